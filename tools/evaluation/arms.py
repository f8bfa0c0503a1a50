"""What is compared: rules of pruning, each at several amounts of visual tokens.

All rules keep as many tokens of a picture as Trimmed Llama does at that amount; it is asked first,
and the others are told its count. Those that read no text are therefore asked before the prompt
runs, as they are in use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_vision import Pruner, TrimmedLlama
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.errors import SettingError, quote

TRIMMED = {"trimmed": "all", "trimmed-last": "last"}
"""Trimmed Llama, and which rows of the text vote."""
MERGED = "+merge"
NAMES = (*TRIMMED, *COUNTED_RULES)


@dataclass(frozen=True)
class Arm:
    """One rule at one amount."""

    rule: str | None
    """One of `NAMES`, perhaps with `MERGED` behind it; None for all tokens."""
    share: float | None = None
    """Most of the visual tokens to keep."""
    k_ratio: float | None = None
    """Or the ratio of Trimmed Llama, whose union over heads says how many that are."""

    @property
    def name(self) -> str:
        """As it stands in files."""
        if self.rule is None:
            return "all"
        amount = f"share={self.share:g}" if self.share else f"k_ratio={self.k_ratio:g}"
        return f"{self.rule}@{amount}"

    @property
    def merge(self) -> bool:
        """Whether tokens that are not kept are merged into those that are."""
        return self.rule is not None and self.rule.endswith(MERGED)

    @property
    def counter(self) -> "Arm | None":
        """The arm whose counts this one keeps; None where it has none, or is that one itself."""
        if self.rule in (None, "trimmed"):
            return None
        return Arm("trimmed", self.share, self.k_ratio)

    def settings(self, count: int | None) -> dict[str, Any]:
        """Of a request.

        Args:
            count: the tokens that `counter` kept of the same prompt.
        """
        if self.rule is None:
            return {}
        if self.rule == "trimmed":
            return {"pruner": TrimmedLlama(self.k_ratio or 1.0), "visual_budget": self.share}
        return {"pruner": self._pruner(count), "visual_budget": count}

    def _pruner(self, count: int) -> Pruner:
        """A trimmed one keeps the largest union of heads that fits, the others the count itself."""
        rule = self.rule.removesuffix(MERGED)
        if rule in TRIMMED:
            return TrimmedLlama(1.0, votes=TRIMMED[rule], merge=self.merge)
        return COUNTED_RULES[rule](keep=[count], merge=self.merge)


def make_arms(rules: Sequence[str], *, shares: Sequence[float], k_ratios: Sequence[float]) -> list:
    """All tokens, then for each amount Trimmed Llama and the other rules.

    Raises:
        SettingError: there is no such rule.
    """
    for rule in rules:
        if rule.removesuffix(MERGED) not in NAMES:
            raise SettingError(
                f"there is no rule {quote(rule)}; expected one of {', '.join(NAMES)}, each also "
                f"with {MERGED}"
            )
    names = dict.fromkeys(("trimmed", *rules))
    amounts = [{"share": share} for share in dict.fromkeys(shares)]
    amounts += [{"k_ratio": k} for k in dict.fromkeys(k_ratios)]
    return [Arm(None), *(Arm(rule, **amount) for amount in amounts for rule in names)]
