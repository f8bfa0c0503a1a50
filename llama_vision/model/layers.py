"""The parts that blocks are made of: normalisation, rotary angles, attention, the gated MLP."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_vision.config import TextConfig
from llama_vision.model import kernels
from llama_vision.model.parallel import total

SCORES_BYTES = 8 * 2**20
"""Of the scores that `attention_with_saliency` holds at once."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, computed in float32.

    Source: llama_models/llama3/model.py, RMSNorm: back to x's type *before* the weight, which
    torch's own rms_norm does not do.
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


class Linear(nn.Linear):
    """A linear layer, by whichever of torch's ways is the fastest here; see `kernels`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return kernels.linear(x, self.weight, self.bias)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)).

    Args:
        hidden: what one device of all has of it.
    """

    def __init__(self, width: int, hidden: int, devices: int = 1):
        super().__init__()
        self.devices = devices
        self.gate_proj = Linear(width, hidden, bias=False)
        self.up_proj = Linear(width, hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        # In place: nothing in the decoder is as wide.
        hidden = F.silu(self.gate_proj(x), inplace=True).mul_(self.up_proj(x))
        return total(self.down_proj(hidden), self.devices)


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


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Scaled dot-product attention with grouped queries; keys and values are never copied.

    Args:
        q: [B, H, S, d]; query heads h · H/K … (h + 1) · H/K - 1 share key/value head h.
        k, v: [B, K, L, d].
        mask: [B, 1, S or 1, L]; bool, True where a row may look: somewhere at least; or what is
            added to the scores, in q's type.
        causal: row s looks at keys 0 … s (S = L); no mask then.

    Returns:
        [B, H, S, d].
    """
    batch, heads, rows, width = q.shape
    shared = k.shape[1]
    if rows == 1 or (not causal and (mask is None or mask.shape[2] == 1)):
        # Where all rows look alike, heads that share keys are only more rows.
        q = q.reshape(batch, shared, -1, width)  # [B, K, H/K · S, d]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.reshape(batch, heads, rows, width)
    q = q.reshape(batch * shared, -1, rows, width)  # [B · K, H/K, S, d]
    k, v = (x.flatten(0, 1)[:, None].expand(-1, heads // shared, -1, -1) for x in (k, v))
    if mask is not None and batch > 1:
        mask = mask.repeat_interleave(shared, dim=0)  # [B · K, 1, S, L]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.reshape(batch, heads, rows, width)


def attention_with_saliency(
    q: Tensor, k: Tensor, v: Tensor, votes: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of one slot, and how much of it each key gets.

    `scaled_dot_product_attention` does not tell its probabilities, and computing them a second time
    would cost a tenth of a cross-attention block; so this computes them once, in blocks of rows. No
    [H, S, V] tensor is ever made.

    Args:
        q: [1, H, S, d].
        k, v: [1, K, V, d].
        votes: [1, S], float32: how much each row counts.
        mask: [1, 1, S, V], as for `attention`.

    Returns:
        [1, H, S, d]; and [H, V], float32: softmax probabilities times votes, summed over rows.
    """
    _, heads, rows, width = q.shape
    shared, tokens = k.shape[1:3]
    q = q.reshape(shared, -1, rows, width) * width**-0.5  # [K, H/K, S, d]
    out = torch.empty_like(q)
    saliency = q.new_zeros(shared, heads // shared, tokens, dtype=torch.float32)
    block = max(1, SCORES_BYTES // (4 * heads * tokens))
    in_place = q.device.type != "mps"  # the others read an element for the last time, then write it
    for start in range(0, rows, block):
        some = slice(start, start + block)
        scores = (q[:, :, some].flatten(1, 2) @ k[0].mT).float()  # [K, H/K · block, V]
        scores = scores.unflatten(1, (heads // shared, -1))  # [K, H/K, block, V]
        if mask is not None:
            scores.masked_fill_(~mask[:, :, some], -torch.inf)
        shares = torch.softmax(scores, dim=-1, out=scores if in_place else None)
        saliency += (votes[:, None, some] @ shares).squeeze(2)
        out[:, :, some] = (shares.type_as(v).flatten(1, 2) @ v[0]).unflatten(1, shares.shape[1:3])
    return out.reshape(1, heads, rows, width), saliency.flatten(0, 1)
