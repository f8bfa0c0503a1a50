"""The static, preallocated, trimmable key/value cache.

Two stores, allocated once before prefill at key/value-head width: one for text, which grows by a
row per token, and one for visual tokens, written at prefill and only read afterwards. Both hold
several conversations side by side, one in each slot.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_vision.config import TextConfig
from llama_vision.errors import LlamaVisionError


class CacheError(LlamaVisionError):
    """A store that is full, or a position that it does not hold."""


@dataclass(frozen=True)
class CachePlan:
    """Exact bytes of a cache, known before it is allocated."""

    text: int
    visual: int

    @property
    def total(self) -> int:
        """Both stores."""
        return self.text + self.visual


class Cache:
    """Keys and values of several conversations, owned by whoever runs the model.

    Args:
        slots: conversations side by side.
        max_text_tokens: text rows that each slot can hold.
        visual_capacity: visual tokens that each slot can hold, in each cross-attention layer; None
            to enlarge the store to what is left after pruning, whenever more is needed.
        first_visual_capacity: those of the first such layer, where a pruner leaves it whole.
        merged: have room for the counts of merged tokens from the beginning.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        slots: int,
        max_text_tokens: int,
        visual_capacity: int | None,
        first_visual_capacity: int | None = None,
        merged: bool = False,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        sizes = (slots, max_text_tokens, visual_capacity or 0, first_visual_capacity)
        text, visual = _shapes(config, *sizes)
        place = {"dtype": dtype, "device": device}
        self.text = TextStore(text, max_text_tokens, slots, **place)
        self.visual = VisualStore(visual, visual_capacity is not None, slots, **place)
        if merged:
            self.visual.make_room_for_counts()

    @classmethod
    def plan(cls, config: TextConfig, **sizes: Any) -> CachePlan:
        """Exact bytes of the cache that the same arguments would allocate; nothing is."""
        cache = cls(config, device="meta", **sizes)
        return CachePlan(cache.text.nbytes, cache.visual.nbytes)

    @property
    def slots(self) -> int:
        """Conversations that it can hold."""
        return len(self.text.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that both stores hold allocated."""
        return self.text.nbytes + self.visual.nbytes

    @property
    def tensors(self) -> list[Tensor]:
        """All that both stores hold allocated."""
        return [*self.text.tensors, *self.visual.tensors]

    def advance(self, slot: int, rows: int) -> None:
        """Count the rows that a forward has just written: once per forward, never by a layer."""
        self.text.lengths[slot] += rows

    def clear(self, slot: int) -> None:
        """Hold nothing in a slot; what it held is overwritten by the next conversation."""
        self.text.lengths[slot] = 0
        self.visual.forget(slot)

    def rewind(self, slot: int, position: int) -> None:
        """Give back the text rows from `position` on; they are as if they had never been.

        Raises:
            CacheError: there are not so many rows, or the rows kept would see images whose keys and
                values have been trimmed, or only some images of a group.
        """
        held = self.text.lengths[slot]
        if not 0 <= position <= held:
            raise CacheError(f"cannot rewind to {position}; expected 0 to {held}, the rows held")
        first, last = self.visual.image_span[slot] or (held, -1)
        if first < position <= last:
            raise CacheError(
                f"cannot rewind to {position}: a later image (row {last}) took the place of what "
                f"row {position - 1} saw; expected {last + 1} or more, or at most {first}"
            )
        if position <= first:
            self.visual.forget(slot)
        self.text.lengths[slot] = position

    def keep(self, slot: int, mask: Tensor) -> None:
        """Trim a slot to the visual tokens where mask [V] is True; see `VisualStore.keep`."""
        self.visual.keep(slot, mask)


def _shapes(
    config: TextConfig,
    slots: int,
    max_text_tokens: int,
    visual_capacity: int,
    first_visual_capacity: int | None,
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes [B, K, capacity, d] of each layer's keys (and values), of text and of vision."""
    text = [max_text_tokens] * config.num_self_attention_layers
    visual = [visual_capacity] * len(config.cross_attention_layers)
    if first_visual_capacity is not None:
        visual[:1] = [first_visual_capacity]
    heads, width = config.kv_heads_here, config.head_dim
    return tuple(
        [torch.Size([slots, heads, capacity, width]) for capacity in capacities]
        for capacities in (text, visual)
    )


class _Store:
    """Keys and values, for each layer [B, K, capacity, d].

    They begin as zeros, for what is masked must stay finite.
    """

    def __init__(self, shapes: list[torch.Size], **place: Any):
        self.keys = [torch.zeros(shape, **place) for shape in shapes]
        self.values = [torch.zeros(shape, **place) for shape in shapes]

    @property
    def capacities(self) -> list[int]:
        """Rows that each slot can hold, in each layer."""
        return [keys.shape[2] for keys in self.keys]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        return [*self.keys, *self.values]

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)


