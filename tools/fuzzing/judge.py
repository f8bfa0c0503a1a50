"""One bad input, what is right about how it ends, and what is not."""

import io
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama_vision.errors import LONGEST_MESSAGE, LlamaVisionError, printable

LIMIT = 5.0
"""Seconds that a case may take."""

MOST_GROWTH = 2**30
"""Bytes of resident memory that a case may take at its peak, beyond what there was before."""

LONGEST_WORDS = 160
"""Characters that say what a case is."""

HUSHED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)
"""Warnings that Python does not show by itself."""

Expected = Literal["taken", "refused", "either", "interrupted"]


@dataclass(frozen=True)
class Case:
    """One input: what it is, and how to hand it in."""

    words: str
    run: Callable[[], Any]
    """Raises `WrongResult` where an input is taken and what comes of it is not right."""
    expected: Expected = "either"


@dataclass(frozen=True)
class Kind:
    """A kind of input; case i is the same in every run with the same seed."""

    name: str
    cases: int
    """How many there are, or how many to try."""
    case: Callable[[int], Case]


@dataclass(frozen=True)
class Outcome:
    """How a case ended, and what was wrong with that."""

    number: int
    words: str
    ended: str
    """taken, refused, interrupted, or the name of a foreign exception."""
    faults: tuple[str, ...] = ()
    where: str = ""
    """The line of the package nearest to the fault."""


class Refused(Exception):
    """A case was refused as it should be, in another way than by a LlamaVisionError."""


class WrongResult(Exception):
    """A case was taken, and what came of it is known to be wrong."""


def draw_for(kind: str, seed: int, number: int) -> random.Random:
    """What all the choices of a case are drawn from."""
    return random.Random(f"{kind}/{seed}/{number}")


def judge(case: Case, number: int = 0, limit: float = LIMIT) -> Outcome:
    """Run a case here, and look at all that it must not do."""
    where, faults = "", []
    before, start = _start_of_peak(), time.perf_counter()
    with _watched() as seen:
        try:
            case.run()
            ended = "taken"
        except LlamaVisionError as error:
            ended, where = "refused", place_of(error)
            faults += faults_of_message(str(error))
        except Refused:
            ended = "refused"
        except WrongResult as error:
            ended = "taken"
            faults.append(f"wrong result: {error}")
        except KeyboardInterrupt:
            if case.expected != "interrupted":
                raise
            ended = "interrupted"
        except BaseException as error:
            ended, where = type(error).__name__, place_of(error)
            faults.append(f"foreign exception: {ended}: {printable(error, 100)}")
    if time.perf_counter() - start > limit:
        faults.append(f"hang: {time.perf_counter() - start:.1f} s")
    growth = _peak() - before
    if growth > MOST_GROWTH:
        faults.append(f"memory: {growth / 2**30:.1f} GiB more")
    faults += seen.faults
    if not faults and case.expected not in ("either", ended):
        faults.append(f"wrongly {ended}: expected to be {case.expected}")
    return Outcome(number, printable(case.words, LONGEST_WORDS), ended, tuple(faults), where)


def faults_of_message(message: str) -> list[str]:
    """What a message has that a terminal, or its reader, should not get."""
    faults = []
    if len(message) > LONGEST_MESSAGE:
        faults.append(f"message: {len(message)} characters")
    if len(message.splitlines()) > 1:
        faults.append(f"message: {len(message.splitlines())} lines")
    if not message:
        faults.append("message: none")
    strange = sorted({c for c in message if not c.isprintable()} - {"\n"})
    if strange:
        faults.append(f"message: raw control characters {strange[:3]!a}")
    return faults


def place_of(error: BaseException) -> str:
    """The innermost line of the package in a traceback, or else of whatever raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/llama_vision/" in f.filename.replace(os.sep, "/")]
    return "".join(f"{short(f.filename)}:{f.lineno}" for f in (ours or frames)[-1:])


def short(path: str) -> str:
    """A file of the package by its path in it."""
    return path.replace(os.sep, "/").rpartition("/llama_vision/")[2]


@dataclass
class _Seen:
    """What a case did beside its result."""

    programs: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """In words."""
        return [f"program started: {printable(p)}" for p in self.programs] + [
            f"stderr: {printable(text)}" for text in self.shown
        ]


_watching: list[_Seen] = []
"""The case that is being run, if any: audit hooks cannot be taken off again."""

PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
NETWORK = ("socket.connect", "socket.getaddrinfo")


def _audit(event: str, arguments: tuple) -> None:
    """Note and prevent that a case starts a program; let none reach the network."""
    if _watching and event in PROGRAMS:
        _watching[-1].programs.append(ascii(arguments[:2]))
        raise PermissionError(f"a case started a program: {event}")
    if _watching and event in NETWORK:
        raise ConnectionRefusedError("cases have no network")


sys.addaudithook(_audit)


@contextmanager
def _watched() -> Iterator[_Seen]:
    """See programs, warnings, and all that Python or a C library writes to stderr."""
    seen = _Seen()
    with (
        tempfile.TemporaryFile() as file,
        warnings.catch_warnings(record=True) as caught,
        descriptor_2_to(file.fileno()),
        redirect_stderr(io.TextIOWrapper(file, "utf-8", errors="backslashreplace")) as stderr,
    ):
        for category in HUSHED:
            warnings.simplefilter("ignore", category)
        warnings.simplefilter("always", append=True)
        _watching.append(seen)
        try:
            yield seen
        finally:
            _watching.pop()
            if not stderr.closed:
                stderr.flush()
                os.lseek(file.fileno(), 0, os.SEEK_SET)
                written = os.read(file.fileno(), 2000).decode(errors="replace")
                seen.shown += [written] * bool(written)
                stderr.detach()
            seen.shown += [f"{w.category.__name__}: {w.message}" for w in caught]


@contextmanager
def descriptor_2_to(descriptor: int) -> Iterator[None]:
    """All that this process writes to stderr goes elsewhere, that of C libraries too."""
    saved = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _status(name: str) -> int:
    """A size from the kernel's account of this process, in bytes; 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(s.split()[1]) * 1024 for s in lines if s.startswith(f"{name}:")), 0)


def _start_of_peak() -> int:
    """Resident bytes now, from which the peak is counted anew."""
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")  # resets the peak of resident memory
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")
