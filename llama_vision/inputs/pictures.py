"""One door for pictures: from whatever came to upright RGB on white.

Sizes are checked before anything is unpacked, and whatever a decoder raises or prints ends here.
"""

import logging
import math
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from llama_vision.errors import LlamaVisionError, printable, quote
from llama_vision.inputs.picture_files import (
    FORMATS,
    LARGEST_IN_PYTHON,
    Metered,
    Refused,
    bytes_of_uri,
    in_python,
    is_data_uri,
    open_file,
    path_of,
    read_all,
    read_path,
)
from llama_vision.inputs.rgb import to_rgb

LARGEST_UNPACKED = 300_000_000
"""Bytes that a decoder may hold, see `FORMATS`."""
LARGEST_SIDE = 65_535
"""Pixels; JPEG's own limit."""
EXPECTED = (
    "a path, bytes, an open binary file, a PIL image, an array [h, w] or [h, w, 3] or a data URI"
)
ORIENTATION = 0x0112  # EXIF's tag, and what undoes each of its values
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without a handler, Python prints Pillow's log of damaged files to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_one_at_a_time = threading.RLock()
"""Warning filters and file descriptors are the process's, so one thread at a time changes them."""


class ImageError(LlamaVisionError):
    """A picture that is not there or cannot be read."""


def is_picture(value: Any) -> bool:
    """Whether a value is of a kind that `open_image` takes; a text is taken for none."""
    kinds = (Image.Image, bytes, bytearray, memoryview, os.PathLike)
    return isinstance(value, kinds) or any(
        hasattr(value, n) for n in ("__array_interface__", "read")
    )


def open_image(source: Any) -> Image.Image:
    """A picture as a person would see it: RGB, upright, on white, a file's first frame.

    Any mode that Pillow reads is accepted, 16-bit and CMYK included.

    Args:
        source: a path, `file://` URL or data URI; the bytes of a file; an open binary file, read
            from its start; a PIL image; an array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4] of
            uint8, booleans or floats from 0 to 1, or [h, w] of uint16.

    Raises:
        ImageError: nothing there, not a picture, damaged, or too large to unpack safely.
    """
    name = _name_of(source)
    try:
        with _quiet():
            return _plain(_image_of(source))
    except Refused as refused:
        raise ImageError(f"image {name} {refused}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is too large: {error}; scale it down first") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise ImageError(
            f"image {name} is not a picture that can be read; expected one of {formats}"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        why = printable(error) or type(error).__name__
        what = "cannot be read" if isinstance(source, Image.Image) else "is damaged or cut short"
        raise ImageError(f"image {name} {what}: {why}") from None


def _name_of(source: Any) -> str:
    if isinstance(source, str):
        return "in a data URI" if is_data_uri(source) else printable(source)
    if isinstance(source, os.PathLike):
        return printable(source)
    if isinstance(source, Image.Image):
        return "given as a PIL image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"of {len(source)} bytes"
    return f"given as {quote(source)}"


def _image_of(source: Any) -> Image.Image:
    """Opened, its size unchecked."""
    if isinstance(source, Image.Image):
        return source
    if hasattr(source, "__array_interface__"):
        return _of_array(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return open_file(Metered(source))
    if isinstance(source, str) and is_data_uri(source):
        return open_file(Metered(bytes_of_uri(source)))
    if isinstance(source, (str, os.PathLike)):
        return open_file(read_path(path_of(os.fsdecode(source))))
    if hasattr(source, "read"):
        return open_file(read_all(source))
    raise Refused(f"is no picture; expected {EXPECTED}")


def _of_array(array: Any) -> Image.Image:
    facts = array.__array_interface__
    shape, kind = tuple(facts["shape"]), facts["typestr"][1:]
    if len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,)):
        raise Refused("has no picture's shape; expected [h, w], [h, w, 1], [h, w, 3] or [h, w, 4]")
    if kind not in ("u1", "b1", "f2", "f4", "f8") and (kind != "u2" or shape[2:]):
        raise Refused("has levels of another type; expected uint8, or floats from 0 to 1")
    bytes_per_pixel = max(4, math.prod(shape[2:]) * int(kind[1:]))
    _check_size(shape[1], shape[0], LARGEST_UNPACKED // bytes_per_pixel)
    if shape[2:] == (1,):
        array = array.reshape(shape[:2])
    if kind[0] == "f":
        if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
            raise Refused("has levels out of range; expected floats from 0 to 1, or uint8")
        array = (array * 255).round().astype("uint8")
    elif kind == "b1":
        array = array.astype("uint8") * 255
    return Image.fromarray(array)


def _check_size(width: int, height: int, most: int) -> None:
    if not width or not height:
        raise Refused(f"has no pixels: it is {width} x {height}")
    if max(width, height) > LARGEST_SIDE or width * height > most:
        raise Refused(
            f"is too large: {width} x {height} pixels; expected at most {most} pixels, and "
            f"{LARGEST_SIDE} on a side; scale it down first"
        )


def _plain(image: Image.Image) -> Image.Image:
    """An opened picture, unpacked and as it is seen; RGB of the caller's own stays what it is."""
    most = LARGEST_UNPACKED // FORMATS.get(image.format, 4)
    from_file = isinstance(image, ImageFile.ImageFile)
    if from_file and image.format not in FORMATS:
        raise Refused(
            f"is of the format {printable(image.format)}; expected one of {', '.join(FORMATS)}, or "
            "what its own convert('RGB') gives, where you trust it"
        )
    if in_python(image):
        most = LARGEST_IN_PYTHON
    _check_size(*image.size, most)
    with _stderr_off() if image.format == "TIFF" else nullcontext():
        image.load()
    turn = _turn_of(image)
    rgb = to_rgb(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    elif rgb is image and from_file:
        rgb = image.copy()  # without the file
    if rgb is not image:
        rgb.info = {}  # what says how to turn it
    return rgb


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:  # damaged EXIF does not make the picture unreadable
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _stderr_off() -> Iterator[None]:
    """Without file descriptor 2, where libtiff writes of each damaged strip by itself.

    What other threads write there meanwhile is lost too; Pillow gives no other way to silence it.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
