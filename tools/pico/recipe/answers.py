"""Greedy answers of a model to the questions of an exam."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from llama_vision import Completion, Engine, LlamaVision, Settings
from recipe.drawing import draw
from recipe.exam import Item

MAX_ANSWER = 64


def answer(
    model: LlamaVision, items: list[Item], shown: list[Item] | None, batch: int
) -> list[str]:
    """The texts of `complete`."""
    return [completion.text for completion in complete(model, items, shown, batch)]


def complete(
    model: LlamaVision,
    items: list[Item],
    shown: list[Item] | None,
    batch: int,
    settings: Sequence[dict[str, Any]] | None = None,
) -> list[Completion]:
    """Greedy answers to all questions, in their order.

    Args:
        shown: whose picture each question comes with; None for no picture at all.
        batch: most questions answered together; pictures of as many tiles go together.
        settings: of each question, see `llama_vision.Settings`.
    """
    settings = [{}] * len(items) if settings is None else settings
    greedy = Settings(max_new_tokens=MAX_ANSWER, temperature=0)
    of_each = [greedy.but(**own) for own in settings]
    completions: list[Any] = [None] * len(items)
    for places in _batches(shown or items, batch):
        prompts = []
        for place in places:
            picture = [draw(shown[place].scene)] if shown is not None else []
            content = [*picture, items[place].question.text]
            prompts.append(model.prompt([{"role": "user", "content": content}]))
        longest = max(len(prompt.token_ids) for prompt in prompts) + MAX_ANSWER
        engine = Engine(model, slots=len(places), max_seq_len=longest)
        requests = [
            engine.submit(prompt, of_each[place])
            for place, prompt in zip(places, prompts, strict=True)
        ]
        for place, completion in zip(places, engine.run(*requests), strict=True):
            completions[place] = completion
    return completions


def _batches(shown: list[Item], size: int) -> Iterator[list[int]]:
    """Places of at most `size` pictures with as many tiles."""
    groups = defaultdict(list)
    for place, item in enumerate(shown):
        groups[item.tiles].append(place)
    for places in groups.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]
