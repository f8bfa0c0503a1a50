"""The pruning hook and the rules that ship with it.

After the first cross-attention block of a prefill a pruner is asked once which visual tokens to
keep. Later cross-attention blocks project keys and values of those only, the cache holds only
those, and decoding reads only those.

A pruner is any callable that fits `Pruner`. It may also have the attributes of `Rule`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import LlamaVisionError

Votes = Literal["all", "after", "last"]


class PruningError(LlamaVisionError):
    """A pruner's setting that is out of range, or an answer that is no keep-mask."""


class Pruner(Protocol):
    """Decides which visual tokens stay."""

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Choose.

        Args:
            saliency: [B, H, V], float32: how much attention the text pays each visual token in the
                first cross-attention block, as probability per query head summed over the text rows
                that vote. Zero in the padding.
            visual: where each token sits, which are padding, and how many each sample may keep.

        Returns:
            [B, V], bool, True for tokens to keep: one at least of every sample that has any.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Options of every rule here, for what the paper leaves open."""

    votes: Votes = "all"
    """Text rows whose attention counts: "all" that see the image, as in the paper's figure; those
    "after" it, so without the `<|image|>` rows themselves; or only the "last" row of the prompt."""
    keep_class_tokens: bool = False
    """Keep the class token of every tile, whatever attention it gets."""
    trim_first_layer: bool = True
    """Trim the first cross-attention block's own cache too, as in the paper's figure. False keeps
    it whole: one layer's share of the cache more, and answers closer to the full model's."""

    def __post_init__(self):
        if self.votes not in ("all", "after", "last"):
            raise PruningError(f"votes is {self.votes!r}; expected 'all', 'after' or 'last'")


@dataclass(frozen=True)
class TrimmedLlama(Rule):
    """Per query head the `k_ratio` most attended tokens; kept is their union over heads.

    Under a visual budget k shrinks until the union fits: the largest k that does.

    Source: Efficient LLaMA-3.2-Vision by Trimming Cross-attended Visual Features,
    arXiv 2504.00557, section 3.
    """

    k_ratio: float

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.k_ratio <= 1:
            raise PruningError(f"k_ratio is {self.k_ratio}; expected more than 0 and at most 1")

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """See `Pruner`."""
        lengths = visual.lengths
        k = torch.tensor([math.ceil(self.k_ratio * length) for length in lengths])
        best = best_ranks(saliency, visual)
        if self.keep_class_tokens:
            best = best.masked_fill(visual.is_class, -1)
        kept = best < k.to(best.device)[:, None]
        if visual.budget is None:
            return kept
        return kept & _within_budget(best, saliency, visual.budget)


def best_ranks(saliency: Tensor, visual: VisualTokens) -> Tensor:
    """A token's place in the order of the head that ranks it highest: [B, H, V] -> [B, V], int64.

    0 is the most attended; of equals the earlier token goes first; padding comes after all tokens.
    The union over heads of each head's top k is `best_ranks(…) < k`.
    """
    saliency = saliency.masked_fill(~visual.valid[:, None], -torch.inf)
    order = saliency.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places).amin(dim=1)


def _within_budget(best: Tensor, saliency: Tensor, budget: Sequence[int]) -> Tensor:
    """The union of the largest k that leaves at most `budget` tokens of each sample: [B, V].

    Where not even k = 1 fits, those most attended by all heads together among it.
    """
    masks = []
    for ranks, heads, most in zip(best, saliency, budget, strict=True):
        if most >= len(ranks):
            masks.append(torch.ones_like(ranks, dtype=torch.bool))
            continue
        # The first token beyond the budget, in order of rank, has the rank that k cannot exceed.
        k = ranks.sort().values[most]
        mask = ranks < k
        if not mask.any():
            mask = _first(heads.sum(0).masked_fill(ranks > 0, -torch.inf), most)
        masks.append(mask)
    return torch.stack(masks)


def _first(scores: Tensor, count: int) -> Tensor:
    """True for the `count` highest of [V]; of equals the earlier."""
    order = scores.argsort(descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, order[:count], True)


Keep = float | int | Sequence[int] | Pruner
"""How many tokens of each sample to keep: a fraction of them, a count, a count for each sample, or
as many as another pruner would keep of the same sample (the only fair comparison)."""


@dataclass(frozen=True)
class BestTokens(Rule, ABC):
    """A rule that scores tokens and keeps the `keep` best of each sample."""

    keep: Keep

    def __post_init__(self):
        super().__post_init__()
        keep = self.keep
        if isinstance(keep, float) and not 0 < keep <= 1:
            raise PruningError(f"keep is {keep}; expected a fraction above 0 and at most 1")
        if isinstance(keep, int) and keep < 1:
            raise PruningError(f"keep is {keep}; expected at least 1 token")
        if callable(keep) and getattr(keep, "votes", "all") != self.votes:
            raise PruningError(
                f"{type(self).__name__} counts the votes of {self.votes!r} rows and "
                f"{type(keep).__name__} of {getattr(keep, 'votes', 'all')!r}; expected the same, "
                "or keep=[…] with the counts of a run"
            )

    @abstractmethod
    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """How good each token is: [B, V]."""

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """See `Pruner`."""
        scores = self.scores(saliency, visual).float()
        if self.keep_class_tokens:
            scores = scores.masked_fill(visual.is_class, torch.inf)
        scores = scores.masked_fill(~visual.valid, -torch.inf)
        counts = self._counts(saliency, visual)
        if visual.budget is not None:
            counts = [min(pair) for pair in zip(counts, visual.budget, strict=True)]
        return torch.stack([_first(row, n) for row, n in zip(scores, counts, strict=True)])

    def _counts(self, saliency: Tensor, visual: VisualTokens) -> list[int]:
        lengths = visual.lengths
        if callable(self.keep):
            counts = self.keep(saliency, visual).sum(-1).tolist()
        elif isinstance(self.keep, float):
            counts = [math.ceil(self.keep * length) for length in lengths]
        elif isinstance(self.keep, int):
            counts = [self.keep] * len(lengths)
        else:
            counts = list(self.keep)
        if len(counts) != len(lengths):
            raise PruningError(f"keep has {len(counts)} counts, expected {len(lengths)} samples")
        return [min(pair) for pair in zip(counts, lengths, strict=True)]


@dataclass(frozen=True)
class TopK(BestTokens):
    """The tokens with the most attention, averaged over heads."""

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Mean over heads."""
        return saliency.mean(dim=1)


