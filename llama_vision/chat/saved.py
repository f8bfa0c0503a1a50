"""A conversation on disk: one JSON file, and its pictures in a folder beside it.

talk.json               {"version": 1, "system": …, "turns": [{"content": […], "answer": {…}}]}
talk.pictures/….png     named by what they show
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from llama_vision.chat.turn import Part, Turn
from llama_vision.errors import LlamaVisionError, printable, quote
from llama_vision.inputs.image import TiledImage, content_of
from llama_vision.inputs.messages import check_text
from llama_vision.inputs.pictures import open_image
from llama_vision.reading import read_json, shown

VERSION = 1
FINISH_REASONS = ("stop", "length", "interrupted")


class ChatFileError(LlamaVisionError):
    """A conversation that cannot be written or read."""


class SavedTurn(NamedTuple):
    """A question and its answer as a file has them."""

    content: tuple[Part, ...]
    text: str
    token_ids: list[int]
    finish_reason: str


def write_chat(path: str | Path, system: str | None, turns: Sequence[Turn]) -> None:
    """Write a conversation, or leave what was there as it was.

    Raises:
        ChatFileError: it cannot be written.
    """
    path = _path_of(path)
    data = {"version": VERSION, "system": system, "turns": []}
    try:
        for turn in turns:
            content = [_written(part, path) for part in turn.content]
            answer = {
                "text": turn.completion.text,
                "token_ids": turn.answer_ids,
                "finish_reason": turn.completion.finish_reason,
            }
            data["turns"].append({"content": content, "answer": answer})
        text = json.dumps(data, ensure_ascii=False, indent=1)
        with _replacing(path) as file:
            file.write(text.encode())
    except (OSError, ValueError) as error:
        if isinstance(error, LlamaVisionError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ChatFileError(
            f"the conversation cannot be written to {shown(path)}: {reason}; give another place"
        ) from None


def read_chat(path: str | Path) -> tuple[str | None, list[SavedTurn]]:
    """The system message of a saved conversation, and its turns.

    Raises:
        ChatFileError: it is no saved conversation.
        ImageError: a picture is not there, or cannot be read.
    """
    path = _path_of(path)
    data = read_json(path, ChatFileError)
    if data.get("version") != VERSION:
        raise ChatFileError(
            f"{shown(path)} has version {quote(data.get('version'))}; expected {VERSION}, a "
            "conversation that was saved here"
        )
    try:
        system = None if data["system"] is None else check_text(data["system"])
        return system, [_read_turn(turn, path) for turn in data["turns"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ChatFileError(
            f"{shown(path)} is no saved conversation, or damaged: {printable(error)} is missing or "
            "of another kind"
        ) from None


def _path_of(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except (TypeError, RuntimeError):
        raise ChatFileError(f"{quote(path)} is no path of a file") from None


def _pictures_of(path: Path) -> Path:
    return path.with_suffix(".pictures")


def _written(part: Part, path: Path) -> str | dict[str, str]:
    """What JSON has for a part of a question; a picture is written beside it."""
    if isinstance(part, str):
        return part
    if isinstance(part, TiledImage):
        raise ChatFileError("an image that came cut into tiles cannot be saved; ask with pictures")
    folder = _pictures_of(path)
    name = f"{content_of(part).hex()}.png"
    if not (folder / name).exists():
        folder.mkdir(exist_ok=True)
        with _replacing(folder / name) as file:
            part.save(file, "PNG")
    return {"image": name}


@contextlib.contextmanager
def _replacing(path: Path):
    """A file that takes the place of another one when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _read_turn(turn: dict[str, Any], path: Path) -> SavedTurn:
    answer = turn["answer"]
    content = tuple(_read_part(part, path) for part in turn["content"])
    ids = answer["token_ids"]
    if not (isinstance(ids, list) and all(type(token) is int for token in ids)):
        raise TypeError("token_ids")
    if answer["finish_reason"] not in FINISH_REASONS:
        raise TypeError("finish_reason")
    return SavedTurn(content, check_text(answer["text"]), ids, answer["finish_reason"])


def _read_part(part: Any, path: Path) -> str | Image.Image:
    if isinstance(part, str):
        return check_text(part)
    name = part["image"]
    if Path(name).name != name:  # only what was saved beside it is opened
        raise TypeError("image")
    return open_image(_pictures_of(path) / name)
