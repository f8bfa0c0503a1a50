"""Decoding: one step is the decoder over one row of each slot, in shapes that stay the same.

The step runs as it is written, or compiled; on CUDA it is captured as a graph, for what it would
wait for otherwise are its own launches.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.engine.capture import Graphs, compiled
from llama_vision.model.layers import rotary_angles, rotary_frequencies
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.text import TextContext, TextDecoder, VisualContext, visible_prefix

BUCKET = 256
"""A compiled or captured step reads the cache up to a multiple of this: one shape for so many."""


class Shape(NamedTuple):
    """What must be equal for two steps to be one program."""

    slots: int
    """The first so many take part."""
    length: int
    """Rows of the text cache to read."""
    visual: tuple[int, ...]
    """Visual tokens to read in each cross-attention layer; () if no slot sees any."""
    exact: bool
    """Whether every slot reads all of that, so that no mask is needed."""


def decode_step(
    text: TextDecoder,
    inputs: Tensor,
    frequencies: Tensor,
    text_cache: tuple[list[Tensor], list[Tensor]],
    visual_cache: tuple[list[Tensor], list[Tensor]],
    log_counts: Tensor | None,
    shape: Shape,
) -> Tensor:
    """One row more for each slot.

    Args:
        inputs: [4, B], on the device: the tokens' ids, their positions, and how many visual tokens
            each row sees in the first cross-attention block and in the later ones.
        text_cache, visual_cache: keys and values of each layer, [B, K, capacity, d].
        log_counts: [B, capacity], see `VisualContext`.

    Returns:
        Logits [B, vocabulary], float32.
    """
    token_ids, positions, in_first, in_later = inputs[..., None].unbind(0)  # each [B, 1]
    mask = None
    if not shape.exact:
        mask = (torch.arange(shape.length, device=inputs.device) <= positions)[:, None, None]
    words = TextContext(
        *rotary_angles(frequencies, positions),
        *text_cache,
        positions=positions,
        length=shape.length,
        mask=mask,  # [B, 1, 1, L]
        causal=False,
    )
    visual = _visual_contexts(visual_cache, log_counts, in_first, in_later, shape)
    return text.logits(text(token_ids, words, visual)[:, 0])


def _visual_contexts(
    visual_cache: tuple[list[Tensor], list[Tensor]],
    log_counts: Tensor | None,
    in_first: Tensor,
    in_later: Tensor,
    shape: Shape,
) -> list[VisualContext]:
    """What each cross-attention block reads; rows see the first [B, 1] of its tokens."""
    contexts = []
    for layer, tokens in enumerate(shape.visual):
        keys, values = (tensors[layer][:, :, :tokens] for tensors in visual_cache)
        counts = None if log_counts is None else log_counts[:, :tokens]
        context = VisualContext(keys, values, counts)
        if not shape.exact and layer < 2:
            prefix = visible_prefix(in_later if layer else in_first, tokens)
        if not shape.exact:
            context.mask, context.sees = prefix
        contexts.append(context)
    return contexts


def compiled_step(device: str) -> Callable[..., Tensor]:
    """`decode_step`, compiled for a kind of device."""
    return compiled(decode_step, device)


class Decoder:
    """Runs steps on a cache that prefill has filled.

    Args:
        compiled: compile the step.
        graphs: on CUDA, capture it as a graph, one for each shape; never what several devices run,
            which has not been tried.
    """

    def __init__(
        self, model: LlamaVisionModel, cache: Cache, *, compiled: bool = False, graphs: bool = True
    ):
        self.text, self.cache, self.device = model.text, cache, model.device
        self.compiled = compiled
        graphs = graphs and self.device.type == "cuda" and model.config.text.devices == 1
        self.graphs = Graphs(self.device) if graphs else None
        self.inputs = torch.zeros(4, cache.slots, dtype=torch.int64, device=self.device)
        self.frequencies = rotary_frequencies(model.config.text, self.device)
        if self.graphs is not None:
            size = (cache.slots, model.config.text.vocab_size)
            self.logits = torch.empty(size, device=self.device)  # one for all graphs
        self.sizes: list[int] | None = None
        """Of the visual store's tensors, when they were last looked at."""

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """One row for some slots.

        Args:
            tokens: the next token id of each slot that takes part.

        Returns:
            Logits [B, vocabulary] of the first slots, up to the last that takes part at least;
            valid until the next step. Those of slots that do not take part mean nothing.
        """
        text, visual = self.cache.text, self.cache.visual
        for slot in tokens:
            text.check_room(slot, 1)
        shape = self._shape(tokens)
        slots = range(shape.slots)
        # A slot that does not take part writes where its next row will go; a full one over its last
        # row, which no row will read any more.
        positions = [min(text.lengths[slot], text.capacity - 1) for slot in slots]
        seen = [lengths[: shape.slots] for lengths in visual.lengths] or [[0] * shape.slots]
        rows = [[tokens.get(slot, 0) for slot in slots], positions, seen[0], seen[-1]]
        self.inputs[:, : shape.slots].copy_(torch.tensor(rows))
        if self._sizes() != self.sizes:
            self._meet_tensors()
        if self.graphs is None:
            logits = self._run(shape)
        else:  # twice the same step does no harm: it writes the same row again
            logits = self.logits[: shape.slots]
            self.graphs.replay(shape, lambda: logits.copy_(self._run(shape)))
        for slot in tokens:
            self.cache.advance(slot, 1)
        return logits

    def _shape(self, tokens: Mapping[int, int]) -> Shape:
        text, visual = self.cache.text, self.cache.visual
        lengths = [text.lengths[slot] + 1 for slot in tokens]
        seen = [[of_layer[slot] for slot in tokens] for of_layer in visual.lengths]
        slots, length, extents = max(tokens) + 1, max(lengths), tuple(map(max, seen))
        if self.compiled:
            slots, extents = self.cache.slots, tuple(visual.capacities) if any(extents) else ()
        elif self.graphs:
            slots = min(1 << (slots - 1).bit_length(), self.cache.slots)
            extents = tuple(map(min, map(whole_buckets, extents), visual.capacities))
        if self.compiled or self.graphs:
            # Not all that it can hold: compiled code tells tensors without gaps apart. An answer's
            # last token is never fed back, so the last row is hardly ever needed.
            length = max(length, min(text.capacity - 1, whole_buckets(length)))
        exact = not (self.compiled or self.graphs) and slots == len(tokens)
        exact = exact and set(lengths) == {length}
        exact = exact and all(set(s) == {e} for s, e in zip(seen, extents, strict=True))
        return Shape(slots, length, extents if any(extents) else (), exact)

    def _run(self, shape: Shape) -> Tensor:
        inputs, log_counts = self.inputs, self.cache.visual.log_counts
        text, visual = (
            (store.keys, store.values) for store in (self.cache.text, self.cache.visual)
        )
        if shape.slots < self.cache.slots:
            some = slice(shape.slots)
            inputs = inputs[:, some]
            log_counts = None if log_counts is None else log_counts[some]
            text, visual = (
                tuple([tensor[some] for tensor in tensors] for tensors in store)
                for store in (text, visual)
            )
        if not self.compiled:
            return decode_step(self.text, inputs, self.frequencies, text, visual, log_counts, shape)
        step = compiled_step(self.device.type)
        return step(self.text, inputs, self.frequencies, text, visual, log_counts, shape)

    def _sizes(self) -> list[int]:
        return [tensor.nbytes for tensor in self.cache.visual.tensors]

    def _meet_tensors(self) -> None:
        """At first, and again when a store was enlarged and so has moved."""
        self.sizes = self._sizes()
        if self.graphs is not None:
            self.graphs.clear()
        if not self.compiled:
            return
        # Sizes that are the model's own. The compiler would take those of a run that are equal to
        # them by chance for the same, and compile again for the next run.
        torch._dynamo.mark_static(self.inputs, 0)
        torch._dynamo.mark_static(self.frequencies)
        for store in (self.cache.text, self.cache.visual):
            for tensor in (*store.keys, *store.values):
                torch._dynamo.mark_static(tensor, [1, 3])  # key/value heads and their width


def whole_buckets(rows: int) -> int:
    """Up to a multiple of `BUCKET`."""
    return -(-rows // BUCKET) * BUCKET
