"""The workload that prompts and settings make."""

import math
from collections import Counter
from collections.abc import Sequence

from llama_vision.cache.pruning import traits_of
from llama_vision.cache.visual_tokens import Grid
from llama_vision.config import Config
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import SLOTS, PromptSize, Workload
from llama_vision.inputs.chat import Prompt
from llama_vision.values import check


def workload_of(
    prompts: Sequence[Prompt],
    settings: Settings,
    config: Config,
    *,
    slots: int | None = None,
    padding_tiles_alike: bool = False,
) -> Workload:
    """The sizes of a run; no picture is cut up.

    Args:
        settings: of every prompt.
        slots: how many are answered at once; None for all of them.
        padding_tiles_alike: see `Workload`.

    Raises:
        LlamaVisionError: a number is out of range, or a prompt does not fit.
    """
    if slots is not None:
        check("slots", slots, SLOTS)
    tiles = settings.limited("max_tiles", config.vision.max_num_tiles)
    sizes = tuple(PromptSize.of(prompt, config, tiles) for prompt in prompts)
    allowed = config.text.max_position_embeddings
    load = Workload(
        sizes,
        min(slots or len(sizes), len(sizes)),
        max(settings.limit(len(size.token_ids), allowed) for size in sizes),
        settings.prefill_chunk,
        pruner=None if settings.pruner is None else traits_of(settings.pruner),
        visual_budget=settings.visual_budget,
        shared_tokens=shared_tokens(prompts, sizes, config),
        padding_tiles_alike=padding_tiles_alike,
    )
    load.check_budget(config)
    return load


def shared_tokens(prompts: Sequence[Prompt], sizes: Sequence[PromptSize], config: Config) -> int:
    """Visual tokens of those images that more than one of several prompts shows."""
    if len(prompts) < 2:
        return 0
    shown = Counter[tuple[bytes, Grid]]()
    for prompt, size in zip(prompts, sizes, strict=True):
        shown.update(set(zip(prompt.contents, size.grids, strict=True)))
    tiles = (math.prod(grid) for (_, grid), count in shown.items() if count > 1)
    return sum(tiles) * config.vision.tokens_per_tile
