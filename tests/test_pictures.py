"""Pictures by every way in, of every kind, and what is refused."""

import base64
import io
import os
import random
import struct
import subprocess
import sys
import threading
import urllib.parse
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image, features

from llama_vision.errors import LONGEST_MESSAGE, printable
from llama_vision.inputs import picture_files, pictures
from llama_vision.inputs.picture_files import FORMATS, LARGEST_IN_PYTHON
from llama_vision.inputs.pictures import LARGEST_SIDE, ImageError, open_image
from llama_vision.inputs.rgb import BAND, to_rgb

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PICTURE = (GOLDEN / "images" / "rgb_57x113.png").read_bytes()
DRAW = random.Random(0)
NOISE = Image.frombytes("RGB", (40, 24), DRAW.randbytes(40 * 24 * 3))


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def opened(path: Path) -> Image.Image:
    return Image.open(path)


WAYS = {
    "path": lambda path: path,
    "text": str,
    "file URL": Path.as_uri,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "memoryview": lambda path: memoryview(path.read_bytes()),
    "open file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
    "file in memory": lambda path: io.BytesIO(path.read_bytes()),
    "data URI": lambda path: data_uri(path.read_bytes()),
    "percent-encoded": lambda path: "data:," + urllib.parse.quote(path.read_bytes()),
    "PIL": opened,
    "PIL, loaded": lambda path: opened(path).copy(),
}
"""What stands for a file's picture; numbers of an array have lost how to turn them."""

ODD = {
    "turned.jpg": stored(NOISE, "JPEG", exif=turned(6)),
    "turned.png": stored(NOISE, exif=turned(3)),
    "turned.webp": stored(NOISE, "WEBP", lossless=True, exif=turned(5)),
    "turned.tif": stored(NOISE, "TIFF", tiffinfo={274: 8}),
    "turned-lzw.tif": stored(NOISE, "TIFF", tiffinfo={274: 7}, compression="tiff_lzw"),
    "rgba.png": stored(Image.frombytes("RGBA", (20, 48), NOISE.resize((40, 32)).tobytes())),
    "palette.gif": stored(NOISE.quantize(16), "GIF", transparency=3),
    "grey16.png": stored(Image.frombytes("I;16", (60, 24), NOISE.tobytes())),
    "float.tif": stored(NOISE.convert("F"), "TIFF"),
    "cmyk.jpg": stored(NOISE.convert("CMYK"), "JPEG"),
    "bits.bmp": stored(NOISE.convert("1"), "BMP"),
    "grey.ppm": stored(NOISE.convert("L"), "PPM"),
    "photo.mpo": stored(NOISE, "MPO", save_all=True, append_images=[NOISE.rotate(180)]),
    "pages.tif": stored(NOISE, "TIFF", save_all=True, append_images=[NOISE.rotate(180)]),
    "photo.jp2": stored(NOISE, "JPEG2000"),
}
if features.check("avif"):
    ODD["photo.avif"] = stored(NOISE, "AVIF")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, data in ODD.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", ODD)
def test_every_way_in_gives_the_same_picture(name, folder):
    want = open_image(folder / name)
    assert want.mode == "RGB"
    for way, source in WAYS.items():
        got = open_image(source(folder / name))
        assert (got.mode, got.size) == ("RGB", want.size), way
        assert got.tobytes() == want.tobytes(), way
        assert "exif" not in got.info, way  # or it would be turned again


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_a_picture_stands_upright(orientation, kind, tmp_path):
    """The corner that is red as shown: where each orientation stores it, by EXIF's definition."""
    stored_at = [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0), (0, 1), (1, 1), (1, 0)][orientation - 1]
    image = Image.new("RGB", (32, 16), BLACK)
    left, top = 16 * stored_at[0], 8 * stored_at[1]
    image.paste((255, 0, 0), (left, top, left + 16, top + 8))
    path = tmp_path / "image"
    image.save(path, kind, exif=turned(orientation))
    for source in (path, Image.open(path), Image.open(path).convert("RGB")):
        shown = open_image(source)
        assert shown.size == ((32, 16) if orientation < 5 else (16, 32))
        assert shown.getpixel((2, 2))[0] > 200
        assert shown.getpixel((shown.width - 2, shown.height - 2))[0] < 50
        assert open_image(shown) is shown


