"""What is asked of an engine, as far as memory goes: sizes of prompts, slots and caches."""

import inspect
import math
from dataclasses import dataclass
from typing import Any

from llama_vision.cache.pruning import (
    Pruner,
    PruningError,
    Traits,
    traits_of,
)
from llama_vision.cache.visual_tokens import Grid
from llama_vision.config import Config
from llama_vision.engine.segments import cut_into_segments
from llama_vision.inputs.chat import Prompt, check_prompt
from llama_vision.inputs.image import TiledImage, check_tiles, grid_of
from llama_vision.values import Either, Number, Whole, check

PREFILL_CHUNK = 2048
"""Rows of a prompt that keep a GPU busy; more of them at once would only take more memory."""


DEFAULT_SEQ_LEN = 2048
"""Tokens of a prompt and its answer that there is room for where nothing else is said."""

SLOTS = Whole(1, 2**20)
"""Conversations at once: more than any machine holds."""

BUDGET = Either(
    (Whole(1), Number(0, 1, above=True)),
    words="a fraction above 0 and at most 1.0, or a whole number of tokens",
)
"""Most visual tokens of a group of images to keep."""


@dataclass(frozen=True)
class PromptSize:
    """One prompt: where its images stand, and their tiles."""

    token_ids: tuple[int, ...]
    grids: tuple[Grid, ...] = ()
    """Rows and columns of tiles of each image."""

    @classmethod
    def of(cls, prompt: Prompt, config: Config, max_tiles: int) -> "PromptSize":
        """That of a prompt, which is checked; its pictures are not cut up yet."""
        check_prompt(prompt, config.text.image_token_id, config.text.largest_token_id)
        side = config.vision.image_size
        for image in prompt.images:
            if isinstance(image, TiledImage):
                check_tiles(image, side, config.vision.max_num_tiles)
        grids = (grid_of(image, side, max_tiles) for image in prompt.images)
        return cls(tuple(prompt.token_ids), tuple(grids))

    def groups(self, config: Config) -> list[int]:
        """Visual tokens of each group of images."""
        segments = cut_into_segments(self.token_ids, config.text.image_token_id)
        tiles = [sum(math.prod(self.grids[i]) for i in s.images) for s in segments if s.images]
        return [n * config.vision.tokens_per_tile for n in tiles]

    def decoded(self, config: Config) -> int:
        """Visual tokens that decoding reads: those of the last group."""
        return self.groups(config)[-1] if self.grids else 0


@dataclass(frozen=True)
class Workload:
    """Prompts that an engine is to answer."""

    prompts: tuple[PromptSize, ...]
    slots: int
    """How many of them are held at once."""
    max_text_tokens: int
    """Most tokens of a slot, prompt and answer together."""
    prefill_chunk: int = PREFILL_CHUNK
    pruner: Traits | None = None
    """Of the one that chooses among the visual tokens; None where all are kept."""
    visual_budget: float | int | None = None
    """Most visual tokens of a group to keep: a count, or a fraction of them."""
    shared_tokens: int = 0
    """Visual tokens of images that several prompts show: they are held until the last has them."""
    padding_tiles_alike: bool = False
    """Whether one padding tile stands for all of an image; not known before the weights are."""

    @property
    def open_ended(self) -> bool:
        """Whether what is kept will only be known when a pruner has answered."""
        return self.pruner is not None and self.visual_budget is None

    def cache_sizes(self, config: Config) -> dict[str, Any]:
        """The arguments of `Cache` and `Cache.plan` but for dtype and device.

        Open-ended, the capacity is the most that a pruner can leave, which the store does not take
        beforehand.
        """
        needs = [prompt.decoded(config) for prompt in self.prompts]
        kept = [budget_in_tokens(self.visual_budget, n) if n else 0 for n in needs]
        traits = self.pruner or Traits()
        return {
            "slots": self.slots,
            "max_text_tokens": self.max_text_tokens,
            "visual_capacity": max(kept, default=0),
            "first_visual_capacity": None if traits.trim_first_layer else max(needs, default=0),
            "merged": traits.merge and any(needs),
        }

    def check_budget(self, config: Config) -> None:
        """Raise PruningError where a budget is less than is needed and no pruner would choose."""
        for prompt in self.prompts:
            for tokens in prompt.groups(config):
                budget_in_tokens(self.visual_budget, tokens)
            need = prompt.decoded(config)
            most = budget_in_tokens(self.visual_budget, need) if need else 0
            if need > most and self.pruner is None:
                raise PruningError(
                    f"the images need {need} visual tokens and the visual budget is {most}; "
                    f"raise --visual-budget (visual_budget) to {need}, or choose a pruner, "
                    "such as --k-ratio 0.5 (pruner=TrimmedLlama(0.5))"
                )


