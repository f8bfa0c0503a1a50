"""The text decoder: self-attention blocks with cross-attention blocks between them.

An image touches the text in the cross-attention blocks alone, and there only through the keys and
values of its visual tokens. A text row that sees no image passes such a block unchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from llama_vision.config import TextConfig
from llama_vision.model import parallel
from llama_vision.model.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    attention,
    attention_with_saliency,
    merge_heads,
    rotate,
    split_heads,
)


@dataclass
class TextContext:
    """What the self-attention blocks of one forward need beside its rows."""

    cos: Tensor
    """[B, 1, S, d], of the rows' positions; see `layers.rotary_angles`."""
    sin: Tensor
    keys: Sequence[Tensor] | None = None
    """The text cache of these slots, for each layer [B, K, capacity, d]; None: nothing is kept."""
    values: Sequence[Tensor] | None = None
    positions: Tensor | None = None
    """[B, S], where the rows go in the cache."""
    length: int = 0
    """How many cached rows to read: those of this forward and all before them."""
    mask: Tensor | None = None
    """[B, 1, S, L], True for the cached rows that a row may look at; None: see `causal`."""
    causal: bool = True
    """Without a mask: a row looks at those up to itself (S = L), else at all that are read."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the rows' keys and values [B, K, S, d] into the cache; what to read: [B, K, L, d]."""
        if self.keys is None:
            return keys, values
        slots = torch.arange(len(keys), device=keys.device)[:, None]
        self.keys[layer][slots, :, self.positions] = keys.transpose(1, 2)  # [B, S, K, d]
        self.values[layer][slots, :, self.positions] = values.transpose(1, 2)
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]


@dataclass
class VisualContext:
    """What one cross-attention block needs beside its rows."""

    keys: Tensor
    """[B, K, V, d], from `CrossAttention.project`, now or when the image came."""
    values: Tensor
    log_counts: Tensor | None = None
    """[B, V], float32: of how many tokens each is the mean, as natural logarithm, which is added to
    its scores: so it gets what they would all get. None where each is one."""
    mask: Tensor | None = None
    """[B, 1, S, V], True for the tokens that a row sees; None: all of them."""
    sees: Tensor | None = None
    """[B, S, 1], False for rows that see none; None: all rows see some."""
    votes: Tensor | None = None
    """[1, S], float32: how much each row counts in the saliency; None: nobody asks for it."""
    saliency: Tensor | None = None
    """[H, V], float32: attention that the tokens got from the rows that vote, once it is known; of
    the heads that are here."""

    def attention_mask(self, dtype: torch.dtype) -> Tensor | None:
        """What `attention` takes: the mask alone, or with the logarithms where it is True."""
        if self.log_counts is None:
            return self.mask
        added = self.log_counts[:, None, None].to(dtype)  # [B, 1, 1, V]
        return added if self.mask is None else added.where(self.mask, -torch.inf)


def visible_prefix(visible: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Mask [B, 1, S, V] and `sees` [B, S, 1] of rows that see the first visible [B, S] of V tokens.

    A row that sees none looks at one token under the mask, for attention needs something to look
    at; `sees` takes away what it finds.
    """
    token = torch.arange(tokens, device=visible.device)
    mask = token < visible.clamp(min=1)[:, None, :, None]
    return mask, (visible > 0)[..., None]


class TextDecoder(nn.Module):
    """Token ids and visual tokens in, hidden states and logits out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = Embedding(config.embedding_rows_here, width, config.devices)
        self.layers = nn.ModuleList(_blocks(config))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = Linear(width, config.vocab_here, bias=False)

    def forward(
        self, token_ids: Tensor, text: TextContext, visual: Sequence[VisualContext] = ()
    ) -> Tensor:
        """All blocks over the rows [B, S]; without visual tokens cross-attention is passed by.

        Args:
            visual: for each cross-attention block, in order; none where no row sees an image.

        Returns:
            [B, S, D], before the final norm.
        """
        h = self.embed_tokens(token_ids)  # [B, S, D]
        for block in self.layers:
            if isinstance(block, SelfAttentionBlock):
                h = block(h, text)
            elif visual:
                h = block(h, visual[block.layer])
        return h

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] of the rows asked for -> [..., vocabulary], float32."""
        logits = self.lm_head(self.norm(h))
        if (devices := self.config.devices) > 1:
            logits = parallel.gather(logits, devices).movedim(0, -2).flatten(-2)
            logits = logits[..., : self.config.vocab_size]
        return logits.float()


class Embedding(nn.Embedding):
    """A row for each token id, divided among the devices: one of them has it."""

    def __init__(self, rows: int, width: int, devices: int):
        super().__init__(rows, width)
        self.devices = devices

    def forward(self, token_ids: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        if self.devices == 1:
            return super().forward(token_ids)
        row = token_ids - parallel.rank() * self.num_embeddings
        is_elsewhere = (row < 0) | (row >= self.num_embeddings)
        words = super().forward(row.masked_fill(is_elsewhere, 0))
        return parallel.total(words.masked_fill_(is_elsewhere[..., None], 0), self.devices)


def _blocks(config: TextConfig) -> Iterator[nn.Module]:
    """All blocks in order; each kind counts its own, for its own store of the cache."""
    self_layers, cross_layers = count(), count()
    for index in range(config.num_hidden_layers):
        if index in config.cross_attention_layers:
            yield CrossAttentionBlock(config, next(cross_layers))
        else:
            yield SelfAttentionBlock(config, next(self_layers))


class SelfAttentionBlock(nn.Module):
    """A Llama block: pre-norm causal attention, pre-norm gated MLP."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_here, config.devices)

    def forward(self, x: Tensor, text: TextContext) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.self_attn(self.input_layernorm(x), text)
        return x + self.mlp(self.post_attention_layernorm(x))


