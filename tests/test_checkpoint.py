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
from llama_vision.checkpoint.devices import choose_device, choose_dtype, parse_device
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


def ascii_name(value: object) -> str:
    """An id for a test, whatever the value is."""
    return ascii(value).partition(" at 0x")[0][:30]


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
    "an index that is no JSON": (index('{"weight_map": {'), [INDEX, "cannot be read as JSON"]),
    "an index without a map": (index("{}"), [INDEX, "damaged", "weight_map"]),
    "an index of numbers": (index('{"weight_map": {"a": 1}}'), [INDEX, "damaged"]),
    "an empty index": (index('{"weight_map": {}}'), ["216 missing"]),
    "no weights": (remove_weights, ["no model.safetensors"]),
    "a directory for a shard": (
        lambda d: [(d / FIRST).unlink(), (d / FIRST).mkdir()],
        ["lacks 1 of 2 shards", FIRST],
    ),
    "a directory for an index": (
        lambda d: [(d / INDEX).unlink(), (d / INDEX).mkdir()],
        [INDEX, "it is not a file"],
    ),
    "a link to nowhere for an index": (
        lambda d: [(d / INDEX).unlink(), (d / INDEX).symlink_to("nowhere")],
        [INDEX, "No such file"],
    ),
    "several files of no set": (
        lambda d: [(d / INDEX).unlink(), (d / SECOND).rename(d / "a.safetensors")],
        ["2 safetensors files and no model.safetensors.index.json", "a.safetensors"],
    ),
    "not all of a set": (
        lambda d: [(d / INDEX).unlink(), (d / SECOND).unlink()],
        ["lacks 1 of 2 shards", SECOND],
    ),
    **{
        f"an index with the file {name[:20]!a}": (
            index(json.dumps({"weight_map": {"a": name}})),
            [INDEX, "damaged: it lists the file"],
        )
        for name in (
            *("/etc/passwd", "../model.safetensors", "a/../../b.safetensors", "C:\\b.safetensors"),
            *("..\\b.safetensors", "model.bin", "", "\0.safetensors", "\x1b[2J.safetensors"),
        )
    },
    **{
        f"an index of {value!r}": (
            index(json.dumps({"weight_map": {"a": value}})),
            [INDEX, "damaged: it lists the file"],
        )
        for value in (None, [], {}, 1.5, True)
    },
    "a shard's name that is too long": (
        index(json.dumps({"weight_map": {"a": "a" * 5000 + ".safetensors"}})),
        ["lacks 1 of 1 shards"],
    ),
}


