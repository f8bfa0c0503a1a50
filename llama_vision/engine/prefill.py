"""Prefill: one prompt into one slot of the cache, segment after segment, block after block.

A segment's rows go through each block before the next one, in chunks where they are many: a block
needs several times the room of its input, and what a pruner is asked after the first
cross-attention block concerns all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner, ask
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.encode import TOKENS_AT_ONCE, encode_group
from llama_vision.engine.segments import Segment, cut_into_segments
from llama_vision.engine.workload import PREFILL_CHUNK, budget_in_tokens
from llama_vision.inputs.image import TiledImage
from llama_vision.model.layers import rotary_angles, rotary_frequencies
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.text import (
    CrossAttentionBlock,
    SelfAttentionBlock,
    TextContext,
    VisualContext,
    visible_prefix,
)

MASK_ENTRIES = 2**25
"""Most rows times keys of a causal mask: near 131,072 tokens, chunks are of 256 rows at most."""

Phase = Callable[[str], AbstractContextManager]
"""Given "vision" or "prefill", what to do that work in: to time it, or to watch its memory."""


@torch.inference_mode()
def prefill(
    model: LlamaVisionModel,
    cache: Cache,
    slot: int,
    token_ids: Sequence[int],
    images: Iterable[TiledImage] = (),
    *,
    pruner: Pruner | None = None,
    visual_budgets: Sequence[float | int] = (),
    first_group: int = 0,
    chunk: int = PREFILL_CHUNK,
    every_chunk: bool = True,
    every_row: bool = False,
    phase: Phase = nullcontext,
) -> tuple[Tensor, list[Tensor]]:
    """Run the next S rows of a conversation, behind those that its slot holds.

    Args:
        token_ids: a group of images is never divided between two calls.
        images: one for each `<|image|>` id, in order; each is taken when its group is encoded.
        pruner: asked once for each group of images; None keeps all of their tokens.
        visual_budgets: of a group, counts or fractions; the least of them holds.
        first_group: number of the first group among those of the conversation.
        chunk: most rows that go through a block at once, which changes no result.
        every_chunk: False runs the first and last of many only, which is enough for a plan.

    Returns:
        Logits [1 or (every_row) S, vocabulary], float32; each image's kept tokens, bool [t, P].
    """
    cache.text.check_room(slot, len(token_ids))
    image_id, images, logits, kept = model.config.text.image_token_id, iter(images), [], []
    for segment in cut_into_segments(token_ids, image_id, continues=cache.visual.holds(slot)):
        with phase("vision") if segment.images else nullcontext():
            group = _next_group(model, segment, images, first_group, visual_budgets)
        with phase("prefill"):
            forward = SegmentForward(model, cache, slot, segment, group, pruner, chunk, every_chunk)
            logits += forward.run(token_ids, every_row)
        kept += forward.kept
        del forward, group  # they need no room beside the next group
    return torch.cat(logits), kept


def _next_group(
    model: LlamaVisionModel,
    segment: Segment,
    images: Iterator[TiledImage],
    first_group: int,
    visual_budgets: Sequence[float | int],
) -> VisualTokens | None:
    """The visual tokens of the images that a segment brings, and how many may be kept."""
    if not segment.images:
        return None
    some = [next(images) for _ in segment.images]
    group = encode_group(model, some, first_group + segment.group)
    tokens = len(group.image)
    group.budget = min((budget_in_tokens(b, tokens) for b in visual_budgets), default=None)
    return group


def row_chunks(rows: range, most: int, held: int | None = None) -> list[slice]:
    """Rows in runs of at most so many.

    Args:
        held: rows that the cache holds before row 0, where every chunk but the very first needs a
            mask over those too.
    """
    chunks, start = [], rows.start
    while start < rows.stop:
        if held is not None:
            most = max(1, min(most, MASK_ENTRIES // (held + start + most)))
        chunks.append(slice(start, min(start + most, rows.stop)))
        start += most
    return chunks


class SegmentForward:
    """One segment on its way through the blocks.

    Args:
        group: the images that it brings; None to go on with those that the slot holds, if any.
    """

    def __init__(
        self,
        model: LlamaVisionModel,
        cache: Cache,
        slot: int,
        segment: Segment,
        group: VisualTokens | None,
        pruner: Pruner | None,
        chunk: int,
        every_chunk: bool = True,
    ):
        self.text, self.cache, self.slot = model.text, cache, slot
        self.held = cache.text.lengths[slot]
        self.segment, self.group, self.chunk = segment, group, chunk
        self.pruner = pruner if group is not None else None
        self.counts = group.counts if group is not None else []
        """Tokens of each image that the coming blocks see."""
        self.sees_images = group is not None or cache.visual.holds(slot)
        self.frequencies = rotary_frequencies(model.config.text, model.device)
        self.store = segment.is_last and group is not None
        """Whether the cache is to hold the group: later rows will see it."""
        self.every_chunk = every_chunk
        self.kept: list[Tensor] = []
        self._context: tuple[slice, TextContext] | None = None

    def run(self, token_ids: Sequence[int], every_row: bool) -> list[Tensor]:
        """The segment's rows of a prompt through all blocks; logits, if any are asked for."""
        if self.group is not None:
            rows = self.segment.image_rows
            self.cache.visual.note_images(self.slot, self.held + rows[0], self.held + rows[-1])
        ids = [token_ids[row] for row in self.segment.rows]
        h = self.text.embed_tokens(torch.tensor([ids], device=self.frequencies.device))  # [1, S, D]
        for block in self.text.layers:
            if isinstance(block, SelfAttentionBlock):
                for rows in self._chunks(range(h.shape[1]), self.held):
                    h[:, rows] = block(h[:, rows], self._text_context(rows))
            elif self.sees_images:
                self._cross_attend(block, h)
        if self.group is not None and not self.kept:
            everything = torch.ones(len(self.group.image), dtype=torch.bool)
            self.kept = self.group.of_each_image(everything)
        self.cache.advance(self.slot, h.shape[1])
        asked = h[0] if every_row else h[0, -1:]
        return [self.text.logits(asked)] if every_row or self.segment.is_last else []

    def _chunks(self, rows: range, held: int | None = None) -> list[slice]:
        chunks = row_chunks(rows, self.chunk, held)
        return chunks if self.every_chunk or len(chunks) < 5 else chunks[:2] + chunks[-2:]

    def _text_context(self, rows: slice) -> TextContext:
        """The last one is remembered: all of a long prompt's would be large."""
        if self._context is not None and self._context[0] == rows:
            return self._context[1]
        self._context = None
        device, slot = self.frequencies.device, slice(self.slot, self.slot + 1)
        start, stop = self.held + rows.start, self.held + rows.stop
        positions = torch.arange(start, stop, device=device)[None]
        mask = None
        if 0 < start < stop - 1:
            mask = (torch.arange(stop, device=device) <= positions[..., None])[None]  # [1, 1, c, L]
        context = TextContext(
            *rotary_angles(self.frequencies, positions),
            keys=[keys[slot] for keys in self.cache.text.keys],
            values=[values[slot] for values in self.cache.text.values],
            positions=positions,
            length=stop,
            mask=mask,
            causal=start == 0,
        )
        self._context = rows, context
        return context

    def _cross_attend(self, block: CrossAttentionBlock, h: Tensor) -> None:
        """One cross-attention block over the rows that see something; after the first, prune."""
        keys, values = self._keys_values(block)
        saliency = None
        for rows, visible in self._visual_chunks():
            context = VisualContext(keys, values)
            if visible is not None:
                context.mask, context.sees = visible_prefix(visible, keys.shape[2])
            if self.pruner is not None:
                context.votes = self._votes(rows).to(h.device)
            h[:, rows] = block(h[:, rows], context)
            if saliency is None:
                saliency = context.saliency
            else:
                saliency += context.saliency
        if self.pruner is not None:
            self._prune(block.layer, keys, values, saliency)

    def _visual_chunks(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Chunks of rows that see something, and how many tokens each row sees; None for all.

        Rows before the images are in none, and so pass the block unchanged. Of a group of several
        images the rows of the images themselves make a chunk of their own: they see one more each.
        """
        rows = self.segment.image_rows
        if len(rows) > 1:
            visible = torch.tensor([list(accumulate(self.counts))], device=self.frequencies.device)
            yield slice(rows.start, rows.stop), visible
        start = rows.stop if len(rows) > 1 else rows.start
        for some in self._chunks(range(start, len(self.segment.rows))):
            yield some, None

    def _keys_values(self, block: CrossAttentionBlock) -> tuple[Tensor, Tensor]:
        """Keys and values [1, K, V, d]: of the group, projected here and only here, or the slot's.

        What later forwards read goes straight into the cache, unless a pruner is yet to choose.
        """
        store, layer = self.cache.visual, block.layer
        if self.group is None:
            held = slice(store.lengths[layer][self.slot])
            slot = slice(self.slot, self.slot + 1)
            return store.keys[layer][slot, :, held], store.values[layer][slot, :, held]
        features = self.group.features[None]  # [1, V, D]
        tokens = features.shape[1]
        if self.store and self.pruner is None:
            keys, values = store.room(layer, self.slot, tokens)
        else:
            heads, width = self.text.config.num_key_value_heads, self.text.config.head_dim
            keys, values = features.new_empty(2, 1, heads, tokens, width)
        for some in row_chunks(range(tokens), TOKENS_AT_ONCE):
            keys[:, :, some], values[:, :, some] = block.cross_attn.project(features[:, some])
        if layer == len(store.keys) - 1 and self.pruner is None:
            self.group.features = features.new_empty(0)  # nothing reads them again
        return keys, values

    def _votes(self, rows: slice) -> Tensor:
        """1 for each of the rows whose attention counts in the saliency, else 0: [1, c]."""
        votes, row = getattr(self.pruner, "votes", "all"), torch.arange(rows.start, rows.stop)
        if votes == "last":
            counted = row == len(self.segment.rows) - 1
        elif votes == "after":
            counted = row >= self.segment.image_rows.stop
        else:
            counted = torch.ones_like(row)
        return counted[None].float()

    def _prune(self, layer: int, keys: Tensor, values: Tensor, saliency: Tensor) -> None:
        """Ask the pruner, go on with the tokens that it keeps, and hold only them in the cache."""
        group, pruner = self.group, self.pruner
        group.keys = keys[0]
        mask = ask(pruner, saliency, group)
        group.keys = None
        self.kept = group.of_each_image(mask)
        self.counts = [int(kept.sum()) for kept in self.kept]
        self.pruner = None
        index = mask.nonzero().squeeze(-1).to(keys.device)
        group.features = group.features[index]
        if layer == len(self.cache.visual.keys) - 1:
            group.features = group.features.new_empty(0)
        if not self.store:
            return
        if getattr(pruner, "trim_first_layer", True):
            keys, values = keys[:, :, index], values[:, :, index]
        for room, kept in zip(
            self.cache.visual.room(layer, self.slot, keys.shape[2]), (keys, values), strict=True
        ):
            room.copy_(kept)
