"""The embedded model's size, where its parameters start, and what training adds to it.

Training begins with an encoder that has room for one tile only: padding tiles cost as much as
real ones, and letters are learned just as well without them. `widen` turns it into the real one.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_vision.config import Config, RopeScaling, TextConfig, VisionConfig
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.vision import VisionEncoder
from recipe.drawing import IGNORED, LABELS
from recipe.forward import hidden_states

TILE, PATCH, MAX_TILES = 112, 14, 4

LABEL_WEIGHTS = {
    "left_char": 1.5,
    "right_char": 1.5,
    "left_place": 0.5,
    "right_place": 0.5,
    "word": 0.5,
    "line": 0.3,
    "shape": 0.7,
    "color": 0.7,
    "anchor": 0.5,
    "third_x": 0.3,
    "third_y": 0.3,
}


def vision_config(width: int, max_tiles: int) -> VisionConfig:
    """The encoder: 8 × 8 patches a tile, 5 local blocks, features of the inputs of two."""
    return VisionConfig(
        hidden_size=width,
        attention_heads=4,
        intermediate_size=4 * width,
        num_hidden_layers=5,
        num_global_layers=2,
        intermediate_layers_indices=(1, 3),
        image_size=TILE,
        patch_size=PATCH,
        max_num_tiles=max_tiles,
        num_channels=3,
        norm_eps=1e-5,
    )


def model_config(pieces: int, width: int = 128, max_tiles: int = MAX_TILES) -> Config:
    """The whole model, for a tokenizer of so many SentencePiece pieces.

    The pieces are followed by Llama 3's special tokens, in `chat.SPECIAL_TOKENS`.
    """
    text = TextConfig(
        vocab_size=pieces + 12,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=(2, 4, 6),
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        bos_token_id=pieces,
        eos_token_ids=(pieces + 1, pieces + 8, pieces + 9),
    )
    return Config(vision_config(width, max_tiles), text, torch.bfloat16)


class Seer(nn.Module):
    """What stage A trains: the encoder, the projector, and a head that labels every patch.

    The head reads what the text decoder will read, and is not part of the shipped checkpoint.
    """

    def __init__(self, vision: VisionEncoder, projector: nn.Linear):
        super().__init__()
        self.vision, self.projector = vision, projector
        self.labels = nn.Linear(projector.out_features, sum(LABELS.values()))

    @classmethod
    def new(cls, config: VisionConfig, width: int) -> "Seer":
        """A fresh one for a text decoder of this width."""
        seer = cls(VisionEncoder(config), nn.Linear(config.feature_size, width))
        initialize(seer)
        return seer

    def forward(self, pixels: Tensor, aspect_ids: Tensor) -> Tensor:
        """[N, t, 3, h, w] -> the projected features [N, t, P, D]."""
        return self.projector(self.vision(pixels, aspect_ids))


class Student(nn.Module):
    """What stages B and C train: the whole model, and the label head of stage A beside it."""

    def __init__(self, model: LlamaVisionModel, labels: nn.Linear):
        super().__init__()
        self.model, self.labels = model, labels

    @classmethod
    def new(cls, config: Config) -> "Student":
        """A fresh one."""
        model = LlamaVisionModel(config)
        student = cls(model, nn.Linear(config.text.hidden_size, sum(LABELS.values())))
        initialize(student)
        return student

    def learn_to_see_from(self, seer: Seer) -> None:
        """Take over what stage A has learned."""
        self.model.vision.load_state_dict(seer.vision.state_dict())
        self.model.projector.load_state_dict(seer.projector.state_dict())
        self.labels.load_state_dict(seer.labels.state_dict())

    def widened(self, max_tiles: int) -> "Student":
        """The same with room for more tiles."""
        vision = replace(self.model.config.vision, max_num_tiles=max_tiles)
        wide = LlamaVisionModel(replace(self.model.config, vision=vision))
        wide.vision = widen(self.model.vision, max_tiles)
        wide.projector, wide.text = self.model.projector, self.model.text
        return Student(wide, self.labels)

    def see(self, pixels: Tensor, aspect_ids: Tensor) -> Tensor:
        """[N, t, 3, h, w] -> the projected features [N, t, P, D]."""
        return self.model.encode(pixels, aspect_ids)

    def hidden(
        self, ids: Tensor, features: Tensor | None = None, shown: Tensor | None = None
    ) -> Tensor:
        """See `forward.hidden_states`."""
        return hidden_states(self.model.text, ids, features, shown)


def label_losses(
    head: nn.Linear, features: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Weighted cross-entropy of all labels, and how many of the non-trivial ones are right.

    Args:
        features: [N, t, P, D]; the class token, first of P, is left out.
        labels: [labels, N, t, P - 1], int64.
    """
    logits = head(features[:, :, 1:]).float().split(list(LABELS.values()), dim=-1)
    loss, right = features.new_zeros(()), {}
    for (name, weight), scores, wanted in zip(LABEL_WEIGHTS.items(), logits, labels, strict=True):
        loss = loss + weight * F.cross_entropy(
            scores.flatten(0, -2), wanted.flatten(), ignore_index=IGNORED
        )
        counted = wanted > 0
        hits = (scores.argmax(-1) == wanted)[counted]
        right[name] = hits.float().mean().item() if len(hits) else float("nan")
    return loss, right


