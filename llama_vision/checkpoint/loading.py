"""Official files into modules: built on the meta device, filled tensor by tensor."""

from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from llama_vision.checkpoint.files import FLOATS, CheckpointError, Entry, find_shards, read_headers
from llama_vision.checkpoint.names import match_names
from llama_vision.config import Config
from llama_vision.model.model import LlamaVisionModel, model_without_weights

BUFFER_BYTES = 16 * 2**20
"""Files are read in pieces of this size: all that loading needs beside the model itself."""


def load_model(
    directory: Path, config: Config, *, device: torch.device, dtype: torch.dtype
) -> LlamaVisionModel:
    """Build the model on the meta device and fill it shard by shard on the target device.

    The files are read, not mapped: afterwards the model does not depend on them.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`, `match_names`.
    """
    model = model_without_weights(config)
    entries = read_headers(find_shards(directory))
    names = match_names(dict(model.named_parameters()), entries)
    in_file_order = sorted(names, key=lambda name: (entries[name].shard, entries[name].offset))
    buffer = bytearray(BUFFER_BYTES)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=None, leave=False) as bar:
        for name in in_file_order:
            _fill(model, names[name], _read(entries[name], buffer, device, dtype))
            bar.update()
    model.vision.compare_padding_tiles()
    return model.eval()


def _read(entry: Entry, buffer: bytearray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One tensor, through the buffer, to its place and type."""
    stored = FLOATS[entry.dtype]
    tensor = torch.empty(entry.shape, dtype=dtype, device=device)
    with entry.shard.open("rb") as file:
        file.seek(entry.offset)
        for part in tensor.view(-1).split(len(buffer) // stored.itemsize):
            size = part.numel() * stored.itemsize
            if file.readinto(memoryview(buffer)[:size]) != size:
                raise CheckpointError(f"{entry.shard} became shorter while it was read")
            part.copy_(torch.frombuffer(buffer, dtype=stored, count=part.numel()))
    return tensor


def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(module_name), leaf, parameter)
