"""One segment of a prompt on its way through the blocks, and its images through the pruner."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.merging import ChosenTokens
from llama_vision.cache.pruning import Kept, Pruner, Votes, ask, traits_of
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.encode import TOKENS_AT_ONCE
from llama_vision.engine.segments import Segment
from llama_vision.model.layers import rotary_angles, rotary_frequencies
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.parallel import agree, gather
from llama_vision.model.text import (
    CrossAttentionBlock,
    SelfAttentionBlock,
    TextContext,
    VisualContext,
    visible_prefix,
)

MASK_ENTRIES = 2**25
"""Most rows times keys of a causal mask: near 131,072 tokens, chunks are of 256 rows at most."""


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


def voting(votes: Votes, rows: slice, segment: Segment) -> Tensor:
    """1 for each of some rows of a segment whose attention counts, else 0: [1, c], float32.

    See `rule.Rule.votes`.
    """
    row = torch.arange(rows.start, rows.stop)
    if votes == "last":
        counted = row == len(segment.rows) - 1
    elif votes == "after":
        counted = row >= segment.image_rows.stop
    else:
        counted = torch.ones_like(row)
    return counted[None].float()


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
        self.traits = None if self.pruner is None else traits_of(self.pruner)
        self.counts = group.counts if group is not None else []
        """Tokens of each image that the coming blocks see."""
        self.sees_images = group is not None or cache.visual.holds(slot)
        self.frequencies = rotary_frequencies(model.config.text, model.device)
        self.store = segment.is_last and group is not None
        """Whether the cache is to hold the group: later rows will see it."""
        self.every_chunk = every_chunk
        self.kept: list[Tensor] = []
        self.stands: list[Tensor] = []
        """For each image who stands for its tokens, where some were merged."""
        self.log_counts: Tensor | None = None
        """[V] of the tokens that the coming blocks see, see `VisualContext`."""
        if group is None and cache.visual.log_counts is not None:
            self.log_counts = cache.visual.log_counts[slot]
        self._context: tuple[slice, TextContext] | None = None

    def run(self, token_ids: Sequence[int], every_row: bool) -> list[Tensor]:
        """The segment's rows of a prompt through all blocks; logits, if any are asked for."""
        if self.group is not None:
            rows = self.segment.image_rows
            self.cache.visual.note_images(self.slot, self.held + rows[0], self.held + rows[-1])
        if self.traits is not None and self.traits.is_asked_first:
            self._choose(None)
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
        if self.store:
            self.cache.visual.note_counts(self.slot, self.log_counts)
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
            context = VisualContext(keys, values, self._log_counts(keys.shape[2]))
            if visible is not None:
                context.mask, context.sees = visible_prefix(visible, keys.shape[2])
            if self.pruner is not None and self.traits.needs_text:
                votes = getattr(self.pruner, "votes", "all")
                context.votes = voting(votes, rows, self.segment).to(h.device)
            h[:, rows] = block(h[:, rows], context)
            if saliency is None:
                saliency = context.saliency
            elif context.saliency is not None:
                saliency += context.saliency
        if self.pruner is not None:
            self._prune(block, keys, values, saliency)

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
            heads, width = self.text.config.kv_heads_here, self.text.config.head_dim
            keys, values = features.new_empty(2, 1, heads, tokens, width)
        self._project(block, features, (keys, values))
        if layer == len(store.keys) - 1 and self.pruner is None:
            self.group.features = features.new_empty(0)  # nothing reads them again
        return keys, values

    def _ask(self, saliency: Tensor | None) -> Kept:
        """What the pruner keeps. It is shown the heads of all devices, on the first of them."""
        group, devices = self.group, self.text.config.devices
        if devices == 1:
            return ask(self.pruner, saliency, group)
        saliency, group.keys = (
            None if x is None else gather(x, devices).flatten(0, 1) for x in (saliency, group.keys)
        )

        def on_host() -> Kept:
            kept = ask(self.pruner, saliency, group)
            return Kept(*(None if part is None else part.cpu() for part in kept))

        return agree(on_host, devices)

    def _choose(self, saliency: Tensor | None) -> Tensor:
        """Ask the pruner, and go on with the tokens that it keeps; their indices in the group.

        What was chosen for an earlier prompt about the same group is not asked again.
        """
        group = self.group
        chosen = group.chosen or ChosenTokens.of(group, self._ask(saliency))
        if group.remember:
            group.chosen = chosen
        self.pruner = None
        self.kept, self.stands = chosen.kept, chosen.stands
        self.counts = [int(kept.sum()) for kept in self.kept]
        group.features, self.log_counts = chosen.features, chosen.log_counts
        return chosen.index

    def _prune(
        self, block: CrossAttentionBlock, keys: Tensor, values: Tensor, saliency: Tensor | None
    ) -> None:
        """Prune after a block, and hold in its cache only what is kept."""
        store, layer = self.cache.visual, block.layer
        self.group.keys = keys[0]
        index = self._choose(saliency)
        self.group.keys = None
        if self.store and self.log_counts is not None:
            self._project(
                block, self.group.features[None], store.room(layer, self.slot, len(index))
            )
        elif self.store:
            if self.traits.trim_first_layer:
                keys, values = keys[:, :, index], values[:, :, index]
            room = store.room(layer, self.slot, keys.shape[2])
            for there, kept in zip(room, (keys, values), strict=True):
                there.copy_(kept)
        if layer == len(store.keys) - 1:
            self.group.features = self.group.features.new_empty(0)

    def _project(
        self, block: CrossAttentionBlock, features: Tensor, room: tuple[Tensor, Tensor]
    ) -> None:
        """Fill keys and values [1, K, V, d] from features [1, V, D]."""
        keys, values = room
        for some in row_chunks(range(features.shape[1]), TOKENS_AT_ONCE):
            keys[:, :, some], values[:, :, some] = block.cross_attn.project(features[:, some])

    def _log_counts(self, tokens: int) -> Tensor | None:
        return None if self.log_counts is None else self.log_counts[None, :tokens]
