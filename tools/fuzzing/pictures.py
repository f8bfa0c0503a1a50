"""Damaged pictures of every format that this Pillow writes, and files made to harm."""

import base64
import io
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from fuzzing.bombs import BOMBS, with_right_sums
from fuzzing.common import tiny
from fuzzing.judge import Case, Kind, descriptor_2_to, draw_for

CASES = 20_000
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I", "I;16", "F", "La")
UNDAMAGED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats whose whole files must be read."""

HOW: dict[str, tuple[dict[str, Any], ...]] = {
    "TIFF": tuple(
        {"compression": c}
        for c in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4")
    ),
    "JPEG": ({}, {"progressive": True}, {"exif": b"Exif\0\0" + b"II*\0\x08\0\0\0" + b"\xff" * 40}),
    "PNG": ({}, {"transparency": 3}, {"pnginfo": None}, {"save_all": True}),
    "WEBP": ({}, {"lossless": True}, {"save_all": True}),
    "GIF": ({}, {"save_all": True}, {"transparency": 0}),
    "DDS": ({}, {"pixel_format": "DXT1"}, {"pixel_format": "BC5"}),
    "PPM": ({},),
}
"""Ways of writing a format; with save_all a second frame goes in."""

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
Edit = Callable[[bytearray, random.Random], bytes]


@cache
def whole_files() -> list[tuple[str, str, bytes]]:
    """Small files of every format and mode: (format, words, bytes)."""
    Image.init()
    picture = Image.linear_gradient("L").resize((24, 17))
    with open(os.devnull, "wb") as nowhere, descriptor_2_to(nowhere.fileno()):
        return list(_written(picture))


def _written(picture: Image.Image) -> Iterator[tuple[str, str, bytes]]:
    for name in sorted(Image.SAVE):
        for mode in MODES:
            for n, how in enumerate(HOW.get(name, ({},))):
                file, how = io.BytesIO(), dict(how)
                try:
                    frame = picture.convert(mode)
                    if how.get("save_all"):
                        how["append_images"] = [frame.rotate(180)]
                    frame.save(file, name, **how)
                except Exception:  # this format has no such mode
                    continue
                yield name, f"{name} {mode} {n}", file.getvalue()


def flip_bits(data: bytearray, draw: random.Random) -> bytes:
    """A few bits anywhere, more of them at the beginning."""
    for _ in range(draw.choice((1, 2, 8, 40))):
        most = draw.choice((32, 200, len(data)))
        data[draw.randrange(min(most, len(data)))] ^= 1 << draw.randrange(8)
    return bytes(data)


def truncate(data: bytearray, draw: random.Random) -> bytes:
    """The beginning alone."""
    return bytes(data[: draw.randrange(len(data))])


def splice(data: bytearray, draw: random.Random) -> bytes:
    """A part from another file, in place of one or in between."""
    other = draw.choice(whole_files())[2]
    start, size = draw.randrange(len(data)), draw.choice((0, 4, 50, len(data)))
    at = draw.randrange(len(other))
    data[start : start + size] = other[at : at + draw.choice((4, 100, len(other)))]
    return bytes(data)


def edit_number(data: bytearray, draw: random.Random) -> bytes:
    """A field of the header, as a number at an edge."""
    for _ in range(draw.choice((1, 1, 2))):
        form = draw.choice(("B", "<H", ">H", "<I", ">I"))
        size = struct.calcsize(form)
        at = draw.randrange(max(1, min(len(data), draw.choice((40, 200))) - size))
        value = draw.choice(NUMBERS) & (256**size - 1)
        data[at : at + size] = struct.pack(form, value)
    return bytes(data)


def random_behind_magic(data: bytearray, draw: random.Random) -> bytes:
    """The first bytes, then any."""
    return bytes(data[: draw.choice((2, 4, 8, 12, 26))]) + draw.randbytes(
        draw.choice((0, 30, 2000))
    )


def repeat(data: bytearray, draw: random.Random) -> bytes:
    """A part over and over."""
    start, size = draw.randrange(len(data)), draw.choice((1, 8, 100))
    return bytes(data[:start] + data[start : start + size] * draw.choice((2, 1000)) + data[start:])


def append(data: bytearray, draw: random.Random) -> bytes:
    """More behind the end."""
    return bytes(data) + draw.randbytes(draw.choice((1, 1000)))


EDITS: tuple[Edit, ...] = (
    *(flip_bits, flip_bits, truncate, splice, edit_number, edit_number, edit_number),
    *(random_behind_magic, repeat, append),
)
SUFFIXES = (".png", ".jpg", ".gif", ".tif", ".webp", ".eps", ".pdf", ".ico", "", ".svg", ".bin")


def make_file(i: int, draw: random.Random) -> tuple[str, bytes, bool]:
    """What the file is, its bytes, and whether it is whole and of a common format."""
    if i < 2 * len(BOMBS) or draw.random() < 0.05:
        name = sorted(BOMBS)[i % len(BOMBS)]
        return name, _bomb(name), False
    kind, words, data = draw.choice(whole_files())
    if draw.random() < 0.03:
        right = kind in UNDAMAGED and "LAB" not in words  # which Pillow does not bring to RGB
        return f"{words}, whole", data, right
    done = []
    for _ in range(draw.choice((1, 1, 1, 2))):
        edit = draw.choice(EDITS)
        data = edit(bytearray(data or b"\0"), draw) or b"\0"
        done.append(edit.__name__)
    if kind == "PNG" and draw.random() < 0.6:
        data = with_right_sums(data)
    return f"{words}, {' '.join(done)}", data, False


@cache
def _bomb(name: str) -> bytes:
    return BOMBS[name]()


def by_path(data: bytes, suffix: str, scratch: Path) -> Any:
    """A file of any name."""
    path = scratch / f"{os.getpid()}{suffix}"
    path.write_bytes(data)
    return path


def opened(data: bytes, suffix: str, scratch: Path) -> Any:
    """By Pillow, all formats allowed, and not read yet; else its bytes."""
    try:
        return Image.open(io.BytesIO(data))
    except Exception:
        return data


WAYS: dict[str, Callable[[bytes, str, Path], Any]] = {
    "path": by_path,
    "text path": lambda *given: str(by_path(*given)),
    "bytes": lambda data, *_: data,
    "open file": lambda data, *_: io.BytesIO(data),
    "open file on disk": lambda *given: by_path(*given).open("rb"),
    "opened": opened,
    "data URI": lambda data, *_: "data:image/png;base64," + base64.b64encode(data).decode(),
}


def read(given: Any) -> None:
    """As a message's picture, to its tiles."""
    content = [{"type": "image", "image": given}, "What is it?"]
    try:
        tiny().tile(tiny().prompt([{"role": "user", "content": content}]))
    finally:
        if hasattr(given, "close"):
            given.close()


def kind(seed: int, scratch: Path) -> Kind:
    """See `fuzzing.kinds`."""
    tiny()
    whole_files()

    def case(i: int) -> Case:
        draw = draw_for("pictures", seed, i)
        words, data, right = make_file(i, draw)
        way, suffix = draw.choice(sorted(WAYS)), draw.choice(SUFFIXES)
        given = WAYS[way](data, suffix, scratch)
        expected = "taken" if right else "either"
        return Case(f"{words}, {len(data)} bytes as {way}, {suffix}", lambda: read(given), expected)

    return Kind("pictures", CASES, case)
