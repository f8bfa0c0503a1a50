"""`config.json` and `generation_config.json`: what they say of a checkpoint, checked and named."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llama_vision.config import (
    DTYPES,
    EXTRA_EMBEDDINGS,
    MOST_TILES,
    Config,
    ConfigError,
    RopeScaling,
    TextConfig,
    VisionConfig,
)
from llama_vision.errors import SettingError


def read_config(directory: Path) -> Config:
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
    return config_from_dict(data)


def config_from_dict(data: dict[str, Any]) -> Config:
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
    return Config(_vision_config(top.section("vision_config")), text, _dtype(data))


def config_to_dict(config: Config) -> dict[str, Any]:
    """What `config_from_dict` reads, in the layout of 2024."""
    vision, text = asdict(config.vision), asdict(config.text)
    text["eos_token_id"] = text.pop("eos_token_ids")
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


@dataclass(frozen=True)
class GenerationDefaults:
    """How a checkpoint's authors would have it answer; without a file of theirs, greedily."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] | None = None
    """None for those of the architecture, `TextConfig.eos_token_ids`."""


def read_generation_config(directory: Path) -> GenerationDefaults:
    """Read `directory/generation_config.json`, which need not be there.

    Raises:
        SettingError: the file is not JSON, or asks for what cannot be had.
    """
    path = Path(directory) / "generation_config.json"
    if not path.is_file():
        return GenerationDefaults()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        stop = data.get("eos_token_id")
        drawing = {}
        if data.get("do_sample"):
            drawing = {name: float(data.get(name, 1.0)) for name in ("temperature", "top_p")}
            drawing["top_k"] = int(data.get("top_k") or 0)
    except (ValueError, TypeError, AttributeError) as error:
        raise SettingError(f"{path} cannot be read: {error!r}; correct or remove it") from None
    if stop is not None:
        stop = tuple(stop) if isinstance(stop, list) else (stop,)
    return GenerationDefaults(**drawing, stop_ids=stop)


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
