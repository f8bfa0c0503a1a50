"""The rules of pruning that ship: Trimmed Llama, max-min diversity, and baselines."""

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from llama_vision.cache.diversity import most_different
from llama_vision.cache.pruning import VOTES, Votes, reads_only
from llama_vision.cache.rule import (
    SHARE,
    BestTokens,
    Counted,
    Rule,
    best_ranks,
    check_finite,
    highest,
)
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.values import Whole


@reads_only
@dataclass(frozen=True)
class TrimmedLlama(Rule):
    """Per query head the `k_ratio` most attended tokens; kept is their union over heads.

    Under a visual budget k shrinks until the union fits: the largest k that does.

    Source: Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features,
    arXiv 2504.00557, section 3.
    """

    k_ratio: Annotated[float, SHARE]

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """See `Pruner`."""
        best = best_ranks(saliency)
        if self.keep_class_tokens:
            best = best.masked_fill(visual.is_class, -1)
        kept = best < math.ceil(self.k_ratio * len(best))
        if visual.budget is not None and visual.budget < len(best):
            kept = kept & _within_budget(best, saliency, visual.budget)
        return self.answer(kept, visual)


def _within_budget(best: Tensor, saliency: Tensor, budget: int) -> Tensor:
    """The union of the largest k that leaves at most `budget` tokens: [V].

    Where not even k = 1 fits, those most attended by all heads together among it.
    """
    # The first token beyond the budget, in order of rank, has the rank that k cannot exceed.
    kept = best < best.sort().values[budget]
    return (
        kept if kept.any() else highest(saliency.sum(0).masked_fill(best > 0, -torch.inf), budget)
    )


@reads_only
@dataclass(frozen=True)
class TopK(BestTokens):
    """The tokens with the most attention, averaged over heads."""

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Mean over heads."""
        return saliency.mean(dim=0)


@reads_only
@dataclass(frozen=True)
class LastQuery(TopK):
    """The tokens that the last row of the text attends to most, averaged over heads."""

    votes: Annotated[Votes, VOTES] = field(default="last", kw_only=True)


@reads_only
@dataclass(frozen=True)
class RandomTokens(BestTokens):
    """Any tokens, drawn anew with the same seed for every group of images."""

    seed: Annotated[int, Whole()] = 0

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """One draw for each token."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(visual.image), generator=generator).to(visual.image.device)


@reads_only
@dataclass(frozen=True)
class UniformGrid(BestTokens):
    """Patches spread evenly over every tile, class tokens last."""

    reads_text: ClassVar[bool] = False

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """The order of an ordered dither (Bayer's matrix): its first n are even in space."""
        bits = visual.patches_per_side.bit_length()
        row, col = visual.patch_row, visual.patch_col
        order = torch.zeros_like(row)
        for bit in range(bits):
            place = 2 * (bits - 1 - bit)
            order += ((row ^ col) >> bit & 1) << place + 1
            order += (row >> bit & 1) << place
        return -order.masked_fill(visual.is_class, 4**bits)


@reads_only
@dataclass(frozen=True)
class KeyNorm(BestTokens):
    """The tokens whose keys are shortest, averaged over key heads.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
    arXiv 2406.11430.
    """

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Minus the mean length of the first block's keys."""
        return -visual.keys.float().norm(dim=-1).mean(dim=0)


@reads_only
@dataclass(frozen=True)
class FeatureNorm(BestTokens):
    """The tokens whose projected features are longest."""

    reads_text: ClassVar[bool] = False

    def scores(self, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """Euclidean length of each feature."""
        check_finite(visual)
        return visual.features.float().norm(dim=-1)

    def rehearse(self, saliency: Tensor | None, visual: VisualTokens, count: int) -> None:
        """See `Rule`."""
        super().rehearse(saliency, visual, count)
        visual.features.float().norm(dim=-1)


@reads_only
@dataclass(frozen=True)
class MaxMin(Counted):
    """Tokens that differ: add, greedily, the one whose nearest chosen token is farthest.

    The distance of two tokens is 1 - the cosine of their projected features.

    Source: DivPrune, arXiv 2503.02175, section 3; how it is made fast, see `diversity`.
    """

    reads_text: ClassVar[bool] = False

    def choose(self, count: int, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """The most different ones."""
        check_finite(visual)
        return most_different(visual, count, always=visual.is_class & self.keep_class_tokens)

    def rehearse(self, saliency: Tensor | None, visual: VisualTokens, count: int) -> None:
        """See `Rule`."""
        super().rehearse(saliency, visual, count)
        visual.features.isfinite()
        most_different(visual, min(count, 2 * len(visual.grids)), visual.is_class)


COUNTED_RULES: dict[str, type[Counted]] = {
    "max-min": MaxMin,
    "feature-norm": FeatureNorm,
    "top-k": TopK,
    "last-query": LastQuery,
    "key-norm": KeyNorm,
    "uniform": UniformGrid,
    "random": RandomTokens,
}
"""Rules that are told how many tokens to keep, by the names that users give."""
