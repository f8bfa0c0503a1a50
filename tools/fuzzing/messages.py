"""Odd messages, contents and prompts, at every door that takes one: all combinations."""

import base64
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy

from fuzzing.common import BOS, IMAGE, picture, tiny
from fuzzing.judge import Case, Expected, Kind
from fuzzing.odd import VALUES, of_types, unless_refused, whole
from llama_vision import Engine, Prompt


@cache
def png() -> bytes:
    """A picture as a file's bytes."""
    file = io.BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


def _uri(data: str, kind: str = "image/png;base64") -> Callable[[], str]:
    return lambda: f"data:{kind},{data}"


PICTURES: dict[str, Callable[[], Any]] = {
    "a picture": picture,
    "bytes of a picture": png,
    "an open file": lambda: io.BytesIO(png()),
    "an array of a picture": lambda: numpy.asarray(picture()),
    "a data URI": lambda: _uri(base64.b64encode(png()).decode())(),
}
"""What is right where a picture is expected."""

NO_PICTURES: dict[str, Callable[[], Any]] = {
    "http": lambda: "http://127.0.0.1:9/x.png",
    "https": lambda: "https://localhost/\x1b[31m.png" + "x" * 5000,
    "file URL": lambda: "file:///etc/passwd",
    "data URI of nothing": _uri(""),
    "data URI of a text": _uri("aGVsbG8="),
    "data URI not base64": _uri("\x1b!" * 3000),
    "data URI without comma": lambda: "data:image/png;base64",
    "data URI of another kind": _uri("hello", "text/plain"),
    "a long data URI": _uri("A" * 10**7),
    "a text file": lambda: io.StringIO("hello"),
    "a closed file": lambda: _closed(),
    "float array": lambda: numpy.full((4, 4, 3), numpy.nan),
    "empty array": lambda: numpy.zeros((0, 4, 3), numpy.uint8),
    "array of 5 axes": lambda: numpy.zeros((1, 1, 1, 4, 3), numpy.uint8),
    "array of 2 channels": lambda: numpy.zeros((4, 4, 7), numpy.uint8),
    "a wide array": lambda: numpy.broadcast_to(numpy.uint8(0), (1, 2**30, 3)),
    "a large array": lambda: numpy.broadcast_to(numpy.uint8(0), (10**5, 10**5, 3)),
}


def _closed() -> io.BytesIO:
    file = io.BytesIO(png())
    file.close()
    return file


def _user(content: Any, **more: Any) -> list:
    return [{"role": "user", "content": content, **more}]


def _part(**part: Any) -> list:
    return _user([part])


def _text(value: Any) -> Expected:
    return "either" if isinstance(value, str) else "refused"


def _content(value: Any) -> Expected:
    """Texts and pictures, alone or in lists, may be right."""
    may = (str, bytes, list, tuple, dict, type(picture()), numpy.ndarray, io.IOBase)
    return "either" if isinstance(value, may) or hasattr(value, "__fspath__") else "refused"


def _picture(value: Any) -> Expected:
    may = (str, bytes, bytearray, memoryview, numpy.ndarray, io.IOBase, type(picture()))
    # A path may be one, and an array of numbers; nothing else among the odd values is.
    return "either" if isinstance(value, may) or hasattr(value, "__fspath__") else "refused"


def _ids(value: Any) -> Expected:
    if isinstance(value, (list, tuple, range)):
        one = unless_refused(whole(0, IMAGE - 1))
        return "refused" if any(one(token) == "refused" for token in value) else "either"
    return of_types(numpy.ndarray, type(numpy))(value) if value is None else "either"


def _one_id(value: Any) -> Expected:
    return whole(0, IMAGE - 1)(value)


Shape = tuple[Callable[[Any], Any], Callable[[Any], Expected]]

