import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llama_vision.errors import LONGEST_MESSAGE
from llama_vision.inputs.chat import chat_prompt, completion_prompt
from llama_vision.inputs.image import ImageError, TiledImage
from llama_vision.inputs.messages import (
    DEEPEST,
    MOST_PARTS,
    PromptError,
    check_messages,
    parts_of,
    role_and_content,
)

RED = Image.new("RGB", (4, 4), "red")


def png(image: Image.Image = RED) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


BASE64 = base64.b64encode(png()).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    path.write_bytes(png())
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: RED,
        lambda path: path,
        lambda path: png(),
        lambda path: bytearray(png()),
        lambda path: memoryview(png()),
        lambda path: io.BytesIO(png()),
        lambda path: np.asarray(RED),
        lambda path: Image.open(path),
        lambda path: {"type": "image", "image": RED},
        lambda path: {"type": "image", "image": str(path)},
        lambda path: {"type": "image", "image": path},
        lambda path: {"type": "image", "image": png()},
        lambda path: {"type": "image", "image": np.asarray(RED)},
        lambda path: {"type": "image", "image": URI},
        lambda path: {"type": "image", "path": str(path)},
        lambda path: {"type": "image", "url": URI},
        lambda path: {"type": "image", "url": path.as_uri()},
        lambda path: {"type": "image", "base64": BASE64},
        lambda path: {"type": "image", "base64": URI},
        lambda path: {"type": "image", "image": None, "path": path},
        lambda path: {"type": "image_url", "image_url": {"url": URI, "detail": "low"}},
        lambda path: {"type": "image_url", "image_url": URI},
        lambda path: {"type": "input_image", "image_url": URI},
    ],
)
def test_a_picture_in_every_form(write, path):
    for content in (write(path), [write(path)], [[write(path)], []], (write(path),)):
        assert list(parts_of(content)) == [RED]


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_a_text_in_every_form(kind):
    part = {"type": kind, "text": "hi\0\x1b"}
    for content in ("hi\0\x1b", part, ["hi\0\x1b"], [part], ([[part]],)):
        assert list(parts_of(content)) == ["hi\0\x1b"]


def test_a_text_is_never_a_path(path):
    assert list(parts_of([str(path)])) == [str(path)]


def test_tiles_stay(path):
    tiles = TiledImage(None, (1, 1), 1)
    assert list(parts_of([tiles, {"type": "image", "image": tiles}])) == [tiles, tiles]


WRONG_CONTENTS = [
    None,
    7,
    1.5,
    True,
    object(),
    {1, 2},
    iter(["hi"]),
    [None],
    ["hi", [7]],
    {},
    {"type": None},
    {"type": []},
    {"type": "video", "video": 1},
    {"type": "text"},
    {"type": "text", "text": b"hi"},
    {"type": "text", "text": ["hi"]},
    {"type": "image"},
    {"type": "image", "image": None},
    {"type": "image", "image": 7},
    {"type": "image", "image": {"url": URI}},
    {"type": "image", "image": RED, "path": "a.png"},
    {"type": "image", "base64": png()},
    {"type": "image_url"},
    {"type": "image_url", "image_url": {}},
    {"type": "image_url", "image_url": {"url": None}},
    {"type": "image_url", "image_url": [URI]},
    {"type": "input_image", "file_id": "file-1"},
    {"type": "image", "image": "\x1b[31m" * 5000, "path": 5},
]


@pytest.mark.parametrize(
    "content", WRONG_CONTENTS, ids=lambda it: str(it).partition(" at 0x")[0][:40]
)
def test_another_content_is_refused_on_one_short_line(content):
    with pytest.raises(PromptError, match=r"content.*; expected") as error:
        list(parts_of(content))
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}, "fetch it first"),
        ({"type": "image", "url": "http://a.b/c.png"}, "fetch it first"),
        ({"type": "image", "image": "none.png"}, "none.png does not exist"),
        ({"type": "image", "base64": "not base64!"}, "no valid base64"),
        ({"type": "image_url", "image_url": {"url": URI[:-40]}}, "data URI"),
        (b"no picture", "of 10 bytes is not a picture"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_picture_that_cannot_be_read_is_named_and_not_written_out(part, says):
    with pytest.raises(ImageError, match=says) as error:
        list(parts_of(part))
    assert BASE64[:40] not in str(error.value)


@pytest.mark.parametrize("text", ["a\udcffb", "\ud83d", "\ude00\ud83d"], ids=ascii)
@pytest.mark.parametrize("wrap", [str, lambda t: [t], lambda t: {"type": "text", "text": t}])
def test_half_characters_are_refused_with_their_place(text, wrap, llama_3):
    place = min(text.find(c) for c in text if not c.isascii())
    with pytest.raises(PromptError, match=rf"'\\ud.*' at character {place}"):
        completion_prompt(wrap(text), llama_3)


def nested(depth):
    return "hi" if not depth else [nested(depth - 1)]


def test_nesting_and_numbers_have_limits():
    assert list(parts_of(nested(DEEPEST - 1))) == ["hi"]
    itself = []
    itself += [itself, itself]
    wide = []
    for _ in range(DEEPEST - 2):
        wide = [wide] * 1000
    for content in (itself, nested(DEEPEST + 5)):
        with pytest.raises(PromptError, match=f"more than {DEEPEST} lists deep"):
            list(parts_of(content))
    for content in (["a"] * (MOST_PARTS + 1), wide):
        with pytest.raises(PromptError, match=f"more than {MOST_PARTS} parts"):
            list(parts_of(content))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "conversation is empty"),
        ((), "conversation is empty"),
        (None, "messages is None"),
        ("hi", "messages is 'hi'"),
        (b"hi", "messages is b'hi'"),
        ({"role": "user", "content": "hi"}, "messages is {"),
        (iter([]), "messages is .*iterator"),
        ({1}, "messages is"),
        (7, "messages is 7"),
        (["hi"], "'hi' is no message"),
        ([None], "None is no message"),
        ([["user", "hi"]], "is no message"),
        ([{"role": "user"}], "is no message"),
        ([{"content": "hi"}], "is no message"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is unknown"),
        ([{"role": ["user"], "content": "x"}], "role .* is unknown"),
        ([{"role": None, "content": "x"}], "role None is unknown"),
        ([{"role": np.array(["user", "a"]), "content": "x"}], "role .* is unknown"),
        ([{"role": "\x1b" * 5000, "content": "x"}], r"role '\\x1b"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "content of type NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_conversation_is_refused(messages, says, llama_3):
    with pytest.raises(PromptError, match=says) as error:
        chat_prompt(messages, llama_3)
    assert len(str(error.value)) <= LONGEST_MESSAGE


def test_a_tuple_is_a_conversation():
    message = {"role": "developer", "content": "hi"}
    assert check_messages((message,)) == (message,)
    assert role_and_content(message) == ("system", "hi")
