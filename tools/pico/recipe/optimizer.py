"""Muon for the hidden matrices, AdamW for everything else, under one learning-rate factor.

Muon replaces each matrix's momentum by the nearest orthogonal matrix, so that all its directions
are learned at one speed; small models learn several times faster with it than with AdamW alone.
torch.optim.Muon orthogonalises in bfloat16, which crawls on CPUs without it; this one uses float32.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NOT_HIDDEN = ("embed", "lm_head", "labels")
"""Matrices that face the vocabulary or the labels, or are tables: AdamW's, by these name parts."""


SEEING = ("vision.", "projector.")
"""What has learned to see before the decoder begins to learn."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of each matrix near 1: [n, rows, cols], float32.

    Source: Keller Jordan, Muon (2024): the quintic Newton-Schulz iteration and its coefficients.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape are treated together.

    Source: Keller Jordan, Muon (2024), with Nesterov momentum and the scale for tall matrices.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, decay: float
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.flatten(1).shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                updates = orthogonalize(updates.float().flatten(2))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"])
                    parameter.sub_(scale * update.view_as(parameter))

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


class Optimizers:
    """Both optimizers as one.

    Args:
        vision_rate: the encoder's and the projector's part of the full learning rates.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        muon_lr: float = 0.02,
        adam_lr: float = 2e-3,
        vision_rate: float = 1.0,
    ):
        # Four kinds: hidden matrices or not, of what sees or of the rest.
        kinds: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in module.named_parameters():
            is_hidden = parameter.ndim >= 2 and not any(part in name for part in NOT_HIDDEN)
            kinds[is_hidden, name.removeprefix("model.").startswith(SEEING)].append(parameter)
        muon, adam = (
            [{"params": kinds[is_hidden, sees]} for sees in (True, False)]
            for is_hidden in (True, False)
        )
        self.muon = Muon(muon, lr=muon_lr, momentum=0.95, decay=0.01)
        self.adam = torch.optim.AdamW(adam, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.lrs = [(lr * vision_rate, lr) for lr in (muon_lr, adam_lr)]
        self.parameters = list(module.parameters())

    def step(self, factor: float) -> None:
        """One step at `factor` times the full learning rates, and forget the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, lrs in zip((self.muon, self.adam), self.lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> dict:
        """For the checkpoint."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """From the checkpoint."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
