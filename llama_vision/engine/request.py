"""A request: one prompt on its way to its answer, and what came of it."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llama_vision.cache.kv import VisualStore
from llama_vision.cache.pruning import PruningError, traits_of
from llama_vision.config import Config
from llama_vision.engine.answer_text import AnswerText
from llama_vision.engine.sampling import Sampling
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import PromptSize, Workload
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.tokenizer import Tokenizer, needed
from llama_vision.model.model import LlamaVisionModel

FinishReason = Literal["stop", "length", "interrupted"]


class TokenLogprob(NamedTuple):
    """A token that might have come, and the natural log of its probability."""

    id: int
    logprob: float


class Chosen(NamedTuple):
    """A request's next token."""

    token: int
    logprob: float
    """Natural log of its probability under the model itself (temperature 1), float32."""
    top: list[TokenLogprob]
    """The likeliest ones, as many as were asked for."""


class VisualCounts(NamedTuple):
    """Visual tokens of one prompt."""

    encoded: int
    """Those that the encoder attends to: of `max_num_tiles` tiles an image, real or padding."""
    valid: int
    """Those of real tiles."""
    kept: int
    """Those that the cross-attention blocks after the first, and decoding, could read."""


@dataclass(frozen=True)
class Completion:
    """What the model made of one prompt."""

    token_ids: list[int]
    """Generated ids, a final stop token included, and those of a stop string."""
    logprobs: list[float]
    """Natural log of each id's probability under the model itself (temperature 1), float32."""
    text: str
    """Without special tokens and stop strings; empty where the checkpoint has no tokenizer."""
    finish_reason: FinishReason
    visual_tokens: VisualCounts
    kept: list[Tensor]
    """For each image a bool tensor [tiles, P]; class token first, then patches row by row."""
    stands: list[Tensor]
    """For each image of a group that was merged an int64 tensor [tiles, P]: the token of the group,
    counted through all of its images, that stands for each."""
    top_logprobs: list[list[TokenLogprob]]
    """For each of `token_ids` the likeliest under the model itself, the likeliest first, as many as
    the settings ask for."""


@runtime_checkable
class Checkpoint(Protocol):
    """What an engine runs: a `LlamaVision`."""

    model: LlamaVisionModel
    config: Config
    tokenizer: Tokenizer | None
    sampling: Sampling
    stop_ids: frozenset[int]

    @property
    def room(self) -> Any:
        """What the device has free; `Room.check_slots` raises where so many slots do not fit."""


class Request:
    """Made by `Engine.submit`, filled by `Engine.step`.

    Args:
        rows_before: those of its conversation that are in its slot, or are to be run before it.
        capacity: most rows of a slot.
        after: the request of the same conversation that this one goes on from.
        hold: whether its slot is kept when its answer has ended.

    Raises:
        LlamaVisionError: the prompt, or a setting, does not fit the model or the slot.
    """

    def __init__(
        self,
        prompt: Prompt,
        settings: Settings,
        checkpoint: Checkpoint,
        *,
        rows_before: int,
        capacity: int,
        after: "Request | None",
        hold: bool,
    ):
        self.prompt, self.settings, self.after, self.hold = prompt, settings, after, hold
        self.config = checkpoint.config
        self.tiles = settings.limited("max_tiles", self.config.vision.max_num_tiles)
        self.size = PromptSize.of(prompt, self.config, self.tiles)
        self.limit = settings.limit(rows_before + len(prompt.token_ids), capacity)
        """Most rows of its slot."""
        self.sampling = settings.sampling(checkpoint.sampling)
        stop_ids = checkpoint.stop_ids if settings.stop_ids is None else settings.stop_ids
        self.stop_ids = frozenset(() if settings.ignore_stop else stop_ids)
        tokenizer = needed(checkpoint.tokenizer) if settings.stop else checkpoint.tokenizer
        self.answer = AnswerText(tokenizer, settings.stop) if tokenizer else None
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.generator = torch.Generator().manual_seed(seed)
        text = self.config.text
        self.never = [text.image_token_id] * (text.image_token_id < text.vocab_size)
        """Ids that are never chosen: a model whose vocabulary grew past `<|image|>` has a logit for
        it, and no picture to put there."""
        self.slot: int | None = None
        """Where the engine holds it; None while it waits and once its slot is given back."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[TokenLogprob]] = []
        self.kept: list[Tensor] = []
        self.stands: list[Tensor] = []
        self.finish_reason: FinishReason | None = None
        """None until it has finished."""
        new_groups = len(self.size.groups(self.config))
        self.groups = new_groups + (after.groups if after else 0)
        """Groups of images of the conversation, this prompt's included."""

    @property
    def rows_to_prefill(self) -> list[int]:
        """The prompt's ids, behind the token of the last answer that was not fed back."""
        unread = self.after.token_ids[-1:] if self.after is not None else []
        return [*unread, *self.prompt.token_ids]

    def check_budgets(self, store: VisualStore, budgets: Sequence[float | int]) -> None:
        """Raise PruningError where its images need more than a store or one of the budgets has."""
        pruner, need = self.settings.pruner, self.size.decoded(self.config)
        traits = None if pruner is None else traits_of(pruner)
        whole = traits is not None and not traits.trim_first_layer
        if whole and store.fixed and need > store.capacities[0]:
            raise PruningError(
                f"the pruner leaves the first cross-attention layer whole, which needs {need} "
                f"tokens where its cache holds {store.capacities[0]}; raise visual_budget, or "
                "prune with trim_first_layer=True"
            )
        for budget in (self.settings.visual_budget, *budgets):
            load = Workload((self.size,), 1, 1, pruner=traits, visual_budget=budget)
            load.check_budget(self.config)

    @property
    def seen(self) -> set[int]:
        """Token ids of the conversation so far."""
        before = self.after.seen if self.after is not None else set()
        return before.union(self.prompt.token_ids, self.token_ids)

    def note_token(self, chosen: Chosen, rows: int) -> None:
        """Go on with a token, and see whether it ends the answer.

        Args:
            rows: those that its slot holds.
        """
        token = chosen.token
        self.token_ids.append(token)
        self.logprobs.append(chosen.logprob)
        self.top_logprobs.append(chosen.top)
        is_stop = token in self.stop_ids
        if self.answer is not None and not is_stop:
            self.answer.add(token)
        if is_stop or (self.answer is not None and self.answer.stopped):
            self.finish("stop")
        elif rows + 1 == self.limit:
            self.finish("length")

    def finish(self, reason: FinishReason) -> None:
        """No more tokens come."""
        self.finish_reason = reason
        if self.answer is not None:
            self.answer.end()

    def completion(self) -> Completion:
        """What has been made so far."""
        vision = self.config.vision
        encoded = len(self.size.grids) * vision.max_num_tiles * vision.tokens_per_tile
        valid = sum(map(math.prod, self.size.grids)) * vision.tokens_per_tile
        kept = sum(int(mask.sum()) for mask in self.kept)
        return Completion(
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            text=self.answer.text if self.answer is not None else "",
            finish_reason=self.finish_reason or "interrupted",
            visual_tokens=VisualCounts(encoded, valid, kept),
            kept=list(self.kept),
            stands=list(self.stands),
            top_logprobs=list(self.top_logprobs),
        )
