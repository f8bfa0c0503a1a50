"""The architecture in numbers.

Nothing here has a default but the place of `<|image|>`: a number that is not given is an error, not
a guess. The field names are those of an official `config.json`, so that one can be read beside this
file.
"""

import math
from dataclasses import dataclass, replace

import torch

from llama_vision.errors import LlamaVisionError, SettingError, quote
from llama_vision.quantization import Quantization

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MOST_PIXELS = 4096
MOST_TILES = 1024
"""Sides and number of tiles: far beyond any published model (560 pixels, 4 tiles)."""

EXTRA_EMBEDDINGS = 8
"""Rows of the embedding past the vocabulary; the first is `<|image|>`. The head has none."""


class ConfigError(LlamaVisionError):
    """A `config.json` that is missing, incomplete, contradictory, or of another architecture."""


@dataclass(frozen=True)
class VisionConfig:
    """The tiled image encoder."""

    hidden_size: int
    """Width E of the encoder."""
    attention_heads: int
    intermediate_size: int
    num_hidden_layers: int
    """Local blocks: no gates; the inputs of some of them are intermediate features."""
    num_global_layers: int
    """Gated blocks after the local ones."""
    intermediate_layers_indices: tuple[int, ...]
    """Local blocks whose *input* joins the output features, ascending."""
    image_size: int
    """Side of a square tile, in pixels."""
    patch_size: int
    max_num_tiles: int
    num_channels: int
    norm_eps: float
    devices: int = 1
    """Among how many devices the heads and the hidden width of each block are divided."""

    @property
    def heads_here(self) -> int:
        """Attention heads that one device has."""
        return self.attention_heads // self.devices

    @property
    def intermediate_here(self) -> int:
        """Hidden width that one device has."""
        return self.intermediate_size // self.devices

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        """P: the class token and one token per patch."""
        return 1 + self.patches_per_side**2

    @property
    def feature_size(self) -> int:
        """Width of the features that leave the encoder: the final and the intermediate ones."""
        return self.hidden_size * (1 + len(self.intermediate_layers_indices))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Every supported arrangement of tiles, (rows, cols); grid i has aspect-ratio id i + 1."""
        return supported_grids(self.max_num_tiles)

    def aspect_id(self, grid: tuple[int, int]) -> int:
        """Row of the position-embedding tables that belongs to a grid (row 0 means: no image)."""
        return self.grids.index(grid) + 1


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the slow rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class TextConfig:
    """The text decoder."""

    vocab_size: int
    hidden_size: int
    """Width D of the decoder."""
    intermediate_size: int
    num_hidden_layers: int
    """Self-attention and cross-attention blocks together."""
    num_attention_heads: int
    num_key_value_heads: int
    cross_attention_layers: tuple[int, ...]
    """Which of the blocks are cross-attention blocks, ascending."""
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    image_token_index: int | None = None
    """The id of `<|image|>` where it is not the first one past the vocabulary: fine-tuning that
    adds tokens enlarges the vocabulary around it."""
    devices: int = 1
    """Among how many devices heads, the hidden width of each block, and the rows of embedding and
    head are divided."""

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def heads_here(self) -> int:
        """Query heads that one device has."""
        return self.num_attention_heads // self.devices

    @property
    def kv_heads_here(self) -> int:
        """Key/value heads that one device has, in weights and caches."""
        return self.num_key_value_heads // self.devices

    @property
    def intermediate_here(self) -> int:
        """Hidden width that one device has."""
        return self.intermediate_size // self.devices

    @property
    def vocab_here(self) -> int:
        """Rows of the head that one device has; the last one's go past the end, as zeros."""
        return -(-self.vocab_size // self.devices)

    @property
    def embedding_rows_here(self) -> int:
        """Rows of the embedding that one device has, likewise."""
        return -(-self.embedding_rows // self.devices)

    @property
    def num_self_attention_layers(self) -> int:
        """Blocks that keep text keys and values."""
        return self.num_hidden_layers - len(self.cross_attention_layers)

    @property
    def pad_token_id(self) -> int:
        """`<|finetune_right_pad_id|>`, the fifth special token from BOS on."""
        return self.bos_token_id + 4

    @property
    def image_token_id(self) -> int:
        """The id of `<|image|>`. Below `vocab_size` the head has a row for it, of no meaning."""
        return self.vocab_size if self.image_token_index is None else self.image_token_index

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding."""
        return self.vocab_size + EXTRA_EMBEDDINGS

    @property
    def largest_token_id(self) -> int:
        """The largest id that a prompt may hold."""
        return max(self.vocab_size - 1, self.image_token_id)


@dataclass(frozen=True)
class Config:
    """A whole Llama-3.2-Vision model."""

    vision: VisionConfig
    text: TextConfig
    dtype: torch.dtype
    """The type the checkpoint was published in."""
    quantization: Quantization | None = None
    """Which of its matrices are kept in fewer bits, see `quantization`."""


def divided(config: Config, devices: int) -> Config:
    """The same model, each device of so many having a part of it.

    Raises:
        SettingError: heads or hidden widths cannot be divided so.
    """
    vision, text = config.vision, config.text
    sizes = {
        "query heads": text.num_attention_heads,
        "key/value heads": text.num_key_value_heads,
        "intermediate_size": text.intermediate_size,
        "vision heads": vision.attention_heads,
        "vision intermediate_size": vision.intermediate_size,
    }
    most = math.gcd(*sizes.values())
    fitting = [n for n in range(1, most + 1) if most % n == 0]
    if devices not in fitting:
        wrong = [f"{size} {name}" for name, size in sizes.items() if size % devices]
        raise SettingError(
            f"{devices} devices cannot divide this model's {', '.join(wrong)}; expected "
            f"{' or '.join(map(str, fitting))} (torchrun --nproc-per-node)"
        )
    return replace(
        config, vision=replace(vision, devices=devices), text=replace(text, devices=devices)
    )


def supported_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, cols) with rows · cols ≤ max_tiles, in the order that aspect-ratio ids count."""
    sides = range(1, max_tiles + 1)
    return tuple((rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles)


OFFICIAL_SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "11b": (4096, 14336, 40, 32),
    "90b": (8192, 28672, 100, 64),
}
OFFICIAL_VISION = VisionConfig(
    hidden_size=1280,
    attention_heads=16,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_global_layers=8,
    intermediate_layers_indices=(3, 7, 15, 23, 30),
    image_size=560,
    patch_size=14,
    max_num_tiles=4,
    num_channels=3,
    norm_eps=1e-5,
)
"""All sizes have one encoder; that of Instruct, whose tiles are 560 pixels wide."""


def official_config(name: str) -> Config:
    """The published configuration of `"11b"` or `"90b"` (Instruct; its tiles are 560 pixels wide).

    Raises:
        ConfigError: another name.
    """
    if name not in OFFICIAL_SIZES:
        names = ", ".join(OFFICIAL_SIZES)
        raise ConfigError(f"no official model is called {quote(name)}; there are {names}")
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = OFFICIAL_SIZES[name]
    text = TextConfig(
        vocab_size=128256,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=8,
        cross_attention_layers=tuple(range(3, num_hidden_layers, 5)),
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )
    return Config(OFFICIAL_VISION, text, torch.bfloat16)
