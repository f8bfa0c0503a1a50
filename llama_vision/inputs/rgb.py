"""Pictures of any mode to RGB, some rows at a time: a whole copy for each step is too much."""

import math
from collections.abc import Callable, Iterator

from PIL import Image

BAND = 1 << 20
"""Pixels that are converted at once."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB: transparency over white, 16-bit and float samples scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        scale, offset = _scale_to_8_bits(image)
        return _by_bands(
            image, lambda band: band.convert("F").point(lambda x: x * scale + offset).convert("L")
        )
    if image.has_transparency_data:
        return _by_bands(image, _on_white)
    return image.convert("RGB")


def _by_bands(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for box in _bands(image):
        rgb.paste(convert(image.crop(box)).convert("RGB"), box)
    return rgb


def _bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    width, height = image.size
    rows = max(1, BAND // width)
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA"))


def _scale_to_8_bits(image: Image.Image) -> tuple[float, float]:
    """Scale and offset of levels of more than 8 bits: the range that their kind has goes to 255.

    16-bit levels go to 65535. Floats go to 1 and plain integers to 255 or 65535, where they fit;
    those that fit nowhere are stretched from their least to their largest.
    """
    sixteen_bits = image.mode.startswith("I;16")
    known_tops = (
        (65535,) if sixteen_bits else (1, 255, 65535) if image.mode == "F" else (255, 65535)
    )
    bottoms, tops = zip(
        *(image.crop(b).convert("F").getextrema() for b in _bands(image)), strict=True
    )
    bottom, top = min(bottoms), max(tops)
    if not (math.isfinite(bottom) and math.isfinite(top)):
        raise ValueError("it has levels that are not finite")
    if bottom >= 0 and top <= known_tops[-1]:
        bottom, top = 0, next(known for known in known_tops if top <= known)
    scale = 255 / ((top - bottom) or 1)
    return scale, 0.5 - bottom * scale  # Pillow rounds down
