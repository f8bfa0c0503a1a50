"""The text decoder: self-attention blocks with cross-attention blocks between them.

An image touches the text in the cross-attention blocks alone, and there only through the keys and
values of its visual tokens. A text row that sees no image passes such a block unchanged.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import EXTRA_EMBEDDINGS, TextConfig
from llama_vision.engine.prefill import TextChunk, TextPass, VisualChunk, VisualPass, in_chunks
from llama_vision.model.layers import (
    GatedMLP,
    Linear,
    RMSNorm,
    attend,
    merge_heads,
    rotate,
    split_heads,
)


class TextDecoder(nn.Module):
    """Token ids and visual tokens in, hidden states and logits out."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size + EXTRA_EMBEDDINGS, width)
        self.layers = nn.ModuleList(_blocks(config))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.lm_head = Linear(width, config.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        visual: VisualTokens | None = None,
        cache: Cache | None = None,
        pruner: Pruner | None = None,
        prefill_chunk: int | None = None,
    ) -> Tensor:
        """Run the blocks over the next S rows of each sample.

        Args:
            token_ids: [B, S]; on the host they need no transfer back.
            lengths: rows of each sample that are not padding.
            visual: tokens of the images whose ids are in `token_ids`; None if there are none.
            cache: holds what came before and receives these rows; without one they are the first.
            pruner: asked, if there are images, after the first cross-attention block.
            prefill_chunk: most rows, of all samples, that go through a block at once; only with a
                cache.

        Returns:
            [B, S, D], before the final norm.
        """
        h = self.embed_tokens(token_ids.to(self.embed_tokens.weight.device))
        text = TextPass(self.config, h, cache, prefill_chunk)
        sight = VisualPass(
            self.config, token_ids, lengths, visual, cache, pruner, prefill_chunk, h.device
        )
        return self.run(h, text, sight, lambda saliency: sight.keep(pruner(saliency, visual)))

    def run(
        self,
        h: Tensor,
        text: TextPass,
        sight: VisualPass,
        prune: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """All blocks over the rows h [B, S, D]; `prune` is given the saliency once it is there."""
        for block in self.layers:
            if isinstance(block, SelfAttentionBlock):
                h = block(h, text)
            elif not sight.blind:
                h = block(h, sight)
                if sight.saliency is not None:
                    prune(sight.saliency)
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
        return in_chunks(x, text.chunks, lambda x, rows: self._run(x, text.chunk(rows)))

    def _run(self, x: Tensor, chunk: TextChunk) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), chunk)
        return x + self.mlp(self.post_attention_layernorm(x))


class GroupedQueryAttention(nn.Module):
    """The projections that both kinds of attention have, and the layer's number in its store."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, kv_width, bias=False)
        self.v_proj = Linear(width, kv_width, bias=False)
        self.o_proj = Linear(width, width, bias=False)


class SelfAttention(GroupedQueryAttention):
    """Causal attention with rotary positions."""

    def forward(self, x: Tensor, chunk: TextChunk) -> Tensor:
        """[B, c, D] -> [B, c, D]."""
        q = rotate(split_heads(self.q_proj(x), self.heads), chunk.cos, chunk.sin)
        k = rotate(split_heads(self.k_proj(x), self.kv_heads), chunk.cos, chunk.sin)
        v = split_heads(self.v_proj(x), self.kv_heads)
        k, v = chunk.extend(self.layer, k, v)
        return self.o_proj(merge_heads(attend(q, k, v, mask=chunk.mask, causal=chunk.causal)))


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
        layer = self.cross_attn.layer
        k, v = sight.keys_values(layer, self.cross_attn.project)
        return in_chunks(
            x, sight.chunks, lambda x, rows: self._run(x, k, v, sight.chunk(layer, rows))
        )

    def _run(self, x: Tensor, k: Tensor, v: Tensor, chunk: VisualChunk) -> Tensor:
        attention = self.cross_attn(self.input_layernorm(x), k, v, chunk)
        x = x + self.cross_attn_attn_gate.tanh() * attention
        hidden = self.mlp(self.post_attention_layernorm(x))
        if chunk.seen is not None:
            hidden = hidden * chunk.seen
        return x + self.cross_attn_mlp_gate.tanh() * hidden


class CrossAttention(GroupedQueryAttention):
    """Attention from text rows to visual tokens: normed heads, no positions, no order."""

    def __init__(self, config: TextConfig, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, k: Tensor, v: Tensor, chunk: VisualChunk) -> Tensor:
        """x [B, c, D], k and v [B, K, V, d] -> [B, c, D]; zero for rows that see nothing."""
        q = self.q_norm(split_heads(self.q_proj(x), self.heads))
        return self.o_proj(merge_heads(chunk.attend(q, k, v)))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of visual tokens: [B, V, D] -> two of [B, K, V, d]."""
        keys = self.k_norm(split_heads(self.k_proj(features), self.kv_heads))
        return keys, split_heads(self.v_proj(features), self.kv_heads)
