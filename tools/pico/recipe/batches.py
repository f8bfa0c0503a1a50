"""Numbered batches of tensors: a batch hangs on its number and a seed, never on who makes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llama_vision.inputs.image import tile_image
from recipe.chat import Chat, Message
from recipe.drawing import IGNORED, draw, label_patches
from recipe.model import MAX_TILES, PATCH, TILE
from recipe.questions import ask, ask_about_both
from recipe.sampling import sample_page, sample_scene
from recipe.scenes import Scene
from recipe.sources import Sources
from recipe.talk import NO_PICTURE, SMALL_TALK, SYSTEM_MESSAGES


@dataclass
class Pictures:
    """Pictures of one number of tiles, and what their patches show."""

    pixels: Tensor
    """[N, t, 3, h, w]."""
    aspect_ids: Tensor
    """[N]."""
    labels: Tensor
    """[labels, N, t, P - 1], int64."""

    @classmethod
    def of(cls, scenes: list[Scene]) -> "Pictures":
        """Draw and label scenes whose pictures take equally many tiles."""
        tiled = [tile_image(draw(scene), tile_size=TILE, max_tiles=MAX_TILES) for scene in scenes]
        labels = [label_patches(scene, TILE, PATCH) for scene in scenes]
        return cls(
            torch.stack([image.pixels for image in tiled]),
            torch.tensor([image.aspect_id for image in tiled]),
            torch.from_numpy(np.stack(labels, axis=1)).long(),
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: torch.device) -> "Pictures":
        """The same on another device."""
        return Pictures(*(t.to(device, non_blocking=True) for t in vars(self).values()))


class Pages(Dataset):
    """Stage A's batches: one tile each, mostly filled with text and shapes, some of them sparse."""

    def __init__(self, sources: Sources, seed: str, size: int):
        self.sources, self.seed, self.size = sources, seed, size

    def __getitem__(self, number: int) -> Pictures:
        """Batch `number`."""
        rng = Random(f"{self.seed}/pages/{number}")
        samplers = [sample_scene if rng.random() < 0.2 else sample_page for _ in range(self.size)]
        return Pictures.of([sample(rng, self.sources, (1, 1), TILE) for sample in samplers])


GRIDS_OF_TILES = {
    1: ((1, 1),),
    2: ((1, 2), (2, 1)),
    3: ((1, 3), (3, 1)),
    4: ((2, 2), (2, 2), (1, 4), (4, 1)),
}

LAYOUTS = {"plain": 74, "system": 8, "dialog": 8, "pair": 6, "turns": 4}
"""What stands around a question, and how often.

"dialog": an earlier question and its answer about the same picture; "pair": two pictures side by
side; "turns": a second picture after an answer about the first.
"""


@dataclass
class Rows:
    """Token ids, padded on the right, and which of them are to be learned."""

    ids: Tensor
    """[R, S]."""
    targets: Tensor
    """[R, S]: the next token where it belongs to an answer, else IGNORED."""

    @classmethod
    def of(cls, chat: Chat, rows: list[tuple[list[Message], str]]) -> "Rows":
        """From messages and the answer to the last of them."""
        encoded = [(chat.prompt(messages), chat.answer(answer)) for messages, answer in rows]
        length = max(len(prompt) + len(answer) for prompt, answer in encoded) - 1
        ids = torch.full((len(rows), length), chat.padding)
        targets = torch.full((len(rows), length), IGNORED)
        for row, (prompt, answer) in enumerate(encoded):
            both = torch.tensor(prompt + answer)
            ids[row, : len(both) - 1] = both[:-1]
            targets[row, len(prompt) - 1 : len(both) - 1] = both[len(prompt) :]
        return cls(ids, targets)


@dataclass
class Quiz:
    """Pictures, questions about them, and a little talk without pictures."""

    pictures: Pictures
    shown: Tensor
    """[R, n]: the pictures of each row of questions."""
    rows: Rows
    talk: Rows
    types: list[str]
    """[R]: the type of each row's question."""

    def __len__(self) -> int:
        return len(self.pictures)

    def to(self, device: torch.device) -> "Quiz":
        """The same on another device."""
        rows, talk = (
            Rows(*(t.to(device, non_blocking=True) for t in vars(r).values()))
            for r in (self.rows, self.talk)
        )
        return Quiz(self.pictures.to(device), self.shown.to(device), rows, talk, self.types)


