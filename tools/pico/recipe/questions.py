"""What can be asked about a scene, in several wordings, and the one right answer.

A question is only asked where a careful person would have no doubt: not about a place near the
border of two thirds, not about "the star" where there are two, not about what lies both left of and
above something.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from recipe.scenes import SHAPES, Scene, Shape, TextLine, center, reading_order
from recipe.sources import COLORS

TYPES = (
    "text",
    "line",
    "color",
    "shape",
    "yes_no",
    "count",
    "place",
    "relation",
    "describe",
    "absent",
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@dataclass(frozen=True)
class Question:
    """One question with its answer."""

    type: str
    text: str
    answer: str


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(kind: str) -> str:
    """More than one of a kind of shape."""
    return f"{kind}es" if kind == "cross" else f"{kind}s"


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def name(shape: Shape) -> str:
    """Colour and kind."""
    return f"{shape.color} {shape.kind}"


def reading(scene: Scene) -> str:
    """All the text of a picture, line after line."""
    return " ".join(line.text for line in reading_order(scene.lines))


def place_of(scene: Scene, thing: Shape | TextLine, doubt: float = 0.04) -> str | None:
    """Which ninth of the picture the middle of a thing is in; None near a border between two."""
    words = []
    for at, size, names in zip(
        center(thing.box),
        scene.size,
        (("left", "center", "right"), ("top", "middle", "bottom")),
        strict=True,
    ):
        part = at / size
        if min(abs(part - 1 / 3), abs(part - 2 / 3)) < doubt:
            return None
        words.append(names[min(2, int(3 * part))])
    col, row = words
    return "center" if (row, col) == ("middle", "center") else f"{row} {col}"


def describe(scene: Scene) -> str:
    """Every shape from left to right, then the text."""
    things = [article(name(shape)) for shape in by_place(scene.shapes)]
    if scene.lines:
        things.append(f'the text "{reading(scene)}"')
    if len(things) == 1:
        return sentence(things[0])
    return sentence(f"{', '.join(things[:-1])} and {things[-1]}")


def by_place(shapes: list[Shape]) -> list[Shape]:
    """From left to right."""
    return sorted(shapes, key=lambda shape: center(shape.box)[0])


# --- one function for each type: yields every question of the type that a scene allows ---------


def _text(scene: Scene, rng: Random) -> Iterator[Question]:
    wordings = (
        "What does the text say?",
        "What does the text say?",
        "What is written in the image?",
        "What is written here?",
        "Read the text.",
        "What text is in the picture?",
        "Please read the text in the image.",
        "What does it say?",
        "Transcribe the text.",
    )
    if not scene.lines:
        if rng.random() < 0.25:
            yield Question("absent", rng.choice(wordings), "There is no text.")
        return
    yield Question("text", rng.choice(wordings), reading(scene))
    if len(scene.lines) == 1 and scene.lines[0].text.isdigit():
        wording = rng.choice(
            ("What number is shown?", "What is the number?", "Which number do you see?")
        )
        yield Question("text", wording, scene.lines[0].text)


def _line(scene: Scene, rng: Random) -> Iterator[Question]:
    lines = reading_order(scene.lines)
    if len(lines) < 2:
        return
    for ordinal, line in zip(("first", "second", "third"), lines, strict=False):
        wording = rng.choice(
            ("What does the {} line say?", "Read the {} line.", "What is in the {} line?")
        )
        yield Question("line", wording.format(ordinal), line.text)
    colors = Counter(line.color for line in lines)
    for line in lines:
        if colors[line.color] == 1:
            wording = rng.choice(
                ("What does the {} text say?", "Read the {} text.", "What is written in {}?")
            )
            yield Question("line", wording.format(line.color), line.text)


def _color(scene: Scene, rng: Random) -> Iterator[Question]:
    kinds = Counter(shape.kind for shape in scene.shapes)
    wordings = ("What color is the {}?", "Which color is the {}?", "What is the color of the {}?")
    for shape in scene.shapes:
        if kinds[shape.kind] == 1:
            wording = rng.choice((*wordings, "Tell me the color of the {}."))
            yield Question(
                "color", wording.format(shape.kind), f"The {shape.kind} is {shape.color}."
            )
    if len({line.color for line in scene.lines}) == 1:
        color = scene.lines[0].color
        yield Question("color", rng.choice(wordings).format("text"), f"The text is {color}.")
    if scene.background.name is not None:
        answer = f"The background is {scene.background.name}."
        yield Question("color", rng.choice(wordings).format("background"), answer)
    yield from _absent(kinds, wordings, rng)


def _absent(kinds: Counter, wordings: tuple[str, ...], rng: Random) -> Iterator[Question]:
    """As often as not the same question about a shape that is not there."""
    missing = [kind for kind in SHAPES if kind not in kinds]
    if missing and rng.random() < 0.6:
        kind = rng.choice(missing)
        yield Question("absent", rng.choice(wordings).format(kind), f"There is no {kind}.")


def _shape(scene: Scene, rng: Random) -> Iterator[Question]:
    colors = Counter(shape.color for shape in scene.shapes)
    wordings = (
        "What shape is {}?",
        "Which shape is {}?",
        "What is the {} shape?",
        "What {} shape do you see?",
    )
    for shape in scene.shapes:
        if colors[shape.color] == 1:
            wording = rng.choice(wordings).format(shape.color)
            yield Question("shape", wording, sentence(article(shape.kind)))
    missing = [color for color in COLORS if color not in colors]
    if missing and scene.shapes and rng.random() < 0.4:
        absent = rng.choice(missing)
        yield Question(
            "absent", rng.choice(wordings).format(absent), f"There is no {absent} shape."
        )


def _yes_no(scene: Scene, rng: Random) -> Iterator[Question]:
    wordings = ("Is there {}?", "Do you see {}?", "Is there {} in the image?", "Can you see {}?")
    there = {name(shape) for shape in scene.shapes}
    kinds, colors = {s.kind for s in scene.shapes}, {s.color for s in scene.shapes}
    if rng.random() < 0.15:
        answer = "Yes." if scene.lines else "No."
        yield Question("yes_no", rng.choice(wordings).format("any text"), answer)
        return
    # Wrong guesses share a kind or a colour with what is there, so that both must be looked at.
    wrong_color = f"{rng.choice(COLORS)} {rng.choice(sorted(kinds) or SHAPES)}"
    wrong_kind = f"{rng.choice(sorted(colors) or COLORS)} {rng.choice(SHAPES)}"
    for _ in range(1 + bool(there)):
        if there and rng.random() < 0.5:
            thing = rng.choice(sorted(there))
        else:
            thing = rng.choice((wrong_color, wrong_kind))
        if rng.random() < 0.3:
            thing = rng.choice((thing.split()[1], rng.choice(SHAPES)))
            found = thing in kinds
        else:
            found = thing in there
        wording = rng.choice(wordings).format(article(thing))
        yield Question("yes_no", wording, "Yes." if found else "No.")


def _count(scene: Scene, rng: Random) -> Iterator[Question]:
    kinds = Counter(shape.kind for shape in scene.shapes)
    colors = Counter(shape.color for shape in scene.shapes)
    wordings = (
        "How many {} are there?",
        "How many {} do you see?",
        "Count the {}.",
        "How many {} are in the image?",
    )
    asked = [*kinds, *([rng.choice(SHAPES)] if rng.random() < 0.3 else [])]
    for kind in asked:
        yield Question(
            "count", rng.choice(wordings).format(plural(kind)), _amount(kinds[kind], kind)
        )
    if scene.shapes:
        total = len(scene.shapes)
        yield Question("count", rng.choice(wordings).format("shapes"), _amount(total, "shape"))
        color = rng.choice(sorted(colors))
        wording = rng.choice(wordings).format(f"{color} shapes")
        yield Question("count", wording, _amount(colors[color], f"{color} shape"))


def _amount(number: int, kind: str) -> str:
    if number == 0:
        return f"There are no {plural(kind)}."
    if number == 1:
        return f"There is one {kind}."
    return f"There are {NUMBERS[number]} {plural(kind)}."


def _place(scene: Scene, rng: Random) -> Iterator[Question]:
    wordings = (
        "Where is the {}?",
        "Where is the {} in the image?",
        "In which part of the image is the {}?",
        "Where do you see the {}?",
    )
    kinds = Counter(shape.kind for shape in scene.shapes)
    names = Counter(name(shape) for shape in scene.shapes)
    for shape in scene.shapes:
        calls = [name(shape)] * (names[name(shape)] == 1) + [shape.kind] * (kinds[shape.kind] == 1)
        place = place_of(scene, shape)
        if calls and place:
            yield Question("place", rng.choice(wordings).format(rng.choice(calls)), _in_the(place))
    if len(scene.lines) == 1 and (place := place_of(scene, scene.lines[0])):
        yield Question("place", rng.choice(wordings).format("text"), _in_the(place))
    yield from _absent(kinds, wordings, rng)


def _in_the(place: str) -> str:
    return f"In the {place}."


DIRECTIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}


def _relation(scene: Scene, rng: Random) -> Iterator[Question]:
    things: list[Shape | TextLine] = [*scene.shapes, *scene.lines]
    names = Counter(_call(thing) for thing in things)
    if len(things) < 2 or len(things) > 5:
        return
    for thing in things:
        if names[_call(thing)] > 1:
            continue
        for direction, (dx, dy) in DIRECTIONS.items():
            found = _towards(thing, things, dx, dy)
            if found is None:
                continue
            to = "to the " if direction.endswith("of") and rng.random() < 0.4 else ""
            text = rng.choice(("What is {} the {}?", "What do you see {} the {}?")).format(
                f"{to}{direction}", _call(thing)
            )
            if found:
                yield Question("relation", text, _answer(found[0]))
            elif rng.random() < 0.3:
                yield Question("relation", text, "Nothing.")


def _call(thing: Shape | TextLine) -> str:
    return name(thing) if isinstance(thing, Shape) else "text"


def _answer(thing: Shape | TextLine) -> str:
    if isinstance(thing, Shape):
        return sentence(article(name(thing)))
    return f'The text "{thing.text}".'


def _towards(
    thing: Shape | TextLine, things: list[Shape | TextLine], dx: int, dy: int
) -> list[Shape | TextLine] | None:
    """What lies in a direction, at most one thing; None where there are several or it is unclear.

    Clear is what lies wholly beyond the thing's side and less far across than along.
    """
    found = []
    left, top, right, bottom = thing.box
    x, y = center(thing.box)
    for other in things:
        if other is thing:
            continue
        ox, oy = center(other.box)
        along = (ox - x) * dx + (oy - y) * dy
        across = abs((ox - x) * dy) + abs((oy - y) * dx)
        if along <= 0 or across > 1.35 * along:
            continue
        gaps = {(-1, 0): left - other.box[2], (1, 0): other.box[0] - right}
        gaps |= {(0, -1): top - other.box[3], (0, 1): other.box[1] - bottom}
        if gaps[dx, dy] < 0 or across > 0.75 * along:
            return None
        found.append(other)
    return found if len(found) < 2 else None


def _describe(scene: Scene, rng: Random) -> Iterator[Question]:
    if len(scene.shapes) > 4:
        return
    xs = sorted(center(shape.box)[0] for shape in scene.shapes)
    if any(b - a < 0.05 * scene.size[0] for a, b in pairwise(xs)):
        return  # no clear order from left to right
    wordings = (
        "Describe the image.",
        "Describe the picture.",
        "What is in the image?",
        "What do you see?",
        "What is in this picture?",
    )
    yield Question("describe", rng.choice(wordings), describe(scene))


MAKERS: dict[str, tuple[Callable[[Scene, Random], Iterator[Question]], float]] = {
    "text": (_text, 3.0),
    "line": (_line, 1.3),
    "color": (_color, 1.0),
    "shape": (_shape, 0.8),
    "yes_no": (_yes_no, 1.0),
    "count": (_count, 1.1),
    "place": (_place, 1.5),
    "relation": (_relation, 1.6),
    "describe": (_describe, 1.3),
}
"""How to ask for each type, and how often beside the others."""


def ask(
    scene: Scene, rng: Random, number: int, types: tuple[str, ...] | None = None
) -> list[Question]:
    """Some questions about a scene: `number` of them, or fewer if it allows no more.

    Args:
        types: only these, and their negatives, which are of the type "absent".
    """
    pools = {
        kind: list(make(scene, rng))
        for kind, (make, _) in MAKERS.items()
        if types is None or kind in types
    }
    asked: list[Question] = []
    while len(asked) < number and any(pools.values()):
        kinds = [kind for kind, pool in pools.items() if pool]
        kind = rng.choices(kinds, [MAKERS[kind][1] for kind in kinds])[0]
        asked.append(pools[kind].pop(rng.randrange(len(pools[kind]))))
    return asked


def ask_about_both(first: Scene, second: Scene, rng: Random, number: int) -> list[Question]:
    """Questions about two pictures seen together, without saying which.

    The decoder sees the tokens of both as one set, without an order: a question about one of the
    two must be clear from what is in it.
    """
    both = Scene(
        first.size,
        first.canvas,
        replace(first.background, name=None),
        first.shapes + second.shapes,
        first.lines + second.lines,
    )
    types = ("color", "shape", "yes_no") + ("text",) * (not first.lines or not second.lines)
    return ask(both, rng, number, types)