class GroupedQueryAttention(nn.Module):
    """The projections that both kinds of attention have."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.devices = config.devices
        self.heads, self.kv_heads = config.heads_here, config.kv_heads_here
        width, q_width = config.hidden_size, self.heads * config.head_dim
        kv_width = self.kv_heads * config.head_dim
        self.q_proj = Linear(width, q_width, bias=False)
        self.k_proj = Linear(width, kv_width, bias=False)
        self.v_proj = Linear(width, kv_width, bias=False)
        self.o_proj = Linear(q_width, width, bias=False)

    def join(self, heads: Tensor) -> Tensor:
        """The heads' output [B, heads, S, d], of all devices -> [B, S, D]."""
        return parallel.total(self.o_proj(merge_heads(heads)), self.devices)


class SelfAttention(GroupedQueryAttention):
    """Causal attention with rotary positions."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__(config)
        self.layer = layer

    def forward(self, x: Tensor, text: TextContext) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        q = rotate(split_heads(self.q_proj(x), self.heads), text.cos, text.sin)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), text.cos, text.sin)
        v = split_heads(self.v_proj(x), self.kv_heads)
        k, v = text.extend(self.layer, k, v)
        return self.join(attention(q, k, v, mask=text.mask, causal=text.causal))


class CrossAttentionBlock(nn.Module):
    """Pre-norm attention to visual tokens and a gated MLP, each scaled by tanh of a gate."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        width = config.hidden_size
        self.input_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.cross_attn = CrossAttention(config)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(width, config.rms_norm_eps)
        self.mlp = GatedMLP(width, config.intermediate_here, config.devices)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, visual: VisualContext) -> Tensor:
        """[B, S, D] -> [B, S, D]; a row that sees no image leaves as it came.

        Source: llama_models/llama3/multimodal/model.py, CrossAttentionTransformerBlock: such rows
        are zeroed after the attention and again after the MLP.
        """
        attended = self.cross_attn(self.input_layernorm(x), visual)
        x = x + self.cross_attn_attn_gate.tanh() * attended
        hidden = self.mlp(self.post_attention_layernorm(x))
        if visual.sees is not None:
            hidden = hidden * visual.sees
        return x + self.cross_attn_mlp_gate.tanh() * hidden


class CrossAttention(GroupedQueryAttention):
    """Attention from text rows to visual tokens: normed heads, no positions, no order."""

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, visual: VisualContext) -> Tensor:
        """[B, S, D] -> [B, S, D]; zero for rows that see nothing."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        k, v = visual.keys, visual.values
        if visual.votes is None:
            out = attention(q, k, v, mask=visual.attention_mask(q.dtype))
        else:
            out, visual.saliency = attention_with_saliency(q, k, v, visual.votes, visual.mask)
        if visual.sees is not None:
            out = out * visual.sees[:, None]
        return self.join(out)

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of visual tokens: [B, V, D] -> two of [B, K, V, d]."""
        keys = self.k_norm(split_heads(self.k_proj(features), self.kv_heads))
        return keys, split_heads(self.v_proj(features), self.kv_heads)
