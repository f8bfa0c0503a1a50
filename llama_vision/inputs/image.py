"""A picture becomes tiles: choose a canvas, resize without distortion, pad, normalise, split."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from llama_vision.config import supported_grids
from llama_vision.errors import LlamaVisionError

# CLIP's colour statistics. Source: VariableSizeImageTransform and preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageError(LlamaVisionError):
    """A picture that is not there or cannot be read."""


@dataclass(frozen=True)
class TiledImage:
    """One image as the vision encoder takes it."""

    pixels: Tensor
    """[T, 3, h, w], float32, normalised; tiles row by row."""
    grid: tuple[int, int]
    """(rows, cols); rows · cols = T."""
    aspect_id: int
    """1 + the grid's place among all grids of at most `max_tiles` tiles."""


def open_image(path: str | Path) -> Image.Image:
    """Read a picture from a file as a person would see it: upright, on white, its first frame.

    Any mode that Pillow reads is accepted, 16-bit and CMYK included.

    Raises:
        ImageError: no such file, not a picture, cut short, or too many pixels to unpack safely.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise ImageError(f"image {path} {what}; expected a picture file such as PNG or JPEG")
    if path.stat().st_size == 0:
        raise ImageError(f"image {path} is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            # Large photographs only warn; beyond twice that Pillow refuses, and so do we.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {path} is too large: {error}; scale it down first") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"image {path} is not a picture that Pillow can read; expected PNG, JPEG, WebP, GIF, …"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise ImageError(f"image {path} is damaged or cut short: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: transparency over white, 16-bit and float samples scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _to_8_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey levels of more than 8 bits to L: each divided by the range that its kind has.

    16-bit levels go to 65535. Floats go to 1 and plain integers to 255 or 65535, where they fit;
    those that fit nowhere are stretched from their least to their largest.
    """
    sixteen_bits = image.mode.startswith("I;16")
    known_tops = (
        (65535,) if sixteen_bits else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    )
    image = image.convert("F")
    bottom, top = image.getextrema()
    if bottom >= 0 and top <= known_tops[-1]:
        bottom, top = 0, next(known for known in known_tops if top <= known)
    scale = 255 / ((top - bottom) or 1)
    offset = 0.5 - bottom * scale  # Pillow rounds down
    return image.point(lambda level: level * scale + offset).convert("L")


def check_tiles(image: TiledImage, tile_size: int, max_tiles: int) -> None:
    """Raise ImageError where an image is cut into other tiles than a model has."""
    rows, cols = image.grid
    expected = (rows * cols, 3, tile_size, tile_size)
    if rows * cols > max_tiles or tuple(image.pixels.shape) != expected:
        raise ImageError(
            f"an image of {rows} x {cols} tiles has pixels {list(image.pixels.shape)}; "
            f"expected {list(expected)}, and at most {max_tiles} tiles"
        )


def grid_of(image: Image.Image | TiledImage, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The (rows, cols) that `tile_image` cuts a picture into."""
    if isinstance(image, TiledImage):
        return image.grid
    return choose_grid(image.size, tile_size, max_tiles)


def tile_image(image: Image.Image | TiledImage, *, tile_size: int, max_tiles: int) -> TiledImage:
    """Cut a picture into tiles.

    Args:
        image: RGB; other modes are brought to it first, see `to_rgb`. One that is cut up already
            stays as it is.
        tile_size: side of a tile, in pixels.
        max_tiles: most tiles to use.

    Source: llama_models/llama3/multimodal/image_transform.py, VariableSizeImageTransform; the least
    side of 1 pixel is ours, where the reference fails.
    """
    if isinstance(image, TiledImage):
        return image
    rgb = to_rgb(image)
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
