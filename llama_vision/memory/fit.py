"""Does it fit? What a device has free, an early no with a way out, and the largest that would."""

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llama_vision.cache.kv import Cache
from llama_vision.checkpoint.loading import choose_device, choose_dtype, load_config
from llama_vision.config import OFFICIAL_SIZES, Config, LlamaVisionError, SettingError
from llama_vision.memory.plan import Workload, plan_run, visual_counts, weight_parts


class MemoryLimitError(LlamaVisionError):
    """A run that would not fit; says by how much, and what would."""


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


def largest(bytes_of: Callable[[int], int], room: int, most: int) -> int:
    """The largest number up to `most` whose bytes fit into the room; 0 if not even 1 does.

    Bytes grow with the number, nearly in proportion: each guess lies on the line through the
    nearest two that are known, so that few of them are asked for.
    """
    if most < 1 or bytes_of(1) > room:
        return 0
    low, low_bytes, high, high_bytes = 1, bytes_of(1), most, bytes_of(most)
    if high_bytes <= room:
        return most
    while high - low > 1:
        part = (room - low_bytes) / (high_bytes - low_bytes)
        guess = min(high - 1, max(low + 1, low + int(part * (high - low))))
        size = bytes_of(guess)
        if size > room:
            high, high_bytes = guess, size
            continue
        low, low_bytes = guess, size
        if low + 1 < high and (above := bytes_of(low + 1)) > room:
            high, high_bytes = low + 1, above
    return low


def check_weights_fit(config: Config, dtype: torch.dtype, device: torch.device) -> None:
    """Before they are read.

    Raises:
        MemoryLimitError: the weights alone exceed what is free.
    """
    free, size = free_memory(device), sum(weight_parts(config, dtype).values())
    if free is None or size <= free:
        return
    name = str(dtype).removeprefix("torch.")
    ways = []
    if dtype.itemsize > 2 and size // 2 <= free:
        ways.append("--dtype bfloat16 (half the size)")
    on_host = free_memory("cpu") if device.type != "cpu" else None
    if on_host is not None and size <= on_host:
        ways.append("--device cpu")
    raise MemoryLimitError(
        f"the weights take {human_bytes(size)} in {name} and {human_bytes(free)} are free on "
        f"{device}, {human_bytes(size - free)} too few; "
        + (f"try {' or '.join(ways)}" if ways else "a smaller model or a larger device is needed")
        + ", or go on all the same with --force (force=True)"
    )


def check_before_download(source: str | Path, dtype: str | torch.dtype, device: str) -> None:
    """Refuse a repository's weights before they are fetched; only its config.json is.

    Raises:
        MemoryLimitError: the weights alone exceed what is free.
    """
    if not Path(source).expanduser().is_dir() and str(source) not in OFFICIAL_SIZES:
        config = load_config(source)
        check_weights_fit(config, choose_dtype(dtype, config.dtype), choose_device(device))


def check_run_fits(
    config: Config, workload: Workload, *, dtype: torch.dtype, device: torch.device, loaded: bool
) -> None:
    """Before anything is allocated.

    Args:
        loaded: whether the weights are on the device already.

    Raises:
        MemoryLimitError: names what does not fit, by how much, and settings that would.
    """
    free = free_memory(device)
    caches = Cache.plan(config.text, dtype=dtype, **workload.cache_sizes(config)).total
    stays = caches + (0 if loaded else sum(weight_parts(config, dtype).values()))
    if free is None or 4 * stays + 2**28 < free:
        return  # temporary tensors are never so many times what stays: no need to count them

    def need(load: Workload) -> int:
        plan = plan_run(config, load, dtype=dtype, device=device)
        return plan.total - (plan.weights if loaded else 0)

    plan = plan_run(config, workload, dtype=dtype, device=device)
    sizes = {
        "weights": 0 if loaded else plan.weights,
        "text cache": plan.text_cache,
        "visual cache": plan.visual_cache,
        "working memory": plan.working,
    }
    total = sum(sizes.values())
    if total <= free:
        return
    ways = list(ways_to_shrink(config, workload, need, free))
    raise MemoryLimitError(
        f"the run takes {human_bytes(total)} ("
        + ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items() if size)
        + f") and {human_bytes(free)} are free on {device}, "
        f"{human_bytes(total - free)} too few; "
        + (f"try {' or '.join(ways)}" if ways else "no setting of this run makes it fit")
        + ", or go on all the same with --force (force=True)"
    )


