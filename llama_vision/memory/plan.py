"""The plan: what a run takes, before a byte of weights is read.

What stays (weights and both caches) is arithmetic. What comes and goes is found by running the
engine's own prefill and decoding on torch's meta device, where tensors have sizes and no bytes,
while a `Tracker` counts what is alive: so the plan cannot fall behind the code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llama_vision.cache.kv import Cache
from llama_vision.checkpoint.devices import parse_device
from llama_vision.checkpoint.hub import load_config
from llama_vision.checkpoint.resolve import resolve
from llama_vision.config import Config, divided
from llama_vision.drawing.notebook import table_html
from llama_vision.engine.workload import SIZES, Workload, workload_alike
from llama_vision.memory.simulation import shallow, working_memory
from llama_vision.memory.units import human_bytes
from llama_vision.model.model import model_without_weights
from llama_vision.quantization import Quantization
from llama_vision.values import check_names

PARTS = {
    "vision encoder": "vision.",
    "projector": "projector.",
    "embedding": "text.embed_tokens.",
    "decoder": "text.",
    "head": "text.lm_head.",
}
"""Parts of the weights and what their names begin with; the longest beginning counts."""

Row = tuple[str, int]
"""A name, indented by two blanks where it is a part of the one before, and bytes."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes, before it takes them.

    Those of tensors; what a library takes for itself inside an operation (oneDNN's scratch on a
    CPU, cuBLAS's workspace of about 32 MiB on CUDA) depends on the processor and comes on top.
    """

    dtype: torch.dtype
    """Of weights and caches."""
    parts: dict[str, int]
    """Of the weights, see `PARTS`."""
    text_cache: int
    visual_cache: int
    phases: dict[str, int]
    """Most bytes of temporary tensors in each of `PHASES`."""

    @property
    def weights(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def working(self) -> int:
        """Temporary tensors, in the phase that has most of them."""
        return max(self.phases.values())

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return self.weights + self.text_cache + self.visual_cache + self.working

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = ("weights", "text_cache", "visual_cache", "working", "total")
        sizes = {name: getattr(self, name) for name in names}
        return {**sizes, "parts": dict(self.parts), "phases": dict(self.phases)}

    def rows(self, of_text: Sequence[Row] = (), of_visual: Sequence[Row] = ()) -> list[Row]:
        """The plan as a table, with further rows below those of the two caches."""
        return [
            ("weights", self.weights),
            *((f"  {part}", size) for part, size in self.parts.items()),
            ("text cache", self.text_cache),
            *of_text,
            ("visual cache", self.visual_cache),
            *of_visual,
            ("working memory, at most", self.working),
            *((f"  {phase}", size) for phase, size in self.phases.items()),
            ("total", self.total),
        ]

    def __repr__(self) -> str:
        names = ("weights", "text_cache", "visual_cache", "working")
        words = (f"{n.replace('_', ' ')} {human_bytes(getattr(self, n))}" for n in names)
        return f"<MemoryPlan: {human_bytes(self.total)} ({', '.join(words)})>"

    def _repr_html_(self) -> str:
        """What a notebook shows: human units, and exact bytes."""
        return table_html((name, human_bytes(size), f"{size:,}") for name, size in self.rows())


def plan_memory(
    source: Config | str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "auto",
    quantize: str | Quantization | None = None,
    devices: int = 1,
    **sizes: Any,
) -> MemoryPlan:
    """What a run would take, from the configuration alone: no weight is read or fetched.

    Args:
        source: a `Config`, a directory, a repository id, or "11b" or "90b".
        dtype: of weights and caches; "auto" for the type that the checkpoint was published in.
        device: its kind decides what counts: on "cpu" pictures and token ids too. It need not be
            there; "auto" for the one that a run would take.
        quantize: see `LlamaVision.from_pretrained`.
        devices: among how many the model is divided; the plan is that of each.
        sizes: batch, max_seq_len, tiles, images, visual_budget, prompt_tokens and prefill_chunk;
            see `engine.workload.workload_alike`.

    Raises:
        LlamaVisionError: a number is out of range.
    """
    config = source if isinstance(source, Config) else load_config(source)
    config, chosen = resolve(divided(config, devices), None, quantize, dtype)
    place = parse_device(device)
    check_names("size", sizes, SIZES)
    return plan_run(config, workload_alike(config, **sizes), dtype=chosen, device=place)


def plan_run(
    config: Config, workload: Workload, *, dtype: torch.dtype, device: torch.device | str
) -> MemoryPlan:
    """The plan of a workload on a device. Nothing is allocated there.

    Weights and caches are exact to the byte; without a budget the visual cache is the most that a
    pruner can leave.
    """
    caches = Cache.plan(config.text, dtype=dtype, **workload.cache_sizes(config))
    phases = working_memory(shallow(config), workload, dtype, torch.device(device).type)
    return MemoryPlan(dtype, weight_parts(config, dtype), caches.text, caches.visual, phases)


@lru_cache(maxsize=16)
def weight_parts(config: Config, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each of `PARTS`."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model_without_weights(config).to(dtype).named_parameters():
        part = max((p for p in PARTS if name.startswith(PARTS[p])), key=lambda p: len(PARTS[p]))
        sizes[part] += parameter.nbytes
    return sizes


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of all parameters."""
    return sum(weight_parts(config, dtype).values())
