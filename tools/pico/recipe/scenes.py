"""What is in a picture: shapes and lines of text, each with its place, as plain data.

A scene is made before it is drawn, so that labels and answers are read off the same data that the
pixels come from. Lengths are picture pixels.
"""

from dataclasses import dataclass, field

from llama_vision.inputs.image import choose_grid, fit_inside
from recipe.sources import RGB, Face

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "rectangle")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Glyph:
    """One printed character: where it is, and what a reader would count to get there."""

    char: str
    box: Box
    place_in_word: int
    word: int
    """Number of its word in the picture, in reading order of the lines."""
    line: int


@dataclass(frozen=True)
class TextLine:
    """One line of text."""

    text: str
    color: str
    rgb: RGB
    face: Face
    size: int
    origin: tuple[float, float]
    """Left end of the baseline."""
    box: Box
    """From the top of capitals to the baseline, and the advance width."""


@dataclass(frozen=True)
class Shape:
    """One coloured shape."""

    kind: str
    color: str
    rgb: RGB
    box: Box
    angle: float
    """Degrees, counter-clockwise."""
    outline: float
    """Width of the line where only the outline is drawn, as a part of the size; 0 = filled."""


@dataclass(frozen=True)
class Background:
    """One colour, or two from top to bottom."""

    rgb: RGB
    end: RGB
    name: str | None
    """What a person would call it; None where that is not clear."""


@dataclass(frozen=True)
class Crop:
    """Part of a photograph, to lie under a scene."""

    photograph: str
    """A name of `sources.PHOTOGRAPHS`."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom, in pixels of the photograph."""
    mirrored: bool


@dataclass(frozen=True)
class Canvas:
    """Where a picture lands on the model's tiles."""

    grid: tuple[int, int]
    scale: tuple[float, float]
    """Canvas pixels per picture pixel, across and down."""
    size: tuple[int, int]
    """What the picture covers of the canvas, in canvas pixels."""

    @classmethod
    def of(cls, size: tuple[int, int], tile: int, max_tiles: int) -> "Canvas":
        """The canvas that the model's own image code would choose."""
        rows, cols = choose_grid(size, tile, max_tiles)
        fitted = fit_inside(size, (cols * tile, rows * tile), tile)
        return cls((rows, cols), (fitted[0] / size[0], fitted[1] / size[1]), fitted)

    def place(self, box: Box) -> Box:
        """A box of the picture on the canvas."""
        across, down = self.scale
        return box[0] * across, box[1] * down, box[2] * across, box[3] * down


@dataclass
class Scene:
    """A whole picture."""

    size: tuple[int, int]
    canvas: Canvas
    background: Background
    shapes: list[Shape] = field(default_factory=list)
    lines: list[TextLine] = field(default_factory=list)
    blur: float = 0.0
    """Radius, in picture pixels."""
    quality: int | None = None
    """Of a JPEG that the picture went through; None: it did not."""
    photo: Crop | None = None
    """What lies there instead of the background's colour."""
    plates: list[tuple[Box, RGB]] = field(default_factory=list)
    """Rectangles to print on, as signs have them; they are no shapes to ask about."""
    noise: float = 0.0
    """Standard deviation of the noise of each pixel's colours, which go from 0 to 255."""
    noise_seed: int = 0

    @property
    def zoom(self) -> float:
        """Picture pixels to one pixel of the canvas."""
        return 1 / self.canvas.scale[0]

    @property
    def boxes(self) -> list[Box]:
        """What is taken."""
        return [thing.box for thing in (*self.shapes, *self.lines)]


def glyphs_of(scene: Scene) -> list[Glyph]:
    """Every printed character but spaces, from the top line to the bottom one."""
    glyphs, word = [], -1
    for number, line in enumerate(reading_order(scene.lines)):
        left, top, right, bottom = line.box
        # Advances stretched to the true width, which kerning makes a little different.
        stretch = (right - left) / (line.face.length(line.text, line.size) or 1)
        place, before = 0, " "
        for char in line.text:
            start, left = left, left + stretch * line.face.length(char, line.size)
            if char != " ":
                place = 0 if before == " " else place + 1
                word += place == 0
                glyphs.append(Glyph(char, (start, top, left, bottom), place, word, number))
            before = char
    return glyphs


def reading_order(things: list) -> list:
    """From top to bottom; what starts at the same height from left to right."""
    return sorted(things, key=lambda thing: (round(thing.box[3]), thing.box[0]))


def center(box: Box) -> tuple[float, float]:
    """Middle of a box."""
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
