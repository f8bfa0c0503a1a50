"""The architecture in numbers, read from an official `config.json`.

Nothing here has a default: a number that the file does not give is an error, not a guess.
The field names are those of the file, so that it can be read beside this one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

MOST_TILES = 1024
"""Far beyond any published model: a larger `max_num_tiles` is a damaged file."""

EXTRA_EMBEDDINGS = 8
"""Rows of the embedding past the vocabulary; the first is `<|image|>`. The head has none."""


class LlamaVisionError(ValueError):
    """Bad input at one of the package's doors: what came, what was expected, what to do."""


class SettingError(LlamaVisionError):
    """A setting out of its range: a device, type, length or sampling number that cannot be had."""


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
    """Local blocks: no gates, and the ones that features are tapped from."""
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
        """Width of the features that leave the encoder: the final ones and each tap."""
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

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.hidden_size // self.num_attention_heads

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
        """The id of `<|image|>`: the first one past the vocabulary."""
        return self.vocab_size


@dataclass(frozen=True)
class Config:
    """A whole Llama-3.2-Vision model."""

    vision: VisionConfig
    text: TextConfig
    dtype: torch.dtype
    """The type the checkpoint was published in."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Config":
        """Read the parsed JSON of a `config.json`, of the 2024 layout or the newer one.

        Raises:
            ConfigError: a field is missing, contradicts another, or asks for what is not built.
        """
        top = _Fields(data, "")
        top.only("model_type", "mllama")
        text = _text_config(top.section("text_config"))
        image_id = data.get("image_token_index", data.get("image_token_id", text.image_token_id))
        if image_id != text.image_token_id:
            raise ConfigError(
                f"config.json: image_token_index is {image_id}, expected vocab_size = "
                f"{text.image_token_id}, the first of the {EXTRA_EMBEDDINGS} extra embeddings"
            )
        return cls(_vision_config(top.section("vision_config")), text, _dtype(data))

    @classmethod
    def from_directory(cls, directory: Path) -> "Config":
        """Read `directory/config.json`.

        Raises:
            ConfigError: the file is not there, is not JSON, or does not describe this model.
        """
        path = Path(directory) / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{directory} has no config.json; expected a checkpoint in the official layout "
                "(config.json, model*.safetensors, a tokenizer)"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, expected a JSON object")
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, in the layout of 2024."""
        vision, text = asdict(self.vision), asdict(self.text)
        text["eos_token_id"] = text.pop("eos_token_ids")
        scaling = text["rope_scaling"]
        text["rope_scaling"] = scaling and {"rope_type": "llama3", **scaling}
        text |= {"pad_token_id": self.text.pad_token_id, "tie_word_embeddings": False}
        vision["vision_output_dim"] = self.vision.feature_size
        vision["supported_aspect_ratios"] = self.vision.grids
        data = {
            "architectures": ["MllamaForConditionalGeneration"],
            "image_token_index": self.text.image_token_id,
            "model_type": "mllama",
            "text_config": {"model_type": "mllama_text_model", "hidden_act": "silu", **text},
            "torch_dtype": next(name for name, dtype in DTYPES.items() if dtype == self.dtype),
            "vision_config": {"model_type": "mllama_vision_model", "hidden_act": "gelu", **vision},
        }
        return json.loads(json.dumps(data))  # tuples become lists