class TextStore(_Store):
    """Self-attention keys and values of the text so far."""

    def __init__(self, shapes: list[torch.Size], capacity: int, slots: int, **place: Any):
        super().__init__(shapes, **place)
        self.capacity = capacity
        """Rows that each slot can hold."""
        self.lengths = [0] * slots
        """Rows that each slot holds: where its next token goes."""

    def check_room(self, slot: int, rows: int) -> None:
        """Raise CacheError where `rows` more do not fit."""
        need = self.lengths[slot] + rows
        if need > self.capacity:
            raise CacheError(
                f"the text cache holds {self.capacity} tokens and {need} are needed; "
                "raise --max-seq-len (max_seq_len), or shorten the prompt"
            )


class VisualStore(_Store):
    """Cross-attention keys and values of the visual tokens that later rows can still read."""

    def __init__(self, shapes: list[torch.Size], fixed: bool, slots: int, **place: Any):
        super().__init__(shapes, **place)
        self.fixed = fixed
        """Whether the capacity was given; if not, `room` enlarges it to what is needed."""
        self.lengths = [[0] * slots for _ in shapes]
        """Tokens that each layer holds, of each slot."""
        self.image_span: list[tuple[int, int] | None] = [None] * slots
        """Text rows of the first image of each slot so far, and of the last."""
        self.log_counts: Tensor | None = None
        """[B, capacity], float32: see `VisualContext.log_counts`; None where nothing was merged."""

    @property
    def tensors(self) -> list[Tensor]:
        """All that is allocated."""
        return super().tensors + ([] if self.log_counts is None else [self.log_counts])

    def make_room_for_counts(self) -> None:
        """Have `log_counts` as large as the largest layer; zeros, for tokens that are one each."""
        most = max(self.capacities)
        old = self.log_counts
        if old is None or old.shape[1] < most:
            with torch.inference_mode(False):  # as in _enlarge
                slots, device = len(self.image_span), self.keys[0].device
                self.log_counts = torch.zeros(slots, most, device=device)
            if old is not None:
                self.log_counts[:, : old.shape[1]] = old

    def note_counts(self, slot: int, log_counts: Tensor | None) -> None:
        """Note of how many tokens [V] each of a slot's is the mean; None: of one each."""
        if log_counts is not None or self.log_counts is not None:
            self.make_room_for_counts()
            self.log_counts[slot] = 0
        if log_counts is not None:
            self.log_counts[slot, : len(log_counts)] = log_counts

    def holds(self, slot: int) -> bool:
        """Whether any layer holds tokens for the slot's next rows to see."""
        return any(lengths[slot] for lengths in self.lengths)

    def note_images(self, slot: int, first: int, last: int) -> None:
        """Note the text rows of a new group of images."""
        earlier = self.image_span[slot]
        self.image_span[slot] = (earlier[0] if earlier else first, last)

    def room(self, layer: int, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Give one layer's room in a slot to a new group of images: two views [1, K, tokens, d].

        Raises:
            CacheError: the group is larger than the capacity.
        """
        capacity = self.keys[layer].shape[2]
        if tokens > capacity and self.fixed:
            raise CacheError(
                f"the visual cache holds {capacity} tokens of a slot and {tokens} are needed; "
                "raise --visual-budget (visual_budget), or prune with --k-ratio"
            )
        if tokens > capacity:
            self._enlarge(layer, tokens)
        self.lengths[layer][slot] = tokens
        here = (slice(slot, slot + 1), slice(None), slice(tokens))
        return self.keys[layer][here], self.values[layer][here]

    def _enlarge(self, layer: int, capacity: int) -> None:
        for tensors in (self.keys, self.values):
            old = tensors[layer]
            slots, heads, held, width = old.shape
            with torch.inference_mode(False):  # compiled code tells tensors of such a mode apart
                tensors[layer] = old.new_zeros(slots, heads, capacity, width)
            tensors[layer][:, :, :held] = old

    def keep(self, slot: int, mask: Tensor) -> None:
        """Compact every layer of a slot in place, in order.

        Args:
            mask: [V], True for the tokens to keep, of those that the slot holds.

        Raises:
            CacheError: another shape, or layers that hold different tokens.
        """
        lengths = {lengths[slot] for lengths in self.lengths}
        if len(lengths) > 1:
            raise CacheError(
                "the first cross-attention layer was left whole, so its tokens differ from the "
                "others'; prune with trim_first_layer=True to trim all alike"
            )
        (held,) = lengths
        if mask.dtype != torch.bool or tuple(mask.shape) != (held,):
            raise CacheError(
                f"keep-mask is {mask.dtype} {list(mask.shape)}; expected torch.bool [{held}]"
            )
        index = mask.nonzero().squeeze(-1)
        for tensor in (*self.keys, *self.values):
            # The right side is a copy of one slot's kept rows: the only room that it takes.
            tensor[slot, :, : len(index)] = tensor[slot, :, index.to(tensor.device)]
        if self.log_counts is not None:
            self.note_counts(slot, self.log_counts[slot, index.to(self.log_counts.device)])
        for lengths in self.lengths:
            lengths[slot] = len(index)

    def forget(self, slot: int) -> None:
        """Hold nothing of a slot."""
        for lengths in self.lengths:
            lengths[slot] = 0
        self.image_span[slot] = None
