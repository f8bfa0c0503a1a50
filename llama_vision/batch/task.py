"""One question of many: a line of JSON, read into a prompt and its settings."""

import os
from pathlib import Path
from typing import Any

from llama_vision.api import LlamaVision
from llama_vision.cache.choose_rule import RULE_OPTIONS
from llama_vision.engine.settings import Settings
from llama_vision.engine.settings_json import RENAMED, SETTING_NAMES, read_settings
from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.messages import IMAGE_KEYS, check_messages, role_and_content
from llama_vision.inputs.picture_files import is_data_uri
from llama_vision.reading import MOST_BYTES, parse_object
from llama_vision.values import LARGEST, Either, ListOf, Text, Whole, check, check_names

QUESTION = ("id", "messages", "prompt", "images", "system")
KEYS = (*QUESTION, *SETTING_NAMES, *RENAMED, *RULE_OPTIONS)
"""What a line may say."""

ID = Either((Text(), Whole(-LARGEST)), words="a text or a whole number")
PATH_KEYS = {key for keys in IMAGE_KEYS.values() for key in keys} - {"base64"}
"""What names a picture in a part of a message."""


class TaskError(LlamaVisionError):
    """A line that asks for nothing that can be answered."""


class Task:
    """One question.

    Args:
        raw: its line; of one that is too long, the beginning.
        index: its place among all, from 0.
        line: its line in the file, from 1; of a picture, its place in the folder.
        folder: where relative paths of pictures begin.
    """

    def __init__(self, raw: bytes, *, index: int, line: int, folder: Path):
        self.index, self.line, self.folder = index, line, folder
        self.id: str | int = line
        self.fields: dict[str, Any] = {}
        self.problem: LlamaVisionError | None = None
        """Why it cannot be answered."""
        try:
            self.fields = _read_fields(raw)
            self.id = check("id", self.fields.get("id", line), ID, error=TaskError)
        except TaskError as error:
            self.problem = error

    def prompt(self, model: LlamaVision, system: str | None) -> Prompt:
        """The question, its pictures opened.

        Args:
            system: the system message where the line has none.

        Raises:
            LlamaVisionError: says what is wrong with the line.
        """
        if self.problem is not None:
            raise self.problem
        check_names("key", self.fields, KEYS)
        if ("messages" in self.fields) == ("prompt" in self.fields):
            raise TaskError('a line asks by "messages" or by "prompt"; expected one of them')
        messages = self._messages() if "messages" in self.fields else [self._message()]
        system = self.fields.get("system", system)
        if system is not None and all(role_and_content(m)[0] != "system" for m in messages):
            text = check("system", system, Text(), error=TaskError)
            messages = [{"role": "system", "content": text}, *messages]
        return model.prompt(messages)

    def settings(self, base: Settings) -> Settings:
        """Its own settings over those of the run, of which it draws with seed + index.

        Raises:
            LlamaVisionError: there is no such setting, or it is out of range.
        """
        if base.seed is not None:
            base = base.but(seed=(base.seed + self.index) & LARGEST)
        own = {name: value for name, value in self.fields.items() if name not in QUESTION}
        return read_settings(own, base)

    def _messages(self) -> list[Any]:
        beside = next((name for name in ("images", "system") if name in self.fields), None)
        if beside is not None:
            raise TaskError(f'"{beside}" is of "prompt"; put it into "messages"')
        try:
            return _from_folder(list(check_messages(self.fields["messages"])), self.folder)
        except RecursionError:
            raise TaskError("the messages are nested too deeply") from None

    def _message(self) -> dict[str, Any]:
        text = check("prompt", self.fields["prompt"], Text(), error=TaskError)
        paths = check("images", self.fields.get("images", ()), ListOf(Text()), error=TaskError)
        pictures = [{"type": "image", "image": _path(path, self.folder)} for path in paths]
        return {"role": "user", "content": [*pictures, text]}


def _read_fields(raw: bytes) -> dict[str, Any]:
    """A line's JSON object; null says nothing."""
    if len(raw) > MOST_BYTES:
        raise TaskError(
            f"the line has more than {MOST_BYTES:,} bytes; name pictures by their paths instead"
        )
    fields = parse_object(raw, "the line", TaskError)
    return {name: value for name, value in fields.items() if value is not None}


def _from_folder(value: Any, folder: Path) -> Any:
    """The same with the pictures' paths, at any depth, as seen from a folder."""
    if isinstance(value, list):
        return [_from_folder(one, folder) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _path(one, folder)
        if name in PATH_KEYS and isinstance(one, str)
        else _from_folder(one, folder)
        for name, one in value.items()
    }


def _path(picture: str, folder: Path) -> str:
    """A path as seen from a folder; URLs stay."""
    if is_data_uri(picture) or "://" in picture:
        return picture
    return os.path.join(folder, os.path.expanduser(picture))
