"""Small files of a checkpoint, read whole: JSON, tokenizers. They may be damaged, or do harm."""

import json
from pathlib import Path
from typing import Any

from llama_vision.errors import LlamaVisionError, printable, quote

MOST_BYTES = 32 * 2**20
"""Twice Llama 3's tokenizer.json, the largest file that is read whole."""

MOST_CONTAINERS = 2**20
"""Objects and lists in a file of JSON, each 100 bytes in memory: four times as many as there."""

LONGEST_PATH = 300


def shown(path: Path) -> str:
    """A path, for a message that has something left to say after it."""
    return printable(path, LONGEST_PATH)


def is_there(path: Path) -> bool:
    """Whether a directory has such an entry, even one that cannot be read, as a dangling link."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:  # its directory may not be searched: reading it will say so
        return True
    return True


def read_bytes(path: Path, error: type[LlamaVisionError]) -> bytes:
    """All of a file.

    Raises:
        LlamaVisionError: of the kind `error`: it is not there, no file, too large or unreadable.
    """
    name = shown(path)
    try:
        if path.exists() and not path.is_file():
            raise error(f"{name} cannot be read: it is not a file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as problem:
        if isinstance(problem, LlamaVisionError):
            raise
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{name} cannot be read: {reason}") from None
    if len(data) > MOST_BYTES:
        raise error(f"{name} is larger than {MOST_BYTES:,} bytes; it is damaged, or another file")
    return data


def read_json(path: Path, error: type[LlamaVisionError]) -> dict[str, Any]:
    """A file's JSON object; a byte order mark before it is skipped.

    Raises:
        LlamaVisionError: of the kind `error`: see `read_bytes` and `parse_object`.
    """
    return parse_object(read_bytes(path, error), shown(path), error)


def parse_object(data: bytes, name: str, error: type[LlamaVisionError]) -> dict[str, Any]:
    """The JSON object that some bytes are; a byte order mark before it is skipped.

    Args:
        name: what to call them in a message.

    Raises:
        LlamaVisionError: of the kind `error`: they are no JSON object in UTF-8.
    """
    if data.count(b"{") + data.count(b"[") > MOST_CONTAINERS:
        raise error(f"{name} holds more than {MOST_CONTAINERS:,} lists; it is damaged")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_each_once)
    except UnicodeDecodeError as problem:
        raise error(f"{name} cannot be read as JSON: byte {problem.start} is not UTF-8") from None
    except RecursionError:
        raise error(f"{name} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{name} cannot be read as JSON: {printable(problem, 200)}") from None
    if not isinstance(value, dict):
        raise error(f"{name} holds a {type(value).__name__}, expected a JSON object")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{quote(twice)} stands twice in one object")
    return table
