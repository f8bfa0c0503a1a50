"""Visual tokens: what the text can look at, and where in the pictures each of them sits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llama_vision.cache.merging import ChosenTokens

Grid = tuple[int, int]
"""Rows and columns of tiles of one image."""


@dataclass
class VisualTokens:
    """The visual tokens of one group of images: those of its images' *real* tiles.

    They lie image after image, tile after tile, class token before patches. `image`, `tile` and
    `patch` [V], int64, say where a token sits: number of the image in its group, of the tile in its
    image (row by row), and 0 for the class token or 1 + row · patches_per_side + col.
    """

    features: Tensor
    """[V, D], the projector's output."""
    image: Tensor
    tile: Tensor
    patch: Tensor
    grids: tuple[Grid, ...]
    """Of each image."""
    patches_per_side: int
    group: int = 0
    """Number of the group in its conversation."""
    budget: int | None = None
    """Most tokens that a pruner may keep; None for no limit."""
    keys: Tensor | None = None
    """[K, V, d], of the first cross-attention block; there when a pruner is asked."""
    chosen: "ChosenTokens | None" = None
    """What a pruner has chosen of the same group for another prompt, or for this one."""
    remember: bool = False
    """Whether what a pruner chooses is to be noted in `chosen`."""

    @classmethod
    def of_images(cls, features: Tensor, grids: Sequence[Grid], *, group: int = 0):
        """Lay out the features [tiles of all images, P, D] of a group of images."""
        tokens = torch.arange(features.shape[1])
        places = torch.cat(
            [
                torch.cartesian_prod(torch.tensor([image]), torch.arange(rows * cols), tokens)
                for image, (rows, cols) in enumerate(grids)
            ]
        ).to(features.device)  # [V, 3]
        side = math.isqrt(len(tokens) - 1)
        return cls(features.flatten(0, 1), *places.unbind(-1), tuple(grids), side, group)

    @property
    def tokens_per_tile(self) -> int:
        """P: the class token and one token per patch."""
        return 1 + self.patches_per_side**2

    @property
    def counts(self) -> list[int]:
        """Tokens of each image."""
        return [rows * cols * self.tokens_per_tile for rows, cols in self.grids]

    @property
    def is_class(self) -> Tensor:
        """True for the class token of a tile: [V]."""
        return self.patch == 0

    @property
    def tile_row(self) -> Tensor:
        """Row of a token's tile in its image: [V]."""
        return self.tile // self._grid_cols

    @property
    def tile_col(self) -> Tensor:
        """Column of a token's tile in its image: [V]."""
        return self.tile % self._grid_cols

    @property
    def _grid_cols(self) -> Tensor:
        """Columns of tiles of a token's image: [V]."""
        return torch.tensor([cols for _, cols in self.grids], device=self.image.device)[self.image]

    @property
    def patch_row(self) -> Tensor:
        """Row of a token's patch in its tile: [V]; -1 for class tokens."""
        return ((self.patch - 1) // self.patches_per_side).where(self.patch > 0, -1)

    @property
    def patch_col(self) -> Tensor:
        """Column of a token's patch in its tile: [V]; -1 for class tokens."""
        return ((self.patch - 1) % self.patches_per_side).where(self.patch > 0, -1)

    def copy(self) -> "VisualTokens":
        """The same in tensors of its own."""
        tensors = {n: v.clone() for n, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def of_each_image(self, keep: Tensor) -> list[Tensor]:
        """Split a mask [V] into one [tiles, P] for each image, on the host."""
        parts = keep.cpu().split(self.counts)
        return [part.unflatten(0, (-1, self.tokens_per_tile)) for part in parts]