def budget_in_tokens(budget: float | int | None, tokens: int) -> int:
    """A visual budget for a group of so many tokens: of a fraction its part, or the count.

    Raises:
        PruningError: it is no fraction in (0, 1] and no count of at least 1, or under one token.
    """
    if budget is None:
        return tokens
    budget = check("visual_budget", budget, BUDGET, error=PruningError)
    most = min(budget, tokens) if isinstance(budget, int) else math.floor(budget * tokens)
    if tokens and not most:
        raise PruningError(
            f"visual_budget is {budget}, less than one of the {tokens} visual tokens of a group "
            "of images; expected a larger fraction, or a whole number of tokens"
        )
    return most


def slot_capacity(
    config: Config, slots: int, max_seq_len: int, visual_budget: float | int | None
) -> int | None:
    """Visual tokens that an engine's slot has room for; None where it is left open.

    Raises:
        LlamaVisionError: a number is out of range.
    """
    most = config.text.max_position_embeddings
    check("slots", slots, SLOTS)
    check("max_seq_len", max_seq_len, Whole(1, most, means="for this model"))
    image = config.vision.max_num_tiles * config.vision.tokens_per_tile
    if visual_budget is None:
        return None
    budget = check("visual_budget", visual_budget, BUDGET, error=PruningError)
    if isinstance(budget, float):
        return budget_in_tokens(budget, image)
    return min(budget, max_seq_len * image)  # an image for each token is all that can come


def workload_alike(
    config: Config,
    *,
    batch: int = 1,
    images: int = 1,
    tiles: int | None = None,
    max_seq_len: int = DEFAULT_SEQ_LEN,
    prompt_tokens: int | None = None,
    visual_budget: float | int | None = None,
    pruner: Pruner | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Workload:
    """Prompts of equal size, a batch of them at once, each in a slot of its own.

    Args:
        images: of each prompt, side by side in front of the text.
        tiles: of each image; None for the most.
        max_seq_len: most tokens of prompt and answer together.
        prompt_tokens: of each prompt, its images among them; None for max_seq_len - 1, the most.
        visual_budget: most visual tokens of each prompt to keep: a fraction of them or a count.
        pruner: what chooses them; None for any that drops the others.
        prefill_chunk: most rows that go through a block at once.

    Raises: LlamaVisionError for a number out of range.
    """
    tiles = config.vision.max_num_tiles if tiles is None else tiles
    check("batch", batch, SLOTS)
    check("max_seq_len", max_seq_len, Whole(2, config.text.max_position_embeddings))
    prompt_tokens = max_seq_len - 1 if prompt_tokens is None else prompt_tokens
    check("images", images, Whole(0, max_seq_len - 1))
    check("tiles", tiles, Whole(1, config.vision.max_num_tiles))
    check("prompt_tokens", prompt_tokens, Whole(max(1, images), max_seq_len - 1))
    check("prefill_chunk", prefill_chunk, Whole(1))
    token_ids = (config.text.image_token_id,) * images + (0,) * (prompt_tokens - images)
    prompt = PromptSize(token_ids, ((1, tiles),) * images)
    budget = visual_budget if images else None
    traits = (Traits() if budget is not None else None) if pruner is None else traits_of(pruner)
    load = Workload((prompt,) * batch, batch, max_seq_len, prefill_chunk, traits, budget)
    load.check_budget(config)
    return load


SIZES = tuple(inspect.signature(workload_alike).parameters)[1:]
"""What `workload_alike` takes, by name."""
