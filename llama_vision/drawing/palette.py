"""Colours of pictures and pages, and what they mean."""

Colour = tuple[int, int, int]

HEAT: tuple[Colour, ...] = (
    (18, 12, 48),
    (88, 22, 110),
    (178, 42, 100),
    (236, 104, 52),
    (252, 196, 64),
    (255, 250, 205),
)
"""From no attention to the most, evenly spaced; lightness rises all along."""

CLUSTERS: tuple[Colour, ...] = (
    (230, 60, 60),
    (40, 120, 230),
    (30, 160, 80),
    (240, 150, 20),
    (160, 70, 200),
    (20, 170, 180),
)
"""Outlines of clusters, in turn."""

FAINT: Colour = (96, 100, 108)
"""Frames, and words of less weight."""

VEIL: Colour = (128, 134, 144)
"""Lies over what is not kept."""
MERGED, DROPPED = 0.55, 0.84
"""How much of the veil's colour there is over a patch that lives on in another, or does not."""


def heat(share: float) -> Colour:
    """The colour of a share, 0 to 1."""
    place = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    left = min(int(place), len(HEAT) - 2)
    pair = zip(HEAT[left], HEAT[left + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - left)) for a, b in pair)
    return red, green, blue
