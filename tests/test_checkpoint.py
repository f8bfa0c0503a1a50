"""Checkpoints: the proof that every tensor is used once, and where and as what it is loaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.devices import choose_device, choose_dtype
from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.loading import BUFFER_BYTES, load_model
from llama_vision.checkpoint.names import official_names
from llama_vision.config import DTYPES
from llama_vision.errors import SettingError
from llama_vision.model.model import LlamaVisionModel

ROOT = Path(__file__).parent.parent
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
INDEX = "model.safetensors.index.json"
FC1 = "vision_model.transformer.layers.0.mlp.fc1.bias"  # in the first, [256]
HEAD = "language_model.lm_head.weight"  # in the second, [512, 64]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> LlamaVisionModel:
    config = read_config(directory)
    return load_model(directory, config, device=torch.device("cpu"), dtype=dtype)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor in a directory's files, by its name there."""
    return {k: v for shard in directory.glob("*.safetensors") for k, v in load_file(shard).items()}


def convert(directory: Path, edit) -> None:
    """Replace every tensor of a directory's shards by `edit(tensor)`."""
    for shard in (directory / FIRST, directory / SECOND):
        save_file({name: edit(tensor) for name, tensor in load_file(shard).items()}, shard)


def change(shard: Path, new: dict[str, Tensor | None]) -> None:
    """Put tensors into a shard; None takes one out."""
    tensors = load_file(shard) | new
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)


def remove_weights(directory: Path) -> None:
    for file in (FIRST, SECOND, INDEX):
        (directory / file).unlink()


def index(text: str):
    return lambda directory: (directory / INDEX).write_text(text)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "checkpoint"))


ORIGINAL = tensors_of(TINY)


def assert_loaded(model: LlamaVisionModel, expected: dict[str, Tensor] = ORIGINAL) -> None:
    """Every parameter equals its tensor bit for bit, by the name table of 2024."""
    parameters = dict(model.named_parameters())
    names = official_names(list(parameters))
    assert names.keys() == expected.keys()
    for official, ours in names.items():
        assert torch.equal(parameters[ours], expected[official]), official


def test_every_parameter_is_its_tensor_in_the_files():
    assert_loaded(load(TINY))


def test_a_single_file_loads_equal(checkpoint):
    remove_weights(checkpoint)
    save_file(ORIGINAL, checkpoint / "model.safetensors")
    assert_loaded(load(checkpoint))


def test_names_of_newer_files_load_equal(checkpoint):
    newer = (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    )
    for shard in (FIRST, SECOND):
        tensors = {}
        for name, tensor in load_file(checkpoint / shard).items():
            old, new = next(row for row in newer if name.startswith(row[0]))
            tensors[new + name.removeprefix(old)] = tensor
        save_file(tensors, checkpoint / shard)
    assert_loaded(load(checkpoint))


def test_a_random_checkpoint_comes_back_bit_for_bit(checkpoint):
    convert(checkpoint, torch.randn_like)
    assert_loaded(load(checkpoint), tensors_of(checkpoint))


def test_a_tensor_larger_than_the_buffer_loads_in_pieces(checkpoint, monkeypatch):
    monkeypatch.setattr("llama_vision.checkpoint.loading.BUFFER_BYTES", 1000)
    assert BUFFER_BYTES > 1000
    assert_loaded(load(checkpoint))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("stored", [*DTYPES.values(), torch.float64], ids=str)
def test_stored_types_are_converted_to_the_one_asked_for(checkpoint, stored, dtype):
    convert(checkpoint, lambda tensor: tensor.to(stored))
    assert_loaded(load(checkpoint, dtype), {k: v.to(stored).to(dtype) for k, v in ORIGINAL.items()})


def test_parameters_are_filled_frozen_and_the_model_is_in_eval_mode():
    model = load(TINY)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


def test_a_loaded_model_does_not_depend_on_its_files(checkpoint):
    model = load(checkpoint)
    for shard in (FIRST, SECOND):
        (checkpoint / shard).write_bytes(b"")
    assert_loaded(model)


