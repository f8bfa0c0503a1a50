"""Questions about pictures: VLMEvalKit's tables (TSV) and JSON Lines.

A row that cannot be asked becomes a `BadRow`, which says why; it never ends the run. The whole file
is held in memory, its pictures as they are written there.
"""

import ast
import csv
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_vision.errors import LlamaVisionError, printable, quote

LONGEST_FIELD = 400_000_000
"""Characters; a picture of 300 MB in base64."""
LONGEST_INDEX = 64
"""Characters of an `image` that is the index of another row, whose picture is meant.

Source: VLMEvalKit, `ImageBaseDataset`.
"""
NEEDED = ("question", "answer")
PICTURES = ("image", "image_path")


class DataError(LlamaVisionError):
    """A file of questions that cannot be read at all."""


@dataclass(frozen=True)
class Row:
    """One question."""

    number: int
    """Its place in the file, from 0."""
    index: str
    """Its name there."""
    question: str
    answers: tuple[str, ...]
    """Those that are right, one at least."""
    images: tuple[str | Path, ...]
    """What `open_image` takes: data URIs and paths, one at least."""
    options: Mapping[str, str]
    """Texts by letter; empty for an open question."""
    hint: str = ""
    category: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be asked."""

    number: int
    index: str
    why: str


class _Bad(Exception):
    """Why a row is bad."""


def read_rows(path: Path, limit: int | None = None) -> list[Row | BadRow]:
    """The first `limit` rows of a file, in order.

    Raises:
        DataError: it is not there, neither TSV nor JSONL, or lacks a column.
    """
    readers = {".tsv": _read_tsv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise DataError(f"{quote(path.name)} is of no known kind; expected a .tsv or .jsonl file")
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            fields = list(readers[path.suffix.lower()](file))
    except (OSError, ValueError) as error:
        if isinstance(error, LlamaVisionError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{printable(path)} cannot be read: {reason}") from None
    if not fields:
        raise DataError(f"{printable(path)} holds no rows; expected one question a row")
    pictures = {
        _text(row.get("index")): row["image"]
        for row in fields
        if isinstance(row, Mapping) and _is_long(row.get("image"))
    }
    return [_row(number, row, pictures, path.parent) for number, row in enumerate(fields[:limit])]


def sha256(path: Path) -> str:
    """A file's checksum in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_tsv(file: Any) -> Iterator[dict[str, Any] | str]:
    """Fields by column, or why a line has none."""
    csv.field_size_limit(LONGEST_FIELD)
    lines = csv.reader(file, delimiter="\t")
    header = [name.strip() for name in next(lines, [])]
    lacking = [name for name in NEEDED if name not in header]
    lacking += [] if any(name in header for name in PICTURES) else ["image or image_path"]
    if lacking:
        raise DataError(f"the table has no column {', '.join(lacking)}; its header is its 1st line")
    while True:
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"is no line of a table: {error}"
            continue
        if len(fields) > len(header):
            yield f"has {len(fields)} fields where the header has {len(header)}"
        elif fields:
            yield dict(zip(header, fields, strict=False))


def _read_jsonl(file: Any) -> Iterator[dict[str, Any] | str]:
    """Objects, or why a line is none."""
    for line in file:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        yield value if isinstance(value, dict) else "is no JSON object"


def _row(number: int, fields: Any, pictures: Mapping[str, Any], folder: Path) -> Row | BadRow:
    if isinstance(fields, str):
        return BadRow(number, str(number), fields)
    index = _text(fields.get("index")) or str(number)
    try:
        return Row(
            number,
            index,
            _text(fields.get("question")) or _fail("has no question"),
            _answers(fields) or _fail("has no answer"),
            _images(fields, pictures, folder) or _fail("has no image"),
            _options(fields),
            _text(fields.get("hint")),
            _text(fields.get("category")),
        )
    except _Bad as bad:
        return BadRow(number, index, str(bad))


def _fail(why: str) -> Any:
    raise _Bad(why)


def _text(value: Any) -> str:
    """A cell's text; nothing where it is empty, or no text or number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    return str(value).strip()


def _is_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > LONGEST_INDEX


def _options(fields: Mapping[str, Any]) -> dict[str, str]:
    letters = [letter for letter in string.ascii_uppercase if _text(fields.get(letter))]
    return {letter: _text(fields[letter]) for letter in letters}


def _several(value: Any) -> list[str]:
    """The texts of a cell that may hold a list, as Python or JSON writes it."""
    if isinstance(value, str) and re.fullmatch(r"\s*\[.*\]\s*", value, re.DOTALL):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value.strip()]
    values = value if isinstance(value, list) else [value]
    return [text for text in map(_text, values) if text]


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_several(fields.get("answer")))


def _images(fields: Mapping[str, Any], pictures: Mapping[str, Any], folder: Path) -> tuple:
    """Where a row's pictures are: in the cell `image`, else at `image_path`."""
    inside = _several(fields.get("image"))
    if len(inside) == 1 and not _is_long(inside[0]) and inside[0] in pictures:
        inside = _several(pictures[inside[0]])
    if inside:
        return tuple(_picture(value, folder) for value in inside)
    return tuple(folder / path for path in _several(fields.get("image_path")))


def _picture(value: str, folder: Path) -> str | Path:
    """Base64 has no full stop; what has one is a path."""
    if value[:5].lower() == "data:":
        return value
    return folder / value if "." in value else f"data:;base64,{value}"
