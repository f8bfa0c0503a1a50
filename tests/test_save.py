"""Quantised copies that are saved: what is loaded from them, and what refuses to be saved."""

import json

import pytest
import torch
from conftest import TINY
from transformers import AutoConfig

from llama_vision import LlamaVision
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.arguments import build_quantization
from llama_vision.cli.save import main, read_arguments

WAYS = {
    "int8": ["--quantize", "int8"],
    "int4": ["--quantize", "int4"],
    "everything": ["--quantize", "int4", "--quantize-all"],
    "cross": ["--quantize", "int4", "--quantize-group", "32", "--quantize-cross", "int8"],
}


def save(out, *more, model=EMBEDDED_MODEL):
    return main(["--model", str(model), "--out", str(out), *more])


@pytest.mark.parametrize("way", WAYS)
def test_what_is_loaded_equals_what_is_quantised_on_load(way, tmp_path):
    assert save(tmp_path / "copy", *WAYS[way]) == 0
    saved = LlamaVision.from_pretrained(tmp_path / "copy", device="cpu")
    options = read_arguments(["--model", "x", "--out", "y", *WAYS[way]])
    quantize = build_quantization(options)
    made = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", quantize=quantize)
    expected = dict(made.model.named_parameters())
    found = dict(saved.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert saved.plan([saved.prompt([{"role": "user", "content": "?"}])]).weights == sum(
        tensor.nbytes for tensor in found.values()
    )


def test_the_copy_is_smaller_and_says_what_it_is(tmp_path):
    assert save(tmp_path / "copy", *WAYS["everything"]) == 0
    about = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert about["quant_method"] == "compressed-tensors"
    assert about["format"] == "mixed-precision"
    groups = about["config_groups"].values()
    assert {group["weights"]["num_bits"] for group in groups} == {4, 8}
    assert AutoConfig.from_pretrained(tmp_path / "copy").quantization_config
    sizes = [(d / "model.safetensors").stat().st_size for d in (EMBEDDED_MODEL, tmp_path / "copy")]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "what to save is not said; give --quantize int8 or int4"),
        (["--quantize", "none"], "what to save is not said"),
        (["--quantize", "nf4"], "quantize is 'nf4'; expected int8, int4 or none"),
        (["--quantize", "int4", "--quantize-group", "48"], "expected one of (32, 64, 128, 256)"),
        (["--quantize", "int4", "--quantize-group", "256"], "groups of 256 do not divide"),
        (["--quantize", "int8", "--adapter", "/nowhere/at/all"], "adapter"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path, capsys):
    assert save(tmp_path / "copy", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not (tmp_path / "copy").exists()


def test_nothing_is_written_over(tmp_path, capsys):
    (tmp_path / "mine").write_text("here")
    assert save(tmp_path, *WAYS["int8"]) == 2
    assert "is not empty; expected a new directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_copy_is_not_quantised_again(tmp_path, capsys):
    assert save(tmp_path / "copy", *WAYS["int8"]) == 0
    assert save(tmp_path / "again", *WAYS["int8"], model=tmp_path / "copy") == 2
    assert "is quantised already" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert save(tmp_path / "file" / "copy", *WAYS["int8"]) == 2
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_weights_of_any_type_are_saved(tmp_path):
    way = ["--quantize", "int4", "--quantize-group", "32"]
    assert save(tmp_path / "copy", *way, model=TINY) == 0
    model = LlamaVision.from_pretrained(tmp_path / "copy", device="cpu")
    assert model.model.dtype == torch.bfloat16