@pytest.mark.parametrize(("break_it", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_in_one_error(checkpoint, break_it, says):
    break_it(checkpoint)
    with pytest.raises(CheckpointError) as error:
        load(checkpoint)
    for words in says:
        assert words in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 600


@pytest.mark.parametrize(
    "names", [["weights.safetensors"], ["x-1-of-2", "x-2-of-2"], [FIRST, SECOND]]
)
def test_without_an_index_one_file_or_one_set_loads_equal(checkpoint, names):
    shards = [load_file(checkpoint / shard) for shard in (FIRST, SECOND)]
    remove_weights(checkpoint)
    tensors = [ORIGINAL] if len(names) == 1 else shards
    for name, held in zip(names, tensors, strict=True):
        save_file(held, checkpoint / f"{name.removesuffix('.safetensors')}.safetensors")
    save_file({"lora": torch.ones(2)}, checkpoint / "adapter_model.safetensors")
    assert_loaded(load(checkpoint))


def test_links_as_in_the_cache_of_the_hub_are_followed(checkpoint, tmp_path):
    (tmp_path / "blobs").mkdir()
    for shard in (FIRST, SECOND):
        (checkpoint / shard).rename(tmp_path / "blobs" / shard)
        (checkpoint / shard).symlink_to(f"../blobs/{shard}")
    assert_loaded(load(checkpoint))


def test_an_index_that_puts_a_tensor_into_another_shard_does_no_harm(checkpoint):
    about = json.loads((checkpoint / INDEX).read_text())
    about["weight_map"] |= {HEAD: FIRST, FC1: SECOND}
    (checkpoint / INDEX).write_text(json.dumps(about))
    assert_loaded(load(checkpoint))


def test_buffers_that_follow_from_the_config_are_not_read(checkpoint):
    stale = {
        f"language_model.model.{place}rotary_emb.{buffer}": torch.full((8,), torch.nan)
        for place in ("", "layers.0.self_attn.")
        for buffer in ("inv_freq", "original_inv_freq")
    }
    change(checkpoint / FIRST, stale)
    assert_loaded(load(checkpoint))


def header(about: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = about if isinstance(about, bytes) else json.dumps(about).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ODD_FILES = {
    "no length": b"\x01\x02",
    "a length past the end": header({}, length=1000),
    "the largest length": header({}, length=2**64 - 1),
    "a length of gigabytes": header({}, length=2**32),
    "no JSON": header(b"}{"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep JSON": header(b"[" * 100_000),
    "a list": header([]),
    "a number for a tensor": header({"a": 5}),
    "a negative size": header({"a": tensor(shape=[-2])}, bytes(8)),
    "sizes that overflow": header({"a": tensor(shape=[2**40, 2**40])}, bytes(8)),
    "a size of many digits": header(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"),
    "a size with a point": header({"a": tensor(shape=[2.0])}, bytes(8)),
    "a text for sizes": header({"a": tensor(shape="2")}, bytes(8)),
    "offsets past the end": header({"a": tensor(offsets=[0, 800])}, bytes(8)),
    "offsets backwards": header({"a": tensor(offsets=[8, 0])}, bytes(8)),
    "offsets that overlap": header({"a": tensor(), "b": tensor(offsets=[4, 12])}, bytes(12)),
    "a hole": header({"a": tensor(offsets=[4, 12])}, bytes(12)),
    "bytes of no tensor": header({"a": tensor()}, bytes(80)),
    "an unknown type": header({"a": tensor("X7")}, bytes(8)),
    "a number for a type": header({"a": tensor(7)}, bytes(8)),
    "metadata that are no table": header({"__metadata__": 5, "a": tensor()}, bytes(8)),
}


@pytest.mark.parametrize("data", ODD_FILES.values(), ids=ODD_FILES)
def test_an_odd_file_is_refused(checkpoint, data):
    (checkpoint / FIRST).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{FIRST} is damaged or cut short"):
        load(checkpoint)


@pytest.mark.parametrize("stored", ["BOOL", "U8", "I64", "F8_E4M3", "F8_E5M2"])
def test_a_stored_type_that_is_no_weight_is_named(checkpoint, stored):
    size = {"I64": 8}.get(stored, 1)
    change(checkpoint / FIRST, {FC1: None})
    about = {FC1: tensor(stored, [256], [0, 256 * size])}
    (checkpoint / "more.safetensors").write_bytes(header(about, bytes(256 * size)))
    weight_map = dict.fromkeys("abc", FIRST) | {"d": SECOND, "e": "more.safetensors"}
    (checkpoint / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"unsupported type: {FC1} \({stored}\)"):
        load(checkpoint)


@pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_stored_number_that_is_not_finite_is_damage(checkpoint, stored, value):
    odd = torch.zeros(256, dtype=stored)
    odd[77] = value
    change(checkpoint / FIRST, {FC1: odd})
    with pytest.raises(
        CheckpointError, match=f"{FC1} in {FIRST} is not finite: the file is damaged"
    ):
        load(checkpoint)


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e5, torch.float16, "not finite in float16; use bfloat16"),
        (-1e38, torch.float16, "not finite in float16; use bfloat16"),
        (3.4e38, torch.float16, "not finite in float16; use float32"),
        (3.4e38, torch.bfloat16, "not finite in bfloat16; use float32"),
    ],
)
def test_a_number_out_of_a_type_s_range_blames_the_type(checkpoint, value, dtype, says):
    change(checkpoint / FIRST, {FC1: torch.full((256,), value)})
    with pytest.raises(CheckpointError, match=f"{FC1} in {FIRST} is {says}"):
        load(checkpoint, dtype)


def test_numbers_whose_sum_alone_is_too_large_load(checkpoint):
    change(checkpoint / FIRST, {FC1: torch.full((256,), 60_000.0)})
    assert dict(load(checkpoint, torch.float16).named_parameters())


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
    """Meta's own, which can be converted, are in `test_unsupported`."""
    remove_weights(checkpoint)
    torch.save({}, checkpoint / pickle)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(
        CheckpointError, match=rf"{pickle}.*(never loaded|weights/convert_meta\.py)"
    ):
        load(checkpoint)


ODD_VALUES = [None, 5, True, 1.5, [], {}, b"cpu", object(), float, "a" * 10**5, "\x1b[2J", "\ud800"]
DEVICES = ["gpu", "cuda:x", "meta", "", "cpu:cpu", "cuda:-1", f"cuda:{10**30}", "cuda:01", "CPU"]


@pytest.mark.parametrize("name", [*DEVICES, *ODD_VALUES, torch.device("meta")], ids=ascii_name)
def test_an_unknown_device_is_named(name):
    with pytest.raises(SettingError, match=r"device .* is unknown; expected auto, cpu") as error:
        choose_device(name)
    assert str(error.value).isprintable()


def test_a_device_of_torch_is_taken():
    assert choose_device(torch.device("cpu")) == parse_device(torch.device("cpu"))


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


@pytest.mark.parametrize("asked", ["float64", "half", "", torch.int8, *ODD_VALUES], ids=ascii_name)
def test_another_type_is_named(asked):
    with pytest.raises(SettingError, match=r"dtype .* is unknown; expected auto, float32"):
        choose_dtype(asked, torch.bfloat16)
