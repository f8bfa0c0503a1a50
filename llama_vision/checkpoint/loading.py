"""Official files into modules: built on the meta device, filled piece by piece.

Each parameter goes the same way: some rows as they are stored, what an adapter makes of them, this
device's part of them; then cast, or rounded to integers and packed. Nothing is ever held of a
matrix but those rows and what becomes of it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from llama_vision.checkpoint.adapter import Adapter, Delta
from llama_vision.checkpoint.files import (
    BUFFER_BYTES,
    CheckpointError,
    Reader,
    find_shards,
    read_headers,
)
from llama_vision.checkpoint.names import match_names
from llama_vision.checkpoint.stored import Stored
from llama_vision.config import Config, divided
from llama_vision.errors import printable
from llama_vision.model import parallel
from llama_vision.model.model import LlamaVisionModel, model_without_weights
from llama_vision.model.quantized import PACKED_ROWS, Integers, QuantizedLinear, quantise
from llama_vision.quantization import Format

Shapes = dict[str, tuple[int, ...]]


def full_shapes(config: Config) -> Shapes:
    """Of every parameter of the undivided model without quantisation."""
    plain = replace(divided(config, 1), quantization=None)
    return {name: tuple(p.shape) for name, p in model_without_weights(plain).named_parameters()}


def find_weights(directory: Path, config: Config) -> dict[str, Stored]:
    """How every parameter is stored, in the order of the files; no numbers are read.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`, `match_names`.
    """
    entries = read_headers(find_shards(directory))
    stored = match_names(full_shapes(config), entries)
    first = {name: entries[one.names[0]] for name, one in stored.items()}
    order = sorted(stored, key=lambda name: (first[name].shard, first[name].offset))
    return {name: stored[name] for name in order}


def load_model(
    directory: Path,
    config: Config,
    *,
    device: torch.device,
    dtype: torch.dtype,
    adapter: Adapter | None = None,
) -> LlamaVisionModel:
    """Build the model on the meta device and fill it shard by shard on the target device.

    The files are read, not mapped: afterwards the model does not depend on them.

    Raises:
        CheckpointError: see `find_weights`; or a tensor holds what is not finite, as it is stored
            or in the type asked for.
    """
    model = model_without_weights(config)
    found = find_weights(directory, config)
    deltas = {} if adapter is None else adapter.deltas
    reader = Reader(BUFFER_BYTES)
    with tqdm(total=len(found), desc="loading", unit="tensor", disable=None, leave=False) as bar:
        for name, stored in found.items():
            module_name, _, leaf = name.rpartition(".")
            module = model.get_submodule(module_name)
            source = Source(name, stored, reader, deltas.get(name))
            if isinstance(module, QuantizedLinear) and leaf == "weight":
                _fill_quantized(module, source, device)
            else:
                local = getattr(module, leaf).shape
                tensor = torch.empty(local, dtype=dtype, device=device)
                _fill_plain(tensor, source, is_whole_bias(name, model, found))
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
            bar.update()
    model.vision.compare_padding_tiles()
    return model.eval()


@dataclass
class Source:
    """One parameter in the files, and what an adapter makes of it."""

    name: str
    stored: Stored
    reader: Reader
    delta: Delta | None = None

    def pieces(self, start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
        """Rows from `start` to `stop` in pieces that are float32 in one buffer's bytes."""
        most = max(1, len(self.reader.buffer) // (4 * max(1, width)))
        most = max(PACKED_ROWS, most // PACKED_ROWS * PACKED_ROWS) if most > 8 else most
        for first in range(start, stop, most):
            yield first, min(first + most, stop)

    def rows(self, start: int, stop: int, columns: tuple[int, int] | None) -> Tensor:
        """Rows as they are to be, in the type that they are stored in, or float32."""
        rows = self.stored.rows(self.reader, start, stop, columns)
        return rows if self.delta is None else self.delta.apply(rows.float(), start, stop, columns)

    def checked_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows in a type.

        Raises:
            CheckpointError: one of their numbers is not finite.
        """
        read = self.rows(start, stop, None)
        rows = read.to(dtype)
        _check_finite(self._where, rows, read)
        return rows

    def integers(
        self, start: int, stop: int, columns: tuple[int, int] | None, form: Format
    ) -> Integers:
        """Rows in a format: as they are stored, where that is it, else rounded.

        Raises:
            CheckpointError: one of them is not finite.
        """
        if self.delta is None and self.stored.form == form:
            stored = self.stored.integers(self.reader, start, stop, columns)
            if stored is not None:
                _check_finite(self._where, stored[1], stored[1])
                return stored
        rows = self.rows(start, stop, columns).float()
        _check_finite(self._where, rows, rows)
        return quantise(rows, form)

    @property
    def _where(self) -> str:
        return printable(self.stored.names[0])


def share(full: tuple[int, ...], local: tuple[int, ...], rank: int) -> tuple[slice, slice | None]:
    """Rows, and columns unless all, that a device has of a tensor [N, …]: slice number `rank`.

    Along the first of both that is shorter than in full. The last slices may be short, or empty.
    """
    if full[:1] != local[:1]:
        start = min(rank * local[0], full[0])
        return slice(start, min(start + local[0], full[0])), None
    if full[1:2] != local[1:2]:
        return slice(0, full[0]), slice(rank * local[1], (rank + 1) * local[1])
    return slice(0, full[0] if full else 1), None


def is_whole_bias(name: str, model: nn.Module, found: Mapping[str, Stored]) -> bool:
    """Whether a bias is of a layer whose input is divided: one device alone may add it."""
    module, _, leaf = name.rpartition(".")
    weight = found.get(f"{module}.weight")
    if leaf != "bias" or weight is None or len(weight.shape) != 2:
        return False
    return model.get_submodule(module).in_features != weight.shape[1]


def _fill_plain(tensor: Tensor, source: Source, first_device_only: bool) -> None:
    """A parameter that stays as it is; past the end of the full tensor, zeros."""
    full = source.stored.shape
    rows, columns = share(full, tuple(tensor.shape), parallel.rank())
    if first_device_only and parallel.rank():
        tensor.zero_()
        return
    there = tensor if tensor.dim() else tensor.view(1)
    there[rows.stop - rows.start :].zero_()
    some = None if columns is None else (columns.start, columns.stop)
    for start, stop in source.pieces(rows.start, rows.stop, math.prod(full[1:])):
        read = source.rows(start, stop, some).view(-1, *there.shape[1:])
        part = there[start - rows.start : stop - rows.start]
        part.copy_(read)
        _check_finite(f"{source._where} in {_file(source)}", part, read)


def _fill_quantized(module: QuantizedLinear, source: Source, device: torch.device) -> None:
    """A matrix that becomes integers; past the end of the full one, scales are zero."""
    module.allocate(device)
    local = (module.out_features, module.in_features)
    rows, columns = share(source.stored.shape, local, parallel.rank())
    some = None if columns is None else (columns.start, columns.stop)
    for start, stop in source.pieces(rows.start, rows.stop, source.stored.shape[1]):
        module.fill(start - rows.start, source.integers(start, stop, some, module.form))


def _file(source: Source) -> str:
    entry = getattr(source.stored, "entry", None) or getattr(source.stored, "weight", None)
    return entry.shard.name if entry is not None else "the checkpoint"


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of it are; their sum shows that at once, unless it overflows alone."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _check_finite(where: str, tensor: Tensor, stored: Tensor) -> None:
    """What is to blame: the type asked for, where the numbers are finite in one of wider range."""
    if _is_finite(tensor):
        return
    for wider in (torch.bfloat16, torch.float32):
        if _is_finite(stored.to(wider)):
            asked, other = (str(t).removeprefix("torch.") for t in (tensor.dtype, wider))
            raise CheckpointError(f"{where} is not finite in {asked}; use {other}")
    raise CheckpointError(f"{where} is not finite: the file is damaged; fetch it again")
