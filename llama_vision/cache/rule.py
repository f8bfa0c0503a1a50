"""What rules of pruning have in common: their options, and how many tokens they keep."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llama_vision.cache.merging import join, nearest_kept
from llama_vision.cache.pruning import PRUNER, VOTES, Pruner, PruningError, Votes, ask
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.values import Either, Flag, ListOf, Number, Whole, check_fields

SHARE = Number(0, 1, above=True)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options of every rule here, for what the paper leaves open."""

    votes: Annotated[Votes, VOTES] = "all"
    """Text rows whose attention counts: "all" that see the images, as in the paper's figure; those
    "after" them, so without the `<|image|>` rows themselves; or only the "last" row of the text
    that sees them."""
    keep_class_tokens: Annotated[bool, Flag()] = False
    """Keep the class token of every tile, whatever attention it gets."""
    trim_first_layer: Annotated[bool, Flag()] = True
    """Trim the first cross-attention block's own cache too, as in the paper's figure. False keeps
    it whole: one layer's share of the cache more, and answers closer to the full model's."""

    merge: Annotated[bool, Flag()] = False
    """Merge a token that is not kept into the kept one that is most like it; see `merging`."""

    reads_text: ClassVar[bool] = True
    """Whether the rule reads the text's attention, and so must wait for it."""

    def __post_init__(self):
        check_fields(self, error=PruningError)

    @property
    def needs_text(self) -> bool:
        """Whether it can only be asked after the first cross-attention block."""
        return self.reads_text

    def answer(self, keep: Tensor, visual: VisualTokens) -> Tensor:
        """What a `Pruner` answers: the tokens to keep [V], or who stands for each.

        Raises:
            PruningError: merging is asked for, and features are not finite.
        """
        if not self.merge:
            return keep
        check_finite(visual)
        return nearest_kept(visual, keep.to(visual.features.device))

    def rehearse(self, saliency: Tensor | None, visual: VisualTokens, count: int) -> None:
        """Take the memory that choosing takes, of tensors without values; for plans."""
        ranks = None if saliency is None else best_ranks(saliency)  # noqa: F841, held meanwhile
        if self.merge:
            visual.features.isfinite()
            tokens = torch.arange(len(visual.image), device=visual.image.device)
            join(visual, tokens[:count].clone(), tokens[count:].clone())


Keep = float | int | Sequence[int] | Pruner
"""How many tokens of each group of images to keep: a fraction of them, a count, a count for each
group of the conversation, or as many as another pruner would keep of the same group (the only fair
comparison)."""

KEEP = Either(
    (Whole(1), SHARE, ListOf(Whole(1), least=1), PRUNER),
    words="a fraction above 0 and at most 1.0, a count of 1 or more, a list of counts, or a pruner",
)


@dataclass(frozen=True)
class Counted(Rule, ABC):
    """A rule that keeps so many tokens of each group of images."""

    keep: Annotated[Keep, KEEP]

    def __post_init__(self):
        super().__post_init__()
        keep = self.keep
        if callable(keep) and getattr(keep, "votes", "all") != self.votes:
            raise PruningError(
                f"{type(self).__name__} counts the votes of {self.votes!r} rows and "
                f"{type(keep).__name__} of {getattr(keep, 'votes', 'all')!r}; expected the same, "
                "or keep=[…] with the counts of a run"
            )

    @property
    def needs_text(self) -> bool:
        """Whether the rule, or the one that it counts by, reads the text's attention."""
        return self.reads_text or (callable(self.keep) and getattr(self.keep, "needs_text", True))

    @abstractmethod
    def choose(self, count: int, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """True for `count` tokens: [V]."""

    def __call__(self, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """See `Pruner`."""
        count = min(self._count(saliency, visual), len(visual.image))
        count = count if visual.budget is None else min(count, visual.budget)
        return self.answer(self.choose(count, saliency, visual), visual)

    def _count(self, saliency: Tensor | None, visual: VisualTokens) -> int:
        if callable(self.keep):
            return int(ask(self.keep, saliency, visual).mask.sum())
        if isinstance(self.keep, float):
            return math.ceil(self.keep * len(visual.image))
        if isinstance(self.keep, int):
            return self.keep
        if visual.group >= len(self.keep):
            raise PruningError(
                f"keep has {len(self.keep)} counts and this is group {visual.group + 1} of images; "
                "expected a count for each"
            )
        return self.keep[visual.group]


@dataclass(frozen=True)
class BestTokens(Counted, ABC):
    """A rule that scores tokens and keeps the best of each group of images."""

    @abstractmethod
    def scores(self, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """How good each token is: [V]."""

    def choose(self, count: int, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """The best of them; class tokens before all others where they are to be kept."""
        scores = self.scores(saliency, visual).float()
        if self.keep_class_tokens:
            scores = scores.masked_fill(visual.is_class, torch.inf)
        return highest(scores, count)


def best_ranks(saliency: Tensor) -> Tensor:
    """A token's rank in the order of the head that ranks it highest: [H, V] -> [V], int64.

    0 is the most attended; of equals the earlier token goes first. The union over heads of each
    head's top k is `best_ranks(…) < k`.
    """
    order = saliency.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks).amin(dim=0)


def highest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest of [V]; of equals the earlier."""
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:count], True)


def check_finite(visual: VisualTokens) -> None:
    """Raise PruningError where features are infinite or not a number."""
    if not visual.features.isfinite().all():
        raise PruningError(
            "the visual features are not finite, and so cannot be compared; use another dtype "
            "(--dtype bfloat16, or float32)"
        )
