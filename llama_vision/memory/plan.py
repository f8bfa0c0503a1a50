"""The plan: what a run takes, before a byte of weights is read.

What stays (weights and both caches) is arithmetic. What comes and goes is found by running the
engine's own prefill and decoding on torch's meta device, where tensors have sizes and no bytes,
while a `Tracker` counts what is alive: so the plan cannot fall behind the code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import reads_only
from llama_vision.cache.rule import best_ranks
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.checkpoint.devices import choose_dtype, parse_device
from llama_vision.checkpoint.hub import load_config
from llama_vision.config import Config
from llama_vision.engine.decode import Decoder
from llama_vision.engine.prefill import prefill
from llama_vision.engine.sampling import Sampling, sample
from llama_vision.engine.workload import SIZES, PromptSize, Workload, workload_alike
from llama_vision.inputs.image import TiledImage
from llama_vision.memory.ledger import Tracker
from llama_vision.model.model import LlamaVisionModel, model_without_weights
from llama_vision.values import check_names

PARTS = {
    "vision encoder": "vision.",
    "projector": "projector.",
    "embedding": "text.embed_tokens.",
    "decoder": "text.",
    "head": "text.lm_head.",
}
"""Parts of the weights and what their names begin with; the longest beginning counts."""

PHASES = ("vision", "prefill", "decode", "sampling")


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


def plan_memory(
    source: Config | str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "auto",
    **sizes: Any,
) -> MemoryPlan:
    """What a run would take, from the configuration alone: no weight is read or fetched.

    Args:
        source: a `Config`, a directory, a repository id, or "11b" or "90b".
        dtype: of weights and caches; "auto" for the type that the checkpoint was published in.
        device: its kind decides what counts: on "cpu" pictures and token ids too. It need not be
            there; "auto" for the one that a run would take.
        sizes: batch, max_seq_len, tiles, images, visual_budget, prompt_tokens and prefill_chunk;
            see `engine.workload.workload_alike`.

    Raises:
        LlamaVisionError: a number is out of range.
    """
    config = source if isinstance(source, Config) else load_config(source)
    chosen, place = choose_dtype(dtype, config.dtype), parse_device(device)
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
    for name, parameter in model_without_weights(config).named_parameters():
        part = max((p for p in PARTS if name.startswith(PARTS[p])), key=lambda p: len(PARTS[p]))
        sizes[part] += parameter.numel() * dtype.itemsize
    return sizes


def weight_bytes(config: Config, dtype: torch.dtype) -> int:
    """Bytes of all parameters."""
    return sum(weight_parts(config, dtype).values())


def shallow(config: Config) -> Config:
    """A model with as few blocks as have the same peaks: a block frees what it took.

    Of the encoder's blocks two of a kind are left, for the input of the first one lives on beside
    the others, and one more than there are intermediate layers; of the decoder's the first and the
    last cross-attention block, and a self-attention block before, between and after them.
    """
    vision, text = config.vision, config.text
    intermediate = len(vision.intermediate_layers_indices)
    vision = replace(
        vision,
        num_hidden_layers=min(max(2, intermediate + 1), vision.num_hidden_layers),
        num_global_layers=min(2, vision.num_global_layers),
        intermediate_layers_indices=tuple(range(intermediate)),
    )
    cross = text.cross_attention_layers
    kept = sorted({*cross[:1], *cross[-1:]})
    kinds: list[bool] = []  # is each block left a cross-attention block?
    for index in range(text.num_hidden_layers):
        if index in kept:
            kinds.append(True)
        elif index not in cross and (not kinds or kinds[-1]):
            kinds.append(False)
    text = replace(
        text,
        num_hidden_layers=len(kinds),
        cross_attention_layers=tuple(i for i, is_cross in enumerate(kinds) if is_cross),
    )
    return replace(config, vision=vision, text=text)


@lru_cache(maxsize=64)
def working_memory(
    config: Config, workload: Workload, dtype: torch.dtype, device: str
) -> dict[str, int]:
    """Most bytes of temporary tensors in each of `PHASES`, on a kind of device.

    Prompts are run one after the other, so the largest of them counts; a step of decoding is one
    of all slots. Pictures are cut up on the host: their pixels count where that is the device.
    """
    simulation = _Simulation(config, workload, dtype, on_host=device == "cpu")
    prompts = [_without_words(prompt, config) for prompt in workload.prompts]
    with simulation.tracker, torch.inference_mode():
        if workload.slots < len(prompts):  # some come between steps of decoding
            simulation.tracker.add(simulation.decoder.inputs)
        for prompt, number in {prompt: i for i, prompt in enumerate(prompts)}.items():
            simulation.note_kept(prompts[:number])
            simulation.prefill(prompt)
        simulation.note_kept(prompts)
        logits = simulation.decode()
        with simulation.phase("sampling"):
            rows = logits[list(range(workload.slots))]
            generators = [torch.Generator() for _ in rows]
            sample(rows, [Sampling(1.0, 0.9)] * len(rows), generators)
    return {name: simulation.peaks.get(name, 0) for name in PHASES}


def _without_words(prompt: PromptSize, config: Config) -> PromptSize:
    """The same sizes: which words they are makes no difference."""
    image = config.text.image_token_id
    ids = tuple(token if token == image else 0 for token in prompt.token_ids)
    return PromptSize(ids, prompt.grids)


class _Simulation:
    """The engine's own code on a model and a cache without bytes."""

    def __init__(self, config: Config, workload: Workload, dtype: torch.dtype, *, on_host: bool):
        self.workload, self.on_host = workload, on_host
        self.tracker = Tracker("meta", "cpu") if on_host else Tracker("meta")
        self.model: LlamaVisionModel = model_without_weights(config).to(dtype)
        self.model.vision.padding_tiles_alike = workload.padding_tiles_alike
        sizes = workload.cache_sizes(config)
        self.cache = Cache(config.text, dtype=dtype, device="meta", **sizes)
        self.decoder = Decoder(self.model, self.cache)
        self.tracker.add(*self.model.parameters(), *self.cache.tensors)
        self.stays, self.peaks = self.tracker.now, {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the peak of what happens inside."""
        self.tracker.peak = self.tracker.now
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self.tracker.peak - self.stays)

    def note_kept(self, prompts: Sequence[PromptSize]) -> None:
        """Hold what requests do whose prompts were run, on the host: which tokens were kept, or
        who stands for each."""
        tokens = sum(sum(prompt.groups(self.model.config)) for prompt in prompts)
        self.kept = torch.ones(tokens, dtype=torch.bool)
        merged = self.workload.pruner is not None and self.workload.pruner.merge
        self.stands = torch.arange(tokens) if merged else None

    def prefill(self, prompt: PromptSize) -> None:
        """Run a prompt in the first slot."""
        workload, budget = self.workload, self.workload.visual_budget
        self.cache.clear(0)
        prefill(
            self.model,
            self.cache,
            0,
            prompt.token_ids,
            map(self._image, prompt.grids),
            pruner=self._pruner(),
            visual_budgets=[] if budget is None else [budget],
            chunk=workload.prefill_chunk,
            every_chunk=False,
            phase=self.phase,
        )

    def _pruner(self) -> "_KeepMost | None":
        traits = self.workload.pruner
        if traits is None:
            return None
        kind = _KeepMostOfCopies if traits.needs_copies else _KeepMost
        return kind(traits.trim_first_layer, traits.merge, traits.needs_text, traits.rehearse)

    def decode(self) -> Tensor:
        """The last step that there is room for: the first slot is full, so that masks are large.

        Returns:
            Logits [B, vocabulary].
        """
        self.cache.text.lengths[0] = self.cache.text.capacity - 1
        visual = self.cache.visual
        for lengths, capacity in zip(visual.lengths, visual.capacities, strict=True):
            lengths[0] = capacity
        with self.phase("decode"):
            return self.decoder.step(dict.fromkeys(range(self.cache.slots), 0))

    def _image(self, grid: tuple[int, int]) -> TiledImage:
        side = self.model.config.vision.image_size
        shape = (math.prod(grid), 3, side, side)
        pixels = torch.empty(shape, device="meta") if self.on_host else torch.empty(1).expand(shape)
        return TiledImage(pixels, grid, 0)


@reads_only
@dataclass(frozen=True)
class _KeepMost:
    """A pruner that keeps as much as it may, and takes the room that another one takes."""

    trim_first_layer: bool
    merge: bool
    needs_text: bool
    rehearse: Callable[..., None] | None

    def __call__(self, saliency: Tensor | None, visual: VisualTokens) -> Tensor:
        tokens = len(visual.image)
        budget = tokens if visual.budget is None else visual.budget
        if self.rehearse is not None:
            self.rehearse(saliency, visual, budget)
        elif saliency is not None:
            best_ranks(saliency)
        order = torch.arange(tokens, device="cpu")
        return order.clamp(max=budget - 1) if self.merge else order < budget


class _KeepMostOfCopies(_KeepMost):
    """The same, shown copies: a user's pruner."""