def test_damaged_exif_leaves_the_picture_as_it_is_stored():
    for exif in (b"Exif\0\0II*\0\xff\xff", b"Exif\0\0nonsense", turned(9).tobytes(), b"Exif\0\0"):
        assert open_image(stored(NOISE, exif=exif)).tobytes() == NOISE.tobytes()


def test_rgb_of_the_caller_s_own_is_left_alone():
    assert open_image(NOISE) is NOISE
    assert to_rgb(NOISE) is NOISE
    file = Image.open(io.BytesIO(stored(NOISE)))
    assert type(open_image(file)) is Image.Image  # none that its owner can close
    file.close()


GREY = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10
COLOURS = np.frombuffer(NOISE.tobytes(), np.uint8).reshape(24, 40, 3)


@pytest.mark.parametrize(
    ("array", "want"),
    [
        (COLOURS, NOISE),
        (COLOURS / 255, NOISE),
        ((COLOURS / 255).astype(np.float32), NOISE),
        (COLOURS[::-1, ::2], NOISE.transpose(Image.Transpose.FLIP_TOP_BOTTOM).crop((0, 0, 40, 24))),
        (np.dstack([COLOURS, np.full((24, 40), 255, np.uint8)]), NOISE),
        (np.asfortranarray(COLOURS), NOISE),
        (GREY, Image.fromarray(GREY)),
        (GREY[..., None], Image.fromarray(GREY)),
        (GREY / 255, Image.fromarray(GREY)),
        (GREY.astype(np.uint16) * 257, Image.fromarray(GREY)),
        (GREY > 90, Image.fromarray((GREY > 90).astype(np.uint8) * 255)),
        ((GREY > 90)[..., None], Image.fromarray((GREY > 90).astype(np.uint8) * 255)),
    ],
    ids=lambda value: f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_an_array_is_a_picture(array, want):
    if array.shape == (24, 20, 3):
        want = Image.fromarray(np.ascontiguousarray(array))
    assert open_image(array).tobytes() == want.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(5, np.uint8),
        np.array(5, np.uint8),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 0), np.uint8),
        np.zeros((8, 8, 3), np.int64),
        np.zeros((8, 8, 3), np.int8),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((8, 8), complex),
        np.full((8, 8), None),
        np.full((8, 8), "a"),
        np.full((8, 8), 1.5),
        np.full((8, 8), -0.1),
        np.full((8, 8), np.nan),
        np.array([[0.5, np.nan]]),
        np.array([[0.5, np.inf]]),
        np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (50_000, 50_000, 3)),
        np.broadcast_to(np.zeros((1, 1, 3)), (5000, 5000, 3)),
        np.broadcast_to(np.zeros(1, np.uint8), (LARGEST_SIDE + 1, 1)),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_an_array_that_is_no_picture_is_refused(array):
    with pytest.raises(ImageError, match=r"given as a ndarray .*(expected|no pixels)"):
        open_image(array)


