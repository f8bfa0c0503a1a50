"""The slow, obvious model that the package is compared with, and random models to compare.

One prompt at a time, in float64, with loops and full masks: tiles stay in Meta's order, padding
included, heads one after the other, visibility as a matrix. Nothing here comes from the package
but the config and the names of the weights.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_vision.config import Config, RopeScaling, TextConfig, VisionConfig
from llama_vision.inputs.image import TiledImage
from llama_vision.model.model import LlamaVisionModel


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """q [H, S, d], k and v [K, L, d], allowed [S, L] -> [H, S, d], and probabilities [H, S, L].

    Both are zero where nothing is allowed.
    """
    out, shares = torch.zeros_like(q), q.new_zeros(*q.shape[:2], k.shape[1])
    for head in range(len(q)):
        shared = head // (len(q) // len(k))
        for row in range(q.shape[1]):
            seen = allowed[row].nonzero().flatten()
            if len(seen):
                scores = k[shared, seen] @ q[head, row] / math.sqrt(q.shape[-1])
                shares[head, row, seen] = scores.softmax(0)
                out[head, row] = shares[head, row, seen] @ v[shared, seen]
    return out, shares


def visible_images(token_ids: list[int], image_id: int) -> list[set[int]]:
    """For each row the images it sees: walk along the text and begin a new group at each run."""
    seen, group, images = [], set(), 0
    for row, token in enumerate(token_ids):
        if token == image_id:
            if row == 0 or token_ids[row - 1] != image_id:
                group = set()
            group = group | {images}
            images += 1
        seen.append(group)
    return seen


class Oracle:
    """A whole model over the weights of another."""

    def __init__(self, model: LlamaVisionModel):
        self.config = model.config
        self.weights = {name: value.double() for name, value in model.state_dict().items()}
        self.shares: list[Tensor] = []
        """Attention [H, S, V] of each cross-attention block of the last run."""

    def logits(self, token_ids: list[int], images: list[TiledImage]) -> Tensor:
        """[S, vocabulary] of one prompt."""
        text = self.config.text
        features = [self.project(image) for image in images]
        seen = visible_images(token_ids, text.image_token_id)
        image_of_token = [i for i, tokens in enumerate(features) for _ in tokens]
        visible = torch.tensor([[image in row for image in image_of_token] for row in seen])
        return self.run(token_ids, features, [visible] * len(text.cross_attention_layers))

    def run(self, token_ids: list[int], features: list[Tensor], visible: list[Tensor]) -> Tensor:
        """Logits from each image's tokens, and for each cross-attention block its mask [S, V]."""
        text = self.config.text
        h = self.weights["text.embed_tokens.weight"][token_ids]
        masks, self.shares = iter(visible), []
        for index in range(text.num_hidden_layers):
            name = f"text.layers.{index}"
            if index not in text.cross_attention_layers:
                h = self.self_attention_block(name, h)
            elif features:
                h = self.cross_attention_block(name, h, torch.cat(features), next(masks))
        return self.linear("text.lm_head", self.rms_norm("text.norm", h))

    def project(self, image: TiledImage) -> Tensor:
        """Visual tokens of the real tiles: [tiles · P, D]."""
        return self.project_slots(image)[: len(image.pixels)].flatten(0, 1)

    def project_slots(self, image: TiledImage) -> Tensor:
        """Visual tokens of all tile slots, the empty ones too: [T, P, D]."""
        return self.linear("projector", self.encode(image))

    def encode(self, image: TiledImage) -> Tensor:
        """Features of all tile slots: [T, P, E · (1 + intermediate layers)]."""
        vision = self.config.vision
        slots, real, tokens = vision.max_num_tiles, len(image.pixels), vision.tokens_per_tile
        id_ = vision.grids.index(image.grid) + 1
        x = torch.stack(
            [
                self.patches(image.pixels[i] if i < real else torch.zeros_like(image.pixels[0]))
                for i in range(slots)
            ]
        )
        x = x + self.tile_embedding("pre", id_)
        class_token = self.weights["vision.class_embedding"].expand(slots, 1, -1)
        x = torch.cat([class_token, x], dim=1)
        name = "vision.gated_positional_embedding"
        gate = self.weights[f"{name}.gate"].tanh()
        in_image = self.weights[f"{name}.tile_embedding.weight"][id_].view(slots, tokens, -1)
        x = x + (1 - gate) * self.weights[f"{name}.embedding"] + gate * in_image
        x = self.layer_norm("vision.layernorm_pre", x)

        padded = math.ceil(tokens / 8) * 8
        x = torch.cat([x, x.new_zeros(slots, padded - tokens, x.shape[-1])], dim=1)
        is_padding = torch.tensor(
            [[tile >= real or token >= tokens for token in range(padded)] for tile in range(slots)]
        ).flatten()
        allowed = ~(is_padding[:, None] & is_padding[None, :])
        x = x.flatten(0, 1)
        intermediate = []
        for index in range(vision.num_hidden_layers):
            if index in vision.intermediate_layers_indices:
                intermediate.append(x)
            x = self.vision_block(f"vision.transformer.layers.{index}", x, allowed)
        x = self.layer_norm("vision.layernorm_post", x).view(slots, padded, -1)
        x = (x + self.tile_embedding("post", id_)).flatten(0, 1)
        for index in range(vision.num_global_layers):
            x = self.vision_block(f"vision.global_transformer.layers.{index}", x, allowed)
        if intermediate:
            x = torch.cat([x, torch.stack(intermediate, dim=-1).flatten(1)], dim=-1)
        return x.view(slots, padded, -1)[:, :tokens]

    def patches(self, tile: Tensor) -> Tensor:
        size, side = self.config.vision.patch_size, self.config.vision.patches_per_side
        weight = self.weights["vision.patch_embedding.weight"].flatten(1)
        cut = [
            tile[:, row * size : (row + 1) * size, col * size : (col + 1) * size].flatten()
            for row in range(side)
            for col in range(side)
        ]
        return torch.stack(cut).double() @ weight.T

    def tile_embedding(self, which: str, id_: int) -> Tensor:
        name = f"vision.{which}_tile_positional_embedding"
        table = self.weights[f"{name}.embedding.weight"][id_]
        tiles = table.view(self.config.vision.max_num_tiles, 1, -1)
        return tiles * self.weights[f"{name}.gate"].tanh()

    def vision_block(self, name: str, x: Tensor, allowed: Tensor) -> Tensor:
        gates = [self.weights.get(f"{name}.gate_{branch}") for branch in ("attn", "ffn")]
        attn_gate, ffn_gate = (1 if gate is None else gate.tanh() for gate in gates)
        y = self.layer_norm(f"{name}.input_layernorm", x)
        q, k, v = (
            self.heads(f"{name}.self_attn.{p}_proj", y, self.config.vision.attention_heads)
            for p in "qkv"
        )
        out = full_attention(q, k, v, allowed).transpose(0, 1).flatten(1)
        x = x + attn_gate * self.linear(f"{name}.self_attn.o_proj", out)
        y = self.linear(f"{name}.mlp.fc1", self.layer_norm(f"{name}.post_attention_layernorm", x))
        return x + ffn_gate * self.linear(
            f"{name}.mlp.fc2", y * (1 + torch.erf(y / math.sqrt(2))) / 2
        )

    def self_attention_block(self, name: str, x: Tensor) -> Tensor:
        text = self.config.text
        y = self.rms_norm(f"{name}.input_layernorm", x)
        q = self.rotate(self.heads(f"{name}.self_attn.q_proj", y, text.num_attention_heads))
        k = self.rotate(self.heads(f"{name}.self_attn.k_proj", y, text.num_key_value_heads))
        v = self.heads(f"{name}.self_attn.v_proj", y, text.num_key_value_heads)
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        out = masked_attention(q, k, v, causal)[0].transpose(0, 1).flatten(1)
        x = x + self.linear(f"{name}.self_attn.o_proj", out)
        return x + self.gated_mlp(name, x)

    def cross_attention_block(
        self, name: str, x: Tensor, tokens: Tensor, visible: Tensor
    ) -> Tensor:
        text = self.config.text
        y = self.rms_norm(f"{name}.input_layernorm", x)
        q = self.heads(f"{name}.cross_attn.q_proj", y, text.num_attention_heads)
        k = self.heads(f"{name}.cross_attn.k_proj", tokens, text.num_key_value_heads)
        v = self.heads(f"{name}.cross_attn.v_proj", tokens, text.num_key_value_heads)
        q = self.rms_norm(f"{name}.cross_attn.q_norm", q)
        k = self.rms_norm(f"{name}.cross_attn.k_norm", k)
        out, shares = masked_attention(q, k, v, visible)
        self.shares.append(shares)
        sees_any = visible.any(1, keepdim=True)
        out = out.transpose(0, 1).flatten(1)
        attention = self.linear(f"{name}.cross_attn.o_proj", out) * sees_any
        x = x + self.weights[f"{name}.cross_attn_attn_gate"].tanh() * attention
        hidden = self.gated_mlp(name, x) * sees_any
        return x + self.weights[f"{name}.cross_attn_mlp_gate"].tanh() * hidden

    def rotate(self, x: Tensor) -> Tensor:
        """[heads, S, d]: elements i and i + d / 2 are one complex number, turned."""
        first, second = x.chunk(2, dim=-1)
        angles = torch.arange(x.shape[1]).double()[:, None] * self.rotary_frequencies()
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def rotary_frequencies(self) -> Tensor:
        text, frequencies = self.config.text, []
        for i in range(text.head_dim // 2):
            frequency = text.rope_theta ** (-2 * i / text.head_dim)
            scaling = text.rope_scaling
            if scaling is not None:
                wavelength, original = (
                    2 * math.pi / frequency,
                    scaling.original_max_position_embeddings,
                )
                if wavelength > original / scaling.low_freq_factor:
                    frequency /= scaling.factor
                elif wavelength >= original / scaling.high_freq_factor:
                    low, high = scaling.low_freq_factor, scaling.high_freq_factor
                    smooth = (original / wavelength - low) / (high - low)
                    frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
            frequencies.append(frequency)
        return torch.tensor(frequencies, dtype=torch.float64)

    def gated_mlp(self, name: str, x: Tensor) -> Tensor:
        y = self.rms_norm(f"{name}.post_attention_layernorm", x)
        gate = self.linear(f"{name}.mlp.gate_proj", y)
        up = self.linear(f"{name}.mlp.up_proj", y)
        return self.linear(f"{name}.mlp.down_proj", gate * gate.sigmoid() * up)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def heads(self, name: str, x: Tensor, heads: int) -> Tensor:
        return self.linear(name, x).view(len(x), heads, -1).transpose(0, 1)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.config.vision.norm_eps)

    def rms_norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = x.pow(2).mean(-1, keepdim=True)
        return (
            x
            / (mean_square + self.config.text.rms_norm_eps).sqrt()
            * self.weights[f"{name}.weight"]
        )


