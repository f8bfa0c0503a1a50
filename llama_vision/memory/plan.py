"""Memory: the exact plan before a byte of weights is read, and the ledger of what a run took.

What stays (weights and both caches) is arithmetic. What comes and goes is found by running the
model's own code on torch's meta device, where tensors have sizes and no bytes, while a `Tracker`
counts what is alive: so the plan cannot fall behind the code.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import PruningError, best_ranks
from llama_vision.cache.visual_tokens import VisualTokens, find_stretches
from llama_vision.config import Config
from llama_vision.engine.sampling import Sampling
from llama_vision.inputs.image import TiledImage
from llama_vision.model.model import LlamaVisionModel, model_without_weights

Grid = tuple[int, int]

PARTS = {
    "vision encoder": "vision.",
    "projector": "projector.",
    "embedding": "text.embed_tokens.",
    "decoder": "text.",
    "head": "text.lm_head.",
}
"""Parts of the weights and what their names begin with; the longest beginning counts."""

PREFILL_CHUNK = 2048
"""Rows of a prompt that keep a GPU busy; more of them at once would only take more memory."""

PHASES = ("vision", "prefill", "decode", "sampling")


@dataclass(frozen=True)
class Workload:
    """What is asked of the model in one batch, as far as memory goes."""

    token_ids: tuple[tuple[int, ...], ...]
    """Of each prompt."""
    grids: tuple[tuple[Grid, ...], ...]
    """Rows and columns of tiles of each prompt's images."""
    max_text_tokens: int
    """Most tokens of a sample, prompt and answer together."""
    prefill_chunk: int | None = None
    pruned: bool = False
    """Whether a pruner chooses among the visual tokens."""
    budget: tuple[int, ...] | None = None
    """Most visual tokens of each sample to keep."""
    trim_first_layer: bool = True
    absent_tiles_alike: bool = False
    """Whether one absent tile stands for all of an image; not known before the weights are."""

    def cache_sizes(self, config: Config) -> dict[str, Any]:
        """The arguments of `Cache` and `Cache.plan` but for dtype and device.

        Room for the limits' text rows, and for the budget or what decoding reads. What a pruner
        leaves without a budget is not known yet: its capacity is the most that it can leave, which
        the store does not take beforehand.
        """
        needs = max(visual_needs(self.token_ids, self.grids, config))
        return {
            "batch": len(self.token_ids),
            "max_text_tokens": self.max_text_tokens,
            "visual_capacity": needs if self.budget is None else max(self.budget),
            "first_visual_capacity": None if self.trim_first_layer else needs,
        }


def visual_counts(grids: Sequence[Sequence[Grid]], config: Config) -> list[int]:
    """Visual tokens of each sample: those of the real tiles of its images."""
    per_tile = config.vision.tokens_per_tile
    return [sum(map(math.prod, sample)) * per_tile for sample in grids]


def visual_needs(
    prompts: Sequence[Sequence[int]], grids: Sequence[Sequence[Grid]], config: Config
) -> list[int]:
    """Visual tokens that decoding reads of each sample: those that its prompt's last row sees."""
    seen = []
    for token_ids, sample in zip(prompts, grids, strict=True):
        stretches = find_stretches(token_ids, config.text.image_token_id)
        seen.append(sample[stretches[-1].images] if stretches else [])
    return visual_counts(seen, config)


def budget_in_tokens(budget: float | int, tokens: Sequence[int]) -> list[int]:
    """A visual budget for each sample: of a fraction the part of its visual tokens, or the count.

    Raises:
        PruningError: it is no fraction in (0, 1] and no count of at least 1, or under one token.
    """
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
    if not is_number or not budget > 0 or (isinstance(budget, float) and budget > 1):
        raise PruningError(
            f"visual_budget is {budget!r}; expected a fraction above 0 and at most 1.0, "
            "or a whole number of tokens"
        )
    is_count = isinstance(budget, int)
    most = [min(budget, n) if is_count else math.floor(budget * n) for n in tokens]
    for sample, (n, allowed) in enumerate(zip(tokens, most, strict=True)):
        if n and not allowed:
            raise PruningError(
                f"visual_budget is {budget!r}, less than one of the {n} visual tokens of "
                f"sample {sample}; expected a larger fraction, or a whole number of tokens"
            )
    return most


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes, before it takes them."""

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


def plan_run(
    config: Config, workload: Workload, *, dtype: torch.dtype, device: torch.device | str
) -> MemoryPlan:
    """The plan of one batch on a device. Nothing is allocated there.

    Weights and caches are exact to the byte; without a budget the visual cache is the most that a
    pruner can leave. Working memory is that of the tensors; what a library takes for itself inside
    one operation (cuBLAS about 32 MiB) comes on top.
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


class Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive among those that operations under it make.

    Args:
        devices: kinds of device whose tensors count.
    """

    def __init__(self, *devices: str):
        super().__init__()
        self.devices = devices
        self.now = self.peak = 0
        self._alive: dict[int, tuple[ref, int]] = {}

    def add(self, *tensors: Tensor) -> None:
        """Count the storage of each, once, until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type in self.devices and key not in self._alive:
                size = storage.nbytes()
                self._alive[key] = ref(storage, lambda _, key=key: self._drop(key)), size
                self.now += size
                self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its whole compiler, for a second, just to stay out of here."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.add(*(tensor for tensor in made if isinstance(tensor, Tensor)))
        return out


