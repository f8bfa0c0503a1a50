"""The tiled vision encoder: local blocks over all tiles, then gated global blocks.

pixels of the real tiles                    [N, t, 3, h, w]
  patches -> + tile embedding -> class token -> + position embedding -> layernorm_pre
  pad: each tile to a multiple of 8 tokens, the image to max_num_tiles tiles
  local blocks ......... the inputs of a few of them are kept: intermediate features
  layernorm_post -> + tile embedding -> gated global blocks
features of the real tiles                  [N, t, P, E · (1 + intermediate layers)]
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_vision.config import VisionConfig
from llama_vision.model.layers import Linear, attention, merge_heads, split_heads
from llama_vision.model.parallel import total

TOKENS_MULTIPLE = 8
"""Each tile's tokens are padded to a multiple of this.

Source: llama_models/llama3/multimodal/encoder_utils.py, expand_num_tokens_to_mult8.
"""


class Layout(NamedTuple):
    """Where the tokens of an image are: real ones first, then padding, padding tiles at the end."""

    real: int
    """Tokens of real tiles."""
    padding_tile: int
    """Tokens of the last padding tile, padding included."""
    copies: int
    """How many padding tiles more there are that are just like it, and so are left out."""


class VisionEncoder(nn.Module):
    """Images as tiles in, features of every token of every real tile out.

    Real tokens attend to padding tiles too, so those go through all blocks. As published, nothing
    tells an image's padding tiles from each other, so one can stand for them all: half of the work
    of a one-tile image.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(width, config.norm_eps)
        self.layernorm_post = nn.LayerNorm(width, config.norm_eps)
        self.transformer = Blocks(config, config.num_hidden_layers, gated=False)
        self.global_transformer = Blocks(config, config.num_global_layers, gated=True)
        self.padding_tiles_alike = False
        """Whether the weights make an image's padding tiles all alike; `compare_padding_tiles`."""

    def padding_entries(self) -> Iterator[Tensor]:
        """What each table holds for the padding tiles of each grid: views [T - t, width]."""
        tables = (
            self.pre_tile_positional_embedding.embedding,
            self.gated_positional_embedding.tile_embedding,
            self.post_tile_positional_embedding.embedding,
        )
        for table in tables:
            slots = table.weight.detach().unflatten(-1, (self.config.max_num_tiles, -1))
            for rows, cols in self.config.grids:
                yield slots[self.config.aspect_id((rows, cols)), rows * cols :]

    def compare_padding_tiles(self) -> None:
        """Once the weights are here, see whether they give all padding tiles of an image the same.

        Source: llama_models/llama3/multimodal/model.py, TilePositionEmbedding.forward and
        apply_positional_embedding: they give them nothing, zeros in the official files.
        """
        self.padding_tiles_alike = all(
            bool((entry == entry[:1]).all()) for entry in self.padding_entries()
        )

    def forward(self, pixels: Tensor, aspect_ids: Tensor) -> Tensor:
        """Encode N images of the same number t of real tiles.

        Args:
            pixels: [N, t, 3, h, w], normalised.
            aspect_ids: [N], from `VisionConfig.aspect_id`.

        Returns:
            [N, t, P, E · (1 + I)]: the final features, then those of the I intermediate layers,
            interleaved (feature e of layer i at E + e · I + i).

        Source: llama_models/llama3/multimodal/model.py, VisionEncoder.forward.
        """
        images, tiles = pixels.shape[:2]
        x = self.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, (images, tiles))  # [N, t, P - 1, E]
        padding = self.config.max_num_tiles - tiles
        copies = max(0, padding - 1) if self.padding_tiles_alike else 0
        # Padding tiles have zero pixels; there is no bias, so their patches are zero too.
        x = F.pad(x, (0, 0, 0, 0, 0, padding - copies))  # [N, T', P - 1, E]
        x = self.pre_tile_positional_embedding(x, aspect_ids)
        class_tokens = self.class_embedding.expand(*x.shape[:2], 1, -1)
        x = torch.cat([class_tokens, x], dim=2)  # [N, T', P, E]
        x = self.layernorm_pre(self.gated_positional_embedding(x, aspect_ids))

        tokens = x.shape[2]
        x = F.pad(x, (0, 0, 0, -tokens % TOKENS_MULTIPLE))
        order = real_tokens_first(tiles, tokens, x.shape[1], x.shape[2], x.device)
        tile_of_token = order // x.shape[2]
        layout = Layout(tiles * tokens, x.shape[2], copies)
        x = x.flatten(1, 2)[:, order]  # [N, real tokens and then padding, E]

        x, intermediate = self.transformer(x, layout, self.config.intermediate_layers_indices)
        x = self.layernorm_post(x)
        x = self.post_tile_positional_embedding(x, aspect_ids, tile_of_token)
        x, _ = self.global_transformer(x, layout)
        features = torch.cat([x[:, : layout.real], *intermediate], dim=-1)
        return features.unflatten(1, (tiles, tokens))


