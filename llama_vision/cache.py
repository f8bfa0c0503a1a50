"""The static, preallocated, trimmable key/value cache.

Two stores, allocated once before prefill at key/value-head width: one for text, which grows by a
row per token, and one for visual tokens, written at prefill and only read afterwards. Nothing is
reallocated or concatenated later, so the storage never moves and its size is known beforehand.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
        visual_capacity: visual tokens that each sample can hold.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        batch: int,
        max_text_tokens: int,
        visual_capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        text, visual = _shapes(config, batch, max_text_tokens, visual_capacity)
        self.text = TextStore(text, dtype, device)
        self.visual = VisualStore(visual, dtype, device)

    @staticmethod
    def plan(
        config: TextConfig,
        *,
        batch: int,
        max_text_tokens: int,
        visual_capacity: int,
        dtype: torch.dtype,
    ) -> CachePlan:
        """Exact bytes of the cache that the same arguments would allocate."""
        text, visual = _shapes(config, batch, max_text_tokens, visual_capacity)
        return CachePlan(*(2 * shape.numel() * dtype.itemsize for shape in (text, visual)))

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
        self.text.lengths = [
            length + new for length, new in zip(self.text.lengths, rows, strict=True)
        ]


def _shapes(
    config: TextConfig, batch: int, max_text_tokens: int, visual_capacity: int
) -> tuple[torch.Size, torch.Size]:
    """Shape of the keys (and of the values) of the text store and of the visual store."""
    heads, width = config.num_key_value_heads, config.head_dim
    return (
        torch.Size([config.num_self_attention_layers, batch, heads, max_text_tokens, width]),
        torch.Size([len(config.cross_attention_layers), batch, heads, visual_capacity, width]),
    )


class _Store:
    """Keys and values [layers, B, K, capacity, d]; zeros, for what is masked must stay finite."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str):
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * self.batch

    @property
    def batch(self) -> int:
        """Samples."""
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        """Rows that each sample can hold."""
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Allocated bytes."""
        return self.keys.nbytes + self.values.nbytes

    def read(self, layer: int, rows: int) -> tuple[Tensor, Tensor]:
        """Views of the first rows of one layer: two of [B, K, rows, d]."""
        return self.keys[layer, :, :, :rows], self.values[layer, :, :, :rows]


class TextStore(_Store):
    """Self-attention keys and values of the text so far."""

    def positions(self, rows: int) -> Tensor:
        """Where the next `rows` rows of each sample go: [B, rows], int64.

        Raises:
            CacheError: they do not fit.
        """
        need = max(self.lengths) + rows
        if need > self.capacity:
            raise CacheError(
                f"the text cache holds {self.capacity} tokens and {need} are needed; "
                "raise --max-seq-len (max_seq_len), or shorten the prompt"
            )
        start = torch.tensor(self.lengths, device=self.keys.device)
        return start[:, None] + torch.arange(rows, device=self.keys.device)

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [B, K, S, d] at positions [B, S]."""
        samples = torch.arange(self.batch, device=positions.device)[:, None]
        self.keys[layer][samples, :, positions] = keys.transpose(1, 2)  # [B, S, K, d]
        self.values[layer][samples, :, positions] = values.transpose(1, 2)


class VisualStore(_Store):
    """Cross-attention keys and values of the visual tokens that later rows can still read."""

    def write(self, layer: int, keys: Tensor, values: Tensor, runs: Sequence[slice]) -> None:
        """Replace what one layer holds by the given run of tokens of each sample.

        Args:
            keys, values: [B, K, V, d].
            runs: for each sample the tokens to remember.

        Raises:
            CacheError: a run is longer than the capacity.
        """
        lengths = [run.stop - run.start for run in runs]
        if max(lengths) > self.capacity:
            raise CacheError(
                f"the visual cache holds {self.capacity} tokens an image row and "
                f"{max(lengths)} are needed; raise --visual-budget (visual_budget)"
            )
        for sample, run in enumerate(runs):
            self.keys[layer, sample, :, : lengths[sample]] = keys[sample, :, run]
            self.values[layer, sample, :, : lengths[sample]] = values[sample, :, run]
        self.lengths = lengths
