"""The exam: a fixed set of pictures and questions that training never sees.

Its seeds are its own. Of every ten pictures six are made as in training, two are set in font
families and two in words that training never shows; so the first pictures are a fair sample of all.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from random import Random

from recipe.batches import GRIDS_OF_TILES
from recipe.model import TILE
from recipe.questions import Question, ask
from recipe.sampling import sample_scene
from recipe.scenes import Scene
from recipe.sources import Sources

PARTS = ("trained",) * 6 + ("unseen fonts",) * 2 + ("unseen words",) * 2
TILES = {1: 0.4, 2: 0.2, 3: 0.15, 4: 0.25}


@dataclass(frozen=True)
class Item:
    """One question of the exam."""

    picture: int
    part: str
    scene: Scene
    question: Question

    @property
    def tiles(self) -> int:
        """Tiles of the picture."""
        rows, cols = self.scene.canvas.grid
        return rows * cols


def make_exam(
    pictures: int = 1000, questions: int = 3, *, first: int = 0, minimal: bool = False
) -> list[Item]:
    """So many pictures from number `first` on, with up to `questions` questions each.

    The questions about a picture are of different types. Which pictures there are besides changes
    nothing; how many questions are asked of each does.
    """
    sources = {"trained": Sources.trained, "unseen fonts": Sources.with_unseen_fonts}
    sources["unseen words"] = Sources.with_unseen_words
    made = {part: Sources.minimal() if minimal else make() for part, make in sources.items()}
    items = []
    for number in range(first, first + pictures):
        rng = Random(f"exam/{number}")
        part = PARTS[number % len(PARTS)]
        tiles = rng.choices(list(TILES), list(TILES.values()))[0]
        scene = sample_scene(rng, made[part], rng.choice(GRIDS_OF_TILES[tiles]), TILE)
        by_type: dict[str, list[Question]] = defaultdict(list)
        for question in ask(scene, rng, 12):
            by_type[question.type].append(question)
        for kind in rng.sample(sorted(by_type), min(questions, len(by_type))):
            items.append(Item(number, part, scene, rng.choice(by_type[kind])))
    return items


@lru_cache(maxsize=2)
def blind_answers(
    minimal: bool = False, scenes: int = 6000
) -> tuple[dict[str, str], dict[str, str]]:
    """The most frequent answers of the training data, by the question's words and by its type."""
    sources = Sources.minimal() if minimal else Sources.trained()
    scenes = scenes // 10 if minimal else scenes
    rng = Random("blind")
    by_text: dict[str, Counter] = defaultdict(Counter)
    by_type: dict[str, Counter] = defaultdict(Counter)
    for _ in range(scenes):
        for question in ask(sample_scene(rng, sources, (1, 1), TILE), rng, 6):
            by_text[question.text][question.answer] += 1
            by_type[question.type][question.answer] += 1
    return tuple(
        {k: c.most_common(1)[0][0] for k, c in table.items()} for table in (by_text, by_type)
    )


def guess(question: Question, minimal: bool = False) -> str:
    """What someone who knows the training data but sees no picture would answer."""
    by_text, by_type = blind_answers(minimal)
    return by_text.get(question.text) or by_type.get(question.type, "Yes.")


def wilson(right: int, asked: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion.

    Source: E. B. Wilson (1927); it keeps to 0 … 1 and holds for few questions too.
    """
    if asked == 0:
        return 0.0, 1.0
    p = right / asked
    middle = p + z * z / (2 * asked)
    spread = z * sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return (middle - spread) / (1 + z * z / asked), (middle + spread) / (1 + z * z / asked)


def tally(items: list[Item], answers: list[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions: overall, by type, by part, by tiles, and of short texts."""
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for item, answer in zip(items, answers, strict=True):
        question = item.question
        groups = ["overall", f"type: {question.type}", f"part: {item.part}", f"tiles: {item.tiles}"]
        if question.type in ("text", "line") and len(question.answer) <= 6:
            groups += ["text up to 6 characters", f"text up to 6 characters, {item.part}"]
        for group in groups:
            table[group][0] += answer == question.answer
            table[group][1] += 1
    return {group: (right, asked) for group, (right, asked) in sorted(table.items())}
