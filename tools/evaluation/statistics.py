"""Intervals and tests for scores of the same questions."""

import math
from collections.abc import Sequence

import torch

Z = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""
DRAWS = 2000
"""Of the bootstrap."""


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a proportion.

    Source: E. B. Wilson (1927); it keeps to 0 … 1 and holds for few questions too.
    """
    if not asked:
        return 0.0, 1.0
    p, part = right / asked, Z * Z / asked
    spread = Z * math.sqrt(p * (1 - p) / asked + part / asked / 4)
    low, high = (p + part / 2 + sign * spread for sign in (-1, 1))
    return max(0.0, low / (1 + part)), min(1.0, high / (1 + part))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: percentiles of the means of questions drawn with replacement.

    Draws are the same for the same number of values.
    """
    if not values:
        return 0.0, 1.0
    scores, generator = torch.tensor(values, dtype=torch.float64), torch.Generator().manual_seed(0)
    n = len(scores)
    means = torch.stack(
        [scores[torch.randint(n, (n,), generator=generator)].mean() for _ in range(DRAWS)]
    )
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """The exact test of McNemar: the probability of a split as uneven as this, were both alike.

    Args:
        gained: questions that only the first answers right.
        lost: those that only the second does.

    Source: the two-sided binomial test of the smaller count, with probability 1/2.
    """
    n, tail, ways = gained + lost, 0, 1
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, tail * 2 / 2**n)


def paired(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of scores of the same questions that are 0 or 1, and its 95 % interval.

    The interval is the normal one of the differences.
    """
    differences = [a - b for a, b in zip(scores, others, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1) if n > 1 else 0.0
    spread = Z * math.sqrt(variance / n)
    return mean, max(-1.0, mean - spread), min(1.0, mean + spread)
