"""What a machine can do at best, and what a run asks of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from llama_vision.cache.kv import Cache
from llama_vision.config import Config
from llama_vision.memory.plan import weight_parts
from llama_vision.model import kernels


@dataclass(frozen=True)
class Limits:
    """Measured, not looked up."""

    bandwidth: float
    """Bytes a second that are read in a copy of a large tensor, reads and writes counted."""
    operations: float
    """Multiplications and additions a second in a large product, torch's way or the package's."""

    @classmethod
    def measured(cls, dtype: torch.dtype, device: torch.device) -> "Limits":
        size = 2**30 if device.type == "cuda" else 2**28
        source = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        side = 8192 if device.type == "cuda" else 1024
        matrix = torch.randn(side, side, dtype=dtype, device=device)
        weight = torch.randn(side, side, dtype=dtype, device=device)
        copied = best(lambda: target.copy_(source), device)
        with torch.inference_mode():
            multiplied = min(
                best(lambda: F.linear(matrix, weight), device),
                best(lambda: kernels.linear(matrix, weight), device),
            )
        return cls(2 * source.nbytes / copied, 2 * side**3 / multiplied)


def best(work: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """The shortest of some rounds, in seconds."""
    return min(timed(work, device) for _ in range(rounds))


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run."""
    start = now(device)
    work()
    return now(device) - start


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes allocated at any time of a run, beside those from before.

    On CUDA the allocator's own count, else what torch's profiler sees on the CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def decode_bytes(
    config: Config, batch: int, text_tokens: int, visual_tokens: int, dtype: torch.dtype
) -> int:
    """What one step of decoding must read: the decoder's weights, the head's, and both caches.

    Without visual tokens the cross-attention blocks are passed by.
    """
    parts = weight_parts(config, dtype)
    weights = parts["decoder"] + parts["head"]
    if visual_tokens == 0:
        text = config.text
        self_layers = text.num_self_attention_layers
        only = replace(text, num_hidden_layers=self_layers, cross_attention_layers=())
        parts = weight_parts(replace(config, text=only), dtype)
        weights = parts["decoder"] + parts["head"]
    caches = Cache.plan(
        config.text,
        slots=batch,
        max_text_tokens=text_tokens,
        visual_capacity=visual_tokens,
        dtype=dtype,
    )
    return weights + caches.total


def encode_operations(config: Config, tiles: int, padding_alike: bool) -> int:
    """Of one image: its tiles go through every block, and padding tiles, or one for them all."""
    vision = config.vision
    empty = vision.max_num_tiles - tiles
    per_tile = -(-vision.tokens_per_tile // 8) * 8
    real, padding = tiles * per_tile, (min(empty, 1) if padding_alike else empty) * per_tile
    width = vision.hidden_size
    block = 2 * (real + padding) * (4 * width * width + 2 * width * vision.intermediate_size)
    attention = 4 * width * real * (vision.max_num_tiles * per_tile + padding)
    blocks = vision.num_hidden_layers + vision.num_global_layers
    patches = 2 * tiles * vision.patches_per_side**2 * 3 * vision.patch_size**2 * width
    projector = 2 * tiles * vision.tokens_per_tile * vision.feature_size * config.text.hidden_size
    return blocks * (block + attention) + patches + projector


def prefill_operations(config: Config, rows: int, tiles: int) -> int:
    """Of one prompt that sees one image: all blocks over its rows, the head for the last."""
    text = config.text
    width, kv_width = text.hidden_size, text.num_key_value_heads * text.head_dim
    visual = tiles * config.vision.tokens_per_tile
    mlp = 3 * width * text.intermediate_size
    in_self = 2 * rows * (2 * width * width + 2 * width * kv_width + mlp) + 2 * rows * rows * width
    in_cross = 2 * rows * (2 * width * width + mlp) + 4 * rows * visual * width
    in_cross += 4 * visual * width * kv_width
    cross_layers = len(text.cross_attention_layers)
    head = 2 * width * text.vocab_size
    return text.num_self_attention_layers * in_self + cross_layers * in_cross + head
