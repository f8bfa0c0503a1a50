"""From logits to the next token."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from llama_vision.values import Number, Whole, check_fields

TEMPERATURE = Number(0, means="(0 is greedy)")
TOP_P = Number(0, 1, above=True)
TOP_K = Whole(0, means="(0 is no limit)")
MIN_P = Number(0, 1)
REPETITION_PENALTY = Number(0, above=True, means="(1 changes nothing)")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the likeliest."""

    temperature: Annotated[float, TEMPERATURE] = 0.0
    top_p: Annotated[float, TOP_P] = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: Annotated[int, TOP_K] = 0
    """Draw among this many of the likeliest tokens; 0 for all."""
    min_p: Annotated[float, MIN_P] = 0.0
    """Draw among the tokens that have this share of the likeliest one's probability at least."""
    repetition_penalty: Annotated[float, REPETITION_PENALTY] = 1.0
    """What the logits of tokens that were there before are divided by, negative ones multiplied.

    Source: CTRL, arXiv 1909.05858, section 4.1; for negative logits as transformers does.
    """

    def __post_init__(self):
        check_fields(self)

    def choose(self, logits: Tensor, generators: list[torch.Generator]) -> Tensor:
        """The next token of each sample: [B, vocabulary] -> [B], int64.

        Each sample draws one number from its own generator on the CPU, so that neither its
        neighbours in the batch nor the device change what it draws.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # Within what float32 can divide by; at both ends the draws are the limits' own.
        temperature = min(max(self.temperature, 1e-30), 1e30)
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        likeliest, order = scaled.sort(dim=-1, descending=True, stable=True)
        if self.top_k:
            likeliest[:, self.top_k :] = -torch.inf
        probabilities = likeliest.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before > self.top_p, 0)
        if self.min_p:
            least = self.min_p * probabilities[:, :1]
            probabilities = probabilities.masked_fill(probabilities < least, 0)
        draws = torch.cat([torch.rand(1, generator=g) for g in generators]).to(logits.device)
        cumulative = probabilities.cumsum(dim=-1)
        places = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(dim=-1, keepdim=True)
        return order.gather(-1, places.clamp(max=logits.shape[-1] - 1)).squeeze(-1)


class Sampled(NamedTuple):
    """The next token of each row."""

    tokens: Tensor
    """[B], int64."""
    logprobs: Tensor
    """[B], natural logs of their probabilities under the model itself (temperature 1)."""
    finite: Tensor
    """[B], bool: whether the row's logits are; where they are not, the token means nothing."""


def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator],
    adjusted: Tensor | None = None,
) -> Sampled:
    """Draw the next token of each row, in its own way.

    Args:
        logits: [B, vocabulary], float32, of the model.
        adjusted: of the same shape, to draw from in their place.
    """
    draw_from = logits if adjusted is None else adjusted
    chosen = draw_from.argmax(dim=-1)
    alike = defaultdict(list)
    for row, sampling in enumerate(samplings):
        if sampling.temperature:
            alike[sampling].append(row)
    for sampling, rows in alike.items():
        chosen[rows] = sampling.choose(draw_from[rows], [generators[row] for row in rows])
    logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
    return Sampled(chosen, logprobs, logits.isfinite().all(dim=-1))
