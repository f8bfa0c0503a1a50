"""A picture as the model saw it, and what was kept of it drawn upon."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor

from llama_vision.drawing import palette
from llama_vision.inputs.image import MEAN, STD, TiledImage

DROPPED = -1
"""Stands for a token that is not kept and in no kept one either."""
LEAST_SIDE = 448
"""Pixels of a panel's shorter side; smaller pictures are enlarged by a whole number."""


class Picture(NamedTuple):
    """One image as the model saw it."""

    canvas: Image.Image
    """Its tiles side by side, padding included, RGB."""
    grid: tuple[int, int]
    """Rows and columns of tiles."""
    start: int
    """Its first token among those of all pictures."""


def pictures_of(images: Iterable[TiledImage], tokens_per_tile: int) -> list[Picture]:
    """All pictures of one prompt, in order."""
    pictures, start = [], 0
    for image in images:
        rows, cols = image.grid
        pictures.append(Picture(canvas_of(image), image.grid, start))
        start += rows * cols * tokens_per_tile
    return pictures


def stands_of(kept: Sequence[Tensor], stands: Sequence[Tensor], images: Sequence[int]) -> Tensor:
    """Who stands for each token [V] of all pictures, from what a `Completion` says of each picture.

    Args:
        kept: of each picture bool [t, P].
        stands: of each picture of a group that was merged int64 [t, P], counted within its group.
        images: pictures of each group.
    """
    parts, start, first, used = [], 0, 0, 0
    for count in images:
        mask = torch.cat([one.flatten() for one in kept[first : first + count]])
        own = torch.arange(len(mask))
        part = (own + start).where(mask, DROPPED)
        # Of groups that were not merged there are none.
        merged = torch.cat([mask[:0], *(one.flatten() for one in stands[used : used + count])])
        if len(merged) == len(mask) and torch.equal(merged == own, mask):
            part, used = merged + start, used + count
        parts.append(part)
        start, first = start + len(mask), first + count
    return torch.cat(parts)


def canvas_of(image: TiledImage) -> Image.Image:
    """The picture that was cut into tiles, from what the model is given."""
    (rows, cols), side = image.grid, image.pixels.shape[-1]
    mean, std = (torch.tensor(levels)[:, None, None] for levels in (MEAN, STD))
    levels = image.pixels.detach().cpu() * std + mean
    levels = levels.mul(255).round().clamp(0, 255).to(torch.uint8)
    levels = levels.unflatten(0, (rows, cols)).permute(0, 3, 1, 4, 2)  # [rows, h, cols, w, 3]
    data = bytearray(levels.numel())
    torch.frombuffer(data, dtype=torch.uint8).view(levels.shape).copy_(levels)
    return Image.frombytes("RGB", (cols * side, rows * side), bytes(data))


class Patch(NamedTuple):
    """A patch of a panel."""

    token: int
    row: int
    col: int
    """Among the patches of all tiles."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels, right and bottom excluded."""


