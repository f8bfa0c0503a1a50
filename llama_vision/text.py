"""The text decoder: self-attention blocks with cross-attention blocks between them.

An image touches the text in the cross-attention blocks alone, and there only through the keys and
values of its visual tokens. A text row that sees no image passes such a block unchanged.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import count

import torch
from torch import Tensor, nn

from llama_vision.cache import Cache
from llama_vision.config import EXTRA_EMBEDDINGS, TextConfig
from llama_vision.layers import (
    GatedMLP,
    RMSNorm,
    attend,
    merge_heads,
    rotary_angles,
    rotate,
    split_heads,
)
from llama_vision.visual import Sight, Visibility, VisualTokens, find_stretches


class TextDecoder(nn.Module):
    """Token ids and visual tokens in, hidden states and logits out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, width)
        self.layers = nn.ModuleList(_blocks(config))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(
        self, token_ids: Tensor, visual: VisualTokens | None, cache: Cache | None
    ) -> Tensor:
        """Run the blocks over the next S rows of each sample.

        Args:
            token_ids: [B, S].
            visual: tokens of the images whose ids are in `token_ids`; None if there are none.
            cache: holds what came before and receives these rows; without one they are the first.

        Returns:
            [B, S, D], before the final norm.
        """
        text = TextPass(self.config, token_ids, cache)
        sight = VisualPass(self.config, token_ids, visual, cache)
        h = self.embed_tokens(token_ids)
        for block in self.layers:
            if isinstance(block, SelfAttentionBlock):
                h = block(h, text)
            elif not sight.blind:
                h = block(h, sight)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] of the rows asked for -> [..., vocabulary], float32."""
        return self.lm_head(self.norm(h)).float()


def _blocks(config: TextConfig) -> Iterator[nn.Module]:
    """All blocks in order; each kind counts its own, for its own store of the cache."""
    self_layers, cross_layers = count(), count()
    for index in range(config.num_hidden_layers):
        if index in config.cross_attention_layers:
            yield CrossAttentionBlock(config, next(cross_layers))
        else:
            yield SelfAttentionBlock(config, next(self_layers))


class TextPass:
    """What the self-attention blocks of one pass share: positions, angles, the causal mask."""

    def __init__(self, config: TextConfig, token_ids: Tensor, cache: Cache | None):
        rows = token_ids.shape[1]
        self.store = cache.text if cache is not None else None
        lengths = self.store.lengths if self.store is not None else [0]
        if self.store is not None:
            self.positions = self.store.positions(rows)  # [B, S]
        else:
            self.positions = torch.arange(rows, device=token_ids.device)[None]  # [1, S]
        self.cos, self.sin = rotary_angles(config, self.positions)
        self.causal = max(lengths) == 0
        self.keys_held = max(lengths) + rows
        self.mask = None
        if not self.causal and (rows > 1 or min(lengths) != max(lengths)):
            keys = torch.arange(self.keys_held, device=token_ids.device)
            self.mask = keys <= self.positions[:, None, :, None]  # [B, 1, S, L]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember this pass's keys and values [B, K, S, d]; all that its rows may read."""
        if self.store is None:
            return keys, values
        self.store.write(layer, self.positions, keys, values)
        return self.store.read(layer, self.keys_held)