class Quizzes(Dataset):
    """Batches of stages B and C; the pictures of one batch have the same number of tiles.

    Args:
        tiles: how often each number of tiles comes.
        size: pictures a batch.
        pages: part of the pictures that are full pages, looked at but not asked about.
    """

    def __init__(
        self,
        sources: Sources,
        chat: Chat,
        seed: str,
        *,
        tiles: dict[int, float],
        size: int,
        questions: int,
        pages: float,
    ):
        self.sources, self.chat, self.seed = sources, chat, seed
        self.tiles, self.size, self.questions, self.pages = tiles, size, questions, pages

    def __getitem__(self, number: int) -> Quiz:
        """Batch `number`."""
        rng = Random(f"{self.seed}/quiz/{number}")
        tiles = rng.choices(list(self.tiles), list(self.tiles.values()))[0]
        layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        grids = [rng.choice(GRIDS_OF_TILES[tiles]) for _ in range(self.size)]
        asked = self.size - int(self.pages * self.size)
        scenes = [sample_scene(rng, self.sources, grid, TILE) for grid in grids[:asked]]
        rows, shown, types = [], [], []
        for index, scene in enumerate(scenes):
            other = rng.randrange(asked)
            for kind, *row in _rows(rng, layout, scene, scenes[other], self.questions):
                types.append(kind)
                rows.append(row)
                shown.append(_order(layout, index, other, rng))
        scenes += [sample_page(rng, self.sources, grid, TILE) for grid in grids[asked:]]
        talk = Rows.of(self.chat, [_small_talk(rng, self.sources) for _ in range(4)])
        return Quiz(Pictures.of(scenes), torch.tensor(shown), Rows.of(self.chat, rows), talk, types)


def _order(layout: str, index: int, other: int, rng: Random) -> list[int]:
    """Which pictures a row shows, first to last."""
    if layout == "pair":
        return rng.sample((index, other), 2)
    return [other, index] if layout == "turns" else [index]


def _rows(
    rng: Random, layout: str, scene: Scene, other: Scene, questions: int
) -> list[tuple[str, list[Message], str]]:
    """Questions about a scene: type, the messages with what stands before it, and the answer."""
    if layout == "pair":
        asked = ask_about_both(scene, other, rng, questions)
        return [(q.type, [Message("user", q.text, 2)], q.answer) for q in asked]
    asked = ask(scene, rng, questions)
    if layout == "system":
        system = Message("system", rng.choice(SYSTEM_MESSAGES))
        return [(q.type, [system, Message("user", q.text, 1)], q.answer) for q in asked]
    if layout == "plain":
        return [(q.type, [Message("user", q.text, 1)], q.answer) for q in asked]
    # An earlier exchange, about this picture or about another one that is no longer seen.
    rows, images = [], int(layout == "turns")
    for q in asked:
        before = rng.choice(ask(other if images else scene, rng, 2))
        turns = [Message("user", before.text, 1), Message("assistant", before.answer)]
        rows.append((q.type, [*turns, Message("user", q.text, images)], q.answer))
    return rows


def _small_talk(rng: Random, sources: Sources) -> tuple[list[Message], str]:
    """An exchange without a picture; to questions about one the answer is that there is none."""
    text, answer = rng.choice(SMALL_TALK)
    if rng.random() < 0.5:
        asked = ask(sample_scene(rng, sources, (1, 1), TILE), rng, 1)
        text, answer = (asked[0].text if asked else "What is in the picture?"), NO_PICTURE
    system = [Message("system", rng.choice(SYSTEM_MESSAGES))] if rng.random() < 0.15 else []
    return [*system, Message("user", text)], answer


def stream(batches: Dataset, start: int, step: int, workers: int) -> Iterator:
    """Batches start, start + step, … for ever; made ahead by worker processes if there are any."""
    yield from DataLoader(
        batches,
        batch_size=None,
        sampler=count(start, step),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
    )
