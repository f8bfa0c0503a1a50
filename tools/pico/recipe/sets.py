"""Sets of questions beside the exam, which training does not resemble.

"clutter": two lines of text and five shapes, one of which is asked for. "one tile of four": all
that there is lies in one of the four tiles, and takes 7 to 11 % of the patches. "photographs": text
and shapes on a photograph instead of a plain background, half of the texts on a plate, like a sign.
"noise": pictures of the exam, with noise on every pixel.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np

from recipe.batches import GRIDS_OF_TILES
from recipe.drawing import LABELS, cut, draw, label_patches
from recipe.exam import TILES, Item, make_exam
from recipe.model import PATCH, TILE
from recipe.questions import Question, ask
from recipe.sampling import add_line, add_shape, new_scene, sample_scene
from recipe.scenes import Background, Box, Canvas, Crop, Scene, Shape, TextLine
from recipe.sources import COLORS, PHOTOGRAPHS, Sources, contrast, photograph, sample_rgb

ABOUT_ONE_THING = ("line", "color", "shape", "place")
FOREGROUND = (0.07, 0.11)
NOISE = 10.0
MISTAKABLE = ("circle", "square", "rectangle")


def _clutter(rng: Random, sources: Sources) -> Scene | None:
    tiles = rng.choice((2, 3, 4))
    scene = new_scene(rng, rng.choice(GRIDS_OF_TILES[tiles]), TILE)
    for _ in range(2):
        add_line(rng, scene, sources)
    for _ in range(5):
        add_shape(rng, scene)
    return scene if (len(scene.lines), len(scene.shapes)) == (2, 5) else None


def _one_tile_of_four(rng: Random, sources: Sources) -> Scene | None:
    inner = sample_scene(rng, sources, (1, 1), TILE)
    if inner.canvas.scale != (1, 1) or max(inner.size) > TILE:
        return None
    left, top = (rng.randrange(2) * TILE + rng.randint(0, TILE - length) for length in inner.size)
    size = (2 * TILE, 2 * TILE)
    scene = replace(
        inner,
        size=size,
        canvas=Canvas.of(size, TILE, 4),
        shapes=[_moved(shape, left, top) for shape in inner.shapes],
        lines=[_moved(line, left, top) for line in inner.lines],
    )
    low, high = FOREGROUND
    return scene if low <= foreground(scene) <= high else None


def _moved(thing: Shape | TextLine, right: int, down: int) -> Shape | TextLine:
    """The same thing elsewhere."""
    x, y, end, bottom = thing.box
    moved = replace(thing, box=(x + right, y + down, end + right, bottom + down))
    if isinstance(moved, TextLine):
        return replace(moved, origin=(moved.origin[0] + right, moved.origin[1] + down))
    return moved


def foreground(scene: Scene) -> float:
    """Share of the patches that show part of a shape or of a character."""
    labels = dict(zip(LABELS, label_patches(scene, TILE, PATCH), strict=True))
    return ((labels["shape"] + labels["left_char"] + labels["right_char"]) != 0).mean().item()


def _on_photograph(rng: Random, sources: Sources) -> Scene | None:
    tiles = rng.choices(list(TILES), list(TILES.values()))[0]
    scene = new_scene(rng, rng.choice(GRIDS_OF_TILES[tiles]), TILE)
    scene.photo = sample_crop(rng, scene.size)
    seen = _between(np.asarray(cut(scene.photo, scene.size)))
    plate = _plain(rng) if rng.random() < 0.5 else None
    scene.background = plate or seen
    for _ in range(rng.choice((1, 1, 2))):
        add_line(rng, scene, sources)
    if plate:
        scene.plates = [(_around(line), plate.rgb) for line in scene.lines]
    scene.background = seen
    for _ in range(rng.randint(1, 3)):
        add_shape(rng, scene)
    pixels = np.asarray(draw(replace(scene, lines=[], shapes=[])))
    clear = all(stands_out(line, pixels, 0.3) for line in scene.lines) and all(
        stands_out(shape, pixels, 0.2) for shape in scene.shapes
    )
    told_apart = plate is None or plate.name not in {shape.color for shape in scene.shapes}
    return scene if clear and told_apart and scene.lines and scene.shapes else None


def _plain(rng: Random) -> Background:
    """One colour that has a name."""
    name = rng.choice(COLORS)
    rgb = sample_rgb(rng, name)
    return Background(rgb, rgb, name)


def _around(line: TextLine) -> Box:
    """A plate for a line: as much margin as its letters reach under it."""
    left, top, right, bottom = line.box
    margin = 0.4 * (bottom - top)
    return left - margin, top - margin, right + margin, bottom + margin


def sample_crop(rng: Random, size: tuple[int, int]) -> Crop:
    """A part of a photograph in the proportions of a picture: half of its width, or more."""
    name = rng.choice(sorted(PHOTOGRAPHS))
    whole = photograph(name).size
    scale = rng.uniform(0.5, 1) * min(whole[0] / size[0], whole[1] / size[1])
    width, height = (
        min(int(scale * wanted), most) for wanted, most in zip(size, whole, strict=True)
    )
    left, top = rng.randint(0, whole[0] - width), rng.randint(0, whole[1] - height)
    return Crop(name, (left, top, left + width, top + height), rng.random() < 0.5)


def _between(pixels: np.ndarray) -> Background:
    """The colours that are as dark and as light as a sixth of the pixels, and no name for them."""
    flat = pixels.reshape(-1, 3)
    order = flat.astype(int).sum(1).argsort(kind="stable")
    dark, light = (tuple(flat[order[int(at * len(order))]].tolist()) for at in (1 / 6, 5 / 6))
    return Background(dark, light, None)


def stands_out(thing: Shape | TextLine, pixels: np.ndarray, least: float) -> bool:
    """Whether nine tenths of the pixels that a thing lies on are unlike its colour."""
    left, top, right, bottom = (round(length) for length in thing.box)
    under = np.moveaxis(pixels[top:bottom, left:right].reshape(-1, 3).astype(float), -1, 0)
    return bool((contrast(thing.rgb, under) >= least).mean() >= 0.9)


def _about_things(question: Question) -> bool:
    """Not about what is not there, or about the background."""
    return question.type != "absent" and "background" not in question.text


def _clear_on_photograph(question: Question) -> bool:
    """Nor about a shape that a cup, a lens or a plate might be taken for."""
    words = question.text + question.answer
    return _about_things(question) and not any(kind in words for kind in MISTAKABLE)


MAKERS: dict[str, tuple[Callable, tuple[str, ...] | None, Callable]] = {
    "clutter": (_clutter, ABOUT_ONE_THING, _about_things),
    "one tile of four": (_one_tile_of_four, None, bool),
    "photographs": (_on_photograph, ("text", *ABOUT_ONE_THING), _clear_on_photograph),
}
"""How to make a picture or None, types of questions or None for all, and which to ask."""

SETS = (*MAKERS, "noise")


def make_set(name: str, questions: int = 400, *, minimal: bool = False) -> list[Item]:
    """The first so many questions of a set, two about a picture where it allows two."""
    if name == "noise":
        return _noisy(questions, minimal)
    make, types, is_asked = MAKERS[name]
    sources = Sources.minimal() if minimal else Sources.trained()
    items, number = [], 0
    while len(items) < questions:
        rng = Random(f"{name}/{number}")
        scene = make(rng, sources)
        by_type: dict[str, list[Question]] = defaultdict(list)
        for question in ask(scene, rng, 12, types) if scene is not None else []:
            if is_asked(question):
                by_type[question.type].append(question)
        for kind in rng.sample(sorted(by_type), min(2, len(by_type))):
            items.append(Item(number, name, scene, rng.choice(by_type[kind])))
        number += 1
    return items[:questions]


def _noised(item: Item) -> Scene:
    return replace(item.scene, noise=NOISE, noise_seed=item.picture)


def _noisy(questions: int, minimal: bool) -> list[Item]:
    """From picture 500 of the exam on, those that are not scaled, which would average noise out."""
    items, number = [], 500
    while len(items) < questions:
        for item in make_exam(100, 2, first=number, minimal=minimal):
            if item.scene.canvas.scale == (1, 1):
                items.append(replace(item, part="noise", scene=_noised(item)))
        number += 100
    return items[:questions]