@dataclass(frozen=True)
class LastQuery(TopK):
    """The tokens that the prompt's last row attends to most, averaged over heads."""

    votes: Votes = field(default="last", kw_only=True)


@dataclass(frozen=True)
class RandomTokens(BestTokens):
    """Any tokens; every sample draws with the same seed, so that it is as if it were alone."""

    seed: int = 0

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """One draw for each token."""
        rows = [
            torch.rand(length, generator=torch.Generator().manual_seed(self.seed))
            for length in visual.lengths
        ]
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return rows.to(saliency.device)


@dataclass(frozen=True)
class UniformGrid(BestTokens):
    """Patches spread evenly over every tile, class tokens last."""

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


@dataclass(frozen=True)
class KeyNorm(BestTokens):
    """The tokens whose keys are shortest, averaged over key heads.

    Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
    arXiv 2406.11430.
    """

    def scores(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Minus the mean length of the first block's keys."""
        return -visual.keys.float().norm(dim=-1).mean(dim=1)


def check_keep_mask(keep: Tensor, pruner: Pruner, visual: VisualTokens) -> Tensor:
    """A pruner's answer, without padding.

    Raises:
        PruningError: it is no bool tensor [B, V], leaves a sample nothing, or exceeds the budget.
    """
    name = getattr(pruner, "__name__", type(pruner).__name__)
    shape = tuple(visual.image.shape)
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool or tuple(keep.shape) != shape:
        got = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, Tensor) else repr(keep)
        raise PruningError(
            f"pruner {name} returned {got}; expected a torch.bool tensor [B, V] = {list(shape)}"
        )
    keep = keep.to(visual.image.device) & visual.valid
    for sample, (kept, length) in enumerate(
        zip(keep.sum(-1).tolist(), visual.lengths, strict=True)
    ):
        if length and not kept:
            raise PruningError(
                f"pruner {name} kept none of the {length} visual tokens of sample {sample}; "
                "expected one at least"
            )
        if visual.budget is not None and kept > visual.budget[sample]:
            raise PruningError(
                f"pruner {name} kept {kept} visual tokens of sample {sample} and the visual "
                f"budget is {visual.budget[sample]}; raise --visual-budget (visual_budget), or "
                "let the pruner heed visual.budget"
            )
    return keep