class SelfAttentionBlock(nn.Module):
    """A Llama block: pre-norm causal attention, pre-norm gated MLP."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_size)

    def forward(self, x: Tensor, text: TextPass) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), text)
        return x + self.mlp(self.post_attention_layernorm(x))


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, text: TextPass) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        q = rotate(split_heads(self.q_proj(x), self.heads), text.cos, text.sin)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), text.cos, text.sin)
        v = split_heads(self.v_proj(x), self.kv_heads)
        k, v = text.extend(self.layer, k, v)
        return self.o_proj(merge_heads(attend(q, k, v, mask=text.mask, causal=text.causal)))


class VisualPass:
    """What the cross-attention blocks of one pass can look at.

    Rows before the first new image of the pass read what the cache remembers of earlier passes,
    the others read the new images; a pass begins a new group of images.
    """

    def __init__(
        self,
        config: TextConfig,
        token_ids: Tensor,
        visual: VisualTokens | None,
        cache: Cache | None,
    ):
        batch, self.rows = token_ids.shape
        self.device = token_ids.device
        self.visual = visual
        self.store = cache.visual if cache is not None else None
        self.remembered = self.store.lengths if self.store is not None else [0] * batch
        self.blind = visual is None and not any(self.remembered)
        self.stretches = [[] for _ in range(batch)]
        if visual is not None:
            ids = token_ids.tolist()
            self.stretches = [find_stretches(row, config.image_token_id) for row in ids]

    @cached_property
    def visibility(self) -> Visibility:
        """Which row reads which of the tokens that `keys_values` gives."""
        old = max(self.remembered)
        sights = []
        for sample, stretches in enumerate(self.stretches):
            first_new = stretches[0].rows.start if stretches else self.rows
            sights.append([])
            if first_new > 0 and self.remembered[sample]:
                sights[-1].append(Sight(slice(0, first_new), slice(0, self.remembered[sample])))
            if self.visual is not None:
                sights[-1].extend(s.shifted(old) for s in self.visual.sights(sample, stretches))
        new = max(self.visual.lengths) if self.visual is not None else 0
        return Visibility(sights, (len(sights), self.rows, old + new), self.device)

    def keys_values(self, attention: "CrossAttention") -> tuple[Tensor, Tensor]:
        """Remembered tokens, then those of this pass, which are projected here and only here.

        Returns:
            Two of [B, K, V, d]. What later passes can still read of them is in the cache now.
        """
        parts = []
        if any(self.remembered):
            parts.append(self.store.read(attention.layer, max(self.remembered)))
        if self.visual is not None:
            parts.append(attention.project(self.visual.features))
        keys, values = (
            torch.cat(p, dim=2) if len(p) > 1 else p[0] for p in zip(*parts, strict=True)
        )
        if self.visual is not None and self.store is not None:
            self.store.write(attention.layer, keys, values, self.visibility.remembered)
        return keys, values


class CrossAttentionBlock(nn.Module):
    """Pre-norm attention to visual tokens and a gated MLP, each scaled by tanh of a gate."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config, layer)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_size)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, sight: VisualPass) -> Tensor:
        """[B, S, D] -> [B, S, D]; a row that sees no image leaves as it came.

        Source: llama_models/llama3/multimodal/model.py, CrossAttentionTransformerBlock: such rows
        are zeroed after the attention and again after the MLP.
        """
        attention = self.cross_attn(self.input_layernorm(x), sight)
        x = x + self.cross_attn_attn_gate.tanh() * attention
        hidden = self.mlp(self.post_attention_layernorm(x))
        if sight.visibility.seen is not None:
            hidden = hidden * sight.visibility.seen
        return x + self.cross_attn_mlp_gate.tanh() * hidden


class CrossAttention(nn.Module):
    """Grouped-query attention from text rows to visual tokens: normed heads, no positions."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, sight: VisualPass) -> Tensor:
        """[B, S, D] -> [B, S, D]; zero for rows that see nothing."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k, v = sight.keys_values(self)
        return self.o_proj(merge_heads(attend_visible(q, k, v, sight.visibility)))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of visual tokens: [B, V, D] -> two of [B, K, V, d]."""
        keys = self.k_norm(split_heads(self.k_proj(features), self.kv_heads))
        return keys, split_heads(self.v_proj(features), self.kv_heads)


def attend_visible(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """Attention in which each text row reads the run of visual tokens it can see.

    A run is attended to as it is, without a mask: rows that see the same run go together, for the
    whole batch where its samples agree.

    Args:
        q: [B, H, S, d].
        k, v: [B, K, V, d].

    Returns:
        [B, H, S, d]; zero for rows that see nothing.
    """
    if visibility.mask is not None:
        out = attend(q, k, v, mask=visibility.mask)
        return out if visibility.seen is None else out * visibility.seen[:, None]
    out = torch.zeros_like(q)
    for samples, sights in visibility.batches():
        for rows, tokens in sights:
            out[samples, :, rows] = attend(
                q[samples, :, rows], k[samples, :, tokens], v[samples, :, tokens]
            )
    return out
