"""The safetensors files of a checkpoint: which there are, and what their headers declare."""

import json
import math
import re
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_vision.checkpoint.unsupported import what_it_is
from llama_vision.config import DTYPES
from llama_vision.errors import LlamaVisionError, printable, quote, some
from llama_vision.reading import MOST_BYTES, is_there, read_json, shown

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that a tensor may be stored in, by their names in a header."""

INTEGERS = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Those that quantised weights are stored in besides."""

BUFFER_BYTES = 16 * 2**20
"""Files are read in pieces of this size: all that loading needs beside the model itself."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
NUMBERED = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors", re.ASCII)
NOT_MODELS = "adapter_"
"""How files of weights begin that are no models: those of peft."""


class CheckpointError(LlamaVisionError):
    """Files that are missing, damaged, or not those of the model that config.json describes."""


class Entry(NamedTuple):
    """One tensor as a shard's header declares it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Where in the file its bytes begin."""


class Reader:
    """Reads tensors in pieces, through one buffer."""

    def __init__(self, size: int = BUFFER_BYTES) -> None:
        self.buffer = bytearray(size)

    def rows(
        self, entry: Entry, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Some rows of a tensor [N, …], in the type that it is stored in; valid until the next.

        Args:
            columns: first and last but one of a matrix [N, K]; None for all.

        Raises:
            CheckpointError: the file cannot be read, or has become shorter.
        """
        dtype, (_, *shape) = (FLOATS | INTEGERS)[entry.dtype], entry.shape or (1,)
        row_bytes = math.prod(shape) * dtype.itemsize
        offset, size, runs = entry.offset + start * row_bytes, (stop - start) * row_bytes, 1
        if columns is not None:
            first, last = columns
            offset += first * dtype.itemsize
            size, runs, shape = (last - first) * dtype.itemsize, stop - start, [last - first]
        if size * runs > len(self.buffer):
            self.buffer = bytearray(size * runs)
        there = memoryview(self.buffer)
        try:
            with entry.shard.open("rb", buffering=0) as file:
                for run in range(runs):
                    file.seek(offset + run * row_bytes)
                    if file.readinto(there[run * size : (run + 1) * size]) != size:
                        raise CheckpointError(
                            f"{shown(entry.shard)} became shorter while it was read"
                        )
        except OSError as error:
            raise CheckpointError(
                f"{shown(entry.shard)} cannot be read: {error.strerror}"
            ) from None
        count = size * runs // dtype.itemsize
        if not count:
            return torch.empty(stop - start, *shape, dtype=dtype)
        return torch.frombuffer(self.buffer, dtype=dtype, count=count).view(stop - start, *shape)

    def whole(self, entry: Entry) -> Tensor:
        """A small tensor, in memory of its own."""
        rows = self.rows(entry, 0, entry.shape[0] if entry.shape else 1)
        return rows.clone().view(entry.shape)


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Those that its index lists; without an index `model.safetensors`, or the only file of another
    name, or all of a numbered set (`x-00001-of-00002.safetensors`).

    Raises:
        CheckpointError: there are none, one that is listed is missing, or it is not clear which.
    """
    index = directory / INDEX
    if is_there(index):
        return _whole(directory, _listed(index))
    if is_there(directory / SINGLE):
        return _whole(directory, [SINGLE])
    names = sorted(path.name for path in _safetensors(directory))
    if numbered := _numbered(names):
        return _whole(directory, numbered)
    if len(names) == 1:
        return _whole(directory, names)
    if names:
        raise CheckpointError(
            f"{shown(directory)} has {len(names)} safetensors files and no {INDEX}: {some(names)}; "
            f"expected one, or numbered ones of one set: fetch the index, or leave one"
        )
    found = what_it_is(directory)
    raise CheckpointError(
        f"{shown(directory)} has no {SINGLE} and no index of shards{found and '; '}{found}"
    )


def _safetensors(directory: Path) -> list[Path]:
    try:
        found = list(directory.glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(f"{shown(directory)} cannot be read: {error.strerror}") from None
    return [path for path in found if not path.name.startswith(NOT_MODELS)]


def _listed(index: Path) -> list[str]:
    """The names in an index; they must lead to files below its directory."""
    weight_map = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{shown(index)} is damaged: weight_map is {quote(weight_map)}, expected names of "
            "tensors and of the files that hold them; fetch it again"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_below(name):
            raise CheckpointError(
                f"{shown(index)} is damaged: it lists the file {quote(name)}, expected names of "
                "safetensors files beside it; fetch it again"
            )
    return sorted(set(weight_map.values()))


def _is_below(name: str) -> bool:
    """Whether a name leads to a safetensors file in or below the directory that it is read in."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute() or path.drive or path.root or ".." in path.parts:
            return False
    return name.isprintable() and name.endswith(".safetensors")


def _numbered(names: list[str]) -> list[str]:
    """All names of the set that these are of; nothing where they are not of one."""
    found = [NUMBERED.fullmatch(name) for name in names]
    if not names or not all(found) or len({(m[1], m[3]) for m in found}) > 1:
        return []
    stem, count = found[0][1], found[0][3]
    numbers = range(1, int(count) + 1)
    expected = [f"{stem}-{n:0{len(found[0][2])}}-of-{count}.safetensors" for n in numbers]
    return expected if set(names) <= set(expected) else []


def _whole(directory: Path, names: list[str]) -> list[Path]:
    """Their paths, if all of them are files."""
    missing = []
    for name in names:
        try:
            found = (directory / name).is_file()
        except OSError:  # a name that is too long, a directory that may not be searched
            found = False
        missing += [] if found else [name]
    if missing:
        raise CheckpointError(
            f"{shown(directory)} lacks {len(missing)} of {len(names)} shards: {some(missing)}; "
            "fetch them again"
        )
    return [directory / name for name in names]


def read_headers(shards: list[Path]) -> dict[str, Entry]:
    """Every tensor that the shards declare, without reading its data.

    Raises:
        CheckpointError: a shard is cut short or damaged, or a tensor is there twice.
    """
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{printable(name)} is in both {printable(entries[name].shard.name)} and "
                    f"{printable(shard.name)}"
                )
            entries[name] = entry
    return entries


def stored_type(directory: Path) -> torch.dtype:
    """The type that most of a checkpoint's numbers are stored in, of those that it can load as.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`; or none is of such a type.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in read_headers(find_shards(directory)).values():
        if entry.dtype in FLOATS:
            sizes[FLOATS[entry.dtype]] += math.prod(entry.shape)
    if not sizes:
        raise CheckpointError(f"{shown(directory)} holds no tensors of numbers with a point")
    (dtype, _), *_ = sizes.most_common(1)
    return dtype if dtype in DTYPES.values() else torch.float32


def _read_header(shard: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: a length in 8 bytes, so much JSON, then their bytes."""
    try:
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MOST_BYTES:
                raise SafetensorError(f"a header of {length:,} bytes")
            with safe_open(shard, framework="pt"):
                pass  # it proves that the header is sound and the file as long as it says
            header: dict[str, Any] = json.loads(file.read(length))
    except UnicodeEncodeError:
        raise CheckpointError(f"{shown(shard)} has a path that is not UTF-8; rename it") from None
    except (SafetensorError, OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{shown(shard)} is damaged or cut short ({printable(error)}; {_size(shard)} bytes); "
            "fetch it again"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Entry(
            shard, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0]
        )
        for name, about in header.items()
    }


def _size(file: Path) -> str:
    try:
        return f"{file.stat().st_size:,}"
    except OSError:
        return "unknown"
