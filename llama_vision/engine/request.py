"""A request: one prompt on its way to its answer, and what came of it."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from llama_vision.config import Config
from llama_vision.engine.sampling import Sampling
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import PromptSize
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.tokenizer import TextStream, Tokenizer, needed
from llama_vision.model.model import LlamaVisionModel

FinishReason = Literal["stop", "length", "interrupted"]


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
    """Generated ids, a final stop token included."""
    logprobs: list[float]
    """Natural log of each id's probability under the model itself (temperature 1), float32."""
    text: str
    """Without special tokens; empty where the checkpoint has no tokenizer."""
    finish_reason: FinishReason
    visual_tokens: VisualCounts
    kept: list[Tensor]
    """For each image a bool tensor [tiles, P]; class token first, then patches row by row."""


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
        self.tiles = settings.limited("max_tiles", checkpoint.config.vision.max_num_tiles)
        self.size = PromptSize.of(prompt, checkpoint.config, self.tiles)
        self.limit = settings.limit(rows_before + len(prompt.token_ids), capacity)
        """Most rows of its slot."""
        self.sampling = settings.sampling(checkpoint.sampling)
        stop_ids = checkpoint.stop_ids if settings.stop_ids is None else settings.stop_ids
        self.stop_ids = frozenset(() if settings.ignore_stop else stop_ids)
        seed = secrets.randbits(63) if settings.seed is None else settings.seed
        self.generator = torch.Generator().manual_seed(seed)
        self.slot: int | None = None
        """Where the engine holds it; None while it waits and once its slot is given back."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.kept: list[Tensor] = []
        self.finish_reason: FinishReason | None = None
        """None until it has finished."""
        new_groups = len(self.size.groups(checkpoint.config))
        self.groups = new_groups + (after.groups if after else 0)
        """Groups of images of the conversation, this prompt's included."""

    @property
    def rows_to_prefill(self) -> list[int]:
        """The prompt's ids, behind the token of the last answer that was not fed back."""
        unread = self.after.token_ids[-1:] if self.after is not None else []
        return [*unread, *self.prompt.token_ids]

    def completion(self, config: Config, tokenizer: Tokenizer | None) -> Completion:
        """What has been made so far."""
        vision = config.vision
        encoded = len(self.size.grids) * vision.max_num_tiles * vision.tokens_per_tile
        valid = sum(map(math.prod, self.size.grids)) * vision.tokens_per_tile
        kept = sum(int(mask.sum()) for mask in self.kept)
        return Completion(
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            text=tokenizer.decode(self.spoken(self.token_ids)) if tokenizer else "",
            finish_reason=self.finish_reason or "interrupted",
            visual_tokens=VisualCounts(encoded, valid, kept),
            kept=list(self.kept),
        )

    def spoken(self, token_ids: Sequence[int]) -> list[int]:
        """Those that are no stop tokens."""
        return [token for token in token_ids if token not in self.stop_ids]


class TextOfRequest:
    """The text of a request as it grows, in pieces of whole characters."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None):
        self.request, self.stream, self.read = request, TextStream(needed(tokenizer)), 0

    def new(self) -> str:
        """What has come since it was last asked; at the end the rest of a broken character too."""
        ids = self.request.token_ids[self.read :]
        self.read += len(ids)
        text = "".join(self.stream.add(token) for token in self.request.spoken(ids))
        return text + self.stream.end() if self.request.finish_reason else text
