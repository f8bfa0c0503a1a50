"""The parts that blocks are made of: normalisation, rotary angles, attention, the gated MLP."""

import math
from functools import lru_cache
from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_vision.config import TextConfig

HAS_ONEDNN = torch.backends.mkldnn.is_available()

ONEDNN_PRODUCTS = 2**20
"""Multiplications from which on oneDNN's preparations pay."""

PRODUCTS_PAIRS = 2**18
"""Pairs of a row and a key from which on `attend_by_products` is faster."""

SCORES_BYTES = 3 * 2**20
"""Of the scores that it holds at once."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, computed in float32.

    Source: llama_models/llama3/model.py, RMSNorm: back to x's type *before* the weight.
    """

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in x's type."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], plus bias: [..., out], by the fastest of torch's ways."""
    if better_by_onednn(x, x.numel() * len(weight)):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def better_by_onednn(x: Tensor, multiplications: int) -> bool:
    """In float32 torch calls MKL, which leaves half of an AMD processor unused.

    It keeps oneDNN for half precision and for its compiler, whose operation can be called. That
    has no gradient, and takes microseconds to prepare.
    """
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and multiplications >= ONEDNN_PRODUCTS
        and HAS_ONEDNN
        and not torch.is_grad_enabled()
    )


@torch.library.custom_op("llama_vision::linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`linear`, opaque to the compiler, which calls oneDNN in float32 for constant weights only."""
    return linear(x, weight)


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    """A linear layer, by the fastest of torch's ways where it would not choose that itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not torch.compiler.is_compiling():
            return linear(x, self.weight, self.bias)
        if x.numel() == x.shape[-1]:
            return self._one_row(x)
        # How many rows come is left open; it takes two to get here.
        if self.bias is None and better_by_onednn(x, 2 * self.weight.numel()):
            return opaque_linear(x, self.weight)
        return super().forward(x)

    def _one_row(self, x: Tensor) -> Tensor:
        """The same for [..., 1, in], whose time is that of reading the weights.

        Compiled, this is one loop over them together with what comes before and after; a matrix
        product is no better at it, and is a call.
        """
        out = (x.float().unsqueeze(-2) * self.weight.float()).sum(dim=-1)
        return (out if self.bias is None else out + self.bias.float()).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        # In place: nothing in the decoder is as wide.
        hidden = F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))
        return self.down_proj(hidden)


@lru_cache(maxsize=8)
def rotary_frequencies(config: TextConfig, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair: [d / 2], float32.

    Wavelengths longer than the original context (over `low_freq_factor`) are stretched by `factor`,
    those shorter than it (over `high_freq_factor`) stay, and the ones between are blended.

    Source: llama_models/llama3/model.py, apply_scaling.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return frequencies.to(device)


def rotary_angles(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position's angles: [B, S] -> two of [B, 1, S, d], float32.

    Both halves of a head turn by the same angles; the sine is negative in the first.
    """
    angles = positions[:, None, :, None] * frequencies  # [B, 1, S, d / 2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [B, H, S, d] by their positions' angles, from `rotary_angles`.

    Element i is paired with i + d / 2: the checkpoint's q_proj and k_proj are permuted for that.
    """
    wide = x.float()
    halves_swapped = wide.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, halves_swapped, sin).type_as(x)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads · d] -> [B, heads, S, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, S, d] -> [B, S, heads · d]."""
    return x.transpose(1, 2).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False):
    """Scaled dot-product attention with grouped queries; keys and values are never repeated.

    Args:
        q: [B, H, S, d]; query heads h · H/K … (h + 1) · H/K - 1 share key/value head h.
        k, v: [B, K, L, d].
        mask: [B, 1, S, L], True where a row may look. A row that may look nowhere gives zeros.
        causal: row s looks at keys 0 … s (S = L); no mask then.

    Returns:
        [B, H, S, d].
    """
    batch, heads, rows, width = q.shape
    groups = k.shape[1]
    if causal and rows > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    # Without an order among the rows, the heads of a group are only more rows of the same head.
    q = q.reshape(batch, groups, -1, width)  # [B, K, H/K · S, d]
    if mask is None and better_by_products(q, k):
        return attend_by_products(q, k, v).reshape(batch, heads, rows, width)
    if mask is not None and rows > 1:
        mask = mask.repeat(1, 1, heads // groups, 1)  # [B, 1, H/K · S, L]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(
        batch, heads, rows, width
    )


