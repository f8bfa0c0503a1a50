"""Which machine it was: results differ by processor."""

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def processor() -> str:
    """The CPU's name, its widest vectors, and whether it multiplies matrices by AMX."""
    fields = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            field, _, value = line.partition(":")
            fields.setdefault(field.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    amx = "AMX" if "amx_tile" in fields.get("flags", "").split() else "no AMX"
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {amx}"


def describe(device: torch.device) -> str:
    """What runs the model."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} beside {processor()}"
    return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What it ran on, and the peer, where it is installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["transformers"] = version("transformers")
    return found
