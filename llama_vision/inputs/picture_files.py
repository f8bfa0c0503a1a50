"""Files of pictures: read from wherever they lie, and opened so that none can do harm.

Only formats that Pillow decodes by itself are tried (EPS would start an external program), and what
it reads before the pixels is bounded.
"""

import base64
import io
import math
import os
import re
import sys
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

from PIL import Image

from llama_vision.errors import printable

LARGEST_FILE = 300_000_000
"""Bytes."""
LARGEST_IN_PYTHON = 1_000_000
"""Pixels of what Pillow decodes in Python, which takes about two seconds for a million."""
LARGEST_IN_SCANS = 1_500_000_000
"""Pixels times scans: a progressive JPEG goes over all of its pixels once a scan."""

FORMATS = {"PNG": 4, "JPEG": 4, "MPO": 4, "GIF": 4, "BMP": 4, "TIFF": 4, "PPM": 4}
FORMATS |= {"WEBP": 8, "AVIF": 8, "JPEG2000": 40}
"""The formats that are read, and the bytes that a decoder holds for a pixel; phones write MPO.

JPEG 2000 takes 16 to 24, and more time than any other.
"""


TOO_LARGE = f"is too large; expected at most {LARGEST_FILE} bytes"


class Refused(Exception):
    """Why a picture is not read: what to say behind its name."""


def is_data_uri(text: str) -> bool:
    """Whether a text holds a picture itself."""
    return text[:5].lower() == "data:"


def bytes_of_uri(uri: str) -> bytes:
    """What a data URI holds; line ends in its base64 are passed over, as encoders write them.

    Raises:
        Refused: it holds no valid base64, or too much.

    Source: RFC 2397.
    """
    head, comma, data = uri.partition(",")
    if not comma:
        raise Refused("has no comma; expected data:image/png;base64,…")
    if len(data) > 2 * LARGEST_FILE:
        raise Refused(TOO_LARGE)
    try:
        plain = unquote_to_bytes(data)
        if not head.lower().endswith(";base64"):
            return plain
        return base64.b64decode(plain.translate(None, b"\r\n"), validate=True)
    except ValueError as error:
        raise Refused(f"is no valid base64: {printable(error)}") from None


def path_of(text: str) -> str:
    """The path that a text or `file://` URL means, `~` expanded.

    Raises:
        Refused: it is another URL.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    if not scheme:
        return os.path.expanduser(text)
    url = urlsplit(text)
    if scheme[1].lower() != "file" or url.netloc not in ("", "localhost"):
        raise Refused("is not on this machine; fetch it first, then give its path or its bytes")
    return url2pathname(url.path)


def read_path(path: str) -> "Metered":
    """A file's bytes.

    Raises:
        Refused: there is no file, or it cannot be opened.
    """
    try:
        if not os.path.isfile(path):
            there = "is no file" if os.path.exists(path) else "does not exist"
            what = "is a directory" if os.path.isdir(path) else there
            raise Refused(f"{what}; expected a picture file such as PNG or JPEG")
        with open(path, "rb") as file:
            return read_all(file)
    except (OSError, ValueError) as error:  # no permission; a name too long or with a NUL
        why = getattr(error, "strerror", None) or error
        raise Refused(f"cannot be opened: {printable(why)}") from None


def read_all(file: Any) -> "Metered":
    """All of an open file's bytes, from its start; of one too large, somewhat more than allowed.

    Raises:
        Refused: it is open as text.
    """
    if getattr(file, "seekable", lambda: False)():
        file.seek(0)
    copy = Metered()
    while part := file.read(1 << 24):
        if not isinstance(part, (bytes, bytearray)):
            raise Refused("is open as text; expected a file opened in binary mode, 'rb'")
        copy.write(part)
        if copy.tell() > LARGEST_FILE:
            break  # `open_file` refuses it
    return copy


class Metered(io.BytesIO):
    """A file that stops a decoder which reads more parts than a picture has.

    Millions of empty chunks, tags or comments take minutes; some are joined again and again.
    """

    parts_left = 20_000
    bytes_left = 16_000_000
    """Before the pixels; real ones have profiles and depth maps of some megabytes there."""

    def read(self, size: int | None = -1) -> bytes:
        """See `io.BytesIO`."""
        data = super().read(size)
        self.parts_left -= 1
        if size is not None and size >= 0:  # WebP and AVIF take all at once
            self.bytes_left -= len(data)
        if self.parts_left < 0 or self.bytes_left < 0:
            raise Refused("has more metadata than a picture needs; save it anew without")
        return data

    def at_pixels(self, *, in_python: bool) -> None:
        """From here on, parts go with the file's size; decoders in Python read single bytes."""
        size = self.getbuffer().nbytes
        self.parts_left += min(size, 8 * LARGEST_IN_PYTHON) if in_python else size // 256
        self.bytes_left = sys.maxsize


def in_python(image: Image.Image) -> bool:
    """Whether Pillow decodes a picture that it opened in Python."""
    return any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ()))


def open_file(file: Metered) -> Image.Image:
    """A picture with its size known and its pixels not unpacked.

    Raises:
        Refused: empty, too large, or made to take long.
        Exception: Pillow's own, of many kinds.
    """
    size = file.getbuffer().nbytes
    if not size:
        raise Refused("is empty (0 bytes)")
    if size > LARGEST_FILE:
        raise Refused(TOO_LARGE)
    Image.init()  # an older Pillow lacks AVIF, and MPO comes with JPEG
    image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    if image.format in ("JPEG", "MPO"):
        data, start = file.getvalue(), file.tell()  # behind the first scan's marker
        scans = 1 + data.count(b"\xff\xda", start, data.find(b"\xff\xd9", start) % (size + 1))
        if scans > 20 and scans * math.prod(image.size) > LARGEST_IN_SCANS:
            raise Refused(f"is a JPEG of {scans} scans, too many for its size; save it anew")
    file.at_pixels(in_python=in_python(image))
    return image
