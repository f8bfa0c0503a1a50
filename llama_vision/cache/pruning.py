"""The pruning hook: what a pruner is shown, and what it may answer. `rules` has those that ship.

Once for each group of images, after the first cross-attention block over it or before the prompt
runs, a pruner is asked which of their visual tokens to keep. Later cross-attention blocks project
keys and values of those only, the cache holds only those, and decoding reads only those.

A pruner is any callable that fits `Pruner`. It may also have the attributes of `rule.Rule`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.errors import LlamaVisionError, name_of, quote
from llama_vision.values import Choice, Flag, Function, check

Votes = Literal["all", "after", "last"]
VOTES = Choice(get_args(Votes))

PRUNER = Function("a function of saliency and visual tokens, such as TrimmedLlama(0.5)")


class PruningError(LlamaVisionError):
    """A pruner's setting that is out of range, or an answer that is no keep-mask."""


class Pruner(Protocol):
    """Decides which visual tokens stay."""

    def __call__(self, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        """Choose.

        Args:
            saliency: [H, V], float32: how much attention the text pays each visual token in the
                first cross-attention block, as probability per query head summed over the text rows
                that vote. None for a pruner that says `needs_text = False`.
            visual: the tokens, where each of them sits, and how many may be kept.

        Returns:
            [V], bool, True for tokens to keep: one at least. Or, of a pruner that says
            `merge = True`, [V], int64: for each token the index of the kept one that stands for it,
            which is its own where it is kept.
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


class Kept(NamedTuple):
    """What a pruner answered."""

    mask: Tensor
    """[V], bool: the tokens that stay."""
    stands: Tensor | None
    """[V], int64: the kept token that stands for each; None where the others are dropped."""


@dataclass(frozen=True)
class Traits:
    """What is to be known of a pruner before it is asked."""

    merge: bool = False
    """Whether it may answer who stands for each token."""
    needs_text: bool = True
    """Whether it reads the text's attention, and so is asked after the first block."""
    trim_first_layer: bool = True
    """See `rule.Rule`."""
    needs_copies: bool = False
    """Whether it is shown copies."""
    rehearse: Callable[..., None] | None = None
    """Takes the memory that the pruner takes, see `rule.Rule`; None where that is not known."""

    @property
    def is_asked_first(self) -> bool:
        """Whether it is asked before the prompt runs."""
        return self.trim_first_layer and not self.needs_text


def traits_of(pruner: Pruner) -> Traits:
    """Those of a pruner, from its attributes.

    Raises:
        PruningError: it is none, or an attribute means nothing here.
    """
    check_options(check("pruner", pruner, PRUNER, error=PruningError))
    names = ("merge", "needs_text", "trim_first_layer")
    given = {name: getattr(pruner, name) for name in names if hasattr(pruner, name)}
    copies = needs_copies(pruner)
    return Traits(**given, needs_copies=copies, rehearse=None if copies else pruner.rehearse)


def check_options(pruner: Pruner) -> None:
    """Raise PruningError where an attribute that a `rule.Rule` has means nothing here."""
    flags = [(name, Flag()) for name in ("trim_first_layer", "merge", "needs_text")]
    for name, kind in (("votes", VOTES), *flags):
        if hasattr(pruner, name):
            of = f"{name} of pruner {name_of(pruner)}"
            check(of, getattr(pruner, name), kind, error=PruningError)
    if getattr(pruner, "merge", False) and not getattr(pruner, "trim_first_layer", True):
        raise PruningError(
            f"pruner {name_of(pruner)} merges and leaves the first layer whole; expected "
            "trim_first_layer=True, or merge=False"
        )


def ask(pruner: Pruner, saliency: Tensor | None, visual: VisualTokens) -> Kept:
    """What a pruner keeps.

    Raises:
        PruningError: it fails, or its answer is no keep-mask and no assignment.
    """
    shown = (saliency, visual)
    if needs_copies(pruner):
        shown = (None if saliency is None else saliency.clone(), visual.copy())
    try:
        return read_answer(pruner(*shown), pruner, visual)
    except LlamaVisionError:
        raise
    except Exception as error:
        raise PruningError(
            f"pruner {name_of(pruner)} raised {type(error).__name__}: {error}"
        ) from error


def read_answer(answer: Tensor, pruner: Pruner, visual: VisualTokens) -> Kept:
    """What a pruner answered, if it is an answer.

    Raises:
        PruningError: it is no bool tensor [V] and no assignment, keeps nothing, or exceeds the
            budget.
    """
    name, tokens = name_of(pruner), len(visual.image)
    merges = traits_of(pruner).merge
    types = (torch.bool, torch.int64) if merges else (torch.bool,)
    is_tensor = isinstance(answer, Tensor) and answer.dtype in types and not answer.is_meta
    if not is_tensor or answer.layout != torch.strided or tuple(answer.shape) != (tokens,):
        what = " or torch.int64" * merges
        raise PruningError(
            f"pruner {name} returned {quote(answer)}; expected a torch.bool{what} tensor [V] = "
            f"[{tokens}]{_hint(answer)}"
        )
    kept = Kept(answer, None) if answer.dtype == torch.bool else _kept_of(answer, name)
    count = int(kept.mask.sum())
    if not count:
        raise PruningError(
            f"pruner {name} kept none of the {tokens} visual tokens; expected one at least"
        )
    if visual.budget is not None and count > visual.budget:
        raise PruningError(
            f"pruner {name} kept {count} visual tokens and the visual budget is {visual.budget}; "
            "raise --visual-budget (visual_budget), or let the pruner heed visual.budget"
        )
    return kept


def _hint(answer: Any) -> str:
    """What a wrong answer was probably meant to be."""
    if isinstance(answer, Tensor) and answer.ndim == 2:
        return ": there is no batch axis any more, saliency is [H, V] of one group of images"
    if isinstance(answer, Tensor) and answer.dtype == torch.int64:
        return "; a pruner that answers who stands for each token has merge = True"
    return ""


def _kept_of(stands: Tensor, name: str) -> Kept:
    """An assignment, if those that it points to stand for themselves."""
    tokens = len(stands)
    outside = stands[(stands < 0) | (stands >= tokens)]
    if len(outside):
        raise PruningError(
            f"pruner {name} assigned a token to {int(outside[0])}; expected an index of 0 to "
            f"{tokens - 1}"
        )
    mask = stands == torch.arange(tokens, device=stands.device)
    astray = (~mask[stands]).nonzero().squeeze(-1)
    if len(astray):
        token = int(astray[0])
        raise PruningError(
            f"pruner {name} assigned token {token} to token {int(stands[token])}, which is not "
            "kept; expected a token that is assigned to itself"
        )
    return Kept(mask, stands)
