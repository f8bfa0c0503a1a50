"""Quantised copies: what bitsandbytes and compressed-tensors wrote is read as they read it."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import TINY, case_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, MllamaForConditionalGeneration

from llama_vision import LlamaVision
from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.files import CheckpointError, Reader, read_headers
from llama_vision.checkpoint.layouts import ENDS, find_stored
from llama_vision.checkpoint.loading import find_weights
from llama_vision.checkpoint.names import match_names, official_names
from llama_vision.checkpoint.stored import Plain, Stored
from llama_vision.checkpoint.unsupported import declared_format
from llama_vision.quantization import INT8, Format

LEFT = ["re:.*vision_model.*", "re:.*lm_head", "re:.*multi_modal_projector"]
LEFT_BY_NAME = ["model.vision_model", "model.multi_modal_projector", "lm_head"]


def scheme(preset: str, group: int | None = None, **weights: object) -> QuantizationScheme:
    """One of compressed-tensors' own, of groups that a tiny matrix has."""
    made = preset_name_to_scheme(preset, ["Linear"])
    if group:
        weights["group_size"] = group
    made.weights = made.weights.model_copy(update=weights)
    return made


BITSANDBYTES = {
    "nf4": ({"bnb_4bit_quant_type": "nf4"}, Format(4, 32)),
    "nf4 nested": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        Format(4, 32),
    ),
    "nf4 as bfloat16": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
        Format(4, 32),
    ),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, Format(4, 32)),
    "LLM.int8": ({"load_in_8bit": True}, INT8),
}
COMPRESSED = {
    "FP8_DYNAMIC": (lambda: scheme("FP8_DYNAMIC"), INT8),
    "FP8": (lambda: scheme("FP8"), INT8),
    "W8A8": (lambda: scheme("W8A8"), INT8),
    "W8A16": (lambda: scheme("W8A16", strategy="channel", group_size=None), INT8),
    "W4A16": (lambda: scheme("W4A16", 32), Format(4, 32)),
    "W4A16_ASYM": (lambda: scheme("W4A16_ASYM", 32), Format(4, 32)),
}
KINDS = BITSANDBYTES | COMPRESSED
LOSSLESS = {"W8A8", "W8A16", "W4A16"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def set_scales(module: nn.Module) -> None:
    """What an observer of compressed-tensors makes of the weights."""
    about = module.quantization_scheme.weights
    weight, dims = module.weight.data, (1,)
    if about.strategy == "group":
        weight, dims = weight.unflatten(1, (-1, about.group_size)), (2,)
    if about.strategy == "tensor":
        dims = (0, 1)
    low, high = weight.amin(dims), weight.amax(dims)
    scale, zero = calculate_qparams(low, high, about)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight.dtype)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)