class Panel:
    """A picture in the size of a panel, to be drawn upon.

    Args:
        side: patches along a tile's side.
        longest: pixels of the panel's longer side; None to enlarge to `LEAST_SIDE`.
    """

    def __init__(self, picture: Picture, side: int, longest: int | None = None):
        self.picture, self.side = picture, side
        self.rows, self.cols = (tiles * side for tiles in picture.grid)
        scale = -(-LEAST_SIDE // min(picture.canvas.size))
        if longest is not None:
            scale = longest / max(picture.canvas.size)
        size = tuple(round(length * scale) for length in picture.canvas.size)
        self.image = picture.canvas.resize(size, Image.Resampling.BICUBIC)

    def patches(self) -> Iterator[Patch]:
        """All patches, row by row through all tiles."""
        (width, height), (_, tile_cols), side = self.image.size, self.picture.grid, self.side
        for row in range(self.rows):
            for col in range(self.cols):
                tile = row // side * tile_cols + col // side
                patch = 1 + row % side * side + col % side
                token = self.picture.start + tile * (side**2 + 1) + patch
                left, right = (c * width // self.cols for c in (col, col + 1))
                top, bottom = (r * height // self.rows for r in (row, row + 1))
                yield Patch(token, row, col, (left, top, right, bottom))

    def veil(self, share: float, hides: Callable[[int], bool]) -> None:
        """Dim the patches of tokens that are hidden: so much of the colour is the veil's."""
        veiled = Image.blend(self.image, Image.new("RGB", self.image.size, palette.VEIL), share)
        for patch in self.patches():
            if hides(patch.token):
                self.image.paste(veiled.crop(patch.box), patch.box)

    def veil_dropped(self, stands: Tensor) -> None:
        """Dim the patches that are not kept, less so those that live on in another.

        Args:
            stands: of all pictures' tokens, see `stands_of`.
        """
        ids = stands.tolist()
        self.veil(palette.DROPPED, lambda token: ids[token] == DROPPED)
        self.veil(palette.MERGED, lambda token: ids[token] not in (DROPPED, token))

    def paint(self, colour_of: Callable[[int], palette.Colour]) -> None:
        """Give each patch its token's colour; the picture shows in it as light and dark."""
        flat = Image.new("RGB", self.image.size)
        for patch in self.patches():
            flat.paste(colour_of(patch.token), patch.box)
        # At half of its contrast it leaves the colours near those of the legend.
        grey = self.image.convert("L").point(lambda level: 64 + level // 2).convert("RGB")
        self.image = ImageChops.soft_light(flat, grey)

    def outline(self, stands: Tensor) -> None:
        """Draw around clusters of several tokens: along each edge that another one lies behind."""
        ids = {(patch.row, patch.col): int(stands[patch.token]) for patch in self.patches()}
        sizes = stands[stands >= 0].bincount(minlength=len(stands)).tolist()
        order = (stands == torch.arange(len(stands))).cumsum(0).tolist()
        draw = ImageDraw.Draw(self.image)
        for patch in self.patches():
            own = int(stands[patch.token])
            if own < 0 or sizes[own] < 2:
                continue
            colour = palette.CLUSTERS[order[own] % len(palette.CLUSTERS)]
            left, top, right, bottom = patch.box
            width = max(1, (right - left) // 14)
            sides = (
                ((-1, 0), (left, top, right - 1, top + width - 1)),
                ((1, 0), (left, bottom - width, right - 1, bottom - 1)),
                ((0, -1), (left, top, left + width - 1, bottom - 1)),
                ((0, 1), (right - width, top, right - 1, bottom - 1)),
            )
            for (down, along), line in sides:
                if ids.get((patch.row + down, patch.col + along)) != own:
                    draw.rectangle(line, fill=colour)

    def tile_lines(self) -> None:
        """Draw the borders of tiles, readable on light and on dark."""
        draw, (width, height), (rows, cols) = (
            ImageDraw.Draw(self.image),
            self.image.size,
            self.picture.grid,
        )
        for col in range(1, cols):
            x = col * width // cols
            draw.line((x - 1, 0, x - 1, height), fill=(255, 255, 255))
            draw.line((x, 0, x, height), fill=(0, 0, 0))
        for row in range(1, rows):
            y = row * height // rows
            draw.line((0, y - 1, width, y - 1), fill=(255, 255, 255))
            draw.line((0, y, width, y), fill=(0, 0, 0))
        draw.rectangle((0, 0, width - 1, height - 1), outline=palette.FAINT)


def counted(kept: Tensor) -> str:
    """How many of one picture's tokens [t, P] are kept, in words."""
    tiles, n, classes = len(kept), int(kept.sum()), int(kept[:, 0].sum())
    share = n / kept.numel()
    return f"{n} of {kept.numel()} tokens, {share:.0%} ({classes} of {tiles} class tokens)"
