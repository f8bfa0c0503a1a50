"""What a command prints, and the one boundary that makes a line and an exit code of any exception.

Answers go to stdout, all else to stderr. Neither stream need be open, or take all characters.
"""

import contextlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

import torch

from llama_vision.errors import LONGEST_MESSAGE, LlamaVisionError, printable

EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal acts on, but for a tab and the end of a line."""

NO_MEMORY = ("can't allocate memory", "out of memory")
"""How torch says so in a RuntimeError: on a CPU, on MPS."""


class OutputError(LlamaVisionError):
    """What stdout does not take: a full disk, say.

    A user's mistake by its exit code: there is nothing in it to report, and something to be done.
    """


def write(text: str, end: str = "\n") -> None:
    r"""Print to stdout at once; on a terminal with control characters as `\x1b`.

    Raises:
        OutputError: it cannot be written.
        BrokenPipeError: whoever was to read it has gone.
    """
    try:
        print(escaped(text) if sys.stdout.isatty() else text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: it was closed
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write the answer: {reason}") from None


def escaped(text: str) -> str:
    r"""A text with its control characters as `\x1b`; tabs and ends of lines stay."""
    return CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def tell(message: object, program: str = "llama-vision") -> None:
    """Print one line to stderr, if it takes one."""
    _to_stderr(f"{program}: {printable(message, LONGEST_MESSAGE)}")


def tell_table(text: str) -> None:
    """Print several lines to stderr."""
    _to_stderr(escaped(text))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Print nothing: another process does."""
    out, err = contextlib.redirect_stdout, contextlib.redirect_stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere, out(nowhere), err(nowhere):
        yield


def _to_stderr(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def run_command(program: str, run: Callable[[], int]) -> int:
    """Run a command, with one line to stderr for whatever ends it.

    Set LLAMA_VISION_DEBUG=1 to see where an exception came from, and warnings of libraries.

    Returns:
        The exit code: that of `run`; 0 too where the reader of its output has gone; 2 for a mistake
        of the user or a lack of the machine, 1 for a fault of the code, 130 for Ctrl-C.
    """
    _open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet_libraries():
            return run()
    except SystemExit as stop:  # argparse, after --help
        return stop.code
    except BaseException as error:
        if _debugging():
            _to_stderr(escaped(traceback.format_exc()).rstrip("\n"))
        return _tell_of(error, program)
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _open_missing_streams() -> None:
    """What was closed (`>&-`) leads nowhere, rather than into the next file that is opened."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _debugging() -> bool:
    return os.environ.get("LLAMA_VISION_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Without Python's warnings, unless they were asked for."""
    with warnings.catch_warnings():
        if not (_debugging() or sys.warnoptions):
            warnings.simplefilter("ignore")
        yield


def _tell_of(error: BaseException, program: str) -> int:
    """Say what an exception means; the exit code."""
    if isinstance(error, BrokenPipeError):
        return 0
    if isinstance(error, KeyboardInterrupt):
        tell("interrupted", program)
        return EXIT_INTERRUPTED
    if isinstance(error, LlamaVisionError):
        tell(error, program)
        return EXIT_USAGE
    # Says the kind, and takes an exception that cannot be written.
    what = printable(traceback.format_exception_only(error)[-1].strip(), LONGEST_MESSAGE // 2)
    if _is_lack_of_memory(error):
        advice = "use smaller settings or another --device or --dtype; --plan says what a run takes"
        tell(f"memory does not suffice ({what}); {advice}", program)
        return EXIT_USAGE
    where = "" if _debugging() else "; LLAMA_VISION_DEBUG=1 shows where"
    tell(f"fault: {what}; please report it{where}", program)
    return EXIT_FAULT


def _is_lack_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def _settle(stream: TextIO) -> None:
    """Flush; what cannot be written is dropped, or Python complains of it when it ends."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
