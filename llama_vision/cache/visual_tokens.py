"""Visual tokens: what the text can look at, where each token sits, and which text rows see which.

An image reaches the decoder as tokens of its *real* tiles only. Tokens of one sample lie in one
row, image after image, tile after tile, class token before patches.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOKENS_AT_ONCE = 8192
"""Most visual tokens that go through a layer together, which bounds what it takes in between.

A single image always goes as one through the encoder; one of the 11B, 6,432 tokens with padding,
keeps a GPU busy.
"""


class Stretch(NamedTuple):
    """Text rows `rows` of one sample that all see the same images, its `images`."""

    rows: slice
    images: slice


class Sight(NamedTuple):
    """Text rows `rows` of one sample attend to the visual tokens `tokens` of that sample."""

    rows: slice
    tokens: slice

    def shifted(self, by: int) -> "Sight":
        """The same, with `by` more tokens in front."""
        return Sight(self.rows, slice(self.tokens.start + by, self.tokens.stop + by))

    def overlaps(self, rows: slice) -> bool:
        """Whether it has any of these rows."""
        return max(self.rows.start, rows.start) < min(self.rows.stop, rows.stop)

    def within(self, rows: slice) -> "Sight":
        """Those of its rows that are among `rows`, counted from the first of them."""
        start, stop = max(self.rows.start, rows.start), min(self.rows.stop, rows.stop)
        return Sight(slice(start - rows.start, stop - rows.start), self.tokens)


def find_stretches(token_ids: Sequence[int], image_token_id: int) -> list[Stretch]:
    """Which images each text row of one sample sees.

    A row sees an image from that image's token until the next group of images begins; image tokens
    that follow each other directly form one group. Rows before the first image are in no stretch.

    Source: llama_models/llama3/chat_format.py, create_vision_mask; what generated rows see is ours:
    the same as the last row of the prompt.
    """
    stretches: list[Stretch] = []
    places = [row for row, token in enumerate(token_ids) if token == image_token_id]
    first_of_group = 0
    for image, row in enumerate(places):
        if image and places[image - 1] != row - 1:
            first_of_group = image
        end = places[image + 1] if image + 1 < len(places) else len(token_ids)
        stretches.append(Stretch(slice(row, end), slice(first_of_group, image + 1)))
    return stretches


@dataclass
class VisualTokens:
    """The visual tokens of a batch, each sample's padded on the right to the longest.

    Shapes: `features` [B, V, D], the projector's output; `image`, `tile` and `patch` [B, V], int64,
    say where a token sits: number of the image in its sample, of the tile in its image (row by
    row), and 0 for the class token or 1 + row · patches_per_side + col. In the padding all are -1.
    """

    features: Tensor
    image: Tensor
    tile: Tensor
    patch: Tensor
    counts: list[list[int]]
    """Tokens of each image of each sample. Kept on the host, so that slicing needs no transfer."""
    grids: list[list[tuple[int, int]]]
    """Rows and columns of tiles of each image of each sample."""
    patches_per_side: int
    budget: list[int] | None = None
    """Most tokens of each sample that a pruner may keep; None for no limit."""
    keys: Tensor | None = None
    """[B, K, V, d], of the first cross-attention block; there when a pruner is asked."""
    kept: Tensor | None = None
    """[B, V], the pruner's answer; None before, or without one."""

    @classmethod
    def blank(
        cls,
        grids: Sequence[Sequence[tuple[int, int]]],
        tokens_per_tile: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "VisualTokens":
        """Room for the images of each sample, whose grids these are; one image at least."""
        counts = [[rows * cols * tokens_per_tile for rows, cols in sample] for sample in grids]
        longest = max(sum(sample) for sample in counts)
        return cls(
            torch.zeros(len(grids), longest, width, dtype=dtype, device=device),
            *_places(grids, tokens_per_tile, device),
            counts=counts,
            grids=[list(sample) for sample in grids],
            patches_per_side=math.isqrt(tokens_per_tile - 1),
        )

    @classmethod
    def of_images(
        cls, images: Sequence[Sequence[Tensor]], grids: Sequence[Sequence[tuple[int, int]]]
    ) -> "VisualTokens":
        """Lay out the features of each sample's images, each [t, P, D]; one at least."""
        like = next(features for sample in images for features in sample)
        visual = cls.blank(grids, like.shape[1], like.shape[2], like.dtype, like.device)
        for sample, row in enumerate(images):
            for image, features in enumerate(row):
                visual.fill(sample, image, features)
        return visual

    def fill(self, sample: int, image: int, features: Tensor) -> None:
        """Put the features [t, P, D] of one image into their place."""
        start = sum(self.counts[sample][:image])
        self.features[sample, start : start + self.counts[sample][image]] = features.flatten(0, 1)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [sum(counts) for counts in self.counts]

    @property
    def valid(self) -> Tensor:
        """True for tokens, False for padding: [B, V]."""
        return self.image >= 0

    @property
    def is_class(self) -> Tensor:
        """True for the class token of a tile: [B, V]."""
        return self.patch == 0

    @property
    def tile_row(self) -> Tensor:
        """Row of a token's tile in its image: [B, V]; -1 in the padding."""
        return (self.tile // self._grid_cols).where(self.valid, -1)

    @property
    def tile_col(self) -> Tensor:
        """Column of a token's tile in its image: [B, V]; -1 in the padding."""
        return (self.tile % self._grid_cols).where(self.valid, -1)

    @property
    def _grid_cols(self) -> Tensor:
        """Columns of tiles of a token's image: [B, V]; anything in the padding."""
        cols = [torch.tensor([cols for _, cols in sample] or [1]) for sample in self.grids]
        of_images = pad_sequence(cols, batch_first=True, padding_value=1).to(self.image.device)
        return of_images.gather(1, self.image.clamp(min=0))

    @property
    def patch_row(self) -> Tensor:
        """Row of a token's patch in its tile: [B, V]; -1 for class tokens and padding."""
        return ((self.patch - 1) // self.patches_per_side).where(self.patch > 0, -1)

    @property
    def patch_col(self) -> Tensor:
        """Column of a token's patch in its tile: [B, V]; -1 for class tokens and padding."""
        return ((self.patch - 1) % self.patches_per_side).where(self.patch > 0, -1)

    def select(self, keep: Tensor) -> "VisualTokens":
        """The tokens where keep [B, V] is True, in order."""
        index = kept_first(keep)
        filled = keep.gather(1, index)
        places = (p.gather(1, index).where(filled, -1) for p in (self.image, self.tile, self.patch))
        on_host = keep.cpu()
        counts = [
            [int(part.sum()) for part in row[:length].split(counts)]
            for row, counts, length in zip(on_host, self.counts, self.lengths, strict=True)
        ]
        features = self.features.gather(1, index[..., None].expand(-1, -1, self.features.shape[-1]))
        return VisualTokens(features, *places, counts, self.grids, self.patches_per_side)

    def kept_of_images(self) -> list[list[Tensor]]:
        """For each image of each sample which tokens were kept: bool [tiles, P], on the host."""
        mask = (self.valid if self.kept is None else self.kept).cpu()
        per_tile = 1 + self.patches_per_side**2
        return [
            [part.unflatten(0, (-1, per_tile)) for part in row[: sum(counts)].split(counts)]
            if counts
            else []
            for row, counts in zip(mask, self.counts, strict=True)
        ]

    def release(self) -> None:
        """Let go of the features (and keys): nothing reads them again."""
        self.features = self.features.new_empty(0)
        self.keys = None

    def sights(self, sample: int, stretches: Sequence[Stretch]) -> list[Sight]:
        """What the stretches of one sample see, as runs of tokens (empty where all were pruned)."""
        ends = [0, *accumulate(self.counts[sample])]
        return [Sight(s.rows, slice(ends[s.images.start], ends[s.images.stop])) for s in stretches]


def kept_first(keep: Tensor) -> Tensor:
    """Places of the True entries of each row, in order: [B, V] -> [B, most in a row], int64.

    Rows with fewer go on with places of False entries.
    """
    most = int(keep.sum(-1).max())
    return keep.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]


def _places(
    grids: Sequence[Sequence[tuple[int, int]]], tokens_per_tile: int, device: torch.device
) -> list[Tensor]:
    """`image`, `tile` and `patch` of `VisualTokens`."""
    tokens = torch.arange(tokens_per_tile)
    rows = []
    for sample in grids:
        places = [
            torch.cartesian_prod(torch.tensor([i]), torch.arange(rows * cols), tokens)
            for i, (rows, cols) in enumerate(sample)
        ]
        rows.append(torch.cat(places) if places else torch.zeros(0, 3, dtype=torch.int64))
    return list(pad_sequence(rows, batch_first=True, padding_value=-1).to(device).unbind(-1))


class Visibility:
    """Which visual tokens each text row of a chunk may read, for a whole batch.

    Args:
        sights: what the text rows of each sample see.
        shape: B, S and V of the chunk.
    """

    def __init__(
        self, sights: list[list[Sight]], shape: tuple[int, int, int], device: torch.device
    ):
        batch, rows, tokens = shape
        self.sights = [[s for s in row if s.tokens.start < s.tokens.stop] for row in sights]
        self.uniform = all(row == self.sights[0] for row in self.sights)
        seen = torch.zeros(batch, rows, 1, dtype=torch.bool)
        for sample, sample_sights in enumerate(self.sights):
            for sight in sample_sights:
                seen[sample, sight.rows] = True
        self.seen = None if bool(seen.all()) else seen.to(device)
        """[B, S, 1], False where a row sees nothing; None where every row sees something."""
        self.mask = None
        """[B, 1, S, V]; only for one row each of samples that differ: decoding a ragged batch.

        A row that sees nothing looks at one token here, and `seen` says that it must not count.
        """
        if rows == 1 and not self.uniform:
            runs = [row[0].tokens if row else slice(0, 1) for row in self.sights]
            starts, ends = torch.tensor([[run.start, run.stop] for run in runs]).T[..., None]
            token = torch.arange(tokens)
            self.mask = ((token >= starts) & (token < ends))[:, None, None].to(device)

    def batches(self) -> Iterator[tuple[slice, list[Sight]]]:
        """Samples that can be attended together, with what they see."""
        if self.uniform:
            yield slice(None), self.sights[0]
        else:
            for sample, sights in enumerate(self.sights):
                yield slice(sample, sample + 1), sights
