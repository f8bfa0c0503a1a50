"""Scenes by chance: pictures to ask about, and full pages to learn to see from.

Sizes are sampled on the model's canvas, so that large pictures show the same things larger.
"""

import math
from random import Random

from recipe.scenes import SHAPES, Background, Box, Canvas, Scene, Shape, TextLine
from recipe.sources import COLORS, RGB, Sources, contrast, sample_rgb


def new_scene(rng: Random, grid: tuple[int, int], tile: int, max_tiles: int = 4) -> Scene:
    """An empty picture of a size that the model puts on a grid of tiles."""
    rows, cols = grid
    while True:
        # A single tile takes pictures up to its own size; the others take large ones as well.
        zoom = rng.uniform(0.7, 1) if rows * cols == 1 else rng.choice((1, 1, rng.uniform(1, 3)))
        zoom = rng.choice((1, zoom))
        across, down = (rng.choice((1, rng.uniform(0.55, 1))) for _ in "xy")
        size = round(cols * tile * zoom * across), round(rows * tile * zoom * down)
        canvas = Canvas.of(size, tile, max_tiles)
        if canvas.grid == grid:
            scene = Scene(size, canvas, sample_background(rng))
            if rng.random() < 0.08:
                scene.blur = rng.uniform(0.2, 0.6) * scene.zoom
            if rng.random() < 0.12:
                scene.quality = rng.randint(50, 95)
            return scene


def sample_background(rng: Random) -> Background:
    """Mostly paper and light tints, else any colour; sometimes fading into another."""
    kind = rng.random()
    if kind < 0.3:
        rgb, name = (255, 255, 255), "white"
    elif kind < 0.55:
        level = rng.uniform(225, 255)
        rgb, name = (
            tuple(round(min(255, max(0, level + rng.uniform(-18, 18)))) for _ in range(3)),
            None,
        )
    else:
        name = rng.choice(COLORS)
        rgb = sample_rgb(rng, name)
    if rng.random() < 0.15:
        end = tuple(min(255, max(0, c + rng.randint(-45, 45))) for c in rgb)
        return Background(rgb, end, None)
    return Background(rgb, rgb, name)


def sample_color(rng: Random, background: Background, least: float) -> tuple[str, RGB] | None:
    """A colour that stands out from the background by `least` at both of its ends."""
    for _ in range(20):
        name = rng.choice(COLORS)
        rgb = sample_rgb(rng, name)
        ends = (background.rgb, background.end)
        if name != background.name and all(contrast(rgb, end) >= least for end in ends):
            return name, rgb
    return None


def sample_text(rng: Random, words: tuple[str, ...], longest: int) -> str:
    """A word, two words, a number or a code of at most `longest` characters."""
    kind = rng.random()
    if kind < 0.52:
        text = _cased(rng, rng.choice(words))
    elif kind < 0.62:
        text = _cased(rng, f"{rng.choice(words)} {rng.choice(words)}")
    elif kind < 0.82:
        text = _number(rng)
    else:
        # One case only and no look-alikes: in many a font O is 0 and l is I to anyone.
        letters = rng.choice(("ABCDEFGHJKLMNPQRSTUVWXYZ", "abcdefghijkmnpqrstuvwxyz"))
        digits = rng.choice(("", "23456789"))
        text = "".join(rng.choice(letters + digits) for _ in range(rng.randint(2, 8)))
    if len(text) <= longest:
        return text
    return text[: max(1, longest)].strip() if " " not in text else text.split(" ")[0][:longest]


def _cased(rng: Random, text: str) -> str:
    return rng.choice((str, str, str, str.title, str.capitalize, str.upper, str.upper))(text)


def _number(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 7)))
    if kind < 0.7:
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if kind < 0.8:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    if kind < 0.88:
        return f"${rng.randint(1, 999)}"
    if kind < 0.94:
        return f"{rng.randint(1, 100)}%"
    return f"{rng.randint(1900, 2099)}-{rng.randint(1, 12):02d}"


def _fits(box: Box, scene: Scene, margin: float) -> bool:
    """Inside the picture, and `margin` away from all that is there."""
    left, top, right, bottom = box
    width, height = scene.size
    if left < 1 or top < 1 or right > width - 1 or bottom > height - 1:
        return False
    return all(
        right + margin < other[0]
        or other[2] + margin < left
        or bottom + margin < other[1]
        or other[3] + margin < top
        for other in scene.boxes
    )


def log_uniform(rng: Random, low: float, high: float) -> float:
    """Between low and high (low, if high is lower), small ones as often as large ones."""
    return low * (max(high, low) / low) ** rng.random()


def add_line(
    rng: Random, scene: Scene, sources: Sources, *, text: str | None = None, size: int | None = None
) -> bool:
    """Put a line of text where it fits; False if no place or colour was found."""
    width, height = scene.size
    face = rng.choice(sources.faces)
    unit = scene.zoom
    for _ in range(6):
        points = size or round(log_uniform(rng, 12 * unit, min(0.42 * height, 60 * unit)))
        font = face.at(max(6, points))
        wanted = text or sample_text(rng, sources.words, max(1, int(width / (0.56 * points))))
        length = font.getlength(wanted)
        tall = -font.getbbox("H", anchor="ls")[1]
        if length > width - 4 or tall > height - 4:
            continue
        color = sample_color(rng, scene.background, 0.42)
        if color is None:
            return False
        for _ in range(8):
            left = rng.uniform(2, width - 2 - length)
            base = rng.uniform(2 + tall, max(2 + tall, height - 2 - 0.25 * points))
            box = (left, base - tall, left + length, base)
            # Each line has a height of its own, so that there is no doubt which one is the first.
            beside = any(box[1] < at.box[3] + 2 and at.box[1] < box[3] + 2 for at in scene.lines)
            if not beside and _fits(box, scene, 0.4 * tall):
                scene.lines.append(
                    TextLine(wanted, *color, face, max(6, points), (left, base), box)
                )
                return True
    return False


