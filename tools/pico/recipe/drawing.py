"""A scene becomes pixels, and numbers that say what each patch of them shows."""

import io
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from recipe.scenes import SHAPES, Box, Canvas, Crop, Glyph, Scene, Shape, center, glyphs_of
from recipe.sources import COLORS, photograph

CHARACTERS = "".join(chr(code) for code in range(33, 127))

LABELS = {
    "left_char": len(CHARACTERS) + 1,
    "right_char": len(CHARACTERS) + 1,
    "left_place": 17,
    "right_place": 17,
    "word": 13,
    "line": 7,
    "shape": len(SHAPES) + 1,
    "color": len(COLORS) + 1,
    "anchor": 2,
    "third_x": 3,
    "third_y": 3,
}
"""What a patch is labelled with, and how many classes each label has; 0 = nothing there.

`place` is a character's number in its word (1 = the first), `word` and `line` count from the top of
the picture, `anchor` marks the patch that holds the centre of a shape (so that shapes can be
counted), and the thirds are those of the shape's centre, else of the patch itself.
"""

IGNORED = -100
"""A label without an answer: past the last class."""


def draw(scene: Scene) -> Image.Image:
    """The picture, RGB."""
    image = _paper(scene)
    pen = ImageDraw.Draw(image)
    for box, rgb in scene.plates:
        pen.rectangle(box, rgb)
    for shape in scene.shapes:
        _draw_shape(image, shape)
    for line in scene.lines:
        pen.text(line.origin, line.text, line.rgb, line.face.at(line.size), anchor="ls")
    return _worn(image, scene)


def _worn(image: Image.Image, scene: Scene) -> Image.Image:
    """What files go through before someone shows them."""
    if scene.blur:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur))
    if scene.quality is not None:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=scene.quality)
        image = Image.open(file).convert("RGB")
    if scene.noise:
        rng = np.random.default_rng(scene.noise_seed)
        draws = rng.normal(0, scene.noise, (*scene.size[::-1], 3))
        noisy = np.rint(np.asarray(image) + draws).clip(0, 255)
        image = Image.fromarray(noisy.astype(np.uint8))
    return image


def cut(crop: Crop, size: tuple[int, int]) -> Image.Image:
    """Part of a photograph, at a size, RGB."""
    image = photograph(crop.photograph).resize(size, Image.Resampling.LANCZOS, crop.box)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if crop.mirrored else image


def _paper(scene: Scene) -> Image.Image:
    if scene.photo is not None:
        return cut(scene.photo, scene.size)
    background = scene.background
    if background.rgb == background.end:
        return Image.new("RGB", scene.size, background.rgb)
    ends = np.array([background.rgb, background.end], dtype=np.float32)
    down = np.linspace(0, 1, scene.size[1], dtype=np.float32)[:, None]
    column = np.round(ends[:1] * (1 - down) + ends[1:] * down).astype(np.uint8)[:, None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(column, (*scene.size[::-1], 3))))


def _draw_shape(image: Image.Image, shape: Shape) -> None:
    """Paste the shape through a mask that is drawn three times as large, for smooth edges."""
    left, top, right, bottom = shape.box
    size = max(2, round(right - left)), max(2, round(bottom - top))
    mask = Image.new("L", (3 * size[0], 3 * size[1]))
    pen = ImageDraw.Draw(mask)
    pen.polygon(_corners(shape, mask.size, 0), fill=255)
    if shape.outline:
        pen.polygon(_corners(shape, mask.size, shape.outline), fill=0)
    image.paste(shape.rgb, (round(left), round(top)), mask.resize(size, Image.Resampling.BOX))


def _corners(shape: Shape, size: tuple[int, int], inset: float) -> list[tuple[float, float]]:
    """Corners of a shape turned by its angle and fitted to the size, shrunk by `inset`."""
    points = np.array(outline_of(shape.kind)) * size
    turn = math.radians(shape.angle)
    points = points @ np.array(
        [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
    )
    low, high = points.min(0), points.max(0)
    points = (points - low) / (high - low) * (np.array(size) - 1)
    if inset:
        # Towards the centre of gravity of the corners; pointed shapes need more for an even line.
        scale = 1 - 2 * inset * (
            1.25 if shape.kind in ("star", "triangle", "heart", "cross") else 1
        )
        middle = points.mean(0)
        points = middle + (points - middle) * scale
    return [tuple(point) for point in points.tolist()]


@lru_cache(maxsize=16)
def outline_of(kind: str) -> tuple[tuple[float, float], ...]:
    """Corners of a kind of shape in the unit square, y downwards."""
    turn = [2 * math.pi * i / 40 for i in range(40)]
    if kind == "circle":
        return tuple((0.5 + 0.5 * math.cos(t), 0.5 + 0.5 * math.sin(t)) for t in turn)
    if kind in ("square", "rectangle"):
        return ((0, 0), (1, 0), (1, 1), (0, 1))
    if kind == "triangle":
        return ((0.5, 0), (1, 1), (0, 1))
    if kind == "diamond":
        return ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))
    if kind == "cross":
        a, b = 0.33, 0.67
        return (
            *((a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b)),
            *((b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)),
        )
    if kind == "heart":
        # The usual heart curve: 32 wide and 29 tall.
        return tuple(
            (
                0.5 + math.sin(t) ** 3 / 2,
                (
                    12
                    - (
                        13 * math.cos(t)
                        - 5 * math.cos(2 * t)
                        - 2 * math.cos(3 * t)
                        - math.cos(4 * t)
                    )
                )
                / 29,
            )
            for t in turn
        )
    if kind == "star":
        points = []
        for i in range(10):
            radius = 0.5 if i % 2 == 0 else 0.2
            angle = math.pi * i / 5
            points.append(
                (0.5 + 1.05 * radius * math.sin(angle), 0.525 - 1.05 * radius * math.cos(angle))
            )
        return tuple(points)
    raise ValueError(f"got the shape {kind!r}, expected one of {', '.join(SHAPES)}")


