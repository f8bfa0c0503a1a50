"""config.json: both layouts, the published sizes, and every contradiction by name."""

import copy
import json
import re

import pytest
import torch
from conftest import TINY, golden_json

from llama_vision.checkpoint.loading import official_names
from llama_vision.config import (
    Config,
    ConfigError,
    RopeScaling,
    official_config,
    supported_grids,
)
from llama_vision.model.model import LlamaVisionModel

OFFICIAL = {"11b": (906, 10_670_220_835), "90b": (1_494, 88_593_355_323)}
MISSING = object()


def tiny_json() -> dict:
    return json.loads((TINY / "config.json").read_text(encoding="utf-8"))


def edited(path: str, value: object) -> dict:
    """The tiny config.json with one field, such as `text_config.vocab_size`, set or left out."""
    data = copy.deepcopy(tiny_json())
    *sections, field = path.split(".")
    section = data
    for name in sections:
        section = section[name]
    if value is MISSING:
        del section[field]
    else:
        section[field] = value
    return data


# Published sizes


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request):
    """The name of a published model, and its parameters on the meta device by official name."""
    with torch.device("meta"):
        model = LlamaVisionModel(official_config(request.param))
    parameters = dict(model.named_parameters())
    names = official_names(list(parameters))
    return request.param, {theirs: parameters[ours] for theirs, ours in names.items()}


def test_official_counts(official):
    name, parameters = official
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == OFFICIAL[name]


def test_official_names_and_shapes(official):
    name, parameters = official
    published = golden_json(f"official/{name}")
    assert {tensor: list(p.shape) for tensor, p in parameters.items()} == published


def test_an_unknown_official_name_is_told():
    with pytest.raises(ConfigError, match=r"no official model is called '8b'; there are 11b, 90b"):
        official_config("8b")


# Reading


def test_the_tiny_checkpoint_is_read_from_its_directory():
    config = Config.from_directory(TINY)
    data = tiny_json()
    for ours, theirs in (
        (config.text, data["text_config"]),
        (config.vision, data["vision_config"]),
    ):
        for field in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            assert getattr(ours, field) == theirs[field]
    assert config.text.cross_attention_layers == (3, 8)
    assert config.text.eos_token_ids == (501, 508, 509)
    assert config.text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.vision.intermediate_layers_indices == (1, 3, 4)
    assert config.dtype == torch.float32


def test_what_follows_from_the_numbers():
    config = Config.from_directory(TINY)
    assert config.text.head_dim == 16
    assert config.text.num_self_attention_layers == 8
    assert config.text.image_token_id == 512
    assert config.vision.patches_per_side == 4
    assert config.vision.tokens_per_tile == 17
    assert config.vision.feature_size == 64 * (1 + 3)
    assert [config.vision.aspect_id(grid) for grid in config.vision.grids] == list(range(1, 9))


def test_grids_count_as_the_reference_does():
    four = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert supported_grids(4) == four
    assert supported_grids(1) == ((1, 1),)


