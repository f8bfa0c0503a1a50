"""Damaged JSON at the doors that read it: lines of a batch, bodies of a server, saved chats."""

import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from fuzzing.common import picture, tiny
from fuzzing.judge import Case, Kind, draw_for
from fuzzing.messages import PICTURES
from llama_vision import Settings
from llama_vision.batch.task import Task
from llama_vision.inputs.pictures import ImageError
from llama_vision.serve.bodies import Reader

CASES = 20_000
SHORT = {"max_new_tokens": 1, "temperature": 0.0, "max_seq_len": 512}

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**63, 10**30, 0.5, -1.0, 1e308, float("nan"), float("inf")),
    *("", "x", "\x1b[31m", "a\nb", "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "x" * 10**6),
    *("file:///etc/passwd", "http://127.0.0.1:9/x.png", "data:image/png;base64,AAAA", "data:,"),
    *([], [1], [None], [[]], {}, {"a": 1}, {"type": "text"}, {"role": "user"}),
)


def _no_network(url: str) -> bytes:
    raise ImageError(f"there is no network for {url[:20]!r}")


@cache
def templates() -> dict[str, dict[str, Any]]:
    """What each door takes as it stands."""
    uri = PICTURES["a data URI"]()
    part = {"type": "image_url", "image_url": {"url": uri}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part, {"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "hi"},
    ]
    asked = {"temperature": 0, "seed": 1, "stop": ["a"], "max_tokens": 3, "keep": 0.5}
    chat = tiny().chat(**SHORT)
    chat.ask([picture(), "hi"])
    return {
        "line of a prompt": {"id": 1, "prompt": "hi", "images": [uri], "system": "x", **asked},
        "line of messages": {"id": "a", "messages": messages, **asked},
        "body": {
            **{"model": "tiny", "messages": messages, "n": 2, "stream": True, **asked},
            **{"stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2},
            **{"tools": [], "response_format": {"type": "text"}, "user": "u"},
        },
        "saved chat": {
            "version": 1,
            "system": None,
            "turns": [
                {
                    "content": ["hi"],
                    "answer": {"text": "A", "token_ids": [65, 509], "finish_reason": "stop"},
                }
            ],
        },
    }


def _read_line(data: bytes, folder: Path) -> None:
    task = Task(data, index=0, line=1, folder=folder)
    prompt, settings = task.prompt(tiny(), None), task.settings(Settings())
    tiny().generate(prompt, **SHORT | {"pruner": settings.pruner})


def _read_body(data: bytes, folder: Path) -> None:
    how = {"max_images": 2, "fetch": _no_network}
    Reader(tiny(), "tiny", Settings(), 512, how).read(data)


def _read_chat(data: bytes, folder: Path) -> None:
    path = folder / "talk.json"
    path.write_bytes(data)
    chat = tiny().chat(**SHORT)
    chat.load(path)
    chat.ask("hi")


DOORS: dict[str, Callable[[bytes, Path], None]] = {
    "line of a prompt": _read_line,
    "line of messages": _read_line,
    "body": _read_body,
    "saved chat": _read_chat,
}


def damaged(value: Any, draw: random.Random) -> Any:
    """The same with one thing in it, at any depth, left out, put in twice, or something odd."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.2:
        return draw.choice(ODD)
    items = dict(enumerate(value)) if isinstance(value, list) else dict(value)
    key = draw.choice(list(items))
    what = draw.randrange(8)
    if what == 0:
        del items[key]
    elif what == 1:
        items[len(items) if isinstance(value, list) else draw.choice(["x", "id"])] = items[key]
    else:
        items[key] = damaged(items[key], draw)
    return list(items.values()) if isinstance(value, list) else items


def cut_up(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut short, repeated, or with others among them."""
    place = draw.randrange(len(data) + 1)
    what = draw.randrange(4)
    if what == 0:
        return data[:place]
    if what == 1:
        return data[:place] + data
    if what == 2:
        return data[:place] + draw.randbytes(draw.randint(1, 4)) + data[place:]
    return data[:place] + draw.choice([b"[", b'{"a":']) * 10**5 + data[place:]


def kind(seed: int, scratch: Path) -> Kind:
    """See `fuzzing.kinds`."""
    doors = list(templates())

    def case(i: int) -> Case:
        draw = draw_for("json", seed, i)
        door = doors[i % len(doors)]
        value = templates()[door]
        for _ in range(draw.randint(0, 3)):
            value = damaged(value, draw)
        data = json.dumps(value).encode()
        if draw.random() < 0.2:
            data = cut_up(data, draw)
        return Case(f"{door} {data[:120]!r}", partial(DOORS[door], data, scratch))

    return Kind("json", CASES, case)