def test_loading_imports_no_compiler():
    """The meta device's random fill would import torch._dynamo: a second of every start."""
    code = (
        "import sys; from llama_vision import LlamaVision; "
        f"LlamaVision.from_pretrained({str(TINY)!r}, device='cpu'); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


DAMAGE = {
    "a missing shard": (lambda d: (d / FIRST).unlink(), ["lacks 1 of 2 shards", FIRST]),
    "a truncated shard": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-100]),
        [SECOND, "cut short"],
    ),
    "an empty shard": (lambda d: (d / SECOND).write_bytes(b""), [SECOND, "0 bytes"]),
    "a shard that is something else": (
        lambda d: (d / FIRST).write_bytes(b"<html>please log in</html>" * 100),
        [FIRST, "damaged"],
    ),
    "a misshapen tensor": (
        lambda d: change(d / SECOND, {HEAD: torch.ones(511, 64)}),
        [f"1 misshapen: {HEAD} [511, 64] instead of [512, 64]"],
    ),
    "a missing tensor": (lambda d: change(d / SECOND, {HEAD: None}), [f"1 missing: {HEAD}"]),
    "an unexpected tensor": (
        lambda d: change(d / SECOND, {"language_model.extra": torch.ones(2)}),
        ["1 unexpected: language_model.extra"],
    ),
    "a tensor twice": (
        lambda d: [change(d / shard, {"twice": torch.ones(2)}) for shard in (FIRST, SECOND)],
        [f"twice is in both {FIRST} and {SECOND}"],
    ),
    "an integer tensor": (
        lambda d: change(d / FIRST, {FC1: torch.ones(256, dtype=torch.int8)}),
        [f"1 of an unsupported type: {FC1} (I8)"],
    ),
    "an index that is no JSON": (index('{"weight_map": {'), [INDEX, "damaged"]),
    "an index without a map": (index("{}"), [INDEX, "damaged", "weight_map"]),
    "an index of numbers": (index('{"weight_map": {"a": 1}}'), [INDEX, "damaged"]),
    "an empty index": (index('{"weight_map": {}}'), ["216 missing"]),
    "no weights": (remove_weights, ["no model.safetensors"]),
}


@pytest.mark.parametrize(("break_it", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_one_error(checkpoint, break_it, says):
    break_it(checkpoint)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    for words in says:
        assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_everything_wrong_with_the_tensors_is_in_the_same_error(checkpoint):
    integers = torch.ones(256, dtype=torch.int32)
    change(checkpoint / FIRST, {"extra": torch.ones(1), FC1: integers})
    change(checkpoint / SECOND, {HEAD: torch.ones(3), "multi_modal_projector.bias": None})
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    for kind in ("1 missing", "1 unexpected", "1 misshapen", "1 of an unsupported type"):
        assert kind in str(error.value)


def test_a_config_of_other_sizes_is_told(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"30 misshapen: .* \[128, 64\] instead of \[136, 64"):
        load(checkpoint)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_loaded(checkpoint, pickle, monkeypatch):
    remove_weights(checkpoint)
    torch.save({}, checkpoint / pickle)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(CheckpointError, match=rf"{pickle}.*never loaded.*weights/convert_meta\.py"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "cpu:cpu"])
def test_an_unknown_device_is_named(name):
    with pytest.raises(SettingError, match=rf"device '{name}' is unknown; expected auto, cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_an_absent_device_is_named(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingError, match=rf"device '{name}' was asked for.*use --device cpu"):
        choose_device(name)


def test_a_cuda_device_past_the_last_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingError, match="device 'cuda:2' was asked for and there are 2 CUDA"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_automatic_device(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device("auto").type == chosen


@pytest.mark.parametrize("asked", ["float16", torch.float16, "torch.float16", "auto"], ids=repr)
def test_a_type_is_taken_by_name_or_as_it_is_or_as_published(asked):
    chosen = torch.bfloat16 if asked == "auto" else torch.float16
    assert choose_dtype(asked, torch.bfloat16) == chosen


@pytest.mark.parametrize("asked", ["float64", "int8", "half", "", torch.int8], ids=repr)
def test_another_type_is_named(asked):
    with pytest.raises(SettingError, match=r"dtype .* is unknown; expected auto, float32"):
        choose_dtype(asked, torch.bfloat16)