def shallow(config: Config) -> Config:
    """A model with as few blocks as have the same peaks: a block frees what it took.

    Of the encoder's blocks two of a kind are left, for the input of the first one lives on beside
    the others, and one more than are tapped; of the decoder's the first and the last
    cross-attention block, and a self-attention block before, between and after them.
    """
    vision, text = config.vision, config.text
    taps = len(vision.intermediate_layers_indices)
    vision = replace(
        vision,
        num_hidden_layers=min(max(2, taps + 1), vision.num_hidden_layers),
        num_global_layers=min(2, vision.num_global_layers),
        intermediate_layers_indices=tuple(range(taps)),
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

    Pictures wait on the host: their pixels count where that is the device.
    """
    tracker = Tracker("meta", "cpu") if device == "cpu" else Tracker("meta")
    model = model_without_weights(config).to(dtype)
    model.vision.absent_tiles_alike = workload.absent_tiles_alike
    cache = Cache(config.text, dtype=dtype, device="meta", **workload.cache_sizes(config))
    tracker.add(*model.parameters())
    for store in (cache.text, cache.visual):
        tracker.add(*store.keys, *store.values)
    stays = tracker.now
    peaks = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        tracker.peak = tracker.now
        yield
        peaks[name] = tracker.peak - stays

    with tracker, torch.inference_mode():
        with phase("vision"):
            visual = _encode(model, workload.grids, on_host=device == "cpu")
        with phase("prefill"):
            logits = _prefill(model, workload, visual, cache)
        with phase("sampling"):
            _sample(logits)
            del logits
        batch = len(workload.token_ids)
        with phase("decode"):
            model(torch.zeros(batch, 1).long(), lengths=[1] * batch, cache=cache)
    return {name: peaks[name] for name in PHASES}


def _encode(
    model: LlamaVisionModel, grids: Sequence[Sequence[Grid]], on_host: bool
) -> VisualTokens | None:
    """Encode images of these grids; where each token sits stays on the host, to be read."""
    side = model.config.vision.image_size
    pixels = torch.empty(1) if not on_host else None
    images = []
    for sample in grids:
        shapes = [(rows * cols, 3, side, side) for rows, cols in sample]
        tensors = [
            torch.empty(shape, device="meta") if pixels is None else pixels.expand(shape)
            for shape in shapes
        ]
        images.append([TiledImage(t, grid, 0) for t, grid in zip(tensors, sample, strict=True)])
    visual = model.encode_images(images)
    if visual is not None:
        vision = model.config.vision
        places = VisualTokens.blank(grids, vision.tokens_per_tile, 0, model.dtype, "cpu")
        visual = replace(visual, image=places.image, tile=places.tile, patch=places.patch)
    return visual


def _prefill(
    model: LlamaVisionModel, workload: Workload, visual: VisualTokens | None, cache: Cache
) -> Tensor:
    """Run the prompts: logits [B, vocabulary]."""
    if visual is not None:
        visual.budget = None if workload.budget is None else list(workload.budget)
    rows = pad_sequence([torch.tensor(ids) for ids in workload.token_ids], batch_first=True)
    return model(
        rows,
        visual,
        lengths=[len(ids) for ids in workload.token_ids],
        cache=cache,
        pruner=_Most(workload.trim_first_layer) if workload.pruned else None,
        prefill_chunk=workload.prefill_chunk,
        last_row_only=True,
    )


@dataclass(frozen=True)
class _Most:
    """A pruner that keeps as much as it may, and takes the room that ranking takes."""

    trim_first_layer: bool

    def __call__(self, saliency: Tensor, visual: VisualTokens) -> Tensor:
        best_ranks(saliency, replace(visual, image=visual.image.to(saliency.device)))
        if visual.budget is None:
            return visual.valid
        token = torch.arange(visual.image.shape[1])
        return visual.valid & (token < torch.tensor(visual.budget)[:, None])


def _sample(logits: Tensor) -> None:
    """What choosing the next token takes, at most: with a temperature and top-p."""
    chosen = Sampling(1.0, 0.9).choose(logits, [torch.Generator() for _ in logits])
    logits.log_softmax(dim=-1).gather(-1, chosen[:, None])


class Ledger:
    """What the phases of a run really took: their peaks, in bytes on the device.

    On CUDA the allocator's own counters are read. On the CPU, which has none, the tensors are
    tracked, each phase the first time that it is entered: tracking costs some microseconds an
    operation, and steps of decoding are all alike. Elsewhere nothing is known.
    """

    def __init__(self, device: torch.device, *there: Tensor):
        self.device = device
        self.peaks: dict[str, int] = {}
        self.tracker = Tracker("cpu") if device.type == "cpu" else None
        if self.tracker is not None:
            self.tracker.add(*there)

    @property
    def peak(self) -> int | None:
        """Of the whole run."""
        return max(self.peaks.values(), default=None)

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Note the peak of what happens inside."""
        if self.tracker is not None and phase not in self.peaks:
            self.tracker.peak = self.tracker.now
            with self.tracker:
                yield
            self.peaks[phase] = self.tracker.peak
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
        else:
            yield
