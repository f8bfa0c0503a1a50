"""Will it fit? A plan from a name alone, and the largest settings that fit into so much memory."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llama_vision.cache.kv import Cache
from llama_vision.checkpoint.loading import choose_dtype, load_config, parse_device
from llama_vision.config import Config, SettingError
from llama_vision.memory.fit import human_bytes, largest, with_budget
from llama_vision.memory.plan import (
    PREFILL_CHUNK,
    MemoryPlan,
    Workload,
    budget_in_tokens,
    plan_run,
    visual_counts,
    weight_parts,
)

DEFAULT_SEQ_LEN = 2048
"""Tokens of a prompt and its answer that are planned for where nothing else is said."""

MOST_PROMPTS = 64
MOST_IMAGES = 64
"""Where the searches for the largest batch and the most images end."""


def plan_memory(
    source: Config | str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    batch: int = 1,
    max_seq_len: int = DEFAULT_SEQ_LEN,
    tiles: int | None = None,
    images: int = 1,
    visual_budget: float | int | None = None,
    prompt_tokens: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    device: torch.device | str = "auto",
) -> MemoryPlan:
    """What a run would take, from the configuration alone: no weight is read or fetched.

    Args:
        source: a `Config`, a directory, a repository id, or "11b" or "90b".
        dtype: of weights and caches; "auto" for the type that the checkpoint was published in.
        batch: prompts at once.
        max_seq_len: most tokens of prompt and answer together.
        tiles: of each image; None for the most.
        images: of each prompt, side by side in front of the text.
        visual_budget: most visual tokens of each prompt to keep: a fraction of them or a count.
        prompt_tokens: of each prompt, its images among them; None for max_seq_len - 1, the most.
        prefill_chunk: most rows, of all samples, that go through a block at once.
        device: its kind decides what counts: on "cpu" pictures and token ids too. It need not be
            there; "auto" for the one that a run would take.

    Raises:
        LlamaVisionError: a number is out of range.
    """
    config = source if isinstance(source, Config) else load_config(source)
    workload = workload_alike(
        config,
        batch=batch,
        images=images,
        tiles=tiles,
        max_seq_len=max_seq_len,
        prompt_tokens=prompt_tokens,
        visual_budget=visual_budget,
        prefill_chunk=prefill_chunk,
    )
    return plan_run(
        config, workload, dtype=choose_dtype(dtype, config.dtype), device=parse_device(str(device))
    )


def workload_alike(
    config: Config,
    *,
    batch: int = 1,
    images: int = 1,
    tiles: int | None = None,
    max_seq_len: int = DEFAULT_SEQ_LEN,
    prompt_tokens: int | None = None,
    visual_budget: float | int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Workload:
    """Prompts of equal size; for the arguments see `plan_memory`."""
    tiles = config.vision.max_num_tiles if tiles is None else tiles
    prompt_tokens = max_seq_len - 1 if prompt_tokens is None else prompt_tokens
    ranges = {
        "batch": (batch, 1, None),
        "max_seq_len": (max_seq_len, 2, config.text.max_position_embeddings),
        "images": (images, 0, max_seq_len - 1),
        "tiles": (tiles, 1, config.vision.max_num_tiles),
        "prompt_tokens": (prompt_tokens, max(1, images), max_seq_len - 1),
        "prefill_chunk": (prefill_chunk, 1, None),
    }
    for name, (value, least, most) in ranges.items():
        if value < least or (most is not None and value > most):
            upper = "or more" if most is None else f"to {most}"
            raise SettingError(f"{name} is {value}; expected {least} {upper}")
    token_ids = (config.text.image_token_id,) * images + (0,) * (prompt_tokens - images)
    grids = ((1, tiles),) * images
    load = Workload((token_ids,) * batch, (grids,) * batch, max_seq_len, prefill_chunk)
    if visual_budget is None or not images:
        return load
    budget = budget_in_tokens(visual_budget, visual_counts(load.grids, config))
    return replace(load, pruned=True, budget=tuple(budget))


def largest_settings(
    config: Config, workload: Workload, *, dtype: torch.dtype, device: torch.device, room: int
) -> dict[str, Any]:
    """The most of each kind that fits into `room` bytes, the others as in the workload.

    Prompts like its first one are added for the batch, images like its first one (or of all tiles)
    for the images, text behind it for the length; the budget is what is kept of each prompt.

    Returns:
        For "batch", "images", "max_seq_len" and "visual_budget" the `largest` number that fits and
        whether that is `all` that was tried; "instead", what to do where the weights do not fit.
    """

    weights = sum(weight_parts(config, dtype).values())

    def stays(load: Workload) -> int:
        return weights + Cache.plan(config.text, dtype=dtype, **load.cache_sizes(config)).total

    def total(load: Workload) -> int:
        return plan_run(config, load, dtype=dtype, device=device).total

    def search(make: Callable[[int], Workload], least: int, most: int) -> dict[str, Any]:
        # Arithmetic first: what has no room even for its caches need not be run.
        numbers = range(least, most + 1)
        numbers = numbers[: bisect_right(numbers, room, key=lambda n: stays(make(n)))]
        count = largest(lambda i: total(make(numbers[i - 1])), room, len(numbers))
        number = numbers[count - 1] if count else 0
        return {"largest": number, "all": number == most}

    text, tokens = config.text, max(visual_counts(workload.grids, config))
    shortest = max(map(len, workload.grids)) + 2
    return {
        "batch": search(partial(_with_batch, workload), 1, MOST_PROMPTS),
        "images": search(partial(_with_images, workload, config), 1, MOST_IMAGES),
        "max_seq_len": search(
            partial(_with_length, workload, config), shortest, text.max_position_embeddings
        ),
        "visual_budget": search(partial(with_budget, workload, config), 1, tokens),
        "instead": instead_of(config, dtype, room),
    }


def _with_batch(workload: Workload, batch: int) -> Workload:
    budget = None if workload.budget is None else workload.budget[:1] * batch
    return replace(
        workload,
        token_ids=workload.token_ids[:1] * batch,
        grids=workload.grids[:1] * batch,
        budget=budget,
    )


def _with_images(workload: Workload, config: Config, images: int) -> Workload:
    """So many images side by side before the first prompt's text; a budget keeps its part."""
    text = [token for token in workload.token_ids[0] if token != config.text.image_token_id]
    grid = (workload.grids[0] or ((1, config.vision.max_num_tiles),))[0]
    ids = (config.text.image_token_id,) * images + tuple(text)
    batch = len(workload.token_ids)
    load = replace(
        workload,
        token_ids=(ids,) * batch,
        grids=((grid,) * images,) * batch,
        max_text_tokens=workload.max_text_tokens - len(workload.token_ids[0]) + len(ids),
    )
    if workload.budget is None:
        return load
    old = visual_counts(workload.grids, config)
    part = max(b / max(1, n) for b, n in zip(workload.budget, old, strict=True))
    return replace(load, budget=tuple(budget_in_tokens(part, visual_counts(load.grids, config))))


def _with_length(workload: Workload, config: Config, length: int) -> Workload:
    """Prompts of their images and so much text that one token's room is left."""
    image, text = config.text.image_token_id, 0
    ids = [(image,) * len(row) + (text,) * (length - 1 - len(row)) for row in workload.grids]
    return replace(workload, token_ids=tuple(ids), max_text_tokens=length)


def instead_of(config: Config, dtype: torch.dtype, room: int) -> str:
    """What to do where the weights alone exceed the room."""
    size = sum(weight_parts(config, dtype).values())
    ways = []
    if dtype.itemsize > 2 and size // 2 <= room:
        ways.append(f"--dtype bfloat16 ({human_bytes(size // 2)})")
    return " or ".join([*ways, f"a device with {human_bytes(size)} and some more"])