def supported_grids(max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, cols) with rows · cols ≤ max_tiles, in the order that aspect-ratio ids count."""
    sides = range(1, max_tiles + 1)
    return tuple((rows, cols) for rows in sides for cols in sides if rows * cols <= max_tiles)


OFFICIAL_SIZES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "11b": (4096, 14336, 40, 32),
    "90b": (8192, 28672, 100, 64),
}


def official_config(name: str) -> Config:
    """The published configuration of `"11b"` or `"90b"` (Instruct; its tiles are 560 pixels wide).

    Raises:
        ConfigError: another name.
    """
    if name not in OFFICIAL_SIZES:
        names = ", ".join(OFFICIAL_SIZES)
        raise ConfigError(f"no official model is called {name!r}; there are {names}")
    hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = OFFICIAL_SIZES[name]
    vision = VisionConfig(
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
    return Config(vision, text, torch.bfloat16)


class _Fields:
    """One section of the file, read field by field; every complaint names the field."""

    def __init__(self, data: dict[str, Any], name: str):
        self.data = data
        self.prefix = f"{name}." if name else ""

    def fail(self, field: str, expected: str) -> ConfigError:
        got = repr(self.data[field]) if field in self.data else "missing"
        return ConfigError(f"config.json: {self.prefix}{field} is {got}, expected {expected}")

    def section(self, field: str) -> "_Fields":
        value = self.data.get(field)
        if not isinstance(value, dict):
            raise self.fail(field, "an object")
        return _Fields(value, self.prefix + field)

    def only(self, field: str, supported: Any) -> None:
        if self.data.get(field) != supported:
            raise self.fail(field, f"{supported!r}, the only one supported")

    def integer(self, field: str, least: int = 1, most: int = 2**31 - 1) -> int:
        value = self.data.get(field)
        if type(value) is not int or not least <= value <= most:
            raise self.fail(field, f"an integer from {least} to {most}")
        return value

    def number(self, field: str) -> float:
        value = self.data.get(field)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            raise self.fail(field, "a positive number")
        return float(value)

    def indices(self, field: str, below: int) -> tuple[int, ...]:
        value = self.data.get(field)
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < below for i in value):
            raise self.fail(field, f"a list of block numbers from 0 to {below - 1}")
        if sorted(set(value)) != value:
            raise self.fail(field, "block numbers in ascending order, each once")
        return tuple(value)

    def divides(self, field: str, into: str) -> None:
        if self.data[into] % self.data[field]:
            raise self.fail(field, f"a divisor of {self.prefix}{into} = {self.data[into]}")


def _vision_config(fields: _Fields) -> VisionConfig:
    fields.only("hidden_act", "gelu")
    num_hidden_layers = fields.integer("num_hidden_layers")
    config = VisionConfig(
        hidden_size=fields.integer("hidden_size"),
        attention_heads=fields.integer("attention_heads"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_hidden_layers,
        num_global_layers=fields.integer("num_global_layers", least=0),
        intermediate_layers_indices=fields.indices(
            "intermediate_layers_indices", below=num_hidden_layers
        ),
        image_size=fields.integer("image_size"),
        patch_size=fields.integer("patch_size"),
        max_num_tiles=fields.integer("max_num_tiles", most=MOST_TILES),
        num_channels=fields.integer("num_channels"),
        norm_eps=fields.number("norm_eps"),
    )
    fields.only("num_channels", 3)
    fields.divides("attention_heads", into="hidden_size")
    fields.divides("patch_size", into="image_size")
    ratios = fields.data.get("supported_aspect_ratios")
    if ratios is not None and ratios != [list(grid) for grid in config.grids]:
        raise fields.fail("supported_aspect_ratios", f"{[list(grid) for grid in config.grids]}")
    if fields.data.get("vision_output_dim", config.feature_size) != config.feature_size:
        raise fields.fail(
            "vision_output_dim",
            f"hidden_size × (1 + number of intermediate_layers_indices) = {config.feature_size}",
        )
    return config


def _text_config(fields: _Fields) -> TextConfig:
    fields.only("hidden_act", "silu")
    if fields.data.get("tie_word_embeddings"):
        raise fields.fail("tie_word_embeddings", "false: the head has its own weights")
    num_hidden_layers = fields.integer("num_hidden_layers")
    rope_theta, rope_scaling = _rope(fields)
    config = TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=fields.integer("num_attention_heads"),
        num_key_value_heads=fields.integer("num_key_value_heads"),
        cross_attention_layers=fields.indices("cross_attention_layers", below=num_hidden_layers),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        bos_token_id=fields.integer("bos_token_id", least=0),
        eos_token_ids=_token_ids(fields, "eos_token_id"),
    )
    fields.divides("num_attention_heads", into="hidden_size")
    fields.divides("num_key_value_heads", into="num_attention_heads")
    if config.head_dim % 2:
        raise fields.fail("num_attention_heads", "an even width per head, for the rotary halves")
    return config


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """The rotary base and its scaling: `rope_parameters` today, two fields in 2024."""
    if "rope_parameters" in fields.data:
        rope = fields.section("rope_parameters")
        theta = rope.number("rope_theta")
    else:
        theta = fields.number("rope_theta")
        if fields.data.get("rope_scaling") is None:
            return theta, None
        rope = fields.section("rope_scaling")
    if rope.data.get("rope_type") == "default":
        return theta, None
    rope.only("rope_type", "llama3")
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.fail("high_freq_factor", "more than low_freq_factor")
    return theta, scaling


def _token_ids(fields: _Fields, field: str) -> tuple[int, ...]:
    value = fields.data.get(field)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise fields.fail(field, "a token id, or a list of them")
    return tuple(ids)


def _dtype(data: dict[str, Any]) -> torch.dtype:
    """The published type: `dtype` today, `torch_dtype` in 2024, beside or inside `text_config`."""
    for section in (data, data["text_config"]):
        for field in ("dtype", "torch_dtype"):
            name = section.get(field)
            if isinstance(name, str) and name in DTYPES:
                return DTYPES[name]
            if name is not None:
                raise _Fields(section, "").fail(field, f"one of {', '.join(DTYPES)}")
    raise ConfigError(f"config.json: torch_dtype is missing, expected one of {', '.join(DTYPES)}")
