"""What a device has free."""

import os
from pathlib import Path

import torch

from llama_vision.checkpoint.devices import choose_device
from llama_vision.errors import SettingError


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On CUDA what the allocator holds and does not use counts as free; on the CPU a container's limit
    counts as well as what the machine has available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    rooms = [room for room in (_available_on_host(), _left_in_container()) if room is not None]
    return min(rooms, default=None)


def known_free_memory(device: torch.device) -> int | None:
    """The same, and None too for a device that this machine does not have."""
    try:
        return free_memory(choose_device(str(device)))
    except SettingError:
        return None


def _available_on_host() -> int | None:
    """Linux says what can be had without swapping; elsewhere all of the machine's memory counts."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return 1024 * int(kilobytes)
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _left_in_container() -> int | None:
    """What a control group (version 2) leaves; file pages that can be dropped count as left."""
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        stat = (group / "memory.stat").read_text(encoding="ascii").split()
        return most - used + int(stat[stat.index("inactive_file") + 1])
    except (OSError, ValueError, IndexError):  # no such files, or "max": no limit
        return None
