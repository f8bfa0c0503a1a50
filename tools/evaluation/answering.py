"""Rows become prompts, and a loaded checkpoint answers them greedily under one arm."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evaluation.arms import Arm
from evaluation.datasets import Row
from llama_vision import Completion, Engine, LlamaVision, Prompt
from llama_vision.cache.kv import Cache
from llama_vision.errors import SettingError, quote

PARTS = ("question", "hint", "options")
"""What a template may name, in braces."""


@dataclass(frozen=True)
class Answer:
    """What was said to one row."""

    row: int
    text: str
    tokens: int
    """Visual tokens of the picture's real tiles."""
    kept: int
    cache_bytes: int
    """Of the keys and values of those that were kept, and of the counts where they were merged."""
    seconds: float
    """Its part of the time that its batch took, pictures included."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def check_template(template: str | None) -> str | None:
    """The template itself.

    Raises:
        SettingError: it has no place for the question, or names something else.
    """
    if template is None:
        return None
    names = re.findall(r"\{(\w*)\}", template)
    if "question" not in names or not set(names) <= set(PARTS):
        raise SettingError(
            f"the template is {quote(template)}; expected a text with {{question}}, and at most "
            "{hint} and {options} beside it"
        )
    return template


def ask_in_words(row: Row, template: str | None = None) -> str:
    """The text of a row's prompt: hint, question, options and what to answer, as far as they are.

    Args:
        template: with `PARTS` in braces, instead of that.
    """
    options = "\n".join(f"{letter}. {text}" for letter, text in row.options.items())
    parts = {"question": row.question, "hint": row.hint, "options": options}
    if template is not None:
        return re.sub(r"\{(\w*)\}", lambda place: parts[place[1]], template)
    if not options:
        return f"Hint: {row.hint}\n{row.question}" if row.hint else row.question
    lines = [f"Hint: {row.hint}"] * bool(row.hint)
    lines += [f"Question: {row.question}", f"Options:\n{options}"]
    return "\n".join([*lines, "Answer with the letter of the right option."])


class Answerer:
    """A loaded checkpoint and how it is asked.

    Args:
        max_new_tokens: of an answer, at most.
        template: see `ask_in_words`.
    """

    def __init__(self, model: LlamaVision, *, max_new_tokens: int, template: str | None = None):
        self.model, self.max_new_tokens, self.template = model, max_new_tokens, template

    def prompt(self, row: Row) -> Prompt:
        """Pictures first: text before them would not see them.

        Raises:
            LlamaVisionError: a picture cannot be read, or the prompt is too long.
        """
        content = [*row.images, ask_in_words(row, self.template)]
        parts = [{"type": "image", "image": image} for image in content[:-1]]
        prompt = self.model.prompt([{"role": "user", "content": [*parts, content[-1]]}])
        self.model.workload([prompt], max_new_tokens=self.max_new_tokens)
        return prompt

    def warm_up(self, prompt: Prompt) -> None:
        """Answer once, for the first time takes longer."""
        self.model.generate(prompt, max_new_tokens=2, temperature=0)

    def answer(
        self, rows: Sequence[int], prompts: Sequence[Prompt], arm: Arm, counts: Sequence[int | None]
    ) -> list[Answer]:
        """Answer prompts together.

        Args:
            rows: their numbers.
            counts: for each how many visual tokens to keep, see `Arm.settings`.

        Raises:
            LlamaVisionError: they do not fit the device, or one of them cannot be run.
        """
        most, largest = self.max_new_tokens, max(counts) if arm.counter else None
        load = self.model.workload(prompts, max_new_tokens=most, **arm.settings(largest))
        self.model.room.check(load)
        started = time.perf_counter()
        engine = Engine(self.model, workload=load)
        requests = [
            engine.submit(prompt, max_new_tokens=most, temperature=0, **arm.settings(count))
            for prompt, count in zip(prompts, counts, strict=True)
        ]
        completions = engine.run(*requests)
        engine.close()
        seconds = (time.perf_counter() - started) / len(prompts)
        return [
            self._answer(row, completion, arm, seconds)
            for row, completion in zip(rows, completions, strict=True)
        ]

    def _answer(self, row: int, made: Completion, arm: Arm, seconds: float) -> Answer:
        tokens, kept = made.visual_tokens.valid, made.visual_tokens.kept
        cache = Cache.plan(
            self.model.config.text,
            slots=1,
            max_text_tokens=1,
            visual_capacity=kept,
            merged=arm.merge,
            dtype=self.model.model.dtype,
        )
        return Answer(row, made.text, tokens, kept, cache.visual, round(seconds, 6))