def better_by_products(q: Tensor, k: Tensor) -> bool:
    """Whether `attend_by_products` is worth its preparations.

    On the meta device, too: a plan counts what it takes, though on CUDA it is never taken.
    """
    pairs = q.shape[2] * k.shape[2]
    return (
        q.device.type in ("cpu", "meta")
        and q.dtype in (torch.float32, torch.bfloat16)
        and pairs >= PRODUCTS_PAIRS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` for many rows and keys on a CPU: plain products, in blocks of rows.

    torch's own kernel multiplies small tiles; two large products are 1.2 to 1.9 times as fast.
    Scores are float32 as they are there.

    Args:
        q: [B, K, R, d]; rows of all heads of a group.
        k, v: [B, K, L, d].

    Returns:
        [B, K, R, d].
    """
    out = torch.empty_like(q)
    groups = product(range(q.shape[0]), range(q.shape[1]))
    # For a plan, which asks only what memory they take, one group stands for all.
    for group in islice(groups, 1) if q.is_meta else groups:
        attend_in_blocks(q[group], k[group], v[group], out[group])
    return out


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Fill out [R, d] with the attention of q [R, d] to k, v [L, d], a block of rows at a time."""
    rows, width = q.shape
    block = max(1, SCORES_BYTES // (4 * len(k)))
    keys = k.float() * width**-0.5
    values = v.mT.contiguous()  # [d, L]
    for start in range(0, rows, block):
        some = slice(start, start + block)
        shares = linear(q[some].float(), keys).softmax(dim=-1).type_as(v)  # [block, L]
        out[some] = linear(shares, values)


def attend_and_weigh(q: Tensor, k: Tensor, v: Tensor, votes: Tensor) -> tuple[Tensor, Tensor]:
    """Attention without a mask, and how much of it each key gets.

    `scaled_dot_product_attention` does not tell its probabilities, and computing them a second time
    would cost a tenth of a cross-attention block; so this computes them once, in blocks of queries
    that fit a CPU core's cache (elsewhere: that are worth a kernel's launch). No [B, H, S, V]
    tensor is ever made.

    Args:
        q: [B, H, S, d].
        k, v: [B, K, V, d].
        votes: [B, S], float32: how much each query counts.

    Returns:
        [B, H, S, d]; and [B, H, V], float32: softmax probabilities times votes, summed over S.
    """
    batch, heads, rows, width = q.shape
    groups, keys = k.shape[1:3]
    q = q.unflatten(1, (groups, -1)).flatten(0, 1)  # [B · K, H/K, S, d]
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # [B · K, V, d]
    votes = votes.repeat_interleave(groups, dim=0)[:, None, None]  # [B · K, 1, 1, S]
    on_cpu = q.device.type == "cpu"
    at_once = 1 if on_cpu else batch * groups
    block_bytes = 2**20 if on_cpu else 24 * 2**20
    block_rows = max(1, block_bytes // (4 * at_once * q.shape[1] * keys))
    # These kernels write an element of a row only once they have read it for the last time.
    in_place = q.device.type in ("cpu", "cuda", "meta") and not torch.is_grad_enabled()
    out = torch.empty_like(q)
    mass = q.new_zeros(*q.shape[:2], keys, dtype=torch.float32)  # [B · K, H/K, V]
    for group in range(0, batch * groups, at_once):
        of = slice(group, group + at_once)
        for start in range(0, rows, block_rows):
            run = slice(start, start + block_rows)
            block = q[of, :, run]  # [groups, H/K, rows, d]
            scores = block.flatten(1, 2) * width**-0.5 @ k[of].mT  # [groups, H/K · rows, V]
            scores = scores.float()
            shares = torch.softmax(scores, dim=-1, out=scores if in_place else None)
            by_head = shares.unflatten(1, block.shape[1:3])  # [groups, H/K, rows, V]
            mass[of] += (votes[of, ..., run] @ by_head).squeeze(2)
            out[of, :, run] = (shares.type_as(v) @ v[of]).unflatten(1, block.shape[1:3])
    return out.reshape(batch, heads, rows, width), mass.reshape(batch, heads, keys)