def real_tokens_first(
    tiles: int, tokens: int, tile_slots: int, token_slots: int, device: torch.device
) -> Tensor:
    """Order of the tile_slots · token_slots tokens that puts those of real tiles in front: [n]."""
    slots = torch.arange(tile_slots * token_slots, device=device)
    is_padding = (slots // token_slots >= tiles) | (slots % token_slots >= tokens)
    return torch.argsort(is_padding, stable=True)


class TileEmbedding(nn.Module):
    """One gated vector per tile slot, from a table by aspect-ratio id."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.slots = config.max_num_tiles
        self.embedding = nn.Embedding(len(config.grids) + 1, self.slots * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ids: Tensor, tile_of_token: Tensor | None = None) -> Tensor:
        """Add to each token its tile's vector: x [N, T', tokens, E], or [N, n, E] of tiles [n]."""
        tiles = self.embedding(aspect_ids).unflatten(-1, (self.slots, -1))  # [N, T, E]
        if tile_of_token is None:
            tiles = tiles[:, : x.shape[1], None]
        else:
            tiles = tiles[:, tile_of_token]
        return x + tiles * self.gate.tanh()


class PositionEmbedding(nn.Module):
    """Where a patch is in its tile, blended by one gate with where it is in the whole image."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.slots, self.tokens = config.max_num_tiles, config.tokens_per_tile
        self.embedding = nn.Parameter(torch.empty(self.tokens, config.hidden_size))
        self.tile_embedding = nn.Embedding(
            len(config.grids) + 1, self.slots * self.tokens * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ids: Tensor) -> Tensor:
        """[N, T', P, E] -> [N, T', P, E]; of the first T' tiles."""
        gate = self.gate.tanh()
        in_image = self.tile_embedding(aspect_ids).unflatten(-1, (self.slots, self.tokens, -1))
        return x + self.embedding * (1 - gate) + in_image[:, : x.shape[1]] * gate


class Blocks(nn.Module):
    """A stack of blocks over one sequence: real tokens first, padding after."""

    def __init__(self, config: VisionConfig, count: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(VisionBlock(config, gated) for _ in range(count))

    def forward(
        self, x: Tensor, layout: Layout, indices: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """[N, n, E] -> the same, and the intermediate features: none, or one [N, real, E · I].

        They are the *inputs* of the blocks at `indices`; of the padding nothing is kept.
        """
        kept = []
        for index, block in enumerate(self.layers):
            if index in indices:
                kept.append(x[:, : layout.real].clone())
            x = block(x, layout)
        return x, [torch.stack(kept, dim=-1).flatten(2)] if kept else []


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP; in global blocks both are scaled by tanh of a gate."""

    def __init__(self, config: VisionConfig, gated: bool):
        super().__init__()
        width = config.hidden_size
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.input_layernorm = nn.LayerNorm(width, config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(width, config.norm_eps)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[N, n, E] -> [N, n, E]."""
        x = x + gated(self.self_attn(self.input_layernorm(x), layout), self.gate_attn)
        return x + gated(self.mlp(self.post_attention_layernorm(x)), self.gate_ffn)


def gated(branch: Tensor, gate: Tensor | None) -> Tensor:
    """A residual branch times tanh of its gate, where it has one."""
    return branch if gate is None else branch * gate.tanh()


class VisionAttention(nn.Module):
    """Attention in which only padding is hidden, and only from padding."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads, self.devices = config.heads_here, config.devices
        width, here = config.hidden_size, config.hidden_size // config.devices
        self.q_proj = Linear(width, here, bias=False)
        self.k_proj = Linear(width, here, bias=False)
        self.v_proj = Linear(width, here, bias=False)
        self.o_proj = Linear(here, width, bias=False)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[N, n, E] -> [N, n, E].

        The reference masks the pairs (padding, padding) and no others: real tokens do attend to
        padding. With the real tokens in front, that is two attentions without any mask. A padding
        tile that stands for others is there for real tokens as often as they were.

        Source: llama_models/llama3/multimodal/encoder_utils.py, build_encoder_attention_mask.
        """
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        real, padding_tile, copies = layout
        from_padding = merge_heads(attention(q[:, :, real:], k[:, :, :real], v[:, :, :real]))
        if copies:
            k, v = (torch.cat([t, *[t[:, :, -padding_tile:]] * copies], dim=2) for t in (k, v))
        from_real = merge_heads(attention(q[:, :, :real], k, v))
        return total(self.o_proj(torch.cat([from_real, from_padding], dim=1)), self.devices)


class VisionMLP(nn.Module):
    """Two linear layers around an exact GELU.

    Of several devices the first one alone has the second bias, which is to be added once; that of
    the others is zero.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.devices = config.devices
        self.fc1 = Linear(config.hidden_size, config.intermediate_here)
        self.fc2 = Linear(config.intermediate_here, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        # In place: nothing in the encoder is as wide.
        return total(self.fc2(torch.ops.aten.gelu_(self.fc1(x))), self.devices)
