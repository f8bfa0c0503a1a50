"""What is known of a model before its weights are read."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from llama_vision.checkpoint.adapter import Adapter, find_adapter, read_adapter
from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.devices import choose_device
from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.hub import find_checkpoint
from llama_vision.checkpoint.loading import find_weights, full_shapes
from llama_vision.checkpoint.resolve import Asked, conversion, resolve
from llama_vision.config import Config, divided
from llama_vision.errors import printable
from llama_vision.model.quantized import check_device


class Outline(NamedTuple):
    """A checkpoint, and what a model is to be made of it."""

    directory: Path
    config: Config
    """With the formats of its matrices, and divided among devices."""
    device: torch.device
    dtype: torch.dtype
    adapter: Adapter | None
    conversion: str
    """What becomes of a quantised copy, for people; nothing of a plain checkpoint."""

    @property
    def name(self) -> str:
        """The checkpoint's, for people: a repository's id where it lies in the hub's cache.

        There it is in `models--owner--name/snapshots/commit`. Elsewhere it is the folder's name.
        """
        directory = self.directory.absolute()
        kind, *names = directory.parent.parent.name.split("--")
        in_cache = kind == "models" and directory.parent.name == "snapshots"
        return printable("/".join(names) if in_cache else directory.name)


def read_outline(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: Asked = None,
    adapter: str | Path | None = None,
    devices: int = 1,
) -> Outline:
    """Find a checkpoint and its adapter, and see what was asked for; for all of it see `api`."""
    chosen = choose_device(device)
    adapter_directory = None if adapter is None else find_adapter(adapter)
    directory = find_checkpoint(source)
    config, found = read_config(directory), None
    with suppress(CheckpointError):  # loading tells, for whoever loads
        found = find_weights(directory, config)
    config, chosen_dtype = resolve(divided(config, devices), found, quantize, dtype)
    if config.quantization is not None:
        check_device(config.quantization, chosen)
    merged = adapter_directory and read_adapter(adapter_directory, full_shapes(config))
    told = "" if found is None else conversion(config, found)
    return Outline(directory, config, chosen, chosen_dtype, merged, told)
