"""A request: one prompt on its way to its answer, and what came of it."""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from llama_vision.cache.kv import VisualStore
from llama_vision.cache.pruning import PruningError, traits_of
from llama_vision.config import Config
from llama_vision.drawing.notebook import answer_html
from llama_vision.engine.answer_text import AnswerText
from llama_vision.engine.image_cache import ImageCache
from llama_vision.engine.sampling import Sampling
from llama_vision.engine.segments import image_groups
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import PromptSize, Workload
from llama_vision.errors import quote
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.image import TiledImage, tile_image
from llama_vision.inputs.tokenizer import Tokenizer, needed
from llama_vision.model.model import LlamaVisionModel
from llama_vision.values import Instance

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
    visual_tokens: VisualCounts = field(default_factory=lambda: VisualCounts(0, 0, 0))
    kept: list[Tensor] = field(default_factory=list)
    """For each image a bool tensor [tiles, P]; class token first, then patches row by row."""
    stands: list[Tensor] = field(default_factory=list)
    """For each image of a group that was merged an int64 tensor [tiles, P]: the token of the group,
    counted through all of its images, that stands for each."""
    top_logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    """For each of `token_ids` the likeliest under the model itself, the likeliest first, as many as
    the settings ask for."""
    images: Sequence[Image.Image | TiledImage] = field(default=(), compare=False)
    """The prompt's pictures."""
    groups: list[int] = field(default_factory=list)
    """How many of them each group has."""
    tile_size: int = 0
    max_tiles: int = 0
    """How they were cut up; see `tile_image`."""

    def _counts(self) -> str:
        """Counts and finish reason, for people."""
        count, (_, valid, kept) = len(self.token_ids), self.visual_tokens
        words = f"{count} token{'s' * (count != 1)}, {self.finish_reason}"
        return words + f", {kept} of {valid} visual tokens kept" * bool(valid)

    def __repr__(self) -> str:
        return f"<Completion {quote(self.text or self.token_ids)}: {self._counts()}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, the counts, and each picture under what was kept."""
        how = {"tile_size": self.tile_size, "max_tiles": self.max_tiles}
        # Nothing is known of what was kept before the prompt is run.
        images = (tile_image(image, **how) for image in self.images[: len(self.kept)])
        of_images = (images, self.kept, self.stands, self.groups)
        return answer_html(self.text, self._counts(), *of_images)


@runtime_checkable
class Checkpoint(Protocol):
    """What an engine runs: a `LlamaVision`."""

    model: LlamaVisionModel
    config: Config
    tokenizer: Tokenizer | None
    sampling: Sampling
    stop_ids: frozenset[int]
    image_cache: ImageCache | None

    @property
    def room(self) -> Any:
        """What the device has free; `Room.check_slots` raises where so many slots do not fit."""


MODEL = Instance(Checkpoint, "a LlamaVision, such as LlamaVision.from_pretrained(…) gives")


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

    slot: int | None = None
    """Where the engine holds it; None while it waits and once its slot is given back."""
    first_row = 0
    """Where its rows begin in its slot."""
    finish_reason: FinishReason | None = None
    """None until it has finished."""
    replaced: list[int] | None = None
    """An answer in the place of its own, see `Engine.replace_answer`."""

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
        self.rows: list[int] = []
        """Ids to prefill, once it has a slot: the prompt's, behind those of the last answer whose
        rows are not in the cache."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[TokenLogprob]] = []
        self.kept: list[Tensor] = []
        self.stands: list[Tensor] = []
        new_groups = len(self.size.groups(self.config))
        self.groups = new_groups + (after.groups if after else 0)
        """Groups of images of the conversation, this prompt's included."""

    def __repr__(self) -> str:
        state = "waiting" if self.slot is None else "running"
        state = state if self.finish_reason is None else f"finished ({self.finish_reason})"
        place = "" if self.slot is None else f" in slot {self.slot}"
        counts = f"{len(self.prompt.token_ids)} prompt tokens, {len(self.token_ids)} generated"
        return f"<Request {state}{place}: {counts}>"

    @property
    def answer_ids(self) -> list[int]:
        """The answer's ids, with which its conversation goes on."""
        return self.token_ids if self.replaced is None else self.replaced

    def check_budgets(self, store: VisualStore, budgets: Sequence[float | int | None]) -> None:
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
        return before.union(self.prompt.token_ids, self.answer_ids)

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
        groups = image_groups(self.prompt.token_ids, self.config.text.image_token_id)
        return Completion(
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            text=self.answer.text if self.answer is not None else "",
            finish_reason=self.finish_reason or "interrupted",
            visual_tokens=VisualCounts(encoded, valid, kept),
            kept=list(self.kept),
            stands=list(self.stands),
            top_logprobs=list(self.top_logprobs),
            images=self.prompt.images,
            groups=[len(rows) for rows in groups],
            tile_size=vision.image_size,
            max_tiles=self.tiles,
        )