class MaskedOracle(Oracle):
    """Trims and prunes nothing: all tokens of all tile slots of all images stay, behind masks."""

    def logits(
        self,
        token_ids: list[int],
        images: list[TiledImage],
        kept: list[Tensor],
        passes: list[int],
        trim_first_layer: bool = True,
    ) -> Tensor:
        """[S, vocabulary] of a conversation that was run in passes; for the rest see masks."""
        first, later = self.masks(token_ids, images, kept, passes, trim_first_layer)
        features = [self.project_slots(image).flatten(0, 1) for image in images]
        others = len(self.config.text.cross_attention_layers) - 1
        return self.run(token_ids, features, [first, *[later] * others])

    def masks(
        self,
        token_ids: list[int],
        images: list[TiledImage],
        kept: list[Tensor],
        passes: list[int],
        trim_first_layer: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """What each row sees in the first cross-attention block, and in the later ones: [S, V].

        Args:
            kept: of each image the tokens that were kept, bool [t, P].
            passes: rows of each pass. In the first cross-attention block an image's own pass sees
                all its tokens; later passes only the kept ones, unless that block is left whole.
        """
        text, vision = self.config.text, self.config.vision
        pass_of_row = [number for number, rows in enumerate(passes) for _ in range(rows)]
        pass_of_image = [
            number
            for token, number in zip(token_ids, pass_of_row, strict=True)
            if token == text.image_token_id
        ]
        slots = len(token_ids), len(images), vision.max_num_tiles, vision.tokens_per_tile
        first, later = torch.zeros(2, *slots, dtype=torch.bool)
        for row, seen in enumerate(visible_images(token_ids, text.image_token_id)):
            for image in seen:
                real = len(images[image].pixels)
                later[row, image, :real] = kept[image]
                whole = not trim_first_layer or pass_of_row[row] == pass_of_image[image]
                first[row, image, :real] = True if whole else kept[image]
        return first.flatten(1), later.flatten(1)


def full_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """`masked_attention` for as many key as query heads where every row is allowed something."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def random_config(seed: int) -> Config:
    """A small model of random sizes; seeds vary heads, blocks, tiles and rotary scaling."""
    draw = random.Random(seed)
    vision_layers = draw.randint(1, 4)
    intermediate = {*draw.sample(range(vision_layers), draw.randint(0, vision_layers))}
    intermediate |= {0} if draw.random() < 0.5 else set()
    vision_heads, patch = draw.choice([1, 2, 3]), draw.choice([2, 3])
    vision = VisionConfig(
        hidden_size=vision_heads * draw.choice([4, 6, 8]),
        attention_heads=vision_heads,
        intermediate_size=draw.randint(8, 40),
        num_hidden_layers=vision_layers,
        num_global_layers=draw.randint(0, 2),
        intermediate_layers_indices=tuple(sorted(intermediate)),
        image_size=patch * draw.choice([2, 3, 4]),
        patch_size=patch,
        max_num_tiles=draw.choice([1, 2, 4, 6]),
        num_channels=3,
        norm_eps=draw.choice([1e-5, 1e-6]),
    )
    layers = draw.randint(3, 6)
    cross = {draw.choice([0, layers - 1]), *draw.sample(range(layers), draw.randint(1, 2))}
    heads, kv_heads = draw.choice([(6, 2), (6, 3), (4, 4), (5, 1), (8, 2)])
    vocab = draw.randint(40, 90)
    text = TextConfig(
        vocab_size=vocab,
        hidden_size=heads * draw.choice([4, 6, 10]),
        intermediate_size=draw.randint(16, 60),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        cross_attention_layers=tuple(sorted(cross)),
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
        rope_theta=draw.choice([100.0, 500_000.0]),
        rope_scaling=draw.choice([None, RopeScaling(8.0, 1.0, 4.0, draw.choice([16, 64, 8192]))]),
        max_position_embeddings=256,
        bos_token_id=vocab - 12,
        eos_token_ids=(vocab - 11,),
    )
    return Config(vision, text, torch.float32)


@torch.no_grad()
def random_model(config: Config, seed: int) -> LlamaVisionModel:
    """Random weights under which every part matters: gates far from zero, norms not all ones."""
    generator = torch.Generator().manual_seed(seed)
    model = LlamaVisionModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gate" in name.rpartition(".")[2]:
            parameter.copy_(noise.sign() * (0.4 + noise.abs()))
        elif "norm" in name and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim > 1 and "embedding" not in name and "embed_tokens" not in name:
            parameter.copy_(1.3 * noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.5 * noise)
    return model


def random_images(config: Config, count: int, draw: random.Random) -> list[TiledImage]:
    """Images of random grids and random pixels."""
    vision = config.vision
    images = []
    for _ in range(count):
        grid = draw.choice(vision.grids)
        generator = torch.Generator().manual_seed(draw.randrange(2**31))
        shape = (grid[0] * grid[1], 3, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=generator)
        images.append(TiledImage(pixels, grid, vision.grids.index(grid) + 1))
    return images


def random_token_ids(config: Config, images: int, rows: int, draw: random.Random) -> list[int]:
    """Random text with `images` image tokens at random places, often side by side."""
    text = config.text
    ids = [draw.randrange(text.vocab_size) for _ in range(rows)]
    start = draw.randint(0, rows - images)
    places = range(start, start + images)
    if draw.random() < 0.5:
        places = draw.sample(range(rows), images)
    for place in places:
        ids[place] = text.image_token_id
    return ids
