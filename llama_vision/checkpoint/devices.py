"""Which device and which type a model is loaded to, from the names that people give."""

import re

import torch

from llama_vision.config import DTYPES
from llama_vision.errors import SettingError, quote

DEVICE = re.compile(r"(cpu|cuda|mps)(:(0|[1-9][0-9]{0,2}))?")


def parse_device(name: str | torch.device) -> torch.device:
    """The device for "auto", a torch device or its name, whether this machine has it or not.

    Raises:
        SettingError: no such kind of device.
    """
    if isinstance(name, torch.device):
        name = str(name)
    if not isinstance(name, str) or not (name == "auto" or DEVICE.fullmatch(name)):
        raise SettingError(
            f"device {quote(name)} is unknown; expected auto, cpu, cuda, cuda:N or mps"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    return torch.device(name)


def choose_device(name: str | torch.device) -> torch.device:
    """The same, of those that this machine has.

    Raises:
        SettingError: no such kind of device, or none of it on this machine.
    """
    device = parse_device(name)
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device.type)
    if backend is not None and not backend.is_available():
        raise SettingError(
            f"device {str(device)!r} was asked for and this machine (or this build of torch "
            f"{torch.__version__}) has none; use --device cpu, or auto"
        )
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise SettingError(
            f"device {str(device)!r} was asked for and there are {count} {device.type.upper()} "
            "devices"
        )
    return device


def choose_dtype(dtype: str | torch.dtype, published: torch.dtype) -> torch.dtype:
    """The type for "auto" (as published), a name, or a torch type.

    Raises:
        SettingError: another type.
    """
    if isinstance(dtype, (str, torch.dtype)):
        if dtype == "auto":
            return published
        if chosen := DTYPES.get(str(dtype).removeprefix("torch.")):
            return chosen
    raise SettingError(f"dtype {quote(dtype)} is unknown; expected auto, {', '.join(DTYPES)}")
