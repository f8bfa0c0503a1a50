"""What was answered so far: one file that is only ever appended to.

Its first line says of what run it is; each other line is what one arm made of one batch of rows,
written at once and synced. A line that a killed run left unfinished is dropped, and its batch is
asked again.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_vision.errors import LlamaVisionError, printable, quote

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two runs apart
    fcntl = None


class RecordsError(LlamaVisionError):
    """A file of answers that cannot be written, or is of another run."""


class Records:
    """The answers of one run, by batch and arm.

    Args:
        path: the file; it is made where it is not there.
        settings: all that the answers hang on.

    Raises:
        RecordsError: it cannot be read or written, is damaged, is of other settings, or another
            process is writing to it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.done: dict[tuple[int, str], dict[str, Any]] = {}
        """Lines by number of the batch and name of the arm."""
        try:
            self.file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self._lock()
            lines = self._whole_lines()
        except OSError as error:
            raise self._unwritten(error) from None
        if not lines:
            self._append({"settings": dict(settings)})
            return
        self._check(lines[0].get("settings"), settings)
        for line in lines[1:]:
            self.done[line["batch"], line["arm"]] = line

    def add(self, batch: int, arm: str, answers: list[dict], bad: list[dict]) -> None:
        """Note what an arm made of a batch; it stays, whatever ends the run.

        Raises:
            RecordsError: it cannot be written.
        """
        line = {"batch": batch, "arm": arm, "answers": answers, "bad": bad}
        self._append(line)
        self.done[batch, arm] = line

    def close(self) -> None:
        """Let others write to it."""
        self.file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordsError(
                f"another run is writing to {printable(self.path)}; wait, or choose another --out"
            ) from None

    def _whole_lines(self) -> list[dict[str, Any]]:
        """What stands there, without an unfinished end, which is cut off."""
        self.file.seek(0)
        data = self.file.readall()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self.file.truncate(end)
        try:
            lines = [json.loads(line) for line in data[:end].splitlines()]
            for number, line in enumerate(lines):
                needed = ("batch", "arm", "answers", "bad") if number else ("settings",)
                if not all(name in line for name in needed):
                    raise ValueError
        except (ValueError, TypeError, RecursionError):
            raise RecordsError(
                f"{printable(self.path)} is damaged, or no file of answers; expected one that a "
                "run has written, choose another --out"
            ) from None
        return lines

    def _check(self, before: Any, now: Mapping[str, Any]) -> None:
        before = before if isinstance(before, dict) else {}
        other = [name for name in now if before.get(name) != now[name]]
        if other:
            name = other[0]
            raise RecordsError(
                f"{printable(self.path)} is of a run with {name} {quote(before.get(name))}, and "
                f"this one has {quote(now[name])}; choose another --out, or the same settings"
            )

    def _append(self, line: dict[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=True).encode() + b"\n"
        try:
            while data:
                data = data[self.file.write(data) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._unwritten(error) from None

    def _unwritten(self, error: OSError) -> RecordsError:
        return RecordsError(f"{printable(self.path)} cannot be written: {error.strerror or error}")