def add_shape(
    rng: Random, scene: Scene, *, kind: str | None = None, name: str | None = None, size: float = 0
) -> bool:
    """Put a shape where it fits; False if no place or colour was found."""
    width, height = scene.size
    color = sample_color(rng, scene.background, 0.22)
    if color is None:
        return False
    if name is not None:
        rgb = sample_rgb(rng, name)
        if name == scene.background.name or contrast(rgb, scene.background.rgb) < 0.22:
            return False
        color = (name, rgb)
    kind = kind or rng.choice(SHAPES)
    for _ in range(10):
        least = 13 * scene.zoom
        side = size or log_uniform(rng, least, min(0.55 * min(width, height), 90 * scene.zoom))
        stretch = (
            rng.uniform(1.6, 2.4) if kind == "rectangle" else rng.choice((1, rng.uniform(1, 1.15)))
        )
        w, h = side, side / stretch
        if rng.random() < (0.3 if kind == "rectangle" else 0.5):
            w, h = h, w
        if w > width - 4 or h > height - 4:
            continue
        left, top = rng.uniform(2, width - 2 - w), rng.uniform(2, height - 2 - h)
        box = (left, top, left + w, top + h)
        if _fits(box, scene, 3 * scene.zoom):
            angle = rng.uniform(-12, 12) if rng.random() < 0.3 else 0.0
            outline = (
                rng.uniform(0.09, 0.16) if rng.random() < 0.15 and side > 24 * scene.zoom else 0.0
            )
            scene.shapes.append(Shape(kind, *color, box, angle, outline))
            return True
    return False


def sample_scene(
    rng: Random, sources: Sources, grid: tuple[int, int], tile: int, kind: str | None = None
) -> Scene:
    """A picture to ask about.

    Args:
        kind: "text", "shapes", "count" or "mixed"; one of them by chance if not given.
    """
    scene = new_scene(rng, grid, tile)
    size, zoom = scene.size, scene.zoom
    kind = kind or rng.choices(("text", "shapes", "count", "mixed"), (35, 25, 12, 28))[0]
    room = 1 + (grid[0] * grid[1] > 1)
    if kind == "text":
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            add_line(rng, scene, sources)
    elif kind == "shapes":
        for _ in range(rng.randint(1, 3 + room)):
            add_shape(rng, scene)
    elif kind == "count":
        counted, many = rng.choice(SHAPES), rng.randint(2, 6)
        name = rng.choice((None, rng.choice(COLORS)))
        most = 0.9 * math.sqrt(size[0] * size[1] / (many + 2))
        side = log_uniform(rng, 13 * zoom, min(most, 0.45 * min(size), 60 * zoom))
        for _ in range(many):
            add_shape(rng, scene, kind=counted, name=name, size=side * rng.uniform(0.85, 1.1))
        for _ in range(rng.randint(0, 2)):
            add_shape(rng, scene, size=side)
    else:
        for _ in range(rng.choice((1, 1, 2))):
            add_line(rng, scene, sources)
        for _ in range(rng.randint(1, 2 + room)):
            add_shape(rng, scene)
    if not scene.boxes:
        add_shape(rng, scene)
    return scene


def sample_page(rng: Random, sources: Sources, grid: tuple[int, int], tile: int) -> Scene:
    """A picture as full of text and shapes as it goes, for learning to see rather than to answer.

    One line a picture teaches next to nothing: most patches would be empty.
    """
    scene = new_scene(rng, grid, tile)
    size, zoom = scene.size, scene.zoom
    if rng.random() < 0.35:
        for _ in range(rng.randint(2, 7)):
            add_shape(rng, scene, size=log_uniform(rng, 13 * zoom, 0.32 * min(size)))
    height = size[1]
    y = rng.uniform(1, 4) * zoom
    tallest = min(0.4 * height, rng.choice((16, 20, 26, 40)) * zoom)
    while y < height - 9 * zoom:
        y += _fill_line(rng, scene, sources, y, max(6, round(log_uniform(rng, 11 * zoom, tallest))))
    return scene


def _fill_line(rng: Random, scene: Scene, sources: Sources, y: float, points: int) -> float:
    """Words from left to right at height y; returns the height that was used up."""
    width, height = scene.size
    face = rng.choice(sources.faces)
    font = face.at(points)
    tall = -font.getbbox("H", anchor="ls")[1]
    base = y + tall
    color = sample_color(rng, scene.background, 0.36)
    if base > height - 2 or color is None:
        return max(4, tall)
    left = rng.uniform(1, 10) * scene.zoom
    free = sorted(box for box in scene.boxes if box[1] < base + 2 and box[3] > y - 2)
    for start, end in _gaps(left, width - 1, free):
        text = ""
        for _ in range(12):
            word = sample_text(rng, sources.words, max(1, int((end - start) / (0.6 * points))))
            longer = f"{text} {word}" if text else word
            if start + face.length(longer, points) <= end:
                text = longer
        if text:
            box = (start, base - tall, start + font.getlength(text), base)
            scene.lines.append(TextLine(text, *color, face, points, (start, base), box))
    return tall * rng.uniform(1.35, 1.9)


def _gaps(left: float, right: float, taken: list[Box]) -> list[tuple[float, float]]:
    """What is free between left and right."""
    gaps = []
    for box in taken:
        gaps.append((left, box[0] - 3))
        left = max(left, box[2] + 3)
    return [gap for gap in (*gaps, (left, right)) if gap[1] - gap[0] > 8]
