"""What both harnesses share: the rule that a model's arguments ask for, and the order of parts."""

from collections.abc import Sequence
from typing import Any

from llama_vision import LlamaVisionError, Pruner, TrimmedLlama
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.values import Choice, check


class PluginError(LlamaVisionError):
    """What a harness asks for and this model cannot do."""


def rule_of(
    k_ratio: float | None = None,
    keep: float | int | None = None,
    pruner: str | None = None,
    merge: bool | None = None,
) -> Pruner | None:
    """The rule of pruning.

    Args:
        k_ratio: Trimmed Llama with this ratio.
        keep: or a share of the visual tokens, or a count.
        pruner: by which of `COUNTED_RULES`; None for max-min.
        merge: merge the tokens that are not kept; None for max-min alone.

    Raises:
        LlamaVisionError: both are asked for, or a value is out of range.
    """
    if k_ratio is not None and (keep is not None or pruner is not None):
        raise PluginError("k_ratio is Trimmed Llama; leave it out, or keep and pruner")
    if k_ratio is not None:
        return TrimmedLlama(k_ratio, merge=False if merge is None else merge)
    if keep is None:
        if pruner is not None or merge:
            raise PluginError("pruner and merge need a keep, such as keep=0.5; give one")
        return None
    names = Choice(tuple(COUNTED_RULES))
    rule = COUNTED_RULES[check("pruner", pruner or "max-min", names, error=PluginError)]
    return rule(keep, merge=pruner is None if merge is None else merge)


def pictures_first(content: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of one turn, pictures before texts, each kind in its order."""
    return sorted(content, key=lambda part: part["type"] != "image")