def label_patches(scene: Scene, tile: int, patch: int) -> np.ndarray:
    """What every patch shows: int16 [labels, tiles, patches], in the order of `LABELS`."""
    canvas = scene.canvas
    rows, cols = canvas.grid
    side = tile // patch
    labels = {name: np.zeros((rows * side, cols * side), np.int16) for name in LABELS}
    _label_thirds(labels, canvas, patch)
    for shape in scene.shapes:
        _label_shape(labels, shape, canvas, patch)
    for line in scene.lines:
        _mark(labels, "color", canvas.place(line.box), patch, COLORS.index(line.color) + 1)
    for glyph in glyphs_of(scene):
        _label_glyph(labels, glyph, canvas, patch)
    whole = np.stack(list(labels.values()))  # [labels, rows · side, cols · side]
    tiles = whole.reshape(-1, rows, side, cols, side).transpose(0, 1, 3, 2, 4)
    return tiles.reshape(len(labels), rows * cols, side * side)


def _label_thirds(labels: dict[str, np.ndarray], canvas: Canvas, patch: int) -> None:
    """Thirds of the picture itself, not of the canvas that it may fill in part."""
    rows, cols = labels["third_x"].shape
    across = np.minimum(2, (np.arange(cols) + 0.5) * patch * 3 // canvas.size[0])
    down = np.minimum(2, (np.arange(rows) + 0.5) * patch * 3 // canvas.size[1])
    labels["third_x"][:] = across[None, :]
    labels["third_y"][:] = down[:, None]


def _patches(low: float, high: float, step: float, count: int) -> slice:
    """Cells whose middle lies between low and high; the one in the middle if there is none."""
    first = max(0, math.ceil(low / step - 0.5))
    last = min(count, math.ceil(high / step - 0.5))
    if first >= last:
        first = min(count - 1, max(0, int((low + high) / 2 / step)))
        last = first + 1
    return slice(first, last)


def _cells(field: np.ndarray, box: Box, patch: int) -> tuple[slice, slice]:
    rows, cols = field.shape
    return _patches(box[1], box[3], patch, rows), _patches(box[0], box[2], patch, cols)


def _mark(labels: dict[str, np.ndarray], name: str, box: Box, patch: int, value: int) -> None:
    labels[name][_cells(labels[name], box, patch)] = value


def _label_shape(labels: dict[str, np.ndarray], shape: Shape, canvas: Canvas, patch: int) -> None:
    box = canvas.place(shape.box)
    x, y = center(box)
    _mark(labels, "shape", box, patch, SHAPES.index(shape.kind) + 1)
    _mark(labels, "color", box, patch, COLORS.index(shape.color) + 1)
    _mark(labels, "anchor", (x, y, x, y), patch, 1)
    _mark(labels, "third_x", box, patch, min(2, int(3 * x / canvas.size[0])))
    _mark(labels, "third_y", box, patch, min(2, int(3 * y / canvas.size[1])))


def _label_glyph(labels: dict[str, np.ndarray], glyph: Glyph, canvas: Canvas, patch: int) -> None:
    """Left and right halves of patches, as wide as small characters are."""
    left, top, right, bottom = canvas.place(glyph.box)
    height, width = labels["left_char"].shape
    rows = _patches(top, bottom, patch, height)
    halves = _patches(left, right, patch / 2, 2 * width)
    for half in range(halves.start, halves.stop):
        side, col = ("left", "right")[half % 2], half // 2
        labels[f"{side}_char"][rows, col] = CHARACTERS.index(glyph.char) + 1
        labels[f"{side}_place"][rows, col] = _capped(glyph.place_in_word + 1, "left_place")
        labels["word"][rows, col] = _capped(glyph.word + 1, "word")
        labels["line"][rows, col] = _capped(glyph.line + 1, "line")


def _capped(value: int, name: str) -> int:
    return value if value < LABELS[name] else IGNORED