MESSAGES: dict[str, Shape] = {
    "messages": (lambda v: v, lambda v: "refused"),
    "[message]": (lambda v: [v], lambda v: "refused"),
    "[message, odd]": (lambda v: [*_user("hi"), v], lambda v: "refused"),
    "role": (lambda v: [{"role": v, "content": "hi"}], lambda v: "refused"),
    "content": (_user, _content),
    "[part]": (lambda v: _user([v]), _content),
    "[text, part]": (lambda v: _user(["hi", v]), _content),
    "type": (lambda v: _part(type=v, text="hi"), lambda v: "refused"),
    "text": (lambda v: _part(type="text", text=v), _text),
    "image": (lambda v: _part(type="image", image=v), _picture),
    "path": (lambda v: _part(type="image", path=v), _picture),
    "image of a URL": (lambda v: _part(type="image", url=v), _picture),
    "image_url": (lambda v: _part(type="image_url", image_url=v), lambda v: "either"),
    "url": (lambda v: _part(type="image_url", image_url={"url": v}), _picture),
    "image, also a text": (
        lambda v: _part(type="image", image=picture(), text=v),
        lambda v: "either",
    ),
    "end": (lambda v: _user("hi", end=v), lambda v: "either"),
    "unknown key": (lambda v: [{"role": "user", "content": "hi", "x": v}], lambda v: "either"),
    "tool calls": (lambda v: _user("hi", tool_calls=v), lambda v: "either"),
}
PROMPTS: dict[str, Shape] = {
    "Prompt(ids)": (lambda v: Prompt(v), _ids),
    "Prompt([id])": (lambda v: Prompt([v]), _one_id),
    "Prompt([BOS, id])": (lambda v: Prompt([BOS, v]), _one_id),
    "Prompt(images=)": (lambda v: Prompt([IMAGE, 1], v), lambda v: "either"),
    "Prompt(no images=)": (lambda v: Prompt([1], v), lambda v: "either"),
    "Prompt(images=[image])": (lambda v: Prompt([IMAGE, 1], [v]), _picture),
    "prompt": (lambda v: v, lambda v: "refused"),
}
QUESTIONS: dict[str, Shape] = {
    "question": (lambda v: v, _content),
    "[part]": (lambda v: [v], _content),
    "[text, part]": (lambda v: ["hi", v], _content),
}
SHORT = {"max_new_tokens": 1, "temperature": 0.0, "max_seq_len": 512}
"""Long texts are refused for their length: reading them takes longer than a case may."""


def _submit(prompt: Any) -> None:
    engine = Engine(tiny(), max_seq_len=512)
    engine.run(engine.submit(prompt, **SHORT))


def _start(prompt: Any) -> None:
    engine, requests = tiny().start([prompt], **SHORT)
    engine.run(*requests)


DOORS: dict[str, tuple[dict[str, Shape], Callable[[Any], Any]]] = {
    "prompt": (MESSAGES, lambda given: tiny().tile(tiny().prompt(given))),
    "generate": ({**MESSAGES, **PROMPTS}, lambda given: tiny().generate(given, **SHORT)),
    "generate list": (PROMPTS, lambda given: tiny().generate([given], **SHORT)),
    "stream": ({**MESSAGES, **PROMPTS}, lambda given: list(tiny().stream(given, **SHORT))),
    "start": (PROMPTS, _start),
    "plan": (PROMPTS, lambda given: tiny().plan([given], **SHORT)),
    "logits": (PROMPTS, lambda given: tiny().logits(given)),
    "submit": (PROMPTS, _submit),
    "ask": (QUESTIONS, lambda given: tiny().chat(**SHORT).ask(given)),
}
EVERY = {**VALUES, **PICTURES, **NO_PICTURES}
PLACES_OF_PICTURES = (
    "content",
    "question",
    "[part]",
    "[text, part]",
    "image",
    "url",
    "Prompt(images=[image])",
)
TEXTS_TOO = ("content", "question", "[part]", "[text, part]")


@cache
def combinations() -> list[tuple[str, str, str]]:
    """Door, shape and value, in an order that does not change."""
    return [
        (door, shape, value)
        for door, (shapes, _) in DOORS.items()
        for shape in shapes
        for value in EVERY
    ]


def expected_of(shape: str, name: str, rule: Callable[[Any], Expected], value: Any) -> Expected:
    """How it must end: a few values are right or wrong wherever a picture is expected."""
    if name in PICTURES and shape == "image":
        return "taken"
    if name in NO_PICTURES and shape in PLACES_OF_PICTURES:
        is_text = isinstance(value, str) and shape in TEXTS_TOO
        return "either" if is_text or name == "float array" else "refused"
    return rule(value) if name != "Prickly()" else "refused"


def kind(seed: int, scratch: Any) -> Kind:
    """See `fuzzing.kinds`; nothing is drawn."""
    tiny()

    def case(i: int) -> Case:
        door, shape, name = combinations()[i]
        (make, rule), hand_in = DOORS[door][0][shape], DOORS[door][1]
        value = EVERY[name]()
        expected = expected_of(shape, name, rule, value)
        if (door, shape, name) == ("generate", "prompt", "[]") or name in ("()", "Prickly()"):
            expected = "either"  # no prompts at all
        return Case(f"{door}: {shape} = {name}", lambda: hand_in(make(value)), expected)

    return Kind("messages", len(combinations()), case)
