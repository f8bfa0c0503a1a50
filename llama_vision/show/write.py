"""A file that shows what a run kept: its name says of which kind."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from llama_vision.cache.rule import Rule
from llama_vision.engine.request import Checkpoint, Request
from llama_vision.errors import printable, quote
from llama_vision.inputs.picture_files import Refused, path_of
from llama_vision.show.kept import ShowError, gather
from llama_vision.show.page import make_page
from llama_vision.show.picture import draw_picture

SUFFIXES = (".png", ".html")


def check_target(
    path: str | None,
    pictures: Sequence[str],
    *,
    pruned: bool = False,
    others: Sequence[type[Rule]] = (),
) -> None:
    """Refuse, before anything is run, what could not be shown or written.

    Args:
        path: the file; None where nothing is to be shown.
        pictures: those asked about, as they were given.
        pruned: whether a rule is in use.
        others: rules to show beside it.

    Raises:
        ShowError: says why.
    """
    if others and (path is None or not pruned):
        need = "--show-kept" if path is None else "--keep or --k-ratio, which says how many"
        raise ShowError(f"--show-rules shows what other rules would keep; it needs {need}")
    if path is not None:
        _check_path(path, pictures)


def _check_path(path: str, pictures: Sequence[str]) -> None:
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ShowError(f"--show-kept is {quote(path)}; expected a name that ends in .png or .html")
    if not pictures:
        raise ShowError("--show-kept shows pictures, and the prompt has none; give an --image")
    try:
        reason = _hindrance(Path(path), pictures)
    except OSError as error:
        raise _unwritten(path, error) from None
    if reason:
        raise ShowError(f"--show-kept {printable(path)} {reason}; expected another file to write")


def _hindrance(target: Path, pictures: Sequence[str]) -> str | None:
    """Why a file cannot be written, or must not."""
    if target.is_dir():
        return "is a directory"
    if not target.parent.is_dir():
        return "is in no directory that exists"
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        return "cannot be written: no permission"
    if target.exists() and any(_is_same(target, picture) for picture in pictures):
        return "is the picture itself"
    return None


def _is_same(target: Path, picture: str) -> bool:
    try:
        return os.path.samefile(target, path_of(picture))
    except (OSError, ValueError, Refused):  # a data URI
        return False


def show_kept(
    path: str,
    checkpoint: Checkpoint,
    request: Request,
    *,
    question: str,
    others: Sequence[type[Rule]] = (),
) -> None:
    """Write what a request kept of its pictures, as a PNG or a page; for the rest see `gather`.

    Raises:
        ShowError: it cannot be written.
    """
    shown, content = gather(checkpoint, request, question=question, others=others), io.BytesIO()
    if Path(path).suffix.lower() == ".png":
        draw_picture(shown).save(content, "PNG")
    else:
        content.write(make_page(shown).encode("utf-8", "replace"))
    try:
        Path(path).write_bytes(content.getvalue())
    except (OSError, ValueError) as error:
        raise _unwritten(path, error) from None


def _unwritten(path: str, error: Exception) -> ShowError:
    reason = getattr(error, "strerror", None) or error
    return ShowError(f"--show-kept {printable(path)} cannot be written: {printable(reason)}")
