"""One batch being generated: prefill, decode, sample, and what came of it."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.decode import Stepper
from llama_vision.engine.sampling import Sampling
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.image import TiledImage
from llama_vision.inputs.tokenizer import TextStream, Tokenizer
from llama_vision.memory.plan import Ledger, Workload
from llama_vision.model.model import LlamaVisionModel


class VisualCounts(NamedTuple):
    """Visual tokens of one sample."""

    encoded: int
    """Those that the encoder attends to: of `max_num_tiles` tiles an image, absent or not."""
    valid: int
    """Those of real tiles."""
    kept: int
    """Those that the cross-attention blocks after the first, and decoding, could read."""


@dataclass(frozen=True)
class Completion:
    """What the model made of one prompt."""

    token_ids: list[int]
    """Generated ids, a final stop token included."""
    logprobs: list[float]
    """Natural log of each id's probability under the model itself (temperature 1), float32."""
    text: str
    """Without special tokens; empty where the checkpoint has no tokenizer."""
    finish_reason: Literal["stop", "length", "interrupted"]
    visual_tokens: VisualCounts
    kept: list[Tensor]
    """For each image a bool tensor [tiles, P]; class token first, then patches row by row."""


class Generation:
    """One batch of prompts being continued. Iterate over it; then ask for `completions()`.

    Every step gives the new token id of each sample, None once that sample has finished. Made by
    `LlamaVision.start`, which checks and completes the settings.

    Args:
        images: the tiled images of each prompt.
        workload: the sizes of all this, from which the cache is allocated.
        limits: most tokens of each sample, prompt and answer together.
        track_memory: note the peaks of memory in `ledger`.
        compiled: compile the steps of decoding, see `stepping`.
    """

    def __init__(
        self,
        model: LlamaVisionModel,
        tokenizer: Tokenizer | None,
        prompts: Sequence[Prompt],
        images: list[list[TiledImage]],
        workload: Workload,
        *,
        limits: list[int],
        sampling: Sampling,
        seed: int,
        stop_ids: frozenset[int],
        pruner: Pruner | None,
        track_memory: bool,
        compiled: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.prompts, self.images = prompts, images
        self.workload = workload
        self.limits, self.sampling, self.stop_ids = limits, sampling, stop_ids
        self.pruner, self.compiled = pruner, compiled
        self.stepper: Stepper | None = None
        self.generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        self.cache = self._allocate()
        self.kept: list[list[Tensor]] = [[] for _ in prompts]
        self.token_ids: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.finish_reasons: list[str | None] = [None] * len(prompts)
        self.seconds = {"vision": 0.0, "prefill": 0.0, "decode": 0.0}
        self.ledger = self._open_ledger() if track_memory else None

    def __iter__(self) -> Iterator[list[int | None]]:
        """Prefill, then decode until every sample has finished."""
        logits = self._prefill()
        while True:
            with self._phase("decode", "sampling"):
                new = self._choose(logits)
            yield new
            if all(self.finish_reasons):
                return
            del logits
            with self._phase("decode"):
                logits = self._decode(new)

    def text_pieces(self) -> Iterator[str]:
        """The text of the only sample, in pieces of whole characters."""
        stream = TextStream(self.tokenizer)
        for (token,) in self:
            if token not in self.stop_ids:
                yield stream.add(token)
        yield stream.end()

    def completions(self) -> list[Completion]:
        """What has been made so far, one for each prompt."""
        return [self._completion(sample) for sample in range(len(self.prompts))]

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        """Encode the images, run the prompts: logits [B, vocabulary] of their last rows."""
        with self._phase("vision"):
            visual = self.model.encode_images(self.images)
            self.images = []  # their pixels are not read again
        with self._phase("prefill"):
            logits = self._run_prompts(visual)
        if visual is not None:
            self.kept = visual.kept_of_images()
        return logits

    def _run_prompts(self, visual: VisualTokens | None) -> Tensor:
        if visual is not None:
            budget = self.workload.budget
            visual.budget = None if budget is None else list(budget)
        lengths = [len(prompt.token_ids) for prompt in self.prompts]
        token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
        for sample, prompt in enumerate(self.prompts):
            token_ids[sample, : lengths[sample]] = torch.tensor(list(prompt.token_ids))
        return self.model(
            token_ids,
            visual,
            lengths=lengths,
            cache=self.cache,
            pruner=self.pruner,
            prefill_chunk=self.workload.prefill_chunk,
            last_row_only=True,
        )

    @torch.inference_mode()
    def _decode(self, new: list[int | None]) -> Tensor:
        """One more row for each sample that has not finished: logits [B, vocabulary]."""
        token_ids = [token or 0 for token in new]
        lengths = [0 if reason else 1 for reason in self.finish_reasons]
        if self.compiled:
            self.stepper = self.stepper or Stepper(self.model, self.cache)
            return self.stepper(token_ids, lengths)
        rows = torch.tensor(token_ids)[:, None]
        return self.model(rows, lengths=lengths, cache=self.cache, last_row_only=True)

    @torch.inference_mode()
    def _choose(self, logits: Tensor) -> list[int | None]:
        """Draw each sample's next token and note it; None for those that had finished."""
        chosen = self.sampling.choose(logits, self.generators)
        logprobs = logits.log_softmax(dim=-1).gather(-1, chosen[:, None]).squeeze(-1)
        step: list[int | None] = []
        for sample, (token, logprob) in enumerate(
            zip(chosen.tolist(), logprobs.tolist(), strict=True)
        ):
            if self.finish_reasons[sample]:
                step.append(None)
                continue
            step.append(token)
            self.token_ids[sample].append(token)
            self.logprobs[sample].append(logprob)
            length = len(self.prompts[sample].token_ids) + len(self.token_ids[sample])
            if token in self.stop_ids:
                self.finish_reasons[sample] = "stop"
            elif length == self.limits[sample]:
                self.finish_reasons[sample] = "length"
        return step

    def _allocate(self) -> Cache:
        """The cache; what a pruner leaves without a budget is only known during prefill."""
        sizes = self.workload.cache_sizes(self.model.config)
        if self.workload.pruned and self.workload.budget is None:
            sizes["visual_capacity"] = None
        return Cache(
            self.model.config.text, dtype=self.model.dtype, device=self.model.device, **sizes
        )

    def _open_ledger(self) -> Ledger:
        """With what is there from the start: weights, caches, and the pictures that wait."""
        stores = (self.cache.text, self.cache.visual)
        return Ledger(
            self.model.device,
            *self.model.parameters(),
            *(tensor for store in stores for tensor in (*store.keys, *store.values)),
            *(image.pixels for sample in self.images for image in sample),
        )

    @contextmanager
    def _phase(self, seconds: str, memory: str | None = None) -> Iterator[None]:
        """Add what happens inside to one entry of `seconds`, and watch its memory."""
        untracked = self.compiled and (seconds, memory) == ("decode", None)
        # Compiled code makes no tensors that could be tracked, and would be compiled anew for that.
        if self.ledger is None or untracked:
            watched = nullcontext()
        else:
            watched = self.ledger.watch(memory or seconds)
        with _Stopwatch(self.seconds, seconds, self.model.device), watched:
            yield

    def _completion(self, sample: int) -> Completion:
        spoken = [token for token in self.token_ids[sample] if token not in self.stop_ids]
        vision = self.model.config.vision
        grids = self.workload.grids[sample]
        encoded = len(grids) * vision.max_num_tiles * vision.tokens_per_tile
        valid = sum(map(math.prod, grids)) * vision.tokens_per_tile
        kept = sum(int(mask.sum()) for mask in self.kept[sample])
        return Completion(
            token_ids=list(self.token_ids[sample]),
            logprobs=list(self.logprobs[sample]),
            text=self.tokenizer.decode(spoken) if self.tokenizer else "",
            finish_reason=self.finish_reasons[sample] or "interrupted",
            visual_tokens=VisualCounts(encoded, valid, kept),
            kept=self.kept[sample],
        )


class _Stopwatch:
    """Adds the seconds spent inside to one entry.

    It waits for the device where a phase hands over to the next. While decoding nothing need be
    waited for: each step ends with its token ids being read.
    """

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device):
        self.seconds, self.name, self.device = seconds, name, device

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.name != "decode" and self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        self.seconds[self.name] += time.perf_counter() - self.start
