"""Where torch knows several ways to the same product, the one that is fastest on this machine.

The architecture would read and answer the same with `PLAIN` in place of `linear`.
"""

import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Way = Callable[[Tensor, Tensor, Tensor | None], Tensor]

PLAIN: Way = F.linear

LARGE = 2**24
"""Multiplications from which on another way's preparations can pay."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias: [..., out].

    In float32 torch calls MKL on a CPU, and keeps oneDNN, which has no gradient, for half precision
    and its compiler. In compiled code a single row is one loop over the weights, with what comes
    before and after: its time is that of reading them, and a product would be a call.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() and rows == 1:
        out = (x.float().unsqueeze(-2) * weight.float()).sum(dim=-1)
        return (out if bias is None else out + bias.float()).to(x.dtype)
    large = rows > 1 and x.dtype == torch.float32 and x.numel() * len(weight) >= LARGE
    if large and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return fastest()(x, weight, bias)
    return F.linear(x, weight, bias)


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product that torch's compiler calls."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@cache
def fastest() -> Way:
    """The faster of both on this processor, timed once in some milliseconds; a small lead is none.

    With Intel's MKL it is oneDNN that is up to twice as fast on AMD's processors.
    """
    if not torch.backends.mkldnn.is_available():
        return PLAIN
    x, weight = torch.ones(64, 1024), torch.ones(1024, 1024)
    return onednn if 1.1 * _seconds(onednn, x, weight) < _seconds(PLAIN, x, weight) else PLAIN


def _seconds(way: Way, x: Tensor, weight: Tensor) -> float:
    """The shortest of some rounds."""
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        way(x, weight, None)
        rounds.append(time.perf_counter() - start)
    return min(rounds)
