"""The largest settings that fit into so many bytes: what `--fit` prints."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llama_vision.cache.pruning import Traits
from llama_vision.config import Config
from llama_vision.engine.workload import PromptSize, Workload
from llama_vision.memory.fit import Room, largest, smaller
from llama_vision.memory.plan import weight_bytes
from llama_vision.memory.units import human_bytes

MOST_PROMPTS = 64
MOST_IMAGES = 64
"""Where the searches for the largest batch and the most images end."""


def largest_settings(
    config: Config, load: Workload, *, dtype: torch.dtype, device: torch.device, room: int
) -> dict[str, Any]:
    """The most of each kind that fits into `room` bytes, the others as in the workload.

    Prompts like its first one are added for the batch, images like its first one (or of all tiles)
    for the images, text behind it for the length; the budget is what is kept of each prompt.

    Returns:
        For "batch", "images", "max_seq_len" and "visual_budget" the `largest` number that fits and
        whether that is `all` that was tried; "instead", what to do where the weights do not fit.
    """
    space = Room(config, dtype, device, loaded=False, free=room)

    def search(make: Callable[[int], Workload], least: int, most: int) -> dict[str, Any]:
        count = largest(lambda n: space.need(make(least - 1 + n)), room, most - least + 1)
        number = least - 1 + count if count else 0
        return {"largest": number, "all": number == most}

    first = load.prompts[0]
    tokens = replace(load, visual_budget=None).cache_sizes(config)["visual_capacity"]
    pruned = replace(load, pruner=load.pruner or Traits())
    return {
        "batch": search(lambda n: replace(load, prompts=(first,) * n, slots=n), 1, MOST_PROMPTS),
        "images": search(lambda n: _with_images(load, config, n), 1, MOST_IMAGES),
        "max_seq_len": search(
            lambda n: _with_length(load, config, n),
            max(len(prompt.grids) for prompt in load.prompts) + 2,
            config.text.max_position_embeddings,
        ),
        "visual_budget": search(lambda n: replace(pruned, visual_budget=n), 1, tokens),
        "instead": instead_of(config, dtype, room),
    }


def _with_images(load: Workload, config: Config, images: int) -> Workload:
    """So many images side by side before the first prompt's text."""
    first = load.prompts[0]
    text = [token for token in first.token_ids if token != config.text.image_token_id]
    grid = (first.grids or ((1, config.vision.max_num_tiles),))[0]
    prompt = PromptSize((config.text.image_token_id,) * images + tuple(text), (grid,) * images)
    more = len(prompt.token_ids) - len(first.token_ids)
    return replace(
        load,
        prompts=(prompt,) * len(load.prompts),
        max_text_tokens=load.max_text_tokens + more,
    )


def _with_length(load: Workload, config: Config, length: int) -> Workload:
    """Prompts of their images and so much text that one token's room is left."""
    image, text = config.text.image_token_id, 0
    prompts = (
        replace(p, token_ids=(image,) * len(p.grids) + (text,) * (length - 1 - len(p.grids)))
        for p in load.prompts
    )
    return replace(load, prompts=tuple(prompts), max_text_tokens=length)


def instead_of(config: Config, dtype: torch.dtype, room: int) -> str:
    """What to do where the weights alone exceed the room."""
    size = weight_bytes(config, dtype)
    ways = []
    if dtype.itemsize > 2 and size // 2 <= room:
        ways.append(f"--dtype bfloat16 ({human_bytes(size // 2)})")
    ways += [f"{flag} ({human_bytes(small)})" for flag, small in smaller(config, room)]
    return " or ".join([*ways, f"a device with {human_bytes(size)} and some more"])
