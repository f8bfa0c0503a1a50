"""Official files into modules: built on the meta device, filled tensor by tensor."""

from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from llama_vision.checkpoint.files import FLOATS, CheckpointError, Entry, find_shards, read_headers
from llama_vision.checkpoint.names import match_names
from llama_vision.config import Config
from llama_vision.errors import printable
from llama_vision.model.model import LlamaVisionModel, model_without_weights
from llama_vision.reading import shown

BUFFER_BYTES = 16 * 2**20
"""Files are read in pieces of this size: all that loading needs beside the model itself."""


def load_model(
    directory: Path, config: Config, *, device: torch.device, dtype: torch.dtype
) -> LlamaVisionModel:
    """Build the model on the meta device and fill it shard by shard on the target device.

    The files are read, not mapped: afterwards the model does not depend on them.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`, `match_names`; or a tensor holds what is
            not finite, as it is stored or in the type asked for.
    """
    model = model_without_weights(config)
    entries = read_headers(find_shards(directory))
    names = match_names(dict(model.named_parameters()), entries)
    in_file_order = sorted(names, key=lambda name: (entries[name].shard, entries[name].offset))
    buffer = bytearray(BUFFER_BYTES)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=None, leave=False) as bar:
        for name in in_file_order:
            tensor = torch.empty(entries[name].shape, dtype=dtype, device=device)
            _read(name, entries[name], buffer, tensor)
            _fill(model, names[name], tensor)
            bar.update()
    model.vision.compare_padding_tiles()
    return model.eval()


def _read(name: str, entry: Entry, buffer: bytearray, tensor: Tensor) -> None:
    """One tensor, through the buffer, to its place and type."""
    stored = FLOATS[entry.dtype]
    try:
        with entry.shard.open("rb") as file:
            file.seek(entry.offset)
            for part in tensor.view(-1).split(len(buffer) // stored.itemsize):
                size = part.numel() * stored.itemsize
                if file.readinto(memoryview(buffer)[:size]) != size:
                    raise CheckpointError(f"{shown(entry.shard)} became shorter while it was read")
                read = torch.frombuffer(buffer, dtype=stored, count=part.numel())
                part.copy_(read)
                if not _is_finite(part):
                    raise _not_finite(f"{printable(name)} in {entry.shard.name}", read, part.dtype)
    except OSError as error:
        raise CheckpointError(f"{shown(entry.shard)} cannot be read: {error.strerror}") from None


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of it are; their sum shows that at once, unless it overflows alone."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _not_finite(where: str, stored: Tensor, dtype: torch.dtype) -> CheckpointError:
    """What is to blame: the type asked for, where the numbers are finite in one of wider range."""
    for wider in (torch.bfloat16, torch.float32):
        if _is_finite(stored.to(wider)):
            asked, other = (str(t).removeprefix("torch.") for t in (dtype, wider))
            return CheckpointError(f"{where} is not finite in {asked}; use {other}")
    return CheckpointError(f"{where} is not finite: the file is damaged; fetch it again")


def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(module_name), leaf, parameter)
