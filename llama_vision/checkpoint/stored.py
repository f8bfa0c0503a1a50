"""How a tensor of the model is stored: as it is, or in fewer bits, as a library wrote it.

The tensors that are present tell: copies leave single matrices as they are, and their lists of them
go by names that have changed since. Sources: bitsandbytes 0.50 (4 bits: nf4 and fp4; LLM.int8),
compressed-tensors 0.20 (pack-quantized, int-quantized, float-quantized, naive-quantized). Our own
saved copies are in the layouts of the latter too.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from llama_vision.checkpoint.files import Entry, Reader
from llama_vision.quantization import INT8, Format


class Stored(Protocol):
    """One tensor of the model in the files."""

    shape: tuple[int, ...]
    """Of the tensor that it stands for."""
    names: tuple[str, ...]
    """Of all tensors in the files that belong to it, that of its numbers first."""
    form: Format | None
    """The nearest of our formats; None where it is stored as it is."""
    library: str
    """Which one wrote it, and as what, for people; nothing where it is stored as it is."""

    def rows(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Some rows: in the stored type, or what the library makes of them, in float32.

        They are valid until the reader's next.

        Args:
            columns: first and last but one of a matrix [N, K]; None for all.

        Raises:
            CheckpointError: see `Reader.rows`.
        """

    def integers(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """The same in our format `form`, as it is stored; None where it must be quantised anew.

        Args:
            columns: as in `rows`; of int4, whole groups.

        Returns:
            Integers, int8 [n, K] from -128 to 127 or from -8 to 7, and their scales, bfloat16
            [n, K / group] or [n, 1], to which finer ones are rounded.

        Raises:
            CheckpointError: see `Reader.rows`.
        """


@dataclass(frozen=True)
class Plain:
    """A tensor that is stored as it is."""

    names: tuple[str, ...]
    entry: Entry
    form: None = None
    library: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Stored`."""
        return self.entry.shape

    def rows(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """See `Stored`."""
        return reader.rows(self.entry, start, stop, columns)

    def integers(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> None:
        """See `Stored`."""


@dataclass(frozen=True)
class Channels:
    """int8 or FP8 with a scale for each output channel, or one for all.

    W = weight · scale · unit. Scales of activations may lie beside it and are not used: ours stay
    bfloat16, which loses nothing that the copy was made to keep.
    """

    shape: tuple[int, int]
    names: tuple[str, ...]
    library: str
    weight: Entry
    scale: Entry
    """[N, 1] or [1, 1]."""
    unit: float = 1.0
    form: Format = INT8

    def rows(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """See `Stored`."""
        weight = reader.rows(self.weight, start, stop, columns).to(torch.float32)
        return weight.mul_(_scales(self.scale, reader, start, stop)).mul_(self.unit)

    def integers(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """See `Stored`."""
        if self.weight.dtype != "I8":
            return None
        weight = reader.rows(self.weight, start, stop, columns).clone()
        scale = _scales(self.scale, reader, start, stop).mul_(self.unit)
        return weight, scale.to(torch.bfloat16)


@dataclass(frozen=True)
class Packed:
    """Integers of 4 or 8 bits, packed along K from the lowest bits of a word on.

    W = (integer - zero) · scale; a group of weights shares a scale, and a zero where there are any.
    """

    shape: tuple[int, int]
    names: tuple[str, ...]
    library: str
    form: Format
    packed: Entry
    """As bytes [N, …]; integers are stored with half their range added."""
    scale: Entry
    """[N, K / group] or [1, 1]."""
    zero: Entry | None
    """int32 [words, K / group], packed along N in the same way."""
    bits: int
    group: int

    def rows(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """See `Stored`."""
        first, last = columns or (0, self.shape[1])
        groups = torch.arange(first, last) // self.group
        weight = self._unpack(reader, start, stop, first, last).to(torch.float32)
        if self.zero is not None:
            weight -= self._zeros(reader, start, stop).index_select(1, groups)
        scale = _scales(self.scale, reader, start, stop)
        return weight.mul_(scale.index_select(1, groups))

    def integers(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """See `Stored`."""
        first, last = columns or (0, self.shape[1])
        size = self.form.group or self.shape[1]
        if self.zero is not None or self.group % size or self.form.bits != self.bits:
            return None
        assert self.bits == 8 or first % size == last % size == 0
        groups = torch.arange(first, last, size) // self.group
        weight = self._unpack(reader, start, stop, first, last)
        scale = _scales(self.scale, reader, start, stop).index_select(1, groups)
        return weight, scale.to(torch.bfloat16)

    def _unpack(self, reader: Reader, start: int, stop: int, first: int, last: int) -> Tensor:
        """int8 [n, last - first]."""
        each = 8 // self.bits
        packed = reader.rows(self.packed, start, stop, (first // each, -(-last // each)))
        if each == 1:
            return (packed ^ 128).view(torch.int8)  # adds half the range, modulo all of it
        integers = torch.stack((packed & 15, packed >> 4), -1).flatten(1).view(torch.int8)
        skip = first % each
        return integers[:, skip : skip + last - first] - 8

    def _zeros(self, reader: Reader, start: int, stop: int) -> Tensor:
        """float32 [n, K / group]."""
        each = 32 // self.bits
        words = reader.rows(self.zero, start // each, -(-stop // each))
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)[None, :, None]
        zeros = ((words[:, None] >> shifts) & (2**self.bits - 1)).flatten(0, 1)
        zeros = zeros[start % each :][: stop - start]
        return (zeros - 2 ** (self.bits - 1)).to(torch.float32)


@dataclass(frozen=True)
class Blocks:
    """4 bits of bitsandbytes: each is one of 16 numbers, times the largest of its block.

    Blocks run over the flattened matrix, two weights in a byte, the first in the high bits. The
    largest of each block may itself be one of 256 numbers, times the largest of so many, plus the
    mean of all ("double quantisation").
    """

    shape: tuple[int, int]
    names: tuple[str, ...]
    library: str
    form: Format
    weight: Entry
    """As bytes [N · K / 2, 1]."""
    code: Entry
    """The 16 numbers."""
    absmax: Entry
    """One for each block, float32 or a byte."""
    size: int
    """Of a block."""
    nested_code: Entry | None = None
    nested_absmax: Entry | None = None
    nested_size: int = 0
    nested_offset: float = 0.0

    def rows(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """See `Stored`."""
        width = self.shape[1]
        first, last = start * width // self.size, -(-stop * width // self.size)
        largest = self._largest(reader, first, last)
        code = reader.whole(self.code)
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), -1)  # of each byte
        half = self.size // 2
        packed = reader.rows(self.weight, first * half, min(last * half, self.weight.shape[0]))
        packed = F.pad(packed.view(-1), (0, (last - first) * half - len(packed)))
        blocks = pairs.index_select(0, packed.int()).view(-1, self.size).mul_(largest[:, None])
        skip = start * width - first * self.size
        rows = blocks.view(-1)[skip : skip + (stop - start) * width].view(stop - start, width)
        return rows if columns is None else rows[:, slice(*columns)]

    def integers(
        self, reader: Reader, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> None:
        """See `Stored`; the 16 numbers are not evenly spaced."""

    def _largest(self, reader: Reader, first: int, last: int) -> Tensor:
        """float32, of some blocks."""
        if self.nested_code is None:
            return reader.rows(self.absmax, first, last).clone()
        code, largest = reader.whole(self.nested_code), reader.whole(self.nested_absmax)
        absmax = code.index_select(0, reader.rows(self.absmax, first, last).int())
        absmax *= largest.index_select(0, torch.arange(first, last) // self.nested_size)
        return absmax + self.nested_offset


def _scales(scale: Entry, reader: Reader, start: int, stop: int) -> Tensor:
    """float32 [n, groups], or [n, 1] where one is for all; in memory of its own."""
    if scale.shape[0] == 1:
        return reader.rows(scale, 0, 1).to(torch.float32, copy=True).repeat(stop - start, 1)
    return reader.rows(scale, start, stop).to(torch.float32, copy=True)
