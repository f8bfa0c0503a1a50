"""What people have that is near to a checkpoint: each is named in one line that says what to do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file
from stub_hub import REPO, StubHub

from llama_vision import LlamaVision
from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.hub import download, find_checkpoint, load_config, source_path
from llama_vision.checkpoint.unsupported import declared_format, refuse_unsupported
from llama_vision.config import ConfigError
from llama_vision.errors import LlamaVisionError
from llama_vision.quantization import INT8, Format

WEIGHTS = {path.name for path in TINY.glob("*.safetensors")}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
GPTQ = {"quant_method": "gptq", "bits": 4}


def compressed(layout: object = "pack-quantized", *weights: dict, **fields: object) -> dict:
    """What compressed-tensors writes into a config.json."""
    groups = {f"group_{n}": {"weights": about} for n, about in enumerate(weights)}
    about = {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}
    return about | {"sparsity_config": {}, "kv_cache_scheme": None} | fields


W4, W8 = {"num_bits": 4, "group_size": 128}, {"num_bits": 8, "group_size": None}
LIKE_11B, LIKE_90B = ({"hidden_size": size} for size in (4096, 8192))


def write_config(directory: Path, **fields: object) -> None:
    data = json.loads((TINY / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(data))


def refusal(run) -> str:
    """The one line that it is refused with."""
    with pytest.raises(LlamaVisionError) as error:
        run()
    message = str(error.value)
    assert message.isprintable()
    assert len(message) <= 600
    return message


@pytest.mark.parametrize(
    ("about", "form"),
    [
        (BNB, Format(4, 32)),
        (BNB | {"bnb_4bit_quant_type": "nf4"}, Format(4, 32)),
        ({"load_in_4bit": True, "load_in_8bit": False}, Format(4, 32)),
        ({"load_in_8bit": True}, INT8),
        (compressed("pack-quantized", W4), Format(4, 128)),
        (compressed("pack-quantized", {"num_bits": 4, "group_size": 1024}), Format(4, 256)),
        (compressed("pack-quantized", {"num_bits": 4, "strategy": "channel"}), Format(4, 256)),
        (compressed("pack-quantized", {"num_bits": 4, "group_size": 16}), Format(4, 32)),
        (compressed("mixed-precision", W4, W8), INT8),
        (compressed("float-quantized", W8, sparsity_config={"format": "dense"}), INT8),
        (compressed("int-quantized", W8, transform_config={}), INT8),
        (compressed("naive-quantized", None), INT8),
        (None, None),
        ({}, None),
        (GPTQ, None),
        ([5], None),
    ],
)
@pytest.mark.parametrize("place", ["on top", "text_config"])
def test_the_format_of_what_is_read_is_told_beforehand(about, form, place):
    data = json.loads((TINY / "config.json").read_text())
    data.get(place, data)["quantization_config"] = about
    assert declared_format(data) == form
    if form:
        refuse_unsupported(data)


@pytest.mark.parametrize(
    ("about", "method"),
    [
        (GPTQ, "(gptq, 4-bit)"),
        ({"quant_method": "bitsandbytes"}, "(bitsandbytes)"),
        (BNB | {"bnb_4bit_quant_type": "int4"}, "(bitsandbytes, 4-bit, 'int4')"),
        *(
            ({"quant_method": method, "config_groups": {}}, f"({method})")
            for method in (
                *("awq", "fp8", "fbgemm_fp8", "torchao", "hqq", "quanto", "aqlm", "gguf"),
                *("Bitsandbytes", "not known yet"),
            )
        ),
        *(
            (compressed(layout, W4), f"(compressed-tensors, {layout})")
            for layout in ("nvfp4-pack-quantized", "marlin-24", "sparse-24-bitmask", "dense", 5)
        ),
        (compressed(None), "(compressed-tensors, no format)"),
        (
            compressed("mixed-precision", config_groups={"a": {"format": "mxfp4-pack-quantized"}}),
            "(compressed-tensors, mxfp4-pack-quantized)",
        ),
        *(
            (compressed("pack-quantized", W4, **{field: about}), f"(compressed-tensors, {field})")
            for field, about in (
                ("kv_cache_scheme", {"num_bits": 8}),
                ("transform_config", {"config_groups": {"R1": {}}}),
                ("sparsity_config", {"format": "sparse-24-bitmask"}),
                ("sparsity_config", [1]),
            )
        ),
        ({"quant_method": "\x1b[2J" * 1000}, r"(\x1b[2J"),
        ({"quant_method": 5, "bits": 10**30}, "(5)"),
        ({"config": 1}, "(unnamed)"),
        ("int8", "('int8')"),
        ([[]], "([[]])"),
    ],
)
@pytest.mark.parametrize("place", ["on top", "text_config"])
def test_quantised_weights_are_named_with_their_method(tmp_path, about, method, place):
    data = json.loads((TINY / "config.json").read_text())
    data.get(place, data)["quantization_config"] = about
    write_config(tmp_path, **data)
    for run in (load_config, LlamaVision.from_pretrained):
        message = refusal(lambda run=run: run(tmp_path))
        assert f"quantised {method}" in message
        assert "take the unquantised checkpoint" in message


@pytest.mark.parametrize("about", [None, {}])
def test_an_empty_quantization_config_is_none(tmp_path, about):
    write_config(tmp_path, quantization_config=about)
    assert load_config(tmp_path) == load_config(TINY)


META = "meta-llama/Llama-3.2"


@pytest.mark.parametrize(
    ("where", "fields", "names"),
    [
        ("unsloth/Llama-3.2-11B-Vision-Instruct-bnb-4bit", {}, f"{META}-11B-Vision-Instruct"),
        ("unsloth/Llama-3.2-11B-Vision-unsloth-bnb-4bit", {}, f"{META}-11B-Vision"),
        ("models--x--llama-3.2-90b-vision-instruct-fp8/snapshots/1", {}, f"{META}-90B-Vision-Ins"),
        ("x", {"_name_or_path": "unsloth/Llama-3.2-90B-Vision-bnb-4bit"}, f"{META}-90B-Vision"),
        ("x", {"_name_or_path": "someone/my-fine-tune"}, "someone/my-fine-tune"),
        ("x", {"_name_or_path": "/home/me/x", "text_config": LIKE_90B}, f"{META}-90B-Vision"),
        ("my-instruct-4bit", {"text_config": LIKE_11B}, f"{META}-11B-Vision-Instruct"),
        ("Llama-Guard-3-11B-Vision-W4A16", {}, "meta-llama/Llama-Guard-3-11B-Vision"),
        ("x", {"_name_or_path": ["a/b"]}, "that it was made from"),
        ("x", {"text_config": {"hidden_size": [1]}}, "that it was made from"),
    ],
)
def test_the_unquantised_repository_is_guessed(where, fields, names):
    says = refusal(lambda: refuse_unsupported({"quantization_config": GPTQ, **fields}, where))
    guess = says.partition("take the unquantised checkpoint, ")[2]
    assert guess.removeprefix("such as ").startswith(names)


@pytest.mark.parametrize(
    "run",
    [load_config, find_checkpoint, download, LlamaVision.from_pretrained],
    ids=lambda run: run.__name__,
)
def test_of_a_quantised_repository_no_weights_are_fetched(hub: StubHub, run):
    write_config(hub.directory, quantization_config=GPTQ)
    assert "gptq, 4-bit" in refusal(lambda: run(REPO))
    assert hub.fetched == ["config.json"]


def test_into_a_directory_they_are_not_fetched_either(hub: StubHub, tmp_path):
    write_config(hub.directory, quantization_config=GPTQ)
    assert "gptq" in refusal(lambda: download(REPO, to=tmp_path / "here"))
    assert not WEIGHTS & set(hub.fetched)


def test_the_text_part_alone_is_named(tmp_path):
    text = json.loads((TINY / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    message = refusal(lambda: load_config(tmp_path))
    assert "model_type is 'mllama_text_model', the text part" in message
    assert "expected 'mllama', a full checkpoint" in message


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("place", [".", "original"])
@pytest.mark.parametrize(
    "files", [["consolidated.00.pth", "params.json"], ["consolidated.pth"], ["params.json"]]
)
def test_meta_s_own_files_are_named_with_the_way_to_convert_them(
    tmp_path, files, place, with_config
):
    (tmp_path / place).mkdir(exist_ok=True)
    for name in files:
        (tmp_path / place / name).write_bytes(b"x")
    if with_config:
        shutil.copy(TINY / "config.json", tmp_path)
    message = refusal(lambda: LlamaVision.from_pretrained(tmp_path, device="cpu"))
    assert f"{files[0]} is of Meta's own layout" in message
    assert f"run `python weights/convert_meta.py {tmp_path / place} TARGET`" in message


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("data", "base"),
    [
        ('{"base_model_name_or_path": "meta-llama/Llama-3.2-11B-Vision"}', "Llama-3.2-11B-Vision"),
        ('{"base_model_name_or_path": "\\u001b[2J"}', r"\x1b[2J"),
        *((text, "the model that it was trained on") for text in ("{}", "[]", "{", "\xff")),
        ('{"base_model_name_or_path": [1]}', "the model that it was trained on"),
    ],
)
def test_an_adapter_is_named_with_its_model(tmp_path, data, base, with_config):
    (tmp_path / "adapter_config.json").write_text(data, encoding="latin-1")
    save_file({"lora_A": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    if with_config:
        shutil.copy(TINY / "config.json", tmp_path)
    message = refusal(lambda: LlamaVision.from_pretrained(tmp_path, device="cpu"))
    assert "is an adapter (LoRA), not a model: load " in message
    assert base in message


def test_an_adapter_s_repository_is_named_too(hub: StubHub):
    for path in hub.directory.glob("*.json"):
        path.unlink()
    (hub.directory / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    assert "load a/b and give this with --adapter" in refusal(lambda: find_checkpoint(REPO))
    assert hub.fetched == ["adapter_config.json"]


def test_files_of_llama_cpp_are_named(tmp_path):
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"x")
    assert "model-Q4_K_M.gguf is of llama.cpp" in refusal(lambda: load_config(tmp_path))


SOURCES = [
    *(None, 5, True, 1.5, [], {}, b"x", b"\xff", object(), str, "", "\0", "a/\0", "\ud800/x"),
    *("a" * 10**5, "a/" * 5000, "~nobody-of-that-name/x", "\x1b[2J", "x\ny/z", "..", "a/b/c", " "),
]


@pytest.mark.parametrize("source", SOURCES, ids=lambda it: ascii(it).partition(" at 0x")[0][:30])
@pytest.mark.parametrize("run", [find_checkpoint, load_config], ids=lambda run: run.__name__)
def test_a_source_that_cannot_be_is_refused(tmp_path, monkeypatch, source, run):
    monkeypatch.chdir(tmp_path)
    if source == "..":
        source = "nowhere/.."
    assert "model" in refusal(lambda: run(source))


def test_a_path_is_taken_as_it_is_and_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source_path("~/x") == tmp_path / "x"
    assert source_path(Path("a")) == Path("a")
    with pytest.raises(CheckpointError, match="is a file; expected a directory"):
        find_checkpoint(TINY / "config.json")
    with pytest.raises(ConfigError, match=r"has no config\.json; expected a checkpoint in the off"):
        load_config(tmp_path)
