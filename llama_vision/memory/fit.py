"""Does it fit? An early no with a way out, and the largest that would."""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Traits
from llama_vision.checkpoint.devices import choose_device
from llama_vision.checkpoint.hub import load_config, source_path
from llama_vision.checkpoint.resolve import resolve
from llama_vision.config import OFFICIAL_SIZES, Config, divided
from llama_vision.engine.workload import PREFILL_CHUNK, Workload, workload_alike
from llama_vision.errors import LlamaVisionError, SettingError
from llama_vision.memory.free import free_memory
from llama_vision.memory.plan import plan_run, weight_bytes
from llama_vision.memory.units import human_bytes
from llama_vision.model import parallel
from llama_vision.quantization import Quantization, choose_quantization


class MemoryLimitError(LlamaVisionError):
    """A run that would not fit; says by how much, and what would."""


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
    free, size = free_memory(device), weight_bytes(config, dtype)
    if free is None or size <= free:
        return
    name = str(dtype).removeprefix("torch.")
    ways = []
    if dtype.itemsize > 2 and size // 2 <= free:
        ways.append("--dtype bfloat16 (half the size)")
    ways += [f"{flag} ({human_bytes(size)})" for flag, size in smaller(config, free)]
    on_host = free_memory("cpu") if device.type != "cpu" else None
    if on_host is not None and size <= on_host:
        ways.append("--device cpu")
    raise MemoryLimitError(
        f"the weights take {human_bytes(size)} in {name} and {human_bytes(free)} are free on "
        f"{device}, {human_bytes(size - free)} too few; "
        + (f"try {' or '.join(ways)}" if ways else "a smaller model or a larger device is needed")
        + ", or go on all the same with --force (force=True)"
    )


def check_before_download(
    source: str | Path,
    dtype: str | torch.dtype,
    device: str,
    quantize: str | Quantization | None = None,
    devices: int = 1,
) -> None:
    """Refuse a repository's weights before they are fetched; only its config.json is.

    Args: see `LlamaVision.from_pretrained`, `LlamaVision.without_weights`.

    Raises:
        MemoryLimitError: the weights alone exceed what is free.
    """
    if not source_path(source).is_dir() and str(source) not in OFFICIAL_SIZES:
        config = load_config(source)
        config, chosen = resolve(divided(config, devices), None, quantize, dtype)
        check_weights_fit(config, chosen, choose_device(device))


def smaller(config: Config, room: int) -> Iterator[tuple[str, int]]:
    """The first way to quantise whose weights fit into the room, and their bytes."""
    if config.quantization is not None:
        return
    ways = {
        "--quantize int8": choose_quantization("int8"),
        "--quantize int4": choose_quantization("int4"),
        "--quantize int4 --quantize-all": choose_quantization("int4", everything=True),
    }
    for flag, quantization in ways.items():
        with suppress(SettingError):  # sizes that the format does not take
            size = weight_bytes(replace(config, quantization=quantization), torch.bfloat16)
            if size <= room:
                yield flag, size
                return


