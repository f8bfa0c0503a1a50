"""From logits to the next token."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_vision.errors import SettingError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0 for all."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(
                f"temperature is {self.temperature}; expected 0 (greedy) or a positive number"
            )
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p is {self.top_p}; expected more than 0 and at most 1")
        if self.top_k < 0:
            raise SettingError(f"top_k is {self.top_k}; expected 0 (no limit) or more")

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next token of each sample: [B, vocabulary] -> [B], int64.

        Each sample draws one number from its own generator on the CPU, so that neither its
        neighbours in the batch nor the device change what it draws.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        likeliest, order = (logits / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            likeliest[:, self.top_k :] = -torch.inf
        probabilities = likeliest.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before > self.top_p, 0)
        draws = torch.cat([torch.rand(1, generator=g) for g in generators]).to(logits.device)
        cumulative = probabilities.cumsum(dim=-1)
        places = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        return order.gather(-1, places.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


def sample(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """The next token of each row, drawn in its own way, and its log-probability.

    Args:
        logits: [B, vocabulary], float32.

    Returns:
        Two of [B]: token ids, and natural logs of their probabilities under the model itself
        (temperature 1).
    """
    chosen = logits.argmax(dim=-1)
    alike = defaultdict(list)
    for row, sampling in enumerate(samplings):
        if sampling.temperature:
            alike[sampling].append(row)
    for sampling, rows in alike.items():
        chosen[rows] = sampling.choose(logits[rows], [generators[row] for row in rows])
    return chosen, logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
