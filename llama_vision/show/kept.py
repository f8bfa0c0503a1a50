"""What is shown, as plain data: pictures, who stands for each of their tokens, and attention."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llama_vision.cache.pruning import Kept, Pruner, Votes, ask
from llama_vision.cache.rule import Counted, Rule
from llama_vision.cache.rules import MaxMin, TrimmedLlama
from llama_vision.drawing.panel import DROPPED, Picture, pictures_of, stands_of
from llama_vision.engine.request import Checkpoint, Completion, Request
from llama_vision.errors import LlamaVisionError, some
from llama_vision.inputs.image import tile_image
from llama_vision.show.attention import Seen, look

SHARES = tuple(tenth / 10 for tenth in range(1, 11))
"""Settings of a rule that the page goes through, beside the one in use."""

ROWS: dict[Votes, str] = {"last": "last row of the prompt", "all": "all rows that see the picture"}
"""Whose attention is shown."""


class ShowError(LlamaVisionError):
    """What cannot be shown, or not in such a file."""


class Stop(NamedTuple):
    """What a rule does at one setting."""

    setting: str
    stands: Tensor
    """[V] of all pictures together, int64: the token that stands for each, or `DROPPED`."""

    @property
    def kept(self) -> Tensor:
        """[V], bool: the tokens that stand for themselves."""
        return self.stands == torch.arange(len(self.stands))


class ShownRule(NamedTuple):
    """A rule, at several settings in order of what they keep."""

    name: str
    stops: list[Stop]
    chosen: int
    """The stop in use, or of another rule the one that keeps as much."""


@dataclass(frozen=True)
class Shown:
    """All that a picture or a page of one answer shows."""

    question: str
    answer: str
    pictures: list[Picture]
    patches_per_side: int
    """Of a tile."""
    blocks: list[int]
    """Numbers of the cross-attention blocks among all blocks of the decoder."""
    attention: dict[Votes, Tensor]
    """For each of `ROWS` [blocks, H, V], float32: shares of a row's attention before pruning."""
    rules: list[ShownRule]
    """The one in use first."""


@torch.inference_mode()
def gather(
    checkpoint: Checkpoint, request: Request, *, question: str, others: Sequence[type[Rule]] = ()
) -> Shown:
    """Run a request's prompt once more to see what its text attends to, and ask its rule again.

    Args:
        checkpoint: a `LlamaVision`.
        request: that has begun its answer, and is the first of its conversation.
        question: to show above the answer.
        others: further rules, to show what they would keep at the same counts; they merge where
            the request's rule merges.

    Raises:
        ShowError: the prompt has no pictures.
    """
    prompt, vision = request.prompt, checkpoint.config.vision
    if not prompt.images:
        raise ShowError("--show-kept shows pictures, and the prompt has none; give an --image")
    images = [
        tile_image(image, tile_size=vision.image_size, max_tiles=request.tiles)
        for image in prompt.images
    ]
    seen = look(checkpoint.model, prompt.token_ids, images, request.settings.prefill_chunk)
    completion, pruner = request.completion(), request.settings.pruner
    in_use = stands_of(completion.kept, completion.stands, [len(one.visual.grids) for one in seen])
    return Shown(
        question,
        completion.text,
        pictures_of(images, vision.tokens_per_tile),
        vision.patches_per_side,
        list(checkpoint.config.text.cross_attention_layers),
        {votes: torch.cat([one.shares(votes) for one in seen], dim=-1) for votes in ROWS},
        [shown_rule(pruner, in_use, seen), *_others(others, pruner, completion, seen)],
    )


def shown_rule(
    pruner: Pruner | None, in_use: Tensor, seen: Sequence[Seen], setting: str | None = None
) -> ShownRule:
    """The rule of a run: what it did, and what it would do at other settings.

    Where nothing was pruned these are of the recommended rule; of a pruner that is none of the
    package's there are no others.

    Args:
        in_use: what it did.
        setting: what to call that; None for the rule's own words.
    """
    rule = MaxMin(1.0, merge=True) if pruner is None else pruner
    name = "Everything kept" if pruner is None else name_of(pruner)
    used = Stop(setting or ("no rule" if pruner is None else _setting(rule)), in_use)
    stops = [used]
    for share in SHARES if isinstance(rule, (TrimmedLlama, Counted)) else ():
        stop = _at(rule, share, seen, "MaxMin, merged, " if pruner is None else "")
        if all(int(stop.kept.sum()) != int(other.kept.sum()) for other in stops):
            stops.append(stop)
    stops.sort(key=lambda stop: int(stop.kept.sum()))
    return ShownRule(name, stops, next(i for i, stop in enumerate(stops) if stop is used))


def name_of(pruner: Pruner) -> str:
    """A rule's name, for people."""
    name = getattr(pruner, "__name__", type(pruner).__name__)
    return name + ", merged" * bool(getattr(pruner, "merge", False))


def _setting(pruner: Pruner) -> str:
    """That of a rule of the package in words; a pruner of another kind has none."""
    if isinstance(pruner, TrimmedLlama):
        return f"k_ratio {pruner.k_ratio:g}"
    if isinstance(pruner, Counted) and isinstance(pruner.keep, (int, float)):
        return f"keep {pruner.keep:g}"
    return "as in the run"


def _at(rule: Rule, share: float, seen: Sequence[Seen], prefix: str) -> Stop:
    """What a rule does at another share."""
    name = "k_ratio" if isinstance(rule, TrimmedLlama) else "keep"
    other = replace(rule, **{name: share})
    return Stop(prefix + _setting(other), _ask_all(other, seen, budgets=[None] * len(seen)))


def _ask_all(rule: Rule, seen: Sequence[Seen], budgets: Sequence[int | None]) -> Tensor:
    """Who stands for each token [V] of all pictures, by a rule that is asked about each group."""
    parts, start = [], 0
    for one, budget in zip(seen, budgets, strict=True):
        saliency = one.saliency[rule.votes][0]
        answer = ask(rule, saliency, replace(one.visual, budget=budget))
        parts.append(_who_stands(answer, start))
        start += len(parts[-1])
    return torch.cat(parts)


def _who_stands(answer: Kept, start: int) -> Tensor:
    mask = answer.mask.cpu()
    if answer.stands is not None:
        return answer.stands.cpu() + start
    return (torch.arange(len(mask)) + start).where(mask, DROPPED)


def _others(
    kinds: Sequence[type[Rule]], pruner: Pruner | None, completion: Completion, seen: Sequence[Seen]
) -> list[ShownRule]:
    """Other rules at the counts of the run, and at other shares."""
    if kinds and pruner is None:
        names = some([kind.__name__ for kind in kinds])
        raise ShowError(
            f"{names} would keep as many tokens as the rule in use, and there is none; give --keep "
            "or --k-ratio too"
        )
    masks, merge = iter(completion.kept), bool(getattr(pruner, "merge", False))
    counts = [sum(int(next(masks).sum()) for _ in one.visual.grids) for one in seen]
    shown = []
    for kind in kinds:
        # The paper's rule cannot be told a count; under a budget it keeps the most that fits.
        trimmed = issubclass(kind, TrimmedLlama)
        rule = kind(1.0 if trimmed else counts, merge=merge)
        in_use = _ask_all(rule, seen, budgets=counts if trimmed else [None] * len(counts))
        shown.append(shown_rule(rule, in_use, seen, "at the same count"))
    return shown
