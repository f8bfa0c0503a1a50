"""What comes and goes in a run, found by running it on torch's meta device.

Tensors have sizes there and no bytes, while a `Tracker` counts what is alive: so a plan cannot fall
behind the code.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import reads_only
from llama_vision.cache.rule import best_ranks
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import Config
from llama_vision.engine.decode import Decoder
from llama_vision.engine.prefill import prefill
from llama_vision.engine.sampling import Sampling, sample
from llama_vision.engine.workload import PromptSize, Workload
from llama_vision.inputs.image import TiledImage
from llama_vision.memory.ledger import Tracker
from llama_vision.model.model import LlamaVisionModel, model_without_weights

PHASES = ("vision", "prefill", "decode", "sampling")


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
    quantization = config.quantization and config.quantization.without_exceptions()
    return replace(config, vision=vision, text=text, quantization=quantization)


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
        if workload.slots == len(prompts):  # none waits any more
            simulation.shared = None
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
        size = (workload.shared_tokens, config.text.hidden_size) if on_host else (0,)
        self.shared = torch.empty(size, dtype=dtype, device="meta")
        self.tracker.add(self.shared)

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
        workload = self.workload
        self.cache.clear(0)
        prefill(
            self.model,
            self.cache,
            0,
            prompt.token_ids,
            map(self._image, prompt.grids),
            pruner=self._pruner(),
            visual_budgets=[workload.visual_budget],
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