def newer_layout(data: dict) -> dict:
    """The same configuration as files are written since `rope_parameters`."""
    data = copy.deepcopy(data)
    text = data["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    for section in (data, text, data["vision_config"]):
        if "torch_dtype" in section:
            section["dtype"] = section.pop("torch_dtype")
    return data


def test_both_layouts_give_the_same_config():
    assert Config.from_dict(newer_layout(tiny_json())) == Config.from_dict(tiny_json())


@pytest.mark.parametrize("section", ["", "text_config."], ids=["on top", "in text_config"])
@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_published_type_is_found(section, field, name):
    data = edited("torch_dtype", MISSING)
    del data["text_config"]["torch_dtype"]
    (data["text_config"] if section else data)[field] = name
    assert Config.from_dict(data).dtype == getattr(torch, name)


@pytest.mark.parametrize(
    "rope",
    [{"rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}],
)
def test_rotary_frequencies_may_be_unscaled(rope):
    data = tiny_json()
    data["text_config"] |= rope
    assert Config.from_dict(data).text.rope_scaling is None


def test_one_stop_token_may_stand_without_a_list():
    assert Config.from_dict(edited("text_config.eos_token_id", 7)).text.eos_token_ids == (7,)


@pytest.mark.parametrize("field", ["intermediate_layers_indices", "cross_attention_layers"])
def test_there_may_be_no_taps_and_no_cross_attention(field):
    section = "vision_config" if field.startswith("inter") else "text_config"
    data = edited(f"{section}.{field}", [])
    data["vision_config"].pop("vision_output_dim")
    config = Config.from_dict(data)
    assert getattr(getattr(config, section.split("_")[0]), field) == ()


# Errors


TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "cross_attention_layers",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
)
VISION_FIELDS = (
    "hidden_size",
    "attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "num_global_layers",
    "intermediate_layers_indices",
    "image_size",
    "patch_size",
    "max_num_tiles",
    "num_channels",
    "norm_eps",
    "hidden_act",
)
NEEDED = (
    "model_type",
    "text_config",
    "vision_config",
    *(f"text_config.{field}" for field in TEXT_FIELDS),
    *(f"vision_config.{field}" for field in VISION_FIELDS),
    *(
        f"text_config.rope_scaling.{field}"
        for field in (
            "rope_type",
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    ),
)


@pytest.mark.parametrize("path", NEEDED)
def test_a_missing_field_is_named(path):
    with pytest.raises(ConfigError, match=rf"config\.json: {re.escape(path)} is missing, expected"):
        Config.from_dict(edited(path, MISSING))


@pytest.mark.parametrize(
    "field", ["rope_type", "rope_theta", "factor", "original_max_position_embeddings"]
)
def test_a_missing_field_of_the_newer_layout_is_named(field):
    data = newer_layout(tiny_json())
    del data["text_config"]["rope_parameters"][field]
    with pytest.raises(ConfigError, match=rf"text_config\.rope_parameters\.{field} is missing"):
        Config.from_dict(data)


def test_a_missing_type_is_named():
    data = edited("torch_dtype", MISSING)
    del data["text_config"]["torch_dtype"]
    with pytest.raises(ConfigError, match="torch_dtype is missing, expected one of float32, bfl"):
        Config.from_dict(data)


CONTRADICTIONS = {
    "another architecture": ("model_type", "llava", "'mllama'"),
    "image token": ("image_token_index", 511, "vocab_size = 512"),
    "published type": ("torch_dtype", "int8", "one of float32, bfloat16, float16"),
    "type of another kind": ("torch_dtype", [], "one of float32, bfloat16, float16"),
    "section of another kind": ("text_config", [], "an object"),
    "text activation": ("text_config.hidden_act", "gelu", "'silu'"),
    "vision activation": ("vision_config.hidden_act", "quick_gelu", "'gelu'"),
    "tied embeddings": ("text_config.tie_word_embeddings", True, "false"),
    "rope type": ("text_config.rope_scaling.rope_type", "yarn", "'llama3'"),
    "rope factors": ("text_config.rope_scaling.high_freq_factor", 1.0, "more than low_freq_factor"),
    "negative rope base": ("text_config.rope_theta", -1.0, "a positive number"),
    "norm of zero": ("text_config.rms_norm_eps", 0, "a positive number"),
    "a text for a number": ("vision_config.norm_eps", "1e-5", "a positive number"),
    "a truth for a number": ("text_config.vocab_size", True, "an integer"),
    "a fraction": ("text_config.hidden_size", 64.5, "an integer from 1"),
    "no blocks": ("text_config.num_hidden_layers", 0, "an integer from 1"),
    "absurd tiles": ("vision_config.max_num_tiles", 10**9, "an integer from 1 to 1024"),
    "text heads": ("text_config.num_attention_heads", 5, "a divisor of text_config.hidden_size"),
    "odd head width": ("text_config.num_attention_heads", 64, "an even width per head"),
    "key/value heads": (
        "text_config.num_key_value_heads",
        3,
        "a divisor of text_config.num_attention_heads = 4",
    ),
    "vision heads": ("vision_config.attention_heads", 7, "a divisor of vision_config.hidden_size"),
    "patches": ("vision_config.patch_size", 13, "a divisor of vision_config.image_size = 56"),
    "channels": ("vision_config.num_channels", 4, "3, the only one supported"),
    "width of features": ("vision_config.vision_output_dim", 300, "= 256"),
    "grids": ("vision_config.supported_aspect_ratios", [[1, 1]], "[1, 2]"),
    "tap out of range": ("vision_config.intermediate_layers_indices", [1, 99], "from 0 to"),
    "taps unsorted": ("vision_config.intermediate_layers_indices", [3, 1], "ascending"),
    "tap twice": ("vision_config.intermediate_layers_indices", [1, 1], "each once"),
    "cross block out of range": ("text_config.cross_attention_layers", [10], "from 0 to 9"),
    "cross block negative": ("text_config.cross_attention_layers", [-1], "from 0 to 9"),
    "cross blocks unsorted": ("text_config.cross_attention_layers", [8, 3], "ascending"),
    "cross blocks no list": ("text_config.cross_attention_layers", 3, "a list"),
    "stop tokens": ("text_config.eos_token_id", [1, -2], "a token id, or a list"),
    "no stop tokens": ("text_config.eos_token_id", [], "a token id, or a list"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_contradiction_names_field_value_and_what_is_expected(contradiction):
    path, value, expected = CONTRADICTIONS[contradiction]
    with pytest.raises(ConfigError) as error:
        Config.from_dict(edited(path, value))
    message = str(error.value)
    assert message.startswith(f"config.json: {path} is ")
    assert str(value) in message
    assert expected in message.partition(", expected ")[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no config.json; expected a checkpoint in the official layout"),
        ("", "cannot be read as JSON"),
        ('{"model_type": ', "cannot be read as JSON"),
        ("[]", "holds a list, expected a JSON object"),
    ],
    ids=["absent", "empty", "cut short", "a list"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        Config.from_directory(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("path", NEEDED)
@pytest.mark.parametrize("value", [None, "x", -1, 10**30, [], {}, [[1]], float("nan")], ids=repr)
def test_no_value_of_any_field_escapes_as_another_error(path, value):
    complaint = complaint_about(edited(path, value))
    assert complaint is None or path.rpartition(".")[2] in complaint


def complaint_about(data: dict) -> str | None:
    try:
        Config.from_dict(data)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "config",
    [Config.from_directory(TINY), *map(official_config, OFFICIAL)],
    ids=["tiny", *OFFICIAL],
)
def test_what_is_written_is_read_back(config):
    assert Config.from_dict(config.to_dict()) == config