@pytest.mark.parametrize(
    "source",
    [None, 7, 1.5, True, object(), [], [1], {}, {"type": "image"}, Image, torch.zeros(3, 8, 8)],
    ids=lambda source: type(source).__name__,
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(ImageError, match="is no picture; expected a path, bytes"):
        open_image(source)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: os.mkfifo(path), "is no file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("no picture"), "not a picture"),
        (lambda path: path.write_bytes(PICTURE[:1000]), "damaged or cut short"),
        (lambda path: Image.new("L", (100, 100)).save(path), "too large"),
    ],
)
def test_what_cannot_be_opened_is_named(write, says, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # the next to last has 6441
    path = tmp_path / "image.png"
    write(path)
    with pytest.raises(ImageError, match=says) as error:
        open_image(path)
    assert printable(path) in str(error.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("http://a.b/c.png", "fetch it first"),
        ("HTTPS://a.b/c.png?x=1", "fetch it first"),
        ("s3://bucket/c.png", "fetch it first"),
        ("file://elsewhere/c.png", "fetch it first"),
        ("file:///none.png", "does not exist"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,????", "no valid base64"),
        ("data:image/png;base64,abc", "no valid base64"),
        ("data:image/png;base64,\udcff", "no valid base64"),
        ("data:text/plain,hello", "not a picture"),
        ("", "does not exist"),
        ("a\0b.png", "cannot be opened|does not exist"),
        ("x" * 5000, "cannot be opened|does not exist"),
        ("\x1b[31m\udcff\n.png", r"\\x1b\[31m\\udcff\\n.png"),
        ("/dev/zero", "is no file"),
        (b"", "is empty"),
        (io.StringIO("text"), "opened in binary mode"),
        (memoryview(b"ab")[::2], "not a picture"),
    ],
    ids=lambda value: ascii(value).partition(" at 0x")[0][:30],
)
def test_odd_sources_are_refused_on_one_short_line(source, says):
    with pytest.raises(ImageError, match=says) as error:
        open_image(source)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= LONGEST_MESSAGE


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my picture.png").write_bytes(stored(NOISE))
    for source in ("~/my picture.png", Path("~/my picture.png")):
        assert open_image(source).tobytes() == NOISE.tobytes()


def closed() -> Image.Image:
    image = Image.open(io.BytesIO(stored(NOISE)))
    image.close()
    return image


def closed_file() -> io.BytesIO:
    file = io.BytesIO(stored(NOISE))
    file.close()
    return file


def of_closed_file(path: Path) -> Image.Image:
    with path.open("rb") as file:
        return Image.open(file)


@pytest.mark.parametrize(
    "source",
    [
        lambda path: closed(),
        lambda path: closed_file(),
        of_closed_file,
        lambda path: Image.new("RGB", (0, 5)),
        lambda path: Image.new("L", (5, 0)),
        lambda path: Image.new("F", (2, 2), float("inf")),
        lambda path: Image.new("F", (2, 2), float("nan")),
        lambda path: Image.open(io.BytesIO(PICTURE[:900])),
    ],
    ids=["closed", "closed file", "its file closed", "0 x 5", "5 x 0", "inf", "nan", "cut short"],
)
def test_pictures_that_are_closed_empty_or_broken_are_refused(source, folder):
    with pytest.raises(ImageError, match="image"):
        open_image(source(folder / "turned.png"))


# Formats


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("name", ["image.png", "image.eps", "image"])
def test_no_program_is_started(name, tmp_path, monkeypatch):
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    path = tmp_path / name
    path.write_bytes(EPS)
    for source in (path, EPS, path.open("rb"), Image.open(path)):
        with pytest.raises(ImageError, match=r"not a picture|format EPS"):
            open_image(source)
    assert not started.exists()


@pytest.mark.parametrize("kind", ["PCX", "TGA", "SGI", "ICO", "ICNS", "DDS", "MSP", "XBM"])
def test_other_formats_are_refused_by_every_way_in(kind, tmp_path):
    path = tmp_path / "image.png"
    Image.new("1" if kind in ("MSP", "XBM") else "RGB", (16, 16)).save(path, kind)
    for source in WAYS.values():
        if source is not WAYS["PIL, loaded"]:
            with pytest.raises(ImageError, match=r"expected one of PNG, JPEG"):
                open_image(source(path))


# Limits


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, kind: int = 2):
    """A PNG's head with a body of your own."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", head), *chunks, (b"IDAT", b""), (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + name + data
        out += struct.pack(">I", zlib.crc32(name + data))
    return out


def bmp(width: int, height: int) -> bytes:
    data = bytearray(stored(Image.new("RGB", (1, 1)), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def gif(width: int, height: int) -> bytes:
    data = bytearray(stored(Image.new("P", (1, 1)), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff(width: int, height: int) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, 9)]
    body = b"".join(struct.pack("<HHLL", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + body + bytes(20)


def ppm(width: int, height: int) -> bytes:
    return b"P6 %d %d 255\n" % (width, height)


def jpeg(width: int, height: int) -> bytes:
    data = bytearray(stored(Image.new("RGB", (1, 1)), "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png, bmp, gif, tiff, ppm, jpeg])
@pytest.mark.parametrize("most", [None, 10**12], ids=str)
def test_sizes_are_checked_before_unpacking(make, most, monkeypatch):
    """Whatever Pillow's own limit is set to."""
    sizes = [(9000, 9000), (60_000, 60_000)]
    sizes += [(LARGEST_SIDE + 1, 1), (1, 10**9)] if make not in (gif, jpeg) else []
    files = [make(*size) for size in sizes]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    monkeypatch.setattr(Image.core, "new", None)  # no room is made for pixels
    monkeypatch.setattr(Image.core, "fill", None)
    for (width, height), data in zip(sizes, files, strict=True):
        for source in (data, Image.open(io.BytesIO(data))):
            with pytest.raises(ImageError, match=rf"too large: {width} x {height} .*most 75000000"):
                open_image(source)


