"""The safetensors files of a checkpoint: which there are, and what their headers declare."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from llama_vision.errors import LlamaVisionError, some

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that a tensor may be stored in, by their names in a header."""


class CheckpointError(LlamaVisionError):
    """Files that are missing, damaged, or not those of the model that config.json describes."""


class Entry(NamedTuple):
    """One tensor as a shard's header declares it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Where in the file its bytes begin."""


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or the only one.

    Raises:
        CheckpointError: there are none, or one that the index lists is missing.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(Path(name)) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); fetch it again") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(names)} shards: {some(missing)}; "
                "fetch them again"
            )
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(
        p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in directory.glob(pattern)
    )
    hint = (
        f"; {some(pickles)} may run code when opened and is never loaded: convert it, "
        "for Meta's files with weights/convert_meta.py"
        if pickles
        else ""
    )
    raise CheckpointError(f"{directory} has no model.safetensors and no index of shards{hint}")


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
                    f"{name} is in both {entries[name].shard.name} and {shard.name}"
                )
            entries[name] = entry
    return entries


def _read_header(shard: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: a length in 8 bytes, so much JSON, then their bytes."""
    try:
        with safe_open(shard, framework="pt"):
            pass  # it proves that the header is sound and the file as long as it says
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard} is damaged or cut short ({error}; {shard.stat().st_size:,} bytes); "
            "fetch it again"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Entry(
            shard, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0]
        )
        for name, about in header.items()
    }
