"""A picture becomes tiles: choose a canvas, resize without distortion, pad, normalise, split."""

import ctypes
import hashlib
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llama_vision.config import MOST_PIXELS, MOST_TILES, supported_grids
from llama_vision.errors import quote
from llama_vision.inputs.pictures import ImageError, open_image
from llama_vision.values import Whole, check

# CLIP's colour statistics. Source: VariableSizeImageTransform and preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TiledImage:
    """One image as the vision encoder takes it."""

    pixels: Tensor
    """[T, 3, h, w], float32, normalised; tiles row by row."""
    grid: tuple[int, int]
    """(rows, cols); rows · cols = T."""
    aspect_id: int
    """1 + the grid's place among all grids of at most `max_tiles` tiles."""


def content_of(image: Image.Image | TiledImage) -> bytes:
    """A digest of what a picture shows, or of its tiles: equal for equal pictures."""
    if isinstance(image, TiledImage):
        pixels = image.pixels.contiguous()
        content = (ctypes.c_ubyte * pixels.nbytes).from_address(pixels.data_ptr())
        kind = f"{pixels.dtype} {list(pixels.shape)} {image.grid} {image.aspect_id}"
    else:
        content, kind = image.tobytes(), f"{image.mode} {image.size}"
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    digest.update(content)
    return digest.digest()


def check_tiles(image: TiledImage, tile_size: int, max_tiles: int) -> None:
    """Raise ImageError where an image is cut into other tiles than a model has, or is damaged."""
    pixels, grid = image.pixels, image.grid
    if not (isinstance(grid, (tuple, list)) and len(grid) == 2 and all(map(_is_count, grid))):
        raise ImageError(
            f"an image's grid is {quote(grid)}; expected its rows and columns of tiles"
        )
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.is_meta:
        raise ImageError(f"an image's pixels are {quote(pixels)}; expected a tensor of floats")
    rows, cols = grid
    expected = (rows * cols, 3, tile_size, tile_size)
    if rows * cols > max_tiles or tuple(pixels.shape) != expected:
        raise ImageError(
            f"an image of {quote(rows)} x {quote(cols)} tiles has pixels {list(pixels.shape)}; "
            f"expected {quote(list(expected))}, and at most {max_tiles} tiles"
        )
    if not _is_count(image.aspect_id):
        raise ImageError(f"an image's aspect_id is {quote(image.aspect_id)}; expected 1 or more")
    if pixels.layout != torch.strided or not pixels.isfinite().all():
        raise ImageError("an image's pixels are not all finite numbers; cut the picture up anew")


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 1


def grid_of(image: Any, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The (rows, cols) that `tile_image` cuts a picture into."""
    if isinstance(image, TiledImage):
        return image.grid
    return choose_grid(open_image(image).size, tile_size, max_tiles)


def tile_image(image: Any, *, tile_size: int, max_tiles: int) -> TiledImage:
    """Cut a picture into tiles.

    Args:
        image: what `open_image` takes. One that is cut up already stays as it is.
        tile_size: side of a tile, in pixels.
        max_tiles: most tiles to use.

    Raises:
        ImageError: it cannot be read.

    Source: llama_models/llama3/multimodal/image_transform.py, VariableSizeImageTransform; the least
    side of 1 pixel is ours, where the reference fails.
    """
    if isinstance(image, TiledImage):
        return image
    check("tile_size", tile_size, Whole(1, MOST_PIXELS))
    check("max_tiles", max_tiles, Whole(1, MOST_TILES))
    rgb = open_image(image)
    rows, cols = choose_grid(rgb.size, tile_size, max_tiles)
    canvas = Image.new("RGB", (cols * tile_size, rows * tile_size))
    size = fit_inside(rgb.size, canvas.size, tile_size)
    canvas.paste(rgb if size == rgb.size else rgb.resize(size, Image.Resampling.BILINEAR))
    pixels = _normalise(canvas).unflatten(2, (cols, tile_size)).unflatten(1, (rows, tile_size))
    tiles = pixels.permute(1, 3, 0, 2, 4).flatten(0, 1)  # [rows · cols, 3, h, w]
    return TiledImage(
        tiles.contiguous(), (rows, cols), supported_grids(max_tiles).index((rows, cols)) + 1
    )


def choose_grid(size: tuple[int, int], tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The (rows, cols) whose canvas suits a picture of `size` = (width, height) best.

    The smallest enlargement if any canvas allows one, else the largest scale; of equal ones
    the canvas with the fewest tiles.
    """
    width, height = size
    grids = supported_grids(max_tiles)
    # The reference compares float32 quotients for equality, so ties must be float32 ties here too.
    canvases = torch.tensor(grids) * tile_size
    scales = torch.minimum(canvases[:, 1] / width, canvases[:, 0] / height)
    enlarging = scales[scales >= 1]
    best = enlarging.min() if len(enlarging) else scales.max()
    tied = [grid for grid, scale in zip(grids, scales, strict=True) if scale == best]
    return min(tied, key=lambda grid: grid[0] * grid[1])


def fit_inside(size: tuple[int, int], canvas: tuple[int, int], tile_size: int) -> tuple[int, int]:
    """(width, height) of the undistorted picture on its canvas.

    A side grows at most to the tile's; sides are rounded down, to 1 pixel at least.
    """
    width, height = size
    target_width, target_height = (
        min(max(side, tile_size), limit) for side, limit in zip(size, canvas, strict=True)
    )
    by_width, by_height = target_width / width, target_height / height
    if by_width < by_height:
        return target_width, max(1, min(int(height * by_width), target_height))
    return max(1, min(int(width * by_height), target_width)), target_height


def _normalise(image: Image.Image) -> Tensor:
    """RGB picture -> [3, height, width], float32, minus mean, over standard deviation."""
    levels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    levels = levels.view(image.height, image.width, 3).permute(2, 0, 1)  # [3, height, width]
    mean, std = (torch.tensor(s)[:, None, None] for s in (MEAN, STD))
    return levels.float().div_(255).sub_(mean).div_(std)
