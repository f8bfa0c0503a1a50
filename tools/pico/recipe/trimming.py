"""The questions again with fewer visual tokens, by several rules and as many tokens by each.

At a share, a picture is left as many tokens as Trimmed Llama leaves it for a question: all rows
vote, and the visual budget is that share. This is seldom the whole budget, for Trimmed Llama keeps
a union over heads, the largest that fits. The counts of its run are given to all other rules as
`keep=[count]`, so that a rule that reads no text is asked before the prompt runs, as it would be
alone. Only Trimmed Llama by the last row's vote makes a union of its own: its budget is that count,
and it may stay a little under it. The share that a rule kept indeed stands beside its answers.
"""

from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import Any

import torch

from llama_vision import (
    Completion,
    FeatureNorm,
    LlamaVision,
    MaxMin,
    RandomTokens,
    TrimmedLlama,
    UniformGrid,
)
from recipe.answers import complete
from recipe.exam import Item

KEPT = (0.75, 0.5, 0.25, 0.1)
FEW_KEPT = KEPT[1:]

READING = ("text", "line", "describe")
"""Types whose answers repeat what is printed."""


def _counted(rule: type, **options: Any) -> Callable[[int], dict[str, Any]]:
    """Settings that have a rule keep a count."""
    return lambda count: {"pruner": rule([count], **options)}


def _within(**options: Any) -> Callable[[int], dict[str, Any]]:
    """Settings that have Trimmed Llama keep at most a count."""
    return lambda count: {"pruner": TrimmedLlama(1.0, **options), "visual_budget": count}


COUNTING = "Trimmed Llama, all rows vote"
"""The rule whose counts the others get."""

RULES: dict[str, Callable[[int], dict[str, Any]]] = {
    COUNTING: _within(),
    "Trimmed Llama, the last row votes": _within(votes="last"),
    "random": _counted(RandomTokens),
    "uniform grid": _counted(UniformGrid),
    "longest features": _counted(FeatureNorm),
    "max-min": _counted(MaxMin),
    "Trimmed Llama, all rows vote, merged": _within(merge=True),
    "Trimmed Llama, the last row votes, merged": _within(votes="last", merge=True),
    "uniform grid, merged": _counted(UniformGrid, merge=True),
    "max-min, merged": _counted(MaxMin, merge=True),
}
"""The settings of a question by how many tokens its picture is left."""

FEW_RULES = (
    COUNTING,
    "Trimmed Llama, the last row votes",
    "Trimmed Llama, the last row votes, merged",
    "uniform grid, merged",
    "max-min, merged",
)
"""With `FEW_KEPT` what the sets beside the exam are asked with."""


def compare_rules(
    model: LlamaVision,
    items: list[Item],
    full: list[str],
    batch: int,
    *,
    rules: Sequence[str] = tuple(RULES),
    shares: Sequence[float] = KEPT,
) -> Iterator[dict[str, Any]]:
    """One row for each share and rule: exact answers, and what that changes.

    Args:
        full: the answers with all tokens.
        rules: names of `RULES`, `COUNTING` first.
    """
    right = hits_of(items, full)
    for share in shares:
        budget = [{"pruner": TrimmedLlama(1.0), "visual_budget": share}] * len(items)
        counts: list[int] = []
        for name in rules:
            settings = budget if name == COUNTING else [RULES[name](count) for count in counts]
            completions = complete(model, items, items, batch, settings)
            counts = counts or [completion.visual_tokens.kept for completion in completions]
            hits = hits_of(items, [completion.text for completion in completions])
            tokens = mean_share(completions)
            yield {"kept": share, "rule": name, "tokens": tokens, **compare(items, hits, right)}


def hits_of(items: list[Item], answers: list[str]) -> list[bool]:
    """Which answers are exact."""
    return [a == item.question.answer for item, a in zip(items, answers, strict=True)]


def mean_share(completions: list[Completion]) -> float:
    """Mean over pictures of the share of visual tokens that was kept."""
    counts = [completion.visual_tokens for completion in completions]
    return sum(count.kept / count.valid for count in counts) / len(counts)


def compare(items: list[Item], hits: list[bool], right: list[bool]) -> dict[str, Any]:
    """Exact answers of one run beside those of another, types apart.

    Returns:
        "exact", "difference" and "interval" (half its width at 95 %) over all questions; the same
        and "asked" of the "groups" "reading" and "others"; and of the "types" how many were right,
        right in the other run, and asked.
    """
    types = [item.question.type for item in items]
    groups = {
        "reading": [kind in READING for kind in types],
        "others": [kind not in READING for kind in types],
    }
    table: dict[str, list[int]] = {}
    for kind, hit, other in zip(types, hits, right, strict=True):
        row = table.setdefault(kind, [0, 0, 0])
        for column, value in enumerate((hit, other, True)):
            row[column] += value
    return {
        **_difference(hits, right),
        "groups": {
            name: {
                **_difference(_where(inside, hits), _where(inside, right)),
                "asked": sum(inside),
            }
            for name, inside in groups.items()
            if any(inside)
        },
        "types": dict(sorted(table.items())),
    }


def _where(inside: list[bool], values: list[bool]) -> list[bool]:
    return [value for value, it_is in zip(values, inside, strict=True) if it_is]


def _difference(hits: list[bool], others: list[bool]) -> dict[str, float]:
    difference, spread = paired_difference(hits, others)
    return {"exact": sum(hits) / len(hits), "difference": difference, "interval": spread}


def paired_difference(hits: list[bool], others: list[bool]) -> tuple[float, float]:
    """Mean of hit minus other over the same questions, and half its 95 % interval.

    The interval is a normal one, too narrow where next to nothing changed: where nothing did, the
    change of n questions is under 3 / n with 95 % certainty.
    """
    differences = torch.tensor(hits).double() - torch.tensor(others).double()
    if len(hits) < 2:
        return differences.mean().item(), 1.0
    return differences.mean().item(), 1.96 * differences.std().item() / sqrt(len(hits))


def as_table(rows: list[dict[str, Any]]) -> str:
    """The comparison as Markdown: a line for each rule, a column for each share."""
    shares = sorted({row["kept"] for row in rows}, reverse=True)
    cells = {(row["rule"], row["kept"]): row for row in rows}
    lines = ["| rule | " + " | ".join(f"{share:.0%}" for share in shares) + " |"]
    lines += ["|---" * (len(shares) + 1) + "|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        changes = [_points(cells[rule, share]) for share in shares]
        lines.append(f"| {rule} | " + " | ".join(changes) + " |")
    return "\n".join(lines)


def _points(row: dict[str, Any]) -> str:
    """Points won or lost, with half of their interval."""
    return f"{100 * row['difference']:+.1f} ± {100 * row['interval']:.1f}"


def of_group(rows: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """The same rows for one of the groups only."""
    return [{**row, **row["groups"][group]} for row in rows if group in row["groups"]]
