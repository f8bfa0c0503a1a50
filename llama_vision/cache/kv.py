"""The static, preallocated, trimmable key/value cache.

Two stores, allocated once before prefill at key/value-head width: one for text, which grows by a
row per token, and one for visual tokens, written at prefill and only read afterwards. Nothing is
reallocated or concatenated later, so the storage never moves and its size is known beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_vision.cache.visual_tokens import Stretch
from llama_vision.config import LlamaVisionError, TextConfig


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
    """Keys and values of one batch, owned by whoever runs the model.

    Args:
        max_text_tokens: text rows that each sample can hold.
        visual_capacity: visual tokens that each sample can hold, in each cross-attention layer;
            None to take, at every prefill, exactly the room for what is left after pruning.
        first_visual_capacity: those of the first such layer, where a pruner leaves it whole.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        batch: int,
        max_text_tokens: int,
        visual_capacity: int | None,
        first_visual_capacity: int | None = None,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        text, visual = _shapes(
            config, batch, max_text_tokens, visual_capacity or 0, first_visual_capacity
        )
        self.text = TextStore(text, dtype, device)
        self.visual = VisualStore(visual, dtype, device, fixed=visual_capacity is not None)

    @staticmethod
    def plan(
        config: TextConfig,
        *,
        batch: int,
        max_text_tokens: int,
        visual_capacity: int,
        first_visual_capacity: int | None = None,
        dtype: torch.dtype,
    ) -> CachePlan:
        """Exact bytes of the cache that the same arguments would allocate."""
        stores = _shapes(config, batch, max_text_tokens, visual_capacity, first_visual_capacity)
        return CachePlan(
            *(sum(2 * shape.numel() * dtype.itemsize for shape in shapes) for shapes in stores)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that both stores hold allocated."""
        return self.text.nbytes + self.visual.nbytes

    @property
    def position(self) -> list[int]:
        """Text rows held by each sample: where its next token goes."""
        return self.text.lengths

    def advance(self, rows: Sequence[int]) -> None:
        """Count the rows that a pass has just written. Called once per pass, by the model."""
        self.text.lengths = [held + new for held, new in zip(self.position, rows, strict=True)]

    def rewind(self, position: int | Sequence[int]) -> None:
        """Give back the text rows from `position` on; they are as if they had never been.

        Args:
            position: rows to keep, of every sample or of each.

        Raises:
            CacheError: there are not so many rows, or the rows kept would see images whose keys and
                values have been trimmed, or only some images of a group.
        """
        positions = [position] * len(self.position) if isinstance(position, int) else position
        if len(positions) != len(self.position):
            raise CacheError(
                f"rewind got {len(positions)} positions for {len(self.position)} samples; expected "
                "one for each, or a single one for all"
            )
        for sample, (keep, held) in enumerate(zip(positions, self.position, strict=True)):
            if not 0 <= keep <= held:
                raise CacheError(f"cannot rewind to {keep}; expected 0 to {held}, the rows held")
            first, last = self.visual.image_rows[sample] or (0, -1)
            if first < keep <= last:
                raise CacheError(
                    f"cannot rewind to {keep}: a later image (row {last}) took the place of what "
                    f"row {keep - 1} saw; expected {last + 1} or more, or at most {first}"
                )
        for sample, keep in enumerate(positions):
            first, _ = self.visual.image_rows[sample] or (-1, -1)
            if keep <= first:
                self.visual.forget(sample)
        self.text.lengths = list(positions)

    def keep(self, mask: Tensor) -> None:
        """Trim the visual store to the tokens where mask [B, V] is True; see `VisualStore.keep`."""
        self.visual.keep(mask)


def _shapes(
    config: TextConfig,
    batch: int,
    max_text_tokens: int,
    visual_capacity: int,
    first_visual_capacity: int | None,
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes [B, K, capacity, d] of each layer's keys (and values), of text and of vision."""
    text = [max_text_tokens] * config.num_self_attention_layers
    visual = [visual_capacity] * len(config.cross_attention_layers)
    if first_visual_capacity is not None:
        visual[:1] = [first_visual_capacity]
    heads, width = config.num_key_value_heads, config.head_dim
    return tuple(
        [torch.Size([batch, heads, capacity, width]) for capacity in capacities]
        for capacities in (text, visual)
    )


class _Store:
    """Keys and values, for each layer [B, K, capacity, d], or what a layer holds of that.

    They begin as zeros, for what is masked must stay finite.
    """

    def __init__(self, shapes: list[torch.Size], dtype: torch.dtype, device: torch.device | str):
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.batch = shapes[0][0] if shapes else 0
        self.capacities = [shape[2] for shape in shapes]
        """Rows that each sample can hold, in each layer."""

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.keys, *self.values))

    def read(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Views of the first rows of one layer: two of [B, K, rows, d]."""
        return self.keys[layer][:, :, :rows], self.values[layer][:, :, :rows]


class TextStore(_Store):
    """Self-attention keys and values of the text so far."""

    def __init__(self, shapes: list[torch.Size], dtype: torch.dtype, device: torch.device | str):
        super().__init__(shapes, dtype, device)
        self.lengths = [0] * self.batch
        """Rows that each sample holds."""

    @property
    def capacity(self) -> int:
        """Rows that each sample can hold."""
        return self.capacities[0]

    def check_room(self, rows: int) -> None:
        """Raise CacheError where `rows` more do not fit."""
        need = max(self.lengths) + rows
        if need > self.capacity:
            raise CacheError(
                f"the text cache holds {self.capacity} tokens and {need} are needed; "
                "raise --max-seq-len (max_seq_len), or shorten the prompt"
            )

    def positions(self, rows: int) -> Tensor:
        """Where the next `rows` rows of each sample go: [B, rows], int64.

        Raises:
            CacheError: they do not fit.
        """
        self.check_room(rows)
        device = self.keys[0].device
        start = torch.tensor(self.lengths, device=device)
        return start[:, None] + torch.arange(rows, device=device)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [B, K, S, d] at positions [B, S]."""
        samples = torch.arange(self.batch, device=positions.device)[:, None]
        self.keys[layer][samples, :, positions] = keys.transpose(1, 2)  # [B, S, K, d]
        self.values[layer][samples, :, positions] = values.transpose(1, 2)


class VisualStore(_Store):
    """Cross-attention keys and values of the visual tokens that later rows can still read."""

    def __init__(
        self,
        shapes: list[torch.Size],
        dtype: torch.dtype,
        device: torch.device | str,
        fixed: bool = True,
    ):
        super().__init__(shapes, dtype, device)
        self.fixed = fixed
        """Whether the capacity was given; if not, `write` takes what it needs."""
        self.lengths = [[0] * self.batch for _ in shapes]
        """Tokens that each layer holds, of each sample."""
        self.image_rows: list[tuple[int, int] | None] = [None] * self.batch
        """Text rows of the first image of each sample so far, and of the last."""

    def note_images(self, stretches: Sequence[Sequence[Stretch]], positions: list[int]) -> None:
        """Note the text rows of new images, before the rows of their pass are counted."""
        for sample, (new, start) in enumerate(zip(stretches, positions, strict=True)):
            if new:
                rows = (start + new[0].rows.start, start + new[-1].rows.start)
                first, _ = self.image_rows[sample] or rows
                self.image_rows[sample] = (first, rows[1])

    def write(self, layer: int, keys: Tensor, values: Tensor, runs: Sequence[slice]) -> None:
        """Replace what one layer holds by the given run of tokens of each sample.

        Args:
            keys, values: [B, K, V, d].
            runs: for each sample the tokens to remember.

        Raises:
            CacheError: a run is longer than the capacity.
        """
        lengths = [run.stop - run.start for run in runs]
        capacity = self.capacities[layer]
        if self.fixed and max(lengths) > capacity:
            raise CacheError(
                f"the visual cache holds {capacity} tokens of a sample and {max(lengths)} are "
                "needed; raise --visual-budget (visual_budget), or prune with --k-ratio"
            )
        self._lay_out(layer, max(lengths))
        for sample, run in enumerate(runs):
            self.keys[layer][sample, :, : lengths[sample]] = keys[sample, :, run]
            self.values[layer][sample, :, : lengths[sample]] = values[sample, :, run]
        self.lengths[layer] = lengths

    def _lay_out(self, layer: int, rows: int) -> None:
        """Shape one layer, which is about to be written anew, for exactly so many rows.

        Without gaps, whatever a budget leaves free: compiled code tells tensors with gaps apart. So
        it does views, and tensors made in inference mode.
        """
        for tensors in (self.keys, self.values):
            batch, heads, held, width = tensors[layer].shape
            shape = (batch, heads, rows, width)
            with torch.inference_mode(False):
                if self.fixed:
                    strides = (heads * rows * width, rows * width, width, 1)
                    tensors[layer] = tensors[layer].as_strided(shape, strides).detach()
                elif rows != held:
                    tensors[layer] = tensors[layer].new_zeros(shape)
        if not self.fixed:
            self.capacities[layer] = rows

    def keep(self, mask: Tensor) -> None:
        """Compact every layer in place, in order, sample by sample.

        Args:
            mask: [B, V], True for the tokens to keep; V is the longest sample's length.

        Raises:
            CacheError: another shape, or layers that hold different tokens.
        """
        lengths = self.lengths[0]
        if any(other != lengths for other in self.lengths):
            raise CacheError(
                "the first cross-attention layer was left whole, so its tokens differ from the "
                "others'; prune with trim_first_layer=True to trim all alike"
            )
        if mask.dtype != torch.bool or tuple(mask.shape) != (self.batch, max(lengths)):
            raise CacheError(
                f"keep-mask is {mask.dtype} {list(mask.shape)}; expected torch.bool "
                f"[{self.batch}, {max(lengths)}]"
            )
        places = [row[:n].nonzero().squeeze(-1) for row, n in zip(mask, lengths, strict=True)]
        kept = [len(index) for index in places]
        for store in (*self.keys, *self.values):
            for sample, index in enumerate(places):
                # The right side is a copy of one sample's kept rows: the only room that it takes.
                store[sample, :, : kept[sample]] = store[sample, :, index.to(store.device)]
        self.lengths = [list(kept) for _ in self.lengths]

    def forget(self, sample: int) -> None:
        """Hold nothing of one sample."""
        for lengths in self.lengths:
            lengths[sample] = 0
        self.image_rows[sample] = None
