"""The text decoder: self-attention blocks with cross-attention blocks between them.

An image touches the text in the cross-attention blocks alone, and there only through the keys and
values of its visual tokens. A text row that sees no image passes such a block unchanged.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor, nn

from llama_vision.cache import Cache
from llama_vision.config import EXTRA_EMBEDDINGS, TextConfig
from llama_vision.layers import (
    GatedMLP,
    RMSNorm,
    attend,
    attention_mass,
    merge_heads,
    rotary_angles,
    rotate,
    split_heads,
)
from llama_vision.pruning import Pruner, check_keep_mask
from llama_vision.visual import (
    Sight,
    Stretch,
    Visibility,
    VisualTokens,
    find_stretches,
    kept_first,
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
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)

    def forward(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        visual: VisualTokens | None = None,
        cache: Cache | None = None,
        pruner: Pruner | None = None,
    ) -> Tensor:
        """Run the blocks over the next S rows of each sample.

        Args:
            token_ids: [B, S].
            lengths: rows of each sample that are not padding.
            visual: tokens of the images whose ids are in `token_ids`; None if there are none.
            cache: holds what came before and receives these rows; without one they are the first.
            pruner: asked, if there are images, after the first cross-attention block.

        Returns:
            [B, S, D], before the final norm.
        """
        text = TextPass(self.config, token_ids, cache)
        sight = VisualPass(self.config, token_ids, lengths, visual, cache, pruner)
        h = self.embed_tokens(token_ids)
        for block in self.layers:
            if isinstance(block, SelfAttentionBlock):
                h = block(h, text)
            elif not sight.blind:
                h = block(h, sight)
                if sight.saliency is not None:
                    sight.keep(pruner(sight.saliency, visual))
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
        lengths: Sequence[int],
        visual: VisualTokens | None,
        cache: Cache | None,
        pruner: Pruner | None,
    ):
        self.batch, self.rows = token_ids.shape
        self.row_counts = lengths
        self.device = token_ids.device
        self.layers = len(config.cross_attention_layers)
        self.visual = visual
        self.pruner = pruner if visual is not None else None
        self.saliency: Tensor | None = None
        """[B, H, V], from the first block on until the pruner has answered."""
        self.values: Tensor | None = None
        """[B, K, V, d], of the first block, beside `visual.keys`; likewise."""
        self.store = cache.visual if cache is not None else None
        nothing = [[0] * self.batch] * self.layers
        self.remembered = list(self.store.lengths) if self.store is not None else nothing
        self.blind = visual is None and not any(map(any, self.remembered))
        self.stretches: list[list[Stretch]] = [[] for _ in range(self.batch)]
        if visual is not None:
            ids = token_ids.tolist()
            self.stretches = [find_stretches(row, config.image_token_id) for row in ids]
            if cache is not None:
                cache.visual.note_images(self.stretches, cache.position)
        self._visibility: dict[tuple[int, ...], Visibility] = {}

    def visibility(self, layer: int) -> Visibility:
        """Which row reads which of the tokens that `keys_values` gives."""
        remembered = tuple(self.remembered[layer])
        if remembered not in self._visibility:
            self._visibility[remembered] = self._see(remembered)
        return self._visibility[remembered]

    def _see(self, remembered: Sequence[int]) -> Visibility:
        old = max(remembered)
        sights = []
        for sample, stretches in enumerate(self.stretches):
            first_new = stretches[0].rows.start if stretches else self.rows
            sights.append([])
            if first_new > 0 and remembered[sample]:
                sights[-1].append(Sight(slice(0, first_new), slice(0, remembered[sample])))
            if self.visual is not None:
                sights[-1].extend(s.shifted(old) for s in self.visual.sights(sample, stretches))
        new = max(self.visual.lengths) if self.visual is not None else 0
        return Visibility(sights, (self.batch, self.rows, old + new), self.device)

    def keys_values(self, attention: "CrossAttention") -> tuple[Tensor, Tensor]:
        """Remembered tokens, then those of this pass, which are projected here and only here.

        Returns:
            Two of [B, K, V, d]. What later passes can still read of them is in the cache now,
            unless a pruner is yet to choose among them.
        """
        layer, old = attention.layer, max(self.remembered[attention.layer])
        if self.visual is None:
            return self.store.read(layer, old)
        keys, values = attention.project(self.visual.features)
        if self.pruner is not None:
            self.visual.keys, self.values = keys, values
        if self.store is None:
            return keys, values
        if layer == self.layers - 1:
            self.visual.release()
        keys, values = self._behind(layer, keys, values)
        if self.pruner is None:
            self.store.write(layer, keys, values, self.visibility(layer).remembered)
        return keys, values

    def score(self, attention: "CrossAttention", q: Tensor, k: Tensor) -> None:
        """Note the attention that q [B, H, S, d] pays the new tokens among k [B, K, V, d]."""
        old = max(self.remembered[attention.layer])
        tokens = k.shape[2] - old
        self.saliency = q.new_zeros(self.batch, q.shape[1], tokens, dtype=torch.float32)
        for sample, sights in enumerate(self.visibility(attention.layer).sights):
            for sight in sights:
                if sight.tokens.start >= old:
                    voters = self._voters(sample, sight.rows)
                    new = slice(sight.tokens.start - old, sight.tokens.stop - old)
                    mass = attention_mass(q[sample, :, voters], k[sample, :, sight.tokens])
                    self.saliency[sample, :, new] += mass

    def _voters(self, sample: int, rows: slice) -> slice:
        """Those of the rows whose attention counts; the first of them is an image's own."""
        votes = getattr(self.pruner, "votes", "all")
        end = min(rows.stop, self.row_counts[sample])
        start = {"all": rows.start, "after": rows.start + 1, "last": self.row_counts[sample] - 1}
        return slice(max(rows.start, start[votes]), end)

    def keep(self, mask: Tensor) -> None:
        """Take the pruner's answer [B, V]: go on with those tokens, and remember only them."""
        layer, whole, pruner = 0, self.visual, self.pruner
        whole.kept = mask = check_keep_mask(mask, pruner, whole)
        keys, values, runs = whole.keys, self.values, self.visibility(layer).remembered
        self.visual = whole.select(mask)
        self.pruner = self.saliency = self.values = None
        self._visibility.clear()
        if self.store is None:
            return
        whole.release()
        if getattr(pruner, "trim_first_layer", True):
            index = kept_first(mask)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values = keys.gather(2, index), values.gather(2, index)
            runs = self.visibility(layer).remembered
        self.store.write(layer, *self._behind(layer, keys, values), runs)

    def _behind(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values, behind those that the cache remembers."""
        old = max(self.remembered[layer])
        if not old:
            return keys, values
        old_keys, old_values = self.store.read(layer, old)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


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
        seen = sight.visibility(self.cross_attn.layer).seen
        if seen is not None:
            hidden = hidden * seen
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
        if sight.pruner is not None:
            sight.score(self, q, k)
        return self.o_proj(merge_heads(attend_visible(q, k, v, sight.visibility(self.layer))))

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
