"""Prefill: one prompt into one slot of the cache, segment after segment, block after block.

A segment's rows go through each block before the next one, in chunks where they are many: a block
needs several times the room of its input, and what a pruner is asked after the first
cross-attention block concerns all of them.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.encode import encode_group
from llama_vision.engine.segment_forward import SegmentForward
from llama_vision.engine.segments import Segment, cut_into_segments
from llama_vision.engine.workload import PREFILL_CHUNK, budget_in_tokens
from llama_vision.inputs.image import TiledImage
from llama_vision.model.model import LlamaVisionModel

Encode = Callable[[range, int], VisualTokens]
"""Given the numbers of a group's images in the prompt, and the group's own in the conversation."""

Phase = Callable[[str], AbstractContextManager]
"""Given "vision" or "prefill", what to do that work in: to time it, or to watch its memory."""


class Prefilled(NamedTuple):
    """What came of running rows."""

    logits: Tensor
    """[1 or (every_row) S, vocabulary], float32."""
    kept: list[Tensor]
    """Of each image: bool [t, P]."""
    stands: list[Tensor]
    """Of each image of a group that was merged: int64 [t, P], the token of the group that stands
    for each."""


@torch.inference_mode()
def prefill(
    model: LlamaVisionModel,
    cache: Cache,
    slot: int,
    token_ids: Sequence[int],
    images: Iterable[TiledImage] = (),
    *,
    encode: Encode | None = None,
    pruner: Pruner | None = None,
    visual_budgets: Sequence[float | int | None] = (),
    first_group: int = 0,
    chunk: int = PREFILL_CHUNK,
    every_chunk: bool = True,
    every_row: bool = False,
    phase: Phase = nullcontext,
) -> Prefilled:
    """Run the next S rows of a conversation, behind those that its slot holds.

    Args:
        token_ids: a group of images is never divided between two calls.
        images: one for each `<|image|>` id, in order; each is taken when its group is encoded.
        encode: in the place of the encoder and its `images`.
        pruner: asked once for each group of images; None keeps all of their tokens.
        visual_budgets: of a group, counts or fractions; the least of them holds, None is none.
        first_group: number of the first group among those of the conversation.
        chunk: most rows that go through a block at once, which changes no result.
        every_chunk: False runs the first and last of many only, which is enough for a plan.
    """
    cache.text.check_room(slot, len(token_ids))
    encode = encode or _encoder_of(model, images)
    logits, kept, stands, image_id = [], [], [], model.config.text.image_token_id
    for segment in cut_into_segments(token_ids, image_id, continues=cache.visual.holds(slot)):
        with phase("vision") if segment.images else nullcontext():
            group = _next_group(encode, segment, first_group, visual_budgets)
        with phase("prefill"):
            forward = SegmentForward(model, cache, slot, segment, group, pruner, chunk, every_chunk)
            logits += forward.run(token_ids, every_row)
        kept, stands = kept + forward.kept, stands + forward.stands
        del forward, group  # they need no room beside the next group
    return Prefilled(torch.cat(logits), kept, stands)


def _encoder_of(model: LlamaVisionModel, images: Iterable[TiledImage]) -> Encode:
    images = iter(images)
    return lambda numbers, group: encode_group(model, [next(images) for _ in numbers], group)


def _next_group(
    encode: Encode, segment: Segment, first_group: int, budgets: Sequence[float | int | None]
) -> VisualTokens | None:
    """The visual tokens of the images that a segment brings, and how many may be kept."""
    if not segment.images:
        return None
    group = encode(segment.images, first_group + segment.group)
    tokens = len(group.image)
    given = (budget_in_tokens(budget, tokens) for budget in budgets if budget is not None)
    group.budget = min(given, default=None)
    return group