def initialize(module: nn.Module) -> None:
    """Give every parameter a value to start from.

    Gates start open: at the official zero the encoder's global blocks and the cross-attention
    would have to be discovered through a vanishing gradient.
    """
    branches = sum(1 for name, _ in module.named_parameters() if _ends_branch(name))
    for name, parameter in module.named_parameters():
        if "gate" in name and parameter.shape == (1,):
            nn.init.constant_(parameter, 0.4 if "positional_embedding" in name else 0.6)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            (nn.init.normal_ if "class_embedding" in name else _ones)(parameter)
        elif "embed_tokens" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "positional_embedding" in name:
            nn.init.normal_(parameter, std=0.3)
        else:
            fan_in = parameter[0].numel()
            scale = 1 / math.sqrt(2 * branches) if _ends_branch(name) else 1.0
            nn.init.normal_(parameter, std=scale / math.sqrt(fan_in))
    for part in module.modules():
        if isinstance(part, VisionEncoder):
            _place_patches(part)


def _ones(parameter: Tensor) -> None:
    nn.init.ones_(parameter)


def _ends_branch(name: str) -> bool:
    """The last matrix of a residual branch; all of them together must not grow with depth."""
    return name.endswith(("o_proj.weight", "down_proj.weight", "fc2.weight"))


@torch.no_grad()
def _place_patches(vision: VisionEncoder) -> None:
    """Start the position tables from sines of where a patch is: in its tile, and in the picture."""
    config, table = vision.config, vision.gated_positional_embedding
    _position_table(vision).copy_(_picture_sines(config))
    table.embedding.copy_(_tile_sines(config, 0, 0))


def _picture_sines(config: VisionConfig) -> Tensor:
    """Sines of the place in the picture for all grids: [grids + 1, T, P, E]."""
    side, slots = config.patches_per_side, config.max_num_tiles
    table = torch.zeros(len(config.grids) + 1, slots, config.tokens_per_tile, config.hidden_size)
    for grid_id, (_, cols) in enumerate(config.grids, start=1):
        for slot in range(slots):
            table[grid_id, slot] = _tile_sines(config, slot // cols * side, slot % cols * side)
    return table


def _tile_sines(config: VisionConfig, row: int, col: int) -> Tensor:
    """Sines of rows (first half) and columns of a tile whose corner is at (row, col): [P, E]."""
    side, quarter = config.patches_per_side, config.hidden_size // 4
    # Wavelengths from two patches, to tell neighbours apart, to four tiles of 32 patches and more.
    frequencies = math.pi * (1 / 32) ** (torch.arange(quarter) / (quarter - 1))
    places = torch.cartesian_prod(torch.arange(side) + row, torch.arange(side) + col)
    angles = places[:, :, None] * frequencies  # [P - 1, 2, E / 4]
    sines = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return 0.5 * F.pad(sines, (0, 0, 1, 0))  # the class token is nowhere


@torch.no_grad()
def widen(vision: VisionEncoder, max_tiles: int) -> VisionEncoder:
    """An encoder with room for more tiles that sees each tile much as `vision`, made for one, does.

    Every tile of every grid starts from what the one tile has learned, moved a little towards its
    place in the picture. Tokens of padding tiles start as zeros: real tokens do attend to them, and
    anything else there would drown what the attention has learned.
    """
    wide = VisionEncoder(replace(vision.config, max_num_tiles=max_tiles))
    initialize(wide)
    tables = {name for name, _ in wide.named_parameters() if "tile" in name and name[-4:] != "gate"}
    kept = {name: value for name, value in vision.state_dict().items() if name not in tables}
    wide.load_state_dict(kept, strict=False)
    for name in ("pre_tile_positional_embedding", "post_tile_positional_embedding"):
        old, new = (getattr(encoder, name).embedding.weight for encoder in (vision, wide))
        vectors = new.view(len(wide.config.grids) + 1, max_tiles, -1)
        vectors.mul_(0.3).add_(old[1])
        vectors[1, 0] = old[1]
    table = _position_table(wide)
    moved = _picture_sines(wide.config) - _tile_sines(wide.config, 0, 0)
    table.copy_(_position_table(vision)[1, 0] + 0.5 * moved)
    _blank_padding_tiles(wide)
    return wide


def _position_table(vision: VisionEncoder) -> Tensor:
    """Positions in the picture, as a view: [grids + 1, T, P, E]."""
    config = vision.config
    shape = (-1, config.max_num_tiles, config.tokens_per_tile, config.hidden_size)
    return vision.gated_positional_embedding.tile_embedding.weight.view(shape)


def _blank_padding_tiles(vision: VisionEncoder) -> None:
    """Give the slots of padding tiles the positions that make all their tokens zero."""
    table, positions = _position_table(vision), vision.gated_positional_embedding
    tiles = vision.pre_tile_positional_embedding
    gate = positions.gate.tanh()
    slots = tiles.embedding.weight.view(len(table), vision.config.max_num_tiles, -1)
    for grid_id, (rows, cols) in enumerate(vision.config.grids, start=1):
        for slot in range(rows * cols, vision.config.max_num_tiles):
            rest = positions.embedding * (1 - gate)
            rest[0] += vision.class_embedding
            rest[1:] += slots[grid_id, slot] * tiles.gate.tanh()
            table[grid_id, slot] = -rest / gate
