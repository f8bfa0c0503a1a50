"""The rule of pruning that a few numbers and a name ask for: those of the command, or of JSON."""

from typing import Any

from llama_vision.cache.pruning import Pruner, PruningError
from llama_vision.cache.rules import COUNTED_RULES, MaxMin, TrimmedLlama
from llama_vision.errors import quote
from llama_vision.values import Flag, check

RULE_OPTIONS = ("keep", "k_ratio", "pruner", "merge")
"""What `choose_rule` takes, by name."""


def choose_rule(
    *,
    keep: Any = None,
    k_ratio: Any = None,
    pruner: str | None = None,
    merge: bool = False,
    seed: int | None = None,
) -> Pruner | None:
    """The rule, or None where none is asked for.

    Args:
        keep: visual tokens to keep, a fraction or a count: of max-min, the others merged into them,
            or of the rule that `pruner` names.
        k_ratio: that of Trimmed Llama.
        pruner: of `COUNTED_RULES`.
        merge: have the rule merge instead of dropping.
        seed: of the rule that draws.

    Raises:
        PruningError: they contradict one another, or one is out of range.
    """
    check("merge", merge, Flag(), error=PruningError)
    if pruner is not None and (not isinstance(pruner, str) or pruner not in COUNTED_RULES):
        names = ", ".join(COUNTED_RULES)
        raise PruningError(f"there is no pruner {quote(pruner)}; expected one of {names}")
    if pruner is not None and keep is None:
        raise PruningError("--pruner NAME needs to know how many tokens; give --keep R|N too")
    if k_ratio is not None and keep is not None:
        raise PruningError("--k-ratio is Trimmed Llama; leave out --k-ratio or --keep")
    if merge and k_ratio is None and pruner is None:
        raise PruningError("--merge is of --k-ratio R or --pruner NAME; --keep alone merges anyway")
    if k_ratio is not None:
        return TrimmedLlama(k_ratio, merge=merge)
    if keep is None:
        return None
    if pruner is None:
        return MaxMin(keep, merge=True)
    draws = {"seed": seed or 0} if pruner == "random" else {}
    return COUNTED_RULES[pruner](keep, merge=merge, **draws)
