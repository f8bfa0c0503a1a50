"""The numbers of config.json: both layouts, every contradiction; generation_config.json."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import TINY, golden_json
from safetensors.torch import save_file

from llama_vision import LlamaVision
from llama_vision.checkpoint import config_json
from llama_vision.checkpoint.config_json import (
    config_from_dict,
    config_to_dict,
    read_config,
)
from llama_vision.checkpoint.generation_json import (
    UNSUPPORTED,
    UNSUPPORTED_DRAWS,
    GenerationDefaults,
    read_generation_config,
)
from llama_vision.checkpoint.names import official_names
from llama_vision.config import ConfigError, RopeScaling, official_config
from llama_vision.errors import SettingError
from llama_vision.model.model import LlamaVisionModel
from llama_vision.reading import MOST_BYTES

MISSING = object()
OFFICIAL = {"11b": (906, 10_670_220_835), "90b": (1_494, 88_593_355_323)}
DRAWN = {"temperature": 0.6, "top_p": 0.9, "top_k": 5}


def tiny_json() -> dict:
    return json.loads((TINY / "config.json").read_text(encoding="utf-8"))


def edited(path: str, value: object) -> dict:
    """The tiny config.json, in the layout of `path`, with that field set or left out."""
    data = section = newer_layout() if "rope_parameters" in path else tiny_json()
    *sections, field = path.split(".")
    for name in sections:
        section = section[name]
    if value is MISSING:
        del section[field]
    else:
        section[field] = value
    return data


def test_the_tiny_checkpoint_is_read_from_its_directory():
    config, data = read_config(TINY), tiny_json()
    for field in ("hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(config.text, field) == data["text_config"][field]
        assert getattr(config.vision, field) == data["vision_config"][field]
    assert config.text.cross_attention_layers == (3, 8)
    assert config.text.eos_token_ids == (501, 508, 509)
    assert config.text.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert config.vision.intermediate_layers_indices == (1, 3, 4)
    assert config.dtype == torch.float32


def newer_layout() -> dict:
    """The tiny config.json as files are written since `rope_parameters`."""
    data = tiny_json()
    text = data["text_config"]
    text["rope_parameters"] = {**text.pop("rope_scaling"), "rope_theta": text.pop("rope_theta")}
    for section in (data, text, data["vision_config"]):
        if "torch_dtype" in section:
            section["dtype"] = section.pop("torch_dtype")
    return data


def test_both_layouts_give_the_same_config():
    assert config_from_dict(newer_layout()) == config_from_dict(tiny_json())


@pytest.mark.parametrize("section", ["on top", "text_config"])
@pytest.mark.parametrize("field", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_published_type_is_found(section, field, name):
    data = edited("torch_dtype", MISSING)
    del data["text_config"]["torch_dtype"]
    data.get(section, data)[field] = name
    assert config_from_dict(data).dtype == getattr(torch, name)


@pytest.mark.parametrize(
    "rope",
    [{"rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}],
)
def test_rotary_frequencies_may_be_unscaled(rope):
    data = tiny_json()
    data["text_config"] |= rope
    assert config_from_dict(data).text.rope_scaling is None


def test_one_stop_token_may_stand_without_a_list():
    assert config_from_dict(edited("text_config.eos_token_id", 7)).text.eos_token_ids == (7,)


@pytest.mark.parametrize("field", ["intermediate_layers_indices", "cross_attention_layers"])
def test_there_may_be_no_taps_and_no_cross_attention(field):
    section = "vision_config" if field.startswith("inter") else "text_config"
    data = edited(f"{section}.{field}", [])
    data["vision_config"].pop("vision_output_dim")
    config = config_from_dict(data)
    assert getattr(getattr(config, section.split("_")[0]), field) == ()


TEXT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "cross_attention_layers", "rms_norm_eps"),
    *("rope_theta", "max_position_embeddings", "bos_token_id", "eos_token_id", "hidden_act"),
)
ROPE_FIELDS = ("rope_type", "factor", "original_max_position_embeddings")
ROPE_BAND = ("low_freq_factor", "high_freq_factor")
VISION_FIELDS = (
    *("hidden_size", "attention_heads", "intermediate_size", "num_hidden_layers"),
    *("num_global_layers", "intermediate_layers_indices", "image_size", "patch_size"),
    *("max_num_tiles", "num_channels", "norm_eps", "hidden_act"),
)
NEEDED = (
    *("model_type", "text_config", "vision_config"),
    *(f"text_config.{field}" for field in TEXT_FIELDS),
    *(f"text_config.rope_scaling.{field}" for field in ROPE_FIELDS + ROPE_BAND),
    *(f"vision_config.{field}" for field in VISION_FIELDS),
)
NEEDED_IN_NEWER = [f"text_config.rope_parameters.{name}" for name in (*ROPE_FIELDS, "rope_theta")]


@pytest.mark.parametrize("path", [*NEEDED, *NEEDED_IN_NEWER])
def test_a_missing_field_is_named(path):
    with pytest.raises(ConfigError, match=rf"config\.json: {re.escape(path)} is missing, expected"):
        config_from_dict(edited(path, MISSING))


@pytest.mark.parametrize("name", [MISSING, None, "auto"], ids=["missing", "null", "auto"])
def test_a_type_that_is_not_told_is_that_of_the_weights(tmp_path, name):
    data = edited("torch_dtype", name)
    del data["text_config"]["torch_dtype"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read_config(tmp_path).dtype == config_from_dict(data).dtype == torch.bfloat16
    tensors = {"small": torch.ones(2), "large": torch.ones(99, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_config(tmp_path).dtype == torch.float16
    save_file({"a": torch.ones(9, dtype=torch.float64)}, tmp_path / "model.safetensors")
    assert read_config(tmp_path).dtype == torch.float32


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model_type", "llava", "'mllama'"),
        ("image_token_index", 520, "an integer from 1 to 519"),
        ("image_token_index", 0, "an integer from 1 to 519"),
        ("image_token_id", "512", "an integer from 1 to 519"),
        ("text_config.bos_token_id", 512, "an integer from 0 to 511"),
        ("torch_dtype", "int8", "one of float32, bfloat16, float16"),
        ("torch_dtype", [], "one of float32, bfloat16, float16"),
        ("text_config", [], "an object"),
        ("text_config.hidden_act", "gelu", "'silu'"),
        ("vision_config.hidden_act", "quick_gelu", "'gelu'"),
        ("text_config.tie_word_embeddings", True, "false"),
        ("text_config.rope_scaling.rope_type", "yarn", "'llama3'"),
        ("text_config.rope_scaling.high_freq_factor", 1.0, "more than low_freq_factor"),
        ("text_config.rope_theta", -1.0, "a positive number"),
        ("text_config.rms_norm_eps", 0, "a positive number"),
        ("vision_config.norm_eps", "1e-5", "a positive number"),
        ("text_config.vocab_size", True, "an integer"),
        ("text_config.hidden_size", 64.5, "an integer from 1"),
        ("text_config.num_hidden_layers", 0, "an integer from 1"),
        ("vision_config.max_num_tiles", 10**9, "an integer from 1 to 1024"),
        ("text_config.num_attention_heads", 5, "a divisor of text_config.hidden_size"),
        ("text_config.num_attention_heads", 64, "an even width per head"),
        ("text_config.num_key_value_heads", 3, "a divisor of text_config.num_attention_heads = 4"),
        ("vision_config.attention_heads", 7, "a divisor of vision_config.hidden_size"),
        ("vision_config.patch_size", 13, "a divisor of vision_config.image_size = 56"),
        ("vision_config.num_channels", 4, "3, the only one supported"),
        ("vision_config.vision_output_dim", 300, "= 256"),
        ("vision_config.supported_aspect_ratios", [[1, 1]], "[1, 2]"),
        ("vision_config.intermediate_layers_indices", [1, 99], "from 0 to"),
        ("vision_config.intermediate_layers_indices", [3, 1], "ascending"),
        ("vision_config.intermediate_layers_indices", [1, 1], "each once"),
        ("text_config.cross_attention_layers", [10], "from 0 to 9"),
        ("text_config.cross_attention_layers", [-1], "from 0 to 9"),
        ("text_config.cross_attention_layers", [8, 3], "ascending"),
        ("text_config.cross_attention_layers", 3, "a list"),
        ("text_config.eos_token_id", [1, -2], "a token id, or a list"),
        ("text_config.eos_token_id", [], "a token id, or a list"),
    ],
)
def test_a_contradiction_names_field_value_and_what_is_expected(path, value, expected):
    with pytest.raises(ConfigError) as error:
        config_from_dict(edited(path, value))
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
        ('{"model_type": 1, "model_type": 2}', "'model_type' stands twice"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read as JSON"),
        ('{"a": [' + "[]," * 2**20 + "0]}", "holds more than 1,048,576 lists"),
        (" " * (MOST_BYTES + 1), "larger than 33,554,432 bytes"),
        (b'{"model_type": "\xff' + b"x" * 9999, "byte 16 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, text, says):
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(ConfigError, match=says) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) <= 600


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "it is not a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: path.symlink_to(path), "symbolic links"),
        (os.mkfifo, "it is not a file"),
    ],
)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, make, says):
    make(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=says):
        read_config(tmp_path)


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_json()), encoding="utf-8-sig")
    assert read_config(tmp_path) == read_config(TINY)


SIZES = {
    "text_config.num_hidden_layers": 100,
    "text_config.hidden_size": 8192,
    "text_config.intermediate_size": 28672,
    "text_config.num_attention_heads": 64,
    "text_config.num_key_value_heads": 8,
    "text_config.vocab_size": 128_256,
    "vision_config.num_hidden_layers": 32,
    "vision_config.num_global_layers": 8,
    "vision_config.hidden_size": 1280,
    "vision_config.intermediate_size": 5120,
    "vision_config.attention_heads": 16,
    "vision_config.image_size": 560,
    "vision_config.patch_size": 14,
    "vision_config.max_num_tiles": 4,
}
"""The largest published."""


@pytest.mark.parametrize("path", SIZES)
@pytest.mark.parametrize("size", [10**6, 10**9, 2**31, 10**30])
def test_a_size_far_beyond_any_published_one_is_refused(path, size):
    limit = config_json.MOST_TOKENS if "vocab" in path else config_json.MOST_WIDTH
    size += limit if size == 10**6 else 0
    assert 2 * SIZES[path] <= limit
    with pytest.raises(
        ConfigError, match=rf"{re.escape(path)} is {size}, expected an integer from"
    ):
        config_from_dict(edited(path, size))


def test_patches_that_are_too_many_are_refused():
    data = edited("vision_config.image_size", 257)
    data["vision_config"]["patch_size"] = 1
    with pytest.raises(ConfigError, match="patch_size is 1, expected at most 256 patches"):
        config_from_dict(data)


def test_sizes_that_are_sane_alone_may_be_too_large_together():
    data = edited("text_config.hidden_size", 2**20)
    data["text_config"]["intermediate_size"] = 2**20
    with pytest.raises(ConfigError, match=r"make 7\.7e\+13 weights together"):
        config_from_dict(data)


@pytest.mark.parametrize("path", NEEDED)
@pytest.mark.parametrize("value", [None, "x", -1, 10**30, [], {}, [[1]], float("nan")], ids=repr)
def test_no_value_of_any_field_escapes_as_another_error(path, value):
    complaint = path  # unless there is one
    try:
        config_from_dict(edited(path, value))
    except ConfigError as error:
        complaint = str(error)
    assert path.rpartition(".")[2] in complaint


@pytest.mark.parametrize("name", ["tiny", *OFFICIAL])
def test_what_is_written_is_read_back(name):
    config = read_config(TINY) if name == "tiny" else official_config(name)
    assert config_from_dict(config_to_dict(config)) == config


@pytest.fixture(scope="module", params=OFFICIAL)
def official(request):
    """The name of a published model, and its parameters on the meta device by official name."""
    with torch.device("meta"):
        parameters = dict(LlamaVisionModel(official_config(request.param)).named_parameters())
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


def test_what_follows_from_the_numbers():
    config = read_config(TINY)
    assert config.text.head_dim == 16
    assert config.text.num_self_attention_layers == 8
    assert config.text.image_token_id == 512
    assert config.vision.patches_per_side == 4
    assert config.vision.tokens_per_tile == 17
    assert config.vision.feature_size == 64 * (1 + 3)
    assert [config.vision.aspect_id(grid) for grid in config.vision.grids] == list(range(1, 9))


def test_without_a_file_answers_are_greedy(tmp_path):
    assert read_generation_config(tmp_path) == GenerationDefaults(0.0, 1.0, 0, None)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, GenerationDefaults()),
        ({"eos_token_id": 7}, GenerationDefaults(stop_ids=(7,))),
        ({"eos_token_id": [7, 9]}, GenerationDefaults(stop_ids=(7, 9))),
        ({"eos_token_id": None}, GenerationDefaults()),
        (DRAWN, GenerationDefaults()),
        ({"do_sample": False, "temperature": -1}, GenerationDefaults()),
        ({"do_sample": True}, GenerationDefaults(temperature=1.0)),
        ({"do_sample": None, "temperature": None}, GenerationDefaults()),
        ({"repetition_penalty": 1.2, "min_p": 0.1}, GenerationDefaults(repetition_penalty=1.2)),
        ({"do_sample": True, "min_p": 0.1}, GenerationDefaults(1.0, min_p=0.1)),
        ({"do_sample": True, "top_k": None}, GenerationDefaults(temperature=1.0)),
        ({"do_sample": True, **DRAWN, "eos_token_id": [3]}, GenerationDefaults(0.6, 0.9, 5, (3,))),
    ],
    ids=str,
)
def test_random_draws_are_those_that_the_file_asks_for(tmp_path, data, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps(data))
    assert read_generation_config(tmp_path) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]"),
        *(json.dumps({"do_sample": True, "temperature": t}) for t in ("warm", -0.1, float("inf"))),
        *(json.dumps({"do_sample": True, "top_p": p}) for p in (0, float("nan"), 1.5, [])),
        *(json.dumps({"do_sample": True, "top_k": k}) for k in (-1, 5.0, "5", True, [5])),
        *(json.dumps({"eos_token_id": ids}) for ids in ([], True, "2", 1.0, -1, [True], [[1]], {})),
        *(json.dumps({"repetition_penalty": p}) for p in ("1", [], True, float("nan"), 0)),
        *(json.dumps({"do_sample": True, "min_p": p}) for p in ("1", 2, -1, 10**400)),
        *(json.dumps({"do_sample": flag}) for flag in ("yes", 1, [])),
    ],
)
def test_defaults_that_cannot_be_had_name_the_file(tmp_path, text):
    for name in ("config.json", "model.safetensors.index.json"):
        shutil.copy(TINY / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(SettingError, match=re.escape(str(tmp_path / "generation_config.json"))):
        LlamaVision.without_weights(tmp_path, device="cpu")


NEUTRAL = {
    **dict.fromkeys(UNSUPPORTED | UNSUPPORTED_DRAWS),
    **UNSUPPORTED,
    **UNSUPPORTED_DRAWS,
    "suppress_tokens": [],
    "bad_words_ids": [],
}
STRANGE = {
    **{"num_beams": 4, "no_repeat_ngram_size": 3, "bad_words_ids": [[1]], "guidance_scale": 1.5},
    **{"forced_eos_token_id": 2, "typical_p": 0.9, "min_length": "x", "stop_strings": ["a"]},
}


@pytest.mark.parametrize("draws", [True, False])
def test_settings_that_would_change_an_answer_and_are_not_built_are_told(tmp_path, draws):
    def unsupported(data: dict) -> set[str]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": draws} | data))
        return set(read_generation_config(tmp_path).unsupported)

    assert unsupported({**NEUTRAL, "max_length": 20, "cache_implementation": "x"}) == set()
    assert unsupported(STRANGE) == STRANGE.keys() - (set() if draws else {"typical_p"})
