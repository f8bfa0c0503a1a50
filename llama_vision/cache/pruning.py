"""The pruning hook: what a pruner is shown, and what it may answer. `rules` has those that ship.

After the first cross-attention block over a group of images a pruner is asked once which of their
visual tokens to keep. Later cross-attention blocks project keys and values of those only, the cache
holds only those, and decoding reads only those.

A pruner is any callable that fits `Pruner`. It may also have the attributes of `rules.Rule`.
"""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.errors import LlamaVisionError, printable, quote
from llama_vision.values import Choice, Flag, Function, check

Votes = Literal["all", "after", "last"]
VOTES = Choice(get_args(Votes))

PRUNER = Function("a function of saliency and visual tokens, such as TrimmedLlama(0.5)")


class PruningError(LlamaVisionError):
    """A pruner's setting that is out of range, or an answer that is no keep-mask."""


class Pruner(Protocol):
    """Decides which visual tokens stay."""

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        """Choose.

        Args:
            saliency: [H, V], float32: how much attention the text pays each visual token in the
                first cross-attention block, as probability per query head summed over the text rows
                that vote.
            visual: where each token sits, and how many may be kept.

        Returns:
            [V], bool, True for tokens to keep: one at least.
        """
        ...


READ_ONLY: set[type] = set()
"""Pruners that change nothing of what they are shown. All others are shown copies."""


def reads_only(rule: type) -> type:
    """Put a class of pruners into `READ_ONLY`; those that inherit from it are not in it."""
    READ_ONLY.add(rule)
    return rule


def needs_copies(pruner: Pruner) -> bool:
    """Whether a pruner, or the one that it counts by, might change what it is shown."""
    keep = getattr(pruner, "keep", None)
    return type(pruner) not in READ_ONLY or (callable(keep) and needs_copies(keep))


def check_options(pruner: Pruner) -> None:
    """Raise PruningError where an attribute that a `rules.Rule` has means nothing here."""
    for name, kind in (("votes", VOTES), ("trim_first_layer", Flag())):
        if hasattr(pruner, name):
            check(
                f"{name} of pruner {_name(pruner)}", getattr(pruner, name), kind, error=PruningError
            )


def ask(pruner: Pruner, saliency: Tensor, visual: VisualTokens) -> Tensor:
    """A pruner's answer: [V], bool.

    Raises:
        PruningError: it fails, or its answer is no keep-mask.
    """
    shown = (saliency, visual)
    if needs_copies(pruner):
        shown = (saliency.clone(), visual.copy())
    try:
        return check_keep_mask(pruner(*shown), pruner, visual)
    except LlamaVisionError:
        raise
    except Exception as error:
        raise PruningError(
            f"pruner {_name(pruner)} raised {type(error).__name__}: {error}"
        ) from error


def _name(pruner: Pruner) -> str:
    return printable(getattr(pruner, "__name__", type(pruner).__name__))


def check_keep_mask(keep: Tensor, pruner: Pruner, visual: VisualTokens) -> Tensor:
    """A pruner's answer, if it is one.

    Raises:
        PruningError: it is no bool tensor [V], keeps nothing, or exceeds the budget.
    """
    name, tokens = _name(pruner), len(visual.image)
    is_mask = isinstance(keep, Tensor) and keep.dtype == torch.bool and not keep.is_meta
    if not is_mask or keep.layout != torch.strided or tuple(keep.shape) != (tokens,):
        batched = isinstance(keep, Tensor) and keep.ndim == 2
        raise PruningError(
            f"pruner {name} returned {quote(keep)}; expected a torch.bool tensor [V] = [{tokens}]"
            + ": there is no batch axis any more, saliency is [H, V] of one group of images"
            * batched
        )
    kept = int(keep.sum())
    if not kept:
        raise PruningError(
            f"pruner {name} kept none of the {tokens} visual tokens; expected one at least"
        )
    if visual.budget is not None and kept > visual.budget:
        raise PruningError(
            f"pruner {name} kept {kept} visual tokens and the visual budget is {visual.budget}; "
            "raise --visual-budget (visual_budget), or let the pruner heed visual.budget"
        )
    return keep