def write(kind: str, directory: Path, dtype: torch.dtype) -> None:
    """The tiny checkpoint, its text blocks quantised, as the library itself saves it."""
    if kind in BITSANDBYTES:
        about = {"load_in_4bit": "load_in_8bit" not in BITSANDBYTES[kind][0]}
        about |= BITSANDBYTES[kind][0] | {"llm_int8_skip_modules": LEFT_BY_NAME}
        model = MllamaForConditionalGeneration.from_pretrained(
            TINY, quantization_config=BitsAndBytesConfig(**about), dtype=dtype, device_map="cpu"
        )
        model.save_pretrained(directory)
        return
    model = MllamaForConditionalGeneration.from_pretrained(TINY, dtype=dtype)
    about = QuantizationConfig(config_groups={"group_0": COMPRESSED[kind][0]()}, ignore=LEFT)
    apply_quantization_config(model, about)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            set_scales(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> Callable[[str, torch.dtype], Path]:
    """Directories of the kinds, each written once."""

    @cache
    def of(kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        directory = tmp_path_factory.mktemp("copy")
        write(kind, directory, dtype)
        return directory

    return of


def module_tensors(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Those of one module, by the ends of their names."""
    module = name.removesuffix("weight")
    return {end: tensors[module + end] for end in ENDS if module + end in tensors}


def library_weight(kind: str, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix as its library makes it of the tensors in the file."""
    if kind == "LLM.int8":
        return int8_vectorwise_dequant(parts["weight"], parts["SCB"]).to(dtype)
    if kind in BITSANDBYTES:
        about = {end.removeprefix("weight."): t for end, t in parts.items() if end != "weight"}
        state = QuantState.from_dict(about, device=torch.device("cpu"))
        state.dtype = dtype
        return dequantize_4bit(parts["weight"].view(torch.uint8), state)
    made = COMPRESSED[kind][0]()
    layout = "pack-quantized" if "weight_packed" in parts else "naive-quantized"
    parts = {end: t.to(dtype) if end == "weight_scale" else t for end, t in parts.items()}
    return BaseCompressor.get_value_from_registry(layout).decompress(parts, made)["weight"]


def stored_of(directory: Path) -> dict[str, Stored]:
    return find_weights(directory, read_config(directory))


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_read_as(stored: Stored, want: Tensor) -> None:
    """All rows, several pieces of them, and some columns are equal to the bit."""
    reader, (height, width) = Reader(), want.shape
    pieces = [(0, height), (0, 1), (height // 3, height // 2 + 1), (height - 1, height)]
    for start, stop in pieces:
        assert torch.equal(stored.rows(reader, start, stop).float(), want[start:stop])
        for first, last in ((0, width // 2), (width // 3, width // 3 + 5), (width - 1, width)):
            rows = stored.rows(reader, start, stop, (first, last))
            assert torch.equal(rows.float(), want[start:stop, first:last])


def quantised(directory: Path) -> Iterator[tuple[Stored, dict[str, Tensor]]]:
    """Each matrix that is, with the tensors that belong to it."""
    tensors = tensors_of(directory)
    for stored in stored_of(directory).values():
        if stored.form is not None:
            yield stored, module_tensors(tensors, stored.names[0].rsplit(".", 1)[0] + ".weight")


@every_kind
def test_every_matrix_is_read_as_its_library_reads_it(kind, copies):
    found = list(quantised(copies(kind)))
    assert len(found) == 70  # seven in each of ten text blocks, none elsewhere
    for stored, parts in found:
        assert stored.form == KINDS[kind][1]
        assert stored.library.startswith("bits" if kind in BITSANDBYTES else "compressed-tensors ")
        assert_read_as(stored, library_weight(kind, parts, torch.float32))


@every_kind
def test_in_bfloat16_it_is_the_library_s_own_too(kind, copies):
    for stored, parts in quantised(copies(kind)):
        rows = stored.rows(Reader(), 0, stored.shape[0]).to(torch.bfloat16)
        assert torch.equal(rows, library_weight(kind, parts, torch.bfloat16))


@every_kind
def test_what_is_not_quantised_is_read_as_it_is(kind, copies):
    directory = copies(kind)
    tensors = tensors_of(directory)
    stored = [one for one in stored_of(directory).values() if isinstance(one, Plain)]
    assert len(stored) == 216 - 70
    for one in stored:
        assert torch.equal(one.rows(Reader(), 0, one.shape[0]), tensors[one.names[0]])
        assert one.integers(Reader(), 0, 1) is None


@every_kind
def test_integers_are_those_of_the_file(kind, copies):
    for stored, _ in quantised(copies(kind)):
        found = stored.integers(Reader(), 0, stored.shape[0])
        if kind not in LOSSLESS | {"LLM.int8"}:
            assert found is None
            continue
        assert_integers(stored, rounded=kind == "LLM.int8")


def assert_integers(stored: Stored, rounded: bool = False) -> None:
    """Integers times scales are the rows, of pieces and of slices of whole groups too."""
    height, width = stored.shape
    group, reader = stored.form.group, Reader()
    middle = (width // 2) // (group or 1) * (group or 1)
    for start, stop in ((0, height), (1, 4), (height - 1, height)):
        for columns in (None, (0, middle), (middle, width)):
            if columns and columns[0] == columns[1]:
                continue
            rows = stored.rows(reader, start, stop, columns).clone()
            integers, scales = stored.integers(reader, start, stop, columns)
            assert integers.dtype == torch.int8
            assert scales.dtype == torch.bfloat16
            assert scales.shape == (stop - start, rows.shape[1] // group if group else 1)
            each = scales.float().repeat_interleave(group, 1) if group else scales.float()
            if rounded:
                torch.testing.assert_close(integers * each, rows, rtol=2**-8, atol=0)
            else:
                assert torch.equal(integers * each, rows)


@every_kind
def test_config_json_tells_the_format_beforehand(kind, copies):
    data = json.loads((copies(kind) / "config.json").read_text())
    assert declared_format(data) == KINDS[kind][1]


@every_kind
def test_logits_are_those_of_the_dequantised_weights(kind, copies, tmp_path):
    directory = copies(kind, torch.float32)
    tensors = tensors_of(directory)
    plain = {
        one.names[0]: tensors[one.names[0]]
        for one in stored_of(directory).values()
        if isinstance(one, Plain)
    }
    for stored, parts in quantised(directory):
        name = stored.names[0].rsplit(".", 1)[0] + ".weight"
        plain[name] = library_weight(kind, parts, torch.float32)
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    save_file(plain, tmp_path / "model.safetensors")
    (prompt,) = case_prompts("image_first")
    want, got = (
        LlamaVision.from_pretrained(source, device="cpu", dtype="float32", **how).logits(prompt)
        for source, how in ((tmp_path, {}), (directory, {"quantize": "none"}))
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# --- one matrix, of larger and odder sizes --------------------------------------------------------


def one_matrix(tensors: dict[str, Tensor], shape: tuple[int, int], directory: Path) -> Stored:
    """How it is stored in a file of its own."""
    path = directory / "model.safetensors"
    save_file({f"x.{end}": tensor.contiguous() for end, tensor in tensors.items()}, path)
    return find_stored("x.weight", shape, read_headers([path]), Reader())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((96, 512), 64), ((7, 100), 64), ((33, 77), 64), ((5, 4096), 1024), ((1, 3), 64)],
)
def test_blocks_run_over_rows_of_any_width(shape, size, nested, tmp_path):
    """96 · 512 has 768 blocks, three of the nested ones; 77 weights end inside a byte."""
    torch.manual_seed(0)
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(shape), blocksize=size, quant_type="nf4", compress_statistics=nested
    )
    parts = {f"weight.{end}": t for end, t in state.as_dict(packed=True).items()}
    stored = one_matrix({"weight": packed} | parts, shape, tmp_path)
    assert_read_as(stored, dequantize_4bit(packed, state))
    assert stored.form == (Format(4, 32) if shape[1] % 32 == 0 else INT8)


def packed_matrix(
    shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16, preset: str = "W4A16", **weights
) -> tuple[dict[str, Tensor], QuantizationScheme]:
    """A random one as compressed-tensors stores it."""
    torch.manual_seed(0)
    how = scheme(preset, **weights)
    linear = nn.Linear(*reversed(shape), bias=False, dtype=dtype)
    apply_quantization_config(
        nn.Sequential(linear), QuantizationConfig(config_groups={"group_0": how})
    )
    set_scales(linear)
    local = {name: tensor.data for name, tensor in linear.named_parameters()}
    return BaseCompressor.get_value_from_registry("pack-quantized").compress(local, how), how


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A16"])
@pytest.mark.parametrize(
    ("shape", "group", "ours"),
    [
        ((48, 1024), 128, 128),
        ((13, 1024), 32, 32),
        ((20, 1024), 512, 256),
        ((9, 192), None, 64),
        ((9, 64), 16, 0),
        ((9, 76), None, 0),
    ],
)
def test_packed_groups_of_any_size(shape, group, ours, preset, dtype, tmp_path):
    strategy = "group" if group else "channel"
    parts, how = packed_matrix(shape, dtype, preset, group_size=group, strategy=strategy)
    stored = one_matrix(parts, shape, tmp_path)
    exact = {end: t.float() if end == "weight_scale" else t for end, t in parts.items()}
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    assert_read_as(stored, codec.decompress(exact, how)["weight"])
    if preset == "W8A16":
        assert stored.form == INT8
        lossless = group is None
    else:
        assert stored.form == (INT8 if shape[1] % 32 else Format(4, ours or 32))
        lossless = ours > 0 and preset == "W4A16"
    if lossless:
        assert_integers(stored, rounded=dtype != torch.bfloat16)
    else:
        assert stored.integers(Reader(), 0, 1) is None


# --- damage ---------------------------------------------------------------------------------------

DOWN = "language_model.model.layers.0.mlp.down_proj."  # [64, 128]
NF4_STATE = "weight.quant_state.bitsandbytes__nf4"


def text(about: object) -> Tensor:
    """JSON as a tensor of bytes."""
    data = about if isinstance(about, bytes) else json.dumps(about).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


STATE = {
    "shape": [64, 128], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.1,
    "quant_type": "nf4", "dtype": "bfloat16",
}  # fmt: skip
SHORT = torch.ones(3)
DAMAGE = [
    ("nf4 nested", {NF4_STATE: None}, f"1 missing: {DOWN}{NF4_STATE}"),
    ("nf4 nested", {"weight": None}, f"1 missing: {DOWN}weight"),
    ("nf4 nested", {"weight.quant_map": None}, f"1 missing: {DOWN}weight.quant_map"),
    ("nf4 nested", {"weight.nested_absmax": None}, f"missing: {DOWN}weight.nested_absmax"),
    ("nf4 nested", {"weight.quant_map": SHORT}, "weight.quant_map [3] instead of [16]"),
    ("nf4 nested", {"weight.nested_absmax": SHORT}, "nested_absmax [3] instead of [1]"),
    ("nf4 nested", {"weight.absmax": SHORT}, "weight.absmax [3] instead of [128]"),
    ("nf4 nested", {"weight.absmax": SHORT.half()}, "unsupported type: " + DOWN),
    ("nf4 nested", {"weight": text(b"12345")}, "weight [5] (U8) instead of 4096 bytes"),
    ("nf4 nested", {"weight.absmax": torch.ones(128)}, "2 unexpected: "),
    ("nf4 nested", {"SCB": torch.ones(64)}, f"1 unexpected: {DOWN}SCB"),
    *(
        ("nf4 nested", {NF4_STATE: text(state)}, f"1 damaged: {DOWN}{NF4_STATE} ({says}")
        for state, says in (
            (b"\xff\x1b[2J", r"b'\xff\x1b[2J' is no JSON"),
            (b"{", "b'{' is no JSON"),
            (b"[" * 3000, "b'[[[[["),
            (b" " * 5000, "[5000] bytes, expected up to 4096"),
            ([], "[] is no object"),
            *(
                (STATE | {field: value}, f"{field} is {value!r}")
                for field, value in (
                    *(("blocksize", value) for value in (None, 0, 16, 65, 64.5, True, "64", 10**6)),
                    *(("shape", value) for value in (None, [64], [64, 128, 1], [64, -1], "ab")),
                    *(("nested_blocksize", value) for value in (128, None)),
                    *(("nested_offset", value) for value in (None, "0", True)),
                )
            ),
            (
                {k: v for k, v in STATE.items() if k != "nested_blocksize"},
                "nested_blocksize is missing",
            ),
        )
    ),
    (
        "nf4 nested",
        {NF4_STATE: text(STATE | {"shape": [128, 64]})},
        f"1 misshapen: {DOWN}weight [128, 64] instead of [64, 128]",
    ),
    ("LLM.int8", {"SCB": None}, f"1 missing: {DOWN}SCB"),
    ("LLM.int8", {"SCB": SHORT}, f"1 misshapen: {DOWN}SCB [3] instead of [64]"),
    (
        "LLM.int8",
        {"weight_format": torch.tensor(1, dtype=torch.uint8)},
        f"1 damaged: {DOWN}weight_format (an order of tiles",
    ),
    ("FP8_DYNAMIC", {"weight_scale": None}, f"1 missing: {DOWN}weight_scale"),
    ("FP8_DYNAMIC", {"weight_scale": SHORT}, f"1 misshapen: {DOWN}weight_scale [3] instead of"),
    ("FP8_DYNAMIC", {"weight": torch.ones(64, 128)}, f"unsupported type: {DOWN}weight (F32)"),
    ("W8A8", {"weight": torch.ones(64 * 128).char()}, f"{DOWN}weight [8192] instead of [N, K]"),
    ("W8A8", {"weight_zero_point": torch.ones(64, 1).char()}, "1 unexpected: " + DOWN),
    ("W4A16", {"weight_shape": None}, f"1 missing: {DOWN}weight_shape"),
    ("W4A16", {"weight_scale": None}, f"1 missing: {DOWN}weight_scale"),
    ("W4A16", {"weight_scale": torch.ones(64, 3)}, "[64, 3] instead of [64, a divisor of 128]"),
    ("W4A16", {"weight_scale": torch.ones(64, 0)}, "[64, 0] instead of [64, a divisor of 128]"),
    ("W4A16", {"weight_g_idx": torch.ones(128).int()}, f"1 unexpected: {DOWN}weight_g_idx"),
    ("W4A16", {"weight": torch.ones(64, 128)}, f"1 unexpected: {DOWN}weight"),
    *(
        ("W4A16", {"weight_shape": torch.tensor(shape)}, f"{DOWN}weight_packed [64, 16] instead")
        for shape in ([64, 64 * 4], [128, 128], [64, -128], [64, 0])
    ),
    ("W4A16_ASYM", {"weight_zero_point": SHORT.int()}, "weight_zero_point [3] instead of [8, 4]"),
]


@pytest.mark.parametrize(("kind", "change", "says"), DAMAGE)
def test_damage_is_told_by_name_in_one_line(kind, change, says, copies, tmp_path):
    tensors = {k: v for k, v in tensors_of(copies(kind)).items() if k.startswith(DOWN)}
    tensors |= {DOWN + end: tensor for end, tensor in change.items()}
    path = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    ours = official_names(["text.layers.0.mlp.down_proj.weight"])[f"{DOWN}weight"]
    with pytest.raises(CheckpointError) as error:
        match_names({ours: (64, 128)}, read_headers([path]))
    message = str(error.value)
    assert says in message
    assert DOWN in message
    assert message.isprintable()
    assert len(message) <= 600


def test_unused_scales_of_activations_are_known(copies):
    """FP8 with scales of its own for the activations, which are not quantised here."""
    names = [name for stored in stored_of(copies("FP8")).values() for name in stored.names]
    assert sum(name.endswith("input_scale") for name in names) == 70
    assert len(set(names)) == len(names)
