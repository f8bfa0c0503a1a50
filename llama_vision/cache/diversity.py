"""Which visual tokens differ most from each other: greedy max-min selection."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_vision.cache.visual_tokens import VisualTokens


def most_different(visual: VisualTokens, count: int, always: Tensor) -> Tensor:
    """Choose tokens, one at a time, whose nearest chosen one is farthest.

    Nearness is the cosine of the projected features. The first is the one least like the mean of
    all; of equals the earlier goes first.

    Args:
        count: how many.
        always: [V], bool: tokens to choose before all others.

    Returns:
        [V], bool.
    """
    directions = F.normalize(visual.features.float(), dim=-1)  # [V, D]
    likeness = directions @ directions.T  # [V, V]
    nearest = directions @ directions.mean(dim=0)  # [V], to the mean; then to those chosen
    nearest -= 4.0 * always  # cosines differ by 2 at most
    chosen = torch.zeros(len(nearest), dtype=torch.bool, device=nearest.device)
    for step in range(count):
        token = nearest.argmin()
        chosen[token] = True
        if step == 0:
            nearest = likeness[token] - 4.0 * always
        else:
            torch.maximum(nearest, likeness[token] - 4.0 * always, out=nearest)
        nearest[token] = torch.inf
    return chosen
