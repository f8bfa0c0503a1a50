"""Write a quantised copy, which loads without the original and to the same bits.

The layouts are those of compressed-tensors: pack-quantized for int4, int-quantized for int8, in one
safetensors file. It is written as it is read, some rows at a time: no model is built.
"""

import ctypes
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from llama_vision.checkpoint.adapter import Adapter
from llama_vision.checkpoint.files import BUFFER_BYTES, SINGLE, CheckpointError, Reader
from llama_vision.checkpoint.loading import Source, find_weights
from llama_vision.checkpoint.names import official_names
from llama_vision.config import Config
from llama_vision.model.model import model_without_weights
from llama_vision.model.quantized import QuantizedLinear
from llama_vision.quantization import Format
from llama_vision.reading import read_json, shown

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
COPIED = ("generation_config.json", "preprocessor_config.json", "chat_template.json")
COPIED_PATTERNS = ("tokenizer*", "special_tokens_map.json", "chat_template*")

Header = dict[str, tuple[str, list[int]]]
"""Of each tensor its type, as safetensors names it, and its shape."""


def save_quantized(
    directory: Path, config: Config, out: Path, *, dtype: torch.dtype, adapter: Adapter | None
) -> int:
    """Write a checkpoint's copy with the quantization of `config`; returns the weights' bytes.

    Args:
        out: a directory that is empty or not there yet; `config.json` is written last, so that a
            copy that was cut short is none.

    Raises:
        CheckpointError: the weights cannot be read, see `loading`, or `out` cannot be written.
    """
    found = find_weights(directory, config)
    names = {ours: official for official, ours in official_names(list(found)).items()}
    forms = {
        f"{name}.weight": module.form
        for name, module in model_without_weights(config).named_modules()
        if isinstance(module, QuantizedLinear)
    }
    deltas, reader = {} if adapter is None else adapter.deltas, Reader(BUFFER_BYTES)
    sources = [Source(ours, one, reader, deltas.get(ours)) for ours, one in found.items()]
    about = read_json(directory / "config.json", CheckpointError)
    about |= {"quantization_config": describe(forms, names), "torch_dtype": "bfloat16"}
    try:
        if out.exists() and any(out.iterdir()):
            raise CheckpointError(f"{shown(out)} is not empty; expected a new directory")
        out.mkdir(parents=True, exist_ok=True)
        size = _save_weights(out, sources, names, forms, dtype)
        _copy_others(directory, out)
        (out / "config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{shown(out)} cannot be written: {error.strerror}") from None
    return size


def _save_weights(
    out: Path,
    sources: list[Source],
    names: dict[str, str],
    forms: dict[str, Format],
    dtype: torch.dtype,
) -> int:
    """One file, which has its name when it is whole; the bytes of its data."""
    header: Header = {}
    for source in sources:
        form = forms.get(source.name)
        header |= _declared(names[source.name], source.stored.shape, form, TYPES[dtype])
    part = out / f"{SINGLE}.part"
    with part.open("wb") as file:
        size = _write_header(file, header)
        for source in tqdm(sources, desc="saving", unit="tensor", disable=None, leave=False):
            for tensor in _tensors(source, forms.get(source.name), dtype):
                _write(file, tensor)
    part.rename(out / SINGLE)
    return size


def _declared(name: str, shape: tuple[int, ...], form: Format | None, plain: str) -> Header:
    """The tensors that one parameter becomes, in the order in which they are written."""
    if form is None:
        return {name: (plain, list(shape))}
    outputs, inputs = shape
    if form.bits == 8:
        return {name: ("I8", [outputs, inputs]), f"{name}_scale": ("BF16", [outputs, 1])}
    return {
        f"{name}_packed": ("I32", [outputs, inputs // 8]),
        f"{name}_scale": ("BF16", [outputs, inputs // form.group]),
        f"{name}_shape": ("I64", [2]),
    }


def _write_header(file: IO[bytes], header: Header) -> int:
    """A length in 8 bytes, and so much JSON; returns the bytes of the data to come."""
    widths = {"F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "I64": 8}
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (kind, shape) in header.items():
        end = offset + math.prod(shape) * widths[kind]
        about[name] = {"dtype": kind, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(about).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    return offset


def _tensors(source: Source, form: Format | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """What one parameter becomes, piece by piece, as `_declared` says."""
    shape = source.stored.shape
    rows, scales = shape[0] if shape else 1, []
    for start, stop in source.pieces(0, rows, math.prod(shape[1:])):
        if form is None:
            yield source.checked_rows(start, stop, dtype)
            continue
        q, scale = source.integers(start, stop, None, form)
        scales.append(scale)
        # Eight numbers in a word, the first in its lowest bits: so many bytes of two each.
        yield q if form.bits == 8 else (q[:, ::2] + 8 | (q[:, 1::2] + 8) << 4)
    yield from scales
    if form is not None and form.bits == 4:
        yield torch.tensor(shape)


def _write(file: IO[bytes], tensor: Tensor) -> None:
    tensor = tensor.contiguous()
    if tensor.nbytes:
        file.write((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr()))


def _copy_others(directory: Path, out: Path) -> None:
    """The tokenizer, and what else stands beside the weights."""
    others = [directory / name for name in COPIED]
    for pattern in COPIED_PATTERNS:
        others += directory.glob(pattern)
    for path in {path for path in others if path.is_file()}:
        shutil.copyfile(path, out / path.name)


def describe(forms: dict[str, Format], names: dict[str, str]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors that says which matrix has which format."""
    groups: dict[str, Any] = {}
    for form in sorted(set(forms.values()), key=lambda form: form.bits):
        modules = [names[ours].removesuffix(".weight") for ours, f in forms.items() if f == form]
        weights = {
            "num_bits": form.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if form.group else "channel",
            "group_size": form.group or None,
        }
        layout = "pack-quantized" if form.bits == 4 else "int-quantized"
        targets = sorted(modules)
        group = {"format": layout, "targets": targets, "weights": weights}
        groups[f"group_{len(groups)}"] = group
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }
