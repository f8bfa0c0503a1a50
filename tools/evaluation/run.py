"""The run: every batch of rows under every arm, but for what was answered before."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from evaluation.answering import Answer
from evaluation.arms import Arm
from evaluation.datasets import BadRow, Row
from evaluation.records import Records
from llama_vision.errors import LlamaVisionError
from llama_vision.memory.fit import MemoryLimitError

LINE_EVERY = 30.0
"""Seconds between lines of progress where stderr is no terminal."""


class Answers(Protocol):
    """What is run: an `Answerer`."""

    def prompt(self, row: Row) -> Any: ...
    def warm_up(self, prompt: Any) -> None: ...
    def answer(
        self, rows: Sequence[int], prompts: Sequence[Any], arm: Arm, counts: Sequence[int | None]
    ) -> list[Answer]: ...


class Progress:
    """How far a run is and how long it still takes, on stderr.

    Args:
        steps: batches times arms.
        done: those of them that were answered before.
    """

    def __init__(self, steps: int, done: int):
        self.steps, self.before, self.done = steps, done, done
        self.started = self.told = time.monotonic()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        now, on_terminal = time.monotonic(), sys.stderr.isatty()
        if not (on_terminal or now - self.told >= LINE_EVERY or self.done == self.steps):
            return
        self.told = now
        left = (now - self.started) / (self.done - self.before) * (self.steps - self.done)
        line = f"{self.done} of {self.steps} batches, {clock(left)} left"
        end = "\n" if self.done == self.steps or not on_terminal else ""
        print(f"\r{line:<60}" if on_terminal else line, end=end, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def ask_all(
    answerer: Answers,
    rows: Sequence[Row | BadRow],
    arms: Sequence[Arm],
    records: Records,
    batch: int,
) -> None:
    """Answer all rows under all arms, and note it in `records`.

    Batches are always of the same rows, so that a run that goes on answers as one in one piece.

    Raises:
        LlamaVisionError: a batch does not fit the device though its rows do, or the records cannot
            be written.
    """
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    steps = [(number, arm.name) for number in range(len(batches)) for arm in arms]
    progress = Progress(len(steps), sum(step in records.done for step in steps))
    warm = False
    for number, some in enumerate(batches):
        if all((number, arm.name) in records.done for arm in arms):
            continue
        prompts, bad = prepare(answerer, some)
        if prompts and not warm:
            answerer.warm_up(next(iter(prompts.values())))
            warm = True
        for arm in arms:
            if (number, arm.name) not in records.done:
                answers, failed = _answer(answerer, prompts, arm, _counts(records, number, arm))
                records.add(number, arm.name, [a.to_dict() for a in answers], bad + failed)
                progress.step()
            for row in records.done[number, arm.name]["bad"]:
                prompts.pop(row["row"], None)


def prepare(
    answerer: Answers, rows: Sequence[Row | BadRow]
) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Prompts by the row's number, and the rows that have none."""
    prompts, bad = {}, []
    for row in rows:
        try:
            if isinstance(row, Row):
                prompts[row.number] = answerer.prompt(row)
            else:
                bad.append({"row": row.number, "why": row.why})
        except LlamaVisionError as error:
            bad.append({"row": row.number, "why": str(error)})
    return prompts, bad


def _counts(records: Records, batch: int, arm: Arm) -> dict[int, int]:
    """Visual tokens that the arm is to keep, by row."""
    if arm.counter is None:
        return {}
    answers = records.done[batch, arm.counter.name]["answers"]
    return {answer["row"]: answer["kept"] for answer in answers}


def _answer(
    answerer: Answers, prompts: dict[int, Any], arm: Arm, counts: dict[int, int]
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Answers of a batch together; where that fails, of each row alone, to find the bad ones."""
    answers, bad, no_room = [], [], None
    for some in _whole_then_alone(list(prompts)):
        asked = [prompts[row] for row in some]
        try:
            answers += answerer.answer(some, asked, arm, [counts.get(row) for row in some])
        except LlamaVisionError as error:
            if len(some) == 1:
                bad.append({"row": some[0], "why": f"{arm.name}: {error}"})
            elif isinstance(error, MemoryLimitError):
                no_room = error
            continue
        if len(some) == len(prompts):
            break
    if no_room is not None and not bad:  # each fits, all of them do not: the batch is too large
        raise no_room
    return answers, bad


def _whole_then_alone(rows: list[int]) -> Iterator[list[int]]:
    if rows:
        yield rows
    if len(rows) > 1:
        yield from ([row] for row in rows)