def test_a_picture_made_by_hand_has_limits_too(monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_UNPACKED", 4 * 900)
    assert open_image(Image.new("RGBA", (30, 30))).size == (30, 30)
    with pytest.raises(ImageError, match=r"31 x 30 pixels; expected at most 900 pixels"):
        open_image(Image.new("RGBA", (31, 30)))


def test_what_is_decoded_in_python_has_a_lower_limit():
    assert open_image(b"P3 2 1 255\n0 0 0 255 255 255").getpixel((1, 0)) == WHITE
    assert open_image(b"P6 1 1 77\nMMM").getpixel((0, 0)) == WHITE
    with pytest.raises(ImageError, match=f"expected at most {LARGEST_IN_PYTHON} pixels"):
        open_image(b"P3 1001 1001 255\n" + b"0 " * 30)
    lines = bytearray(stored(Image.new("P", (300, 300)), "BMP"))
    (start,) = struct.unpack("<I", lines[10:14])
    lines[30:34] = struct.pack("<I", 1)  # run lengths, each of them 1
    assert open_image(bytes(lines[:start]) + (b"\1\0" * 300 + b"\0\0") * 300).size == (300, 300)


def test_files_have_a_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(picture_files, "LARGEST_FILE", 1000)
    (tmp_path / "image.png").write_bytes(PICTURE)
    for way in WAYS:
        if not way.startswith("PIL"):
            with pytest.raises(ImageError, match="is too large; expected at most"):
                open_image(WAYS[way](tmp_path / "image.png"))


class Endless(io.RawIOBase):
    """As /dev/zero, which a path may not be."""

    def read(self, size=-1):
        return bytes(1000)


def test_an_endless_file_ends(monkeypatch):
    monkeypatch.setattr(picture_files, "LARGEST_FILE", 10_000)
    with pytest.raises(ImageError, match="is too large"):
        open_image(Endless())


def segments(kind: bytes, data: bytes, times: int) -> bytes:
    body = stored(NOISE, "JPEG")
    return body[:2] + (kind + struct.pack(">H", len(data) + 2) + data) * times + body[2:]


def comments() -> bytes:
    data = stored(NOISE.quantize(4), "GIF")
    start = 13 + 3 * (2 << (data[10] & 7))
    return data[:start] + b"!\xfe" + (b"\xff" + b"c" * 255) * 30_000 + b"\0" + data[start:]


def after_its_pixels() -> bytes:
    end = png(1, 1)[-12:]
    text = png(1, 1, (b"tEXt", b"a\0b"))[33:48]
    return stored(NOISE)[:-12] + text * 30_000 + end


def scans(times: int) -> bytes:
    data = stored(Image.new("RGB", (800, 800)), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * times + data[end:]


HEAPS = {
    "PNG, texts": lambda: png(1, 1, *[(b"tEXt", b"a\0b")] * 8000),
    "PNG, texts behind": after_its_pixels,
    "PNG, large texts": lambda: png(
        1, 1, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))] * 80
    ),
    "PNG, profile": lambda: png(1, 1, (b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "GIF, comments": comments,
    "JPEG, empty segments": lambda: segments(b"\xff\xe5", b"", 20_000),
    "JPEG, EXIF": lambda: segments(b"\xff\xe1", b"Exif\0\0" + bytes(65_000), 260),
    "JPEG, scans": lambda: scans(3000),
    "BigTIFF, tags": lambda: struct.pack("<2sHIQQ", b"II", 43, 8, 16, 10**6) + bytes(500_000),
}


@pytest.mark.parametrize("name", HEAPS)
def test_heaps_of_metadata_are_refused(name):
    with pytest.raises(ImageError, match=r"metadata|scans|damaged"):
        open_image(HEAPS[name]())


def test_usual_metadata_is_read():
    assert open_image(segments(b"\xff\xe2", bytes(65_000), 100)).size == NOISE.size
    assert open_image(scans(10)).size == (800, 800)


@pytest.mark.parametrize(
    "error", [MemoryError, RecursionError, SyntaxError, OverflowError, KeyError]
)
@pytest.mark.parametrize("step", ["load", "convert", "crop", "transpose", "getexif"])
def test_errors_of_every_step_and_kind_are_one(step, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error("no\nway" * 500)

    image = Image.open(io.BytesIO(ODD["turned.png"])).convert("LA")
    monkeypatch.setattr(Image.Image, step, fail)
    if step == "getexif":  # without it, the picture is not turned
        assert open_image(image).size == (40, 24)
    else:
        with pytest.raises(ImageError, match=r"cannot be read: '?no") as caught:
            open_image(image)
        assert caught.value.__suppress_context__


# Silence


DAMAGED = """
import io, random, sys, warnings
from PIL import Image
from llama_vision.inputs.pictures import ImageError, open_image
warnings.simplefilter("error")
draw, refused = random.Random(0), 0
noise = Image.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3))
for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "zstd", None):
    file = io.BytesIO()
    noise.save(file, "TIFF", compression=compression)
    for _ in range(60):
        data = bytearray(file.getvalue())
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        for source in (bytes(data), io.BytesIO(data)):
            try:
                open_image(source)
            except ImageError:
                refused += 1
print(refused)
print("still there", file=sys.stderr)
"""


def test_nothing_reaches_the_terminal():
    """Neither Python's warnings and logs nor what libtiff writes by itself."""
    done = subprocess.run(
        [sys.executable, "-c", DAMAGED], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(done.stdout) > 100
    assert done.stderr == "still there\n"


def test_a_process_without_stderr_reads_tiffs():
    kept = os.dup(2)
    os.close(2)
    try:
        size = open_image(ODD["turned-lzw.tif"]).size
    finally:
        os.dup2(kept, 2)
        os.close(kept)
    assert size == (24, 40)


def test_filters_and_descriptors_are_as_before_and_threads_do_not_mix():
    filters, descriptors = list(warnings.filters), os.stat(2)
    want = {name: open_image(data).tobytes() for name, data in ODD.items()}
    wrong = []

    def work():
        for name, data in ODD.items():
            if open_image(data).tobytes() != want[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert warnings.filters == filters
    assert os.stat(2) == descriptors


@pytest.mark.parametrize("name", ODD)
def test_damaged_files_are_read_or_refused(name):
    """Bytes changed or cut anywhere, the first ones most."""
    draw = random.Random(name)
    for _ in range(25):
        data = bytearray(ODD[name])
        for _ in range(draw.randint(0, 6)):
            reach = min(len(data), 300) if draw.random() < 0.5 else len(data)
            data[draw.randrange(reach)] = draw.randrange(256)
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        message = read_or_refused(bytes(data))
        assert message.isprintable()
        assert len(message) <= LONGEST_MESSAGE


def read_or_refused(data: bytes) -> str:
    try:
        return open_image(data).mode
    except ImageError as error:
        return str(error)


# Colours


@pytest.mark.parametrize(("mode", "clear"), [("P", 7), ("L", 7), ("RGB", (9, 7, 7))])
def test_a_colour_declared_transparent_becomes_white(mode, clear, tmp_path):
    image = Image.new(mode, (4, 4), clear)
    if mode == "P":
        image.putpalette([0] * 3 * 256)
    image.save(tmp_path / "image.png", transparency=clear)
    assert open_image(tmp_path / "image.png").getpixel((2, 2)) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (90, 0), WHITE),
        ("PA", (7, 0), WHITE),
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 0, 0, 0), WHITE),
        ("HSV", (0, 0, 128), (128, 128, 128)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("I", 65535, WHITE),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, expected):
    image = Image.new(mode, (3, 3), colour)
    assert to_rgb(image).getpixel((1, 1)) == open_image(image).getpixel((1, 1)) == expected


def test_bands_are_the_same_as_the_whole():
    image = Image.effect_noise((700, BAND // 500), 90).convert("RGBA")
    image.putalpha(Image.effect_noise(image.size, 90))
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    assert to_rgb(image).tobytes() == Image.alpha_composite(white, image).convert("RGB").tobytes()
    grey = image.getchannel("R")
    levels = grey.convert("I").point(lambda level: level * 257).convert("I;16")
    assert to_rgb(levels).tobytes() == grey.convert("RGB").tobytes()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        path = tmp_path / f"moving.{kind}"
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], lossless=True)
        for source in WAYS.values():
            assert open_image(source(path)).getpixel((4, 4)) == (255, 0, 0)


def test_formats_are_those_that_pillow_has():
    Image.init()
    assert set(FORMATS) - set(Image.OPEN) <= {"AVIF", "MPO"}
