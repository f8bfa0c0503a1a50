"""Picture files made by hand: small, and larger than they look, or odd in another way."""

import io
import struct
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, data: bytes) -> bytes:
    """One chunk of a PNG, its sum right."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose chunks have been edited, with sums that hide it."""
    if not data.startswith(PNG):
        return data
    done, at = bytearray(PNG), len(PNG)
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if at + 12 + size > len(data):
            break
        done += chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + size])
        at += 12 + size
    return bytes(done + data[at:])


def png(
    width: int, height: int, bits: int = 8, colour: int = 0, *chunks: bytes, data: bytes = b""
) -> bytes:
    """A PNG with a header of one's own."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", data or zlib.compress(bytes(1000)))
    return PNG + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


@cache
def _zeros(size: int) -> bytes:
    """So many zero bytes, compressed."""
    packer = zlib.compressobj(9)
    part = bytes(2**20)
    packed = b"".join(packer.compress(part) for _ in range(size // len(part)))
    return packed + packer.compress(bytes(size % len(part))) + packer.flush()


def png_of_zeros(width: int, height: int, bits: int, colour: int) -> bytes:
    """All of a large picture, in few bytes."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    palette = (chunk(b"PLTE", bytes(6)),) if colour == 3 else ()
    size = height * (1 + -(-width * bits * channels // 8))
    return png(width, height, bits, colour, *palette, data=_zeros(size))


def tiff(tags: dict[int, tuple[int, int, int]], *, order: str = "<", more: bytes = b"") -> bytes:
    """A TIFF of one directory: {tag: (type, count, value)}."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, *entry) for tag, entry in sorted(tags.items())
    )
    return head + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 8) + more


def _grey_tiff(width: int, height: int, **more: Any) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 9}
    tags.update({int(name[1:]): value for name, value in more.items()})
    return tiff({tag: (4, 1, value) for tag, value in tags.items()}, more=bytes(100))


def ico(*pictures: bytes, side: int = 0) -> bytes:
    """An icon with any files in it."""
    head, at = struct.pack("<HHH", 0, 1, len(pictures)), 6 + 16 * len(pictures)
    for data in pictures:
        head += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(data), at)
        at += len(data)
    return head + b"".join(pictures)


def saved(name: str, mode: str = "RGB", size: tuple[int, int] = (24, 17), **how: Any) -> bytes:
    """A whole file by Pillow."""
    file = io.BytesIO()
    Image.new(mode, size, 77).save(file, name, **how)
    return file.getvalue()


def _animated(name: str, frames: int = 50) -> bytes:
    return saved(
        name, save_all=True, append_images=[Image.new("RGB", (24, 17), n) for n in range(frames)]
    )


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved("JPEG", exif=exif)


def _with_size(data: bytes, at: int, form: str, *sizes: int) -> bytes:
    """A file with another size written into its header."""
    return data[:at] + struct.pack(form, *sizes) + data[at + struct.calcsize(form) :]


def _jpeg_sized(width: int, height: int) -> bytes:
    data = saved("JPEG")
    return _with_size(data, data.index(b"\xff\xc0") + 5, ">HH", height, width)


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n"
    b"(x) print showpage\n%%EOF\n"
)
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
WMF = (
    b"\xd7\xcd\xc6\x9a\0\0"
    + struct.pack("<4hH", 0, 0, 3000, 3000, 96)
    + bytes(6)
    + b"\1\0\t\0"
    + bytes(80)
)

BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of no width": lambda: png(0, 10),
    "PNG of 65535 x 65535": lambda: png(65535, 65535),
    "PNG of the largest sides": lambda: png(2**31 - 1, 2**31 - 1),
    "PNG of one row, very wide": lambda: png(2**31 - 1, 1),
    "PNG of one column, very high": lambda: png(1, 150_000_000),
    "PNG wide by hidden zeros": lambda: png_of_zeros(10**6, 1, 8, 0),
    "PNG high by hidden zeros": lambda: png_of_zeros(1, 10**6, 8, 0),
    "PNG of 20000 x 20000 bits": lambda: png_of_zeros(20_000, 20_000, 1, 0),
    "PNG of 13000 x 13000 bits": lambda: png_of_zeros(13_000, 13_000, 1, 0),
    "PNG of 13000 x 13000 of a palette": lambda: png_of_zeros(13_000, 13_000, 1, 3),
    "PNG of 9000 x 9000 16-bit": lambda: png_of_zeros(9_000, 9_000, 16, 0),
    "PNG of 9400 x 9400 RGBA": lambda: png_of_zeros(9_400, 9_400, 8, 6),
    "PNG of 6000 x 6000 16-bit RGBA": lambda: png_of_zeros(6_000, 6_000, 16, 6),
    "PNG with a text of 200 MB": lambda: png(
        4, 4, 8, 0, chunk(b"zTXt", b"x\0\0" + _zeros(200 * 10**6))
    ),
    "PNG with an iTXt of 200 MB": lambda: png(
        4, 4, 8, 0, chunk(b"iTXt", b"x\0\1\0\0\0" + _zeros(200 * 10**6))
    ),
    "PNG with a profile of 200 MB": lambda: png(
        4, 4, 8, 0, chunk(b"iCCP", b"x\0\0" + _zeros(200 * 10**6))
    ),
    "PNG with 100 texts": lambda: png(
        4, 4, 8, 0, *(chunk(b"zTXt", b"%d\0\0" % n + _zeros(10**6)) for n in range(100))
    ),
    "PNG with 100,000 chunks": lambda: png(4, 4, 8, 0, chunk(b"tEXt", b"a\0b") * 100_000),
    "PNG with control characters": lambda: png(4, 4, 8, 0, chunk(b"\x1b[3m", b"\x1b[31m")),
    "PNG of 3 bits": lambda: png(4, 4, 3, 7),
    "PNG without pixels": lambda: (
        PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))
    ),
    "PNG of many frames": lambda: png(4, 4, 8, 0, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    "GIF of 65535 x 65535": lambda: _with_size(saved("GIF", "L"), 6, "<HH", 65535, 65535),
    "GIF of 13000 x 13000": lambda: _with_size(saved("GIF", "L"), 6, "<HH", 13000, 13000),
    "GIF of 50 frames": lambda: _animated("GIF"),
    "GIF of no size": lambda: _with_size(saved("GIF", "L"), 6, "<HH", 0, 0),
    "JPEG of 65500 x 65500": lambda: _jpeg_sized(65500, 65500),
    "JPEG of 13000 x 13000": lambda: _jpeg_sized(13000, 13000),
    "JPEG of 65500 x 1": lambda: _jpeg_sized(65500, 1),
    "JPEG of no height": lambda: _jpeg_sized(10, 0),
    **{f"JPEG turned by {n}": (lambda n=n: _exif(n)) for n in (0, 5, 6, 8, 9, 65535)},
    "JPEG with a comment": lambda: saved("JPEG", comment=b"\x1b[31m" * 5000),
    "BMP of 2**31 - 1": lambda: _with_size(saved("BMP"), 18, "<ii", 2**31 - 1, 2**31 - 1),
    "BMP upside down": lambda: _with_size(saved("BMP"), 22, "<i", -17),
    "BMP of a negative width": lambda: _with_size(saved("BMP"), 18, "<i", -24),
    "BMP of the least height": lambda: _with_size(saved("BMP"), 22, "<i", -(2**31)),
    "BMP of 13000 x 13000 runs": lambda: _with_size(
        saved("BMP", "L"), 18, "<iiHHI", 13000, 13000, 1, 8, 1
    ),
    "BMP of 999 bits": lambda: _with_size(saved("BMP"), 28, "<H", 999),
    "TIFF of 2**32 - 1": lambda: _grey_tiff(2**32 - 1, 2**32 - 1),
    "TIFF of 13000 x 13000": lambda: _grey_tiff(13000, 13000),
    "TIFF in tiles": lambda: _grey_tiff(64, 64, t322=2**31, t323=2**31, t324=8, t325=9),
    "TIFF in tiles of nothing": lambda: _grey_tiff(64, 64, t322=0, t323=0, t324=8, t325=9),
    "TIFF of 65535 samples": lambda: _grey_tiff(8, 8, t277=65535),
    "TIFF of no samples": lambda: _grey_tiff(8, 8, t277=0),
    **{
        f"TIFF of compression {n}": (lambda n=n: _grey_tiff(64, 64, t259=n))
        for n in (0, 2, 3, 4, 5, 6, 7, 8, 32773, 32809, 34661, 34712, 34925, 50000, 50001, 65535)
    },
    "TIFF with a tag of 4 GB": lambda: tiff({256: (4, 2**31, 8), 257: (2, 2**32 - 1, 0)}),
    "TIFF with odd types": lambda: tiff(
        {256: (2, 4, 8), 257: (12, 1, 8), 258: (99, 1, 1), 259: (5, 1, 0)}
    ),
    "TIFF that goes in circles": lambda: tiff({34665: (4, 1, 8), 330: (4, 1, 8)}),
    "TIFF big-endian of nothing": lambda: tiff({}, order=">"),
    "ICO within ICO": lambda: ico(ico(ico(saved("PNG")))),
    "ICO with a large PNG": lambda: ico(png_of_zeros(13_000, 13_000, 1, 0)),
    "ICO with a bomb": lambda: ico(png(65535, 65535)),
    "ICO with an EPS": lambda: ico(EPS),
    "ICO of 5,000": lambda: ico(*[saved("PNG")] * 5000, side=16),
    "ICNS with a bomb": lambda: (
        b"icns" + struct.pack(">I", 200) + b"ic10" + struct.pack(">I", 190) + png(9**5, 9**5)
    ),
    "WEBP of 50 frames": lambda: _animated("WEBP"),
    "WEBP of 50 frames, cut": lambda: _animated("WEBP")[:-40],
    "WEBP of 16383 x 6000": lambda: saved("WEBP", size=(16383, 6000), quality=1, method=0),
    "TGA of 65535 x 65535": lambda: _with_size(saved("TGA"), 12, "<HH", 65535, 65535),
    "TGA of 13000 x 13000 runs": lambda: _with_size(
        saved("TGA", compression="tga_rle"), 12, "<HH", 13000, 13000
    ),
    "PCX of 65535 x 65535": lambda: _with_size(saved("PCX", "L"), 8, "<HH", 65535, 65535),
    "SGI of 65535 x 65535": lambda: _with_size(saved("SGI"), 6, ">HH", 65535, 65535),
    "DDS of 2**31": lambda: _with_size(saved("DDS"), 12, "<II", 2**31, 2**31),
    "JPEG 2000 of 2**31": lambda: saved("JPEG2000").replace(
        struct.pack(">I", 24), struct.pack(">I", 2**31 - 1)
    ),
    "QOI of 2**31": lambda: _with_size(saved("QOI"), 4, ">II", 2**31, 2**31),
    "QOI of 13000 x 13000": lambda: _with_size(saved("QOI"), 4, ">II", 13000, 13000),
    "PSD of 300000 x 300000": lambda: (
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3) + bytes(14)
    ),
    "PPM of 10**9": lambda: b"P6 1000000000 1000000000 255\n" + bytes(100),
    "PPM of 10**400": lambda: b"P6 1" + b"0" * 400 + b" 1 255\n",
    "PPM of 13000 x 13000": lambda: b"P4 13000 13000\n" + bytes(100),
    "PPM in words": lambda: b"P3 4 4 255 " + b"\x1b[31m " * 100,
    "PPM of a long comment": lambda: b"P6 #" + b"x" * 10**7 + b"\n4 4 255\n" + bytes(48),
    "PFM of NaN": lambda: b"Pf\n4 4\n-1.0\n" + struct.pack("<f", float("nan")) * 16,
    "PFM of infinities": lambda: (
        b"Pf\n4 4\n-1.0\n" + struct.pack("<2f", float("inf"), float("-inf")) * 8
    ),
    "PFM of the largest": lambda: b"Pf\n4 4\n-1.0\n" + struct.pack("<2f", 3e38, -3e38) * 8,
    "PFM of no scale": lambda: b"Pf\n4 4\nnan\n" + bytes(64),
    "XBM of 10**9": lambda: (
        b"#define x_width 1000000000\n#define x_height 9\nstatic char b[] = {0x00};\n"
    ),
    "XPM of 10**9": lambda: (
        b'/* XPM */\nstatic char*x[]={"1000000000 1000000000 1 1","a c #000",\n"a"};'
    ),
    "XPM of many colours": lambda: b'/* XPM */\nstatic char*x[]={"2 2 99999999 9",\n"a c #000",\n',
    "FITS of 10**9": lambda: b"".join(
        line.ljust(80)
        for line in (
            b"SIMPLE  =  T",
            b"BITPIX  =  8",
            b"NAXIS   =  2",
            b"NAXIS1  = 1000000000",
            b"NAXIS2  = 1000000000",
            b"END",
        )
    ).ljust(2880),
    "FLI of 65535 x 65535": lambda: (
        struct.pack("<IHHHHHH", 128, 0xAF11, 1, 65535, 65535, 8, 3) + bytes(114)
    ),
    "IM of 10**9": lambda: (
        b"Image type: L image\r\nImage size (x*y): 1000000000*1000000000\r\n\x1a" + bytes(100)
    ),
    "EPS": lambda: EPS,
    "EPS of a large box": lambda: EPS.replace(b"0 0 100 100", b"0 0 99999 99999"),
    "EPS behind a DOS header": lambda: (
        struct.pack("<IIIIIII", 0xC6D3D0C5, 30, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS
    ),
    "PDF": lambda: PDF,
    "SVG": lambda: SVG,
    "WMF": lambda: WMF,
    "HTML": lambda: b"<html>\x1b[31m</html>",
    "a zip": lambda: b"PK\3\4" + bytes(100),
    "an ELF program": lambda: b"\x7fELF" + bytes(100),
    "a script": lambda: b"#!/bin/sh\necho pwned\n",
    "nothing": lambda: b"",
    "a zero byte": lambda: b"\0",
    "10 MB of zeros": lambda: bytes(10**7),
}