def ways_to_shrink(
    config: Config, workload: Workload, need: Callable[[Workload], int], room: int
) -> Iterator[str]:
    """Settings that make a run fit, each alone and as large as it can be."""

    def search(make: Callable[[int], Workload], most: int) -> int:
        return largest(lambda n: need(make(n)), room, most)

    longest = max(map(len, workload.token_ids))
    answer = workload.max_text_tokens - longest
    more = search(lambda n: replace(workload, max_text_tokens=longest + n), answer)
    if 0 < more < answer:
        yield f"--max-seq-len {longest + more} (max_seq_len={longest + more})"
    tokens = visual_counts(workload.grids, config)
    kept = search(lambda n: with_budget(workload, config, n), max(tokens))
    if 0 < kept < max(workload.budget or tokens):
        pruner = "" if workload.pruned else " --k-ratio 1"
        rule = "" if workload.pruned else ", pruner=TrimmedLlama(1.0)"
        yield f"--visual-budget {kept}{pruner} (visual_budget={kept}{rule})"
    tiles = max((rows * cols for sample in workload.grids for rows, cols in sample), default=1)
    fewer = search(lambda n: _with_tiles(workload, n), tiles)
    if 0 < fewer < tiles:
        yield f"--max-tiles {fewer} (max_tiles={fewer})"
    rows = longest if workload.prefill_chunk is None else min(longest, workload.prefill_chunk)
    chunk = search(lambda n: replace(workload, prefill_chunk=n), rows)
    if 0 < chunk < rows:
        yield f"--prefill-chunk {chunk} (prefill_chunk={chunk})"
    batch = len(workload.token_ids)
    prompts = search(lambda n: _first_prompts(workload, n), batch)
    if 0 < prompts < batch:
        yield f"{prompts} of the {batch} prompts at a time"


def with_budget(workload: Workload, config: Config, most: int) -> Workload:
    """The same with at most so many visual tokens kept of each prompt."""
    old = workload.budget or visual_counts(workload.grids, config)
    return replace(workload, pruned=True, budget=tuple(min(most, budget) for budget in old))


def _with_tiles(workload: Workload, most: int) -> Workload:
    """Images cut into at most so many tiles; the budget of each prompt stays what it is."""
    grids = tuple(
        tuple(grid if math.prod(grid) <= most else (1, most) for grid in sample)
        for sample in workload.grids
    )
    return replace(workload, grids=grids)


def _first_prompts(workload: Workload, count: int) -> Workload:
    budget = None if workload.budget is None else workload.budget[:count]
    return replace(
        workload,
        token_ids=workload.token_ids[:count],
        grids=workload.grids[:count],
        budget=budget,
    )


UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def human_bytes(size: float) -> str:
    """Bytes in the unit that keeps the number below 1024."""
    unit = max((u for u in UNITS if UNITS[u] <= max(1, size)), key=UNITS.get)
    digits = {"B": 0, "KiB": 1, "MiB": 1}.get(unit, 2)
    return f"{size / UNITS[unit]:.{digits}f} {unit}"


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `512M` or a number of bytes.

    Raises:
        SettingError: something else.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    try:
        number, prefix, binary, unit = match.groups()
        decimal = unit and not binary  # 24 GB are 24 · 10⁹; 24G is what people mean by 24 GiB
        return int(
            float(number) * (1000 if decimal else 1024) ** " KMGT".index(prefix.upper() or " ")
        )
    except (AttributeError, ValueError):
        raise SettingError(f"{text!r} is no size; expected one such as 24GiB or 800MB") from None
