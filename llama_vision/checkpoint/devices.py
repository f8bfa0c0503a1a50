"""Which device and which type a model is loaded to, from the names that people give."""

import torch

from llama_vision.config import DTYPES
from llama_vision.errors import SettingError


def parse_device(name: str) -> torch.device:
    """The device for "auto" or for a torch device string, whether this machine has it or not.

    Raises:
        SettingError: no such kind of device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise SettingError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    return device


def choose_device(name: str) -> torch.device:
    """The same, of those that this machine has.

    Raises:
        SettingError: no such kind of device, or none of it on this machine.
    """
    device = parse_device(name)
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device.type)
    if backend is not None and not backend.is_available():
        raise SettingError(
            f"device {name!r} was asked for and this machine (or this build of torch "
            f"{torch.__version__}) has none; use --device cpu, or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device {name!r} was asked for and there are {torch.cuda.device_count()} CUDA devices"
        )
    return device


def choose_dtype(dtype: str | torch.dtype, published: torch.dtype) -> torch.dtype:
    """The type for "auto" (as published), a name, or a torch type.

    Raises:
        SettingError: another type.
    """
    chosen = published if dtype == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise SettingError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    return chosen