class Room:
    """A device's free memory, and what workloads of one model would take of it.

    Args:
        loaded: whether the weights are on the device already.
        free: bytes; None for what the device has.
    """

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        *,
        loaded: bool,
        free: int | None = None,
    ):
        self.config, self.dtype, self.device, self.loaded = config, dtype, device, loaded
        self.free = free_memory(device) if free is None else free
        if self.free is not None:  # alike on all devices
            self.free = parallel.least(self.free, config.text.devices)

    def parts(self, load: Workload) -> dict[str, int]:
        """Bytes that a workload takes beside what is there.

        Working memory is counted only where there is room for the rest: it takes a simulation.
        """
        caches = Cache.plan(self.config.text, dtype=self.dtype, **load.cache_sizes(self.config))
        weights = 0 if self.loaded else weight_bytes(self.config, self.dtype)
        sizes = {"weights": weights, "text cache": caches.text, "visual cache": caches.visual}
        if sum(sizes.values()) <= self.free:
            plan = plan_run(self.config, load, dtype=self.dtype, device=self.device)
            sizes["working memory"] = plan.working
        return sizes

    def need(self, load: Workload) -> int:
        """All of them together."""
        return sum(self.parts(load).values())

    def fits(self, load: Workload) -> bool:
        """Whether it does; where nothing is known to be free, it is taken to."""
        caches = Cache.plan(self.config.text, dtype=self.dtype, **load.cache_sizes(self.config))
        stays = caches.total + (0 if self.loaded else weight_bytes(self.config, self.dtype))
        if self.free is None or 4 * stays + 2**28 < self.free:
            return True  # temporary tensors are never so many times what stays: do not count them
        return self.need(load) <= self.free

    def fitted(self, load: Workload, slots: int | None = None) -> Workload:
        """The workload with as many slots as fit, or with all of those that were asked for.

        Raises:
            MemoryLimitError: not even one fits, or not so many, or not the weights.
        """
        if not self.loaded:
            check_weights_fit(self.config, self.dtype, self.device)
        if slots is None and not self.fits(load):
            most = largest(lambda n: self.need(replace(load, slots=n)), self.free, load.slots)
            load = replace(load, slots=most or 1)
        self.check(load)
        return load

    def check_slots(self, slots: int, max_seq_len: int, visual_capacity: int | None) -> None:
        """Raise MemoryLimitError with the number that would, where so many slots do not fit."""
        vision, tokens = self.config.vision, min(PREFILL_CHUNK, max_seq_len - 1)
        image = vision.max_num_tiles * vision.tokens_per_tile
        images = min(-(-(visual_capacity or image) // image), max(0, tokens - 1))
        if tokens:
            sizes = {"max_seq_len": max_seq_len, "prompt_tokens": tokens, "images": images}
            load = workload_alike(self.config, visual_budget=visual_capacity, **sizes)
            self.check(replace(load, slots=slots))

    def check_growth(self, cache: Cache, visual_tokens: int) -> None:
        """Raise MemoryLimitError where a cache cannot be enlarged to so many tokens a slot."""
        sizes = {"slots": cache.slots, "max_text_tokens": 1, "visual_capacity": visual_tokens}
        plan = Cache.plan(self.config.text, dtype=self.dtype, **sizes)
        more = plan.visual - cache.visual.nbytes
        if self.free is not None and more > self.free:
            raise MemoryLimitError(
                f"the images need {visual_tokens} visual tokens of each slot, {human_bytes(more)} "
                f"more, and {human_bytes(self.free)} are free on {self.device}; show fewer images "
                "together, or choose a pruner, such as --keep 0.5 (pruner=MaxMin(0.5, merge=True))"
            )

    def check(self, load: Workload) -> None:
        """Before anything is allocated.

        Raises:
            MemoryLimitError: names what does not fit, by how much, and settings that would.
        """
        if self.fits(load):
            return
        sizes = self.parts(load)
        total, ways = sum(sizes.values()), list(self.ways_to_shrink(load))
        raise MemoryLimitError(
            f"the run takes {human_bytes(total)} ("
            + ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items() if size)
            + f") and {human_bytes(self.free)} are free on {self.device}, "
            f"{human_bytes(total - self.free)} too few; "
            + (f"try {' or '.join(ways)}" if ways else "no setting of this run makes it fit")
            + ", or go on all the same with --force (force=True)"
        )

    def ways_to_shrink(self, load: Workload) -> Iterator[str]:
        """Settings that make a run fit, each alone and as large as it can be."""

        def search(make: Callable[[int], Workload], most: int) -> int:
            return largest(lambda n: self.need(make(n)), self.free, most)

        slots = search(lambda n: replace(load, slots=n), load.slots)
        if 0 < slots < load.slots:
            yield f"{slots} of the {load.slots} slots (slots={slots})"
        longest = max(len(prompt.token_ids) for prompt in load.prompts)
        answer = load.max_text_tokens - longest
        more = search(lambda n: replace(load, max_text_tokens=longest + n), answer)
        if 0 < more < answer:
            yield f"--max-seq-len {longest + more} (max_seq_len={longest + more})"
        held = load.cache_sizes(self.config)["visual_capacity"]
        kept = search(
            lambda n: replace(load, pruner=load.pruner or Traits(), visual_budget=n), held
        )
        if 0 < kept < held:
            pruner = "" if load.pruner else " --k-ratio 1"
            rule = "" if load.pruner else ", pruner=TrimmedLlama(1.0)"
            yield f"--visual-budget {kept}{pruner} (visual_budget={kept}{rule})"
        tiles = max((math.prod(grid) for p in load.prompts for grid in p.grids), default=1)
        fewer = search(lambda n: _with_tiles(load, n), tiles)
        if 0 < fewer < tiles:
            yield f"--max-tiles {fewer} (max_tiles={fewer})"
        rows = min(longest, load.prefill_chunk)
        # In at most 16 parts: trying takes as long as there are parts.
        parts = 17 - search(lambda n: replace(load, prefill_chunk=-(-rows // (17 - n))), 16)
        if 1 < parts < 17:
            chunk = -(-rows // parts)
            yield f"--prefill-chunk {chunk} (prefill_chunk={chunk})"


def _with_tiles(load: Workload, most: int) -> Workload:
    """Images cut into at most so many tiles."""
    prompts = (
        replace(p, grids=tuple(g if math.prod(g) <= most else (1, most) for g in p.grids))
        for p in load.prompts
    )
    return replace(load, prompts=tuple(prompts))
