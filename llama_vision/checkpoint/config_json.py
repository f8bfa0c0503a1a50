"""`config.json` and `generation_config.json`: what they say of a checkpoint, checked and named."""

import json
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llama_vision.checkpoint.files import CheckpointError, stored_type
from llama_vision.checkpoint.unsupported import declared_format, refuse_unsupported, what_it_is
from llama_vision.config import (
    DTYPES,
    MOST_PIXELS,
    MOST_TILES,
    Config,
    ConfigError,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from llama_vision.errors import quote
from llama_vision.quantization import Quantization
from llama_vision.reading import is_there, read_json, shown
from llama_vision.values import Number, Whole

MOST_LAYERS = 256
MOST_HEADS = 4096
MOST_WIDTH = 2**20
MOST_TOKENS = 2**24
MOST_PATCHES = 256
MOST_WEIGHTS = 2**42
"""Far beyond any published model (100 layers, 64 heads, 28,672 wide, 128,264 tokens, 40 patches a
side, 89 · 10⁹ weights): what is larger is a damaged file, and would take hours to build."""

PUBLISHED_DTYPE = torch.bfloat16
"""Of all official checkpoints; taken for a config.json that names no type and has no weights."""


def read_config(directory: Path) -> Config:
    """Read `directory/config.json`.

    Where it names no type (fine-tunes), that of most of the weights beside it is taken.

    Raises:
        ConfigError: the file is not there, is not JSON, does not describe this model, or one whose
            weights are quantised.
    """
    path = Path(directory) / "config.json"
    if not is_there(path):
        found = what_it_is(path.parent)
        raise ConfigError(
            f"{shown(directory)} has no config.json; "
            + (found or "expected a checkpoint in the official layout (config.json, ")
            + ("" if found else "model*.safetensors, a tokenizer)")
        )
    data = read_json(path, ConfigError)
    config = config_from_dict(data, directory)
    if _dtype(data) is None:
        with suppress(CheckpointError):  # loading the weights will tell
            config = replace(config, dtype=stored_type(path.parent))
    return config


def config_from_dict(data: dict[str, Any], where: object = "") -> Config:
    """Read the parsed JSON of a `config.json`, of the 2024 layout or the newer one.

    Args:
        data: the file.
        where: the directory or repository that it is from; errors guess from its name.

    Raises:
        ConfigError: a field is missing, contradicts another, or asks for what is not built.
    """
    refuse_unsupported(data, where)
    top = _Fields(data, "")
    top.only("model_type", "mllama")
    text = _text_config(top.section("text_config"))
    vision = _vision_config(top.section("vision_config"))
    for field in ("image_token_id", "image_token_index"):  # today, and in 2024
        if data.get(field) is None:
            continue
        image_id = top.integer(field, most=text.embedding_rows - 1)
        text = replace(text, image_token_index=None if image_id == text.vocab_size else image_id)
    _check_total(vision, text)
    form = declared_format(data)
    quantization = form and Quantization(text=form, cross=form, stored=True)
    return Config(vision, text, _dtype(data) or PUBLISHED_DTYPE, quantization)


def config_to_dict(config: Config) -> dict[str, Any]:
    """What `config_from_dict` reads, in the layout of 2024."""
    vision, text = asdict(config.vision), asdict(config.text)
    text["eos_token_id"] = text.pop("eos_token_ids")
    del text["image_token_index"]  # which stands on top
    del text["devices"], vision["devices"]
    scaling = text["rope_scaling"]
    text["rope_scaling"] = scaling and {"rope_type": "llama3", **scaling}
    text |= {"pad_token_id": config.text.pad_token_id, "tie_word_embeddings": False}
    vision["vision_output_dim"] = config.vision.feature_size
    vision["supported_aspect_ratios"] = config.vision.grids
    data = {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": config.text.image_token_id,
        "model_type": "mllama",
        "text_config": {"model_type": "mllama_text_model", "hidden_act": "silu", **text},
        "torch_dtype": next(name for name, dtype in DTYPES.items() if dtype == config.dtype),
        "vision_config": {"model_type": "mllama_vision_model", "hidden_act": "gelu", **vision},
    }
    return json.loads(json.dumps(data))  # tuples become lists


class _Fields:
    """One section of the file, read field by field; every complaint names the field."""

    def __init__(self, data: dict[str, Any], name: str):
        self.data = data
        self.prefix = f"{name}." if name else ""

    def fail(self, field: str, expected: str) -> ConfigError:
        got = quote(self.data[field]) if field in self.data else "missing"
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
        try:
            return Whole(least, most).read(self.data.get(field))
        except ValueError:
            raise self.fail(field, f"an integer from {least} to {most}") from None

    def number(self, field: str) -> float:
        try:
            return Number(0, above=True).read(self.data.get(field))
        except ValueError:
            raise self.fail(field, "a positive number") from None

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
    num_hidden_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    config = VisionConfig(
        hidden_size=fields.integer("hidden_size", most=MOST_WIDTH),
        attention_heads=fields.integer("attention_heads", most=MOST_HEADS),
        intermediate_size=fields.integer("intermediate_size", most=MOST_WIDTH),
        num_hidden_layers=num_hidden_layers,
        num_global_layers=fields.integer("num_global_layers", 0, MOST_LAYERS),
        intermediate_layers_indices=fields.indices(
            "intermediate_layers_indices", below=num_hidden_layers
        ),
        image_size=fields.integer("image_size", most=MOST_PIXELS),
        patch_size=fields.integer("patch_size", most=MOST_PIXELS),
        max_num_tiles=fields.integer("max_num_tiles", most=MOST_TILES),
        num_channels=fields.integer("num_channels"),
        norm_eps=fields.number("norm_eps"),
    )
    fields.only("num_channels", 3)
    fields.divides("attention_heads", into="hidden_size")
    fields.divides("patch_size", into="image_size")
    if config.patches_per_side > MOST_PATCHES:
        raise fields.fail("patch_size", f"at most {MOST_PATCHES} patches along an image_size")
    ratios = fields.data.get("supported_aspect_ratios")
    if ratios is not None and ratios != [list(grid) for grid in config.grids]:
        raise fields.fail("supported_aspect_ratios", quote([list(grid) for grid in config.grids]))
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
    num_hidden_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    vocab_size = fields.integer("vocab_size", most=MOST_TOKENS)
    rope_theta, rope_scaling = _rope(fields)
    config = TextConfig(
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size", most=MOST_WIDTH),
        intermediate_size=fields.integer("intermediate_size", most=MOST_WIDTH),
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=fields.integer("num_attention_heads", most=MOST_HEADS),
        num_key_value_heads=fields.integer("num_key_value_heads", most=MOST_HEADS),
        cross_attention_layers=fields.indices("cross_attention_layers", below=num_hidden_layers),
        rms_norm_eps=fields.number("rms_norm_eps"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=fields.integer("max_position_embeddings"),
        bos_token_id=fields.integer("bos_token_id", 0, vocab_size - 1),
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


def _dtype(data: dict[str, Any]) -> torch.dtype | None:
    """The published type: `dtype` today, `torch_dtype` in 2024, beside or inside `text_config`.

    None where it is not told: fine-tunes leave it out, or write "auto".
    """
    for section in (data, data["text_config"]):
        for field in ("dtype", "torch_dtype"):
            name = section.get(field)
            if isinstance(name, str) and name.removeprefix("torch.") in DTYPES:
                return DTYPES[name.removeprefix("torch.")]
            if name not in (None, "auto"):
                raise _Fields(section, "").fail(field, f"one of {', '.join(DTYPES)}")
    return None


def _check_total(vision: VisionConfig, text: TextConfig) -> None:
    """Sizes that are sane one by one may not be together; an estimate from above is enough."""
    patches, tiles, width = vision.tokens_per_tile, vision.max_num_tiles, vision.hidden_size
    layers = vision.num_hidden_layers + vision.num_global_layers
    ids = 1 + len(vision.grids)
    total = layers * width * (4 * width + 2 * vision.intermediate_size)
    total += width * (3 * vision.patch_size**2 + patches + ids * tiles * (patches + 2))
    total += vision.feature_size * text.hidden_size
    total += 2 * text.embedding_rows * text.hidden_size
    block = 4 * text.hidden_size + 3 * text.intermediate_size
    total += text.num_hidden_layers * text.hidden_size * block
    if total > MOST_WEIGHTS:
        raise ConfigError(
            f"config.json: the sizes in it make {total:.1e} weights together, expected at most "
            f"{MOST_WEIGHTS:.1e}; it is damaged"
        )
