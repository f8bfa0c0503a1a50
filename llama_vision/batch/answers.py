"""Answers on disk: appended as they come, and put in order when all are there.

`OUT.part` takes each answer the moment it is made, in whatever order: a run that is killed loses
none. When every question has its answer, `OUT.ordered` is written in their order and takes the
place of `OUT`. A run reads `OUT.part` and `OUT` when it begins: what is answered there is not asked
again.
"""

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from llama_vision.errors import LlamaVisionError
from llama_vision.reading import shown

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two runs apart there
    fcntl = None

PART, ORDERED = ".part", ".ordered"
FAILURE = ("id", "line", "error")
"""What is said in the place of an answer."""
ELSEWHERE = "give another --out, or delete it"
KEPT = "; the answers so far are kept, and the same command goes on"


class AnswersError(LlamaVisionError):
    """A file of answers that cannot be written, or that holds something else."""


class Answers:
    """The answers to some questions, none of which is answered twice.

    Args:
        out: where they go.
        run: a digest of all that makes two answers to one question differ.
        questions: the digest of each question; empty where no earlier answer is its own.

    Raises:
        AnswersError: it cannot be written, holds something else or answers of other runs, or is
            being written.
    """

    def __init__(self, out: Path, run: str, questions: Sequence[bytes]):
        self.out, self.run, self.questions = out, run, questions
        self.part = beside(out, PART)
        self.count = 0
        """Questions that are answered; failures are not."""
        self._places = array("q", [-1]) * len(questions)
        """Of each answer twice where its line begins, and 1 more if that is in `out`; -1: none."""
        self._files: list[BinaryIO] = []
        with _problems_told(self.part):
            self._log = _open_alone(self.part)
        try:
            self._find()
        except BaseException:
            self.close()
            raise

    def __contains__(self, index: int) -> bool:
        return self._places[index] >= 0

    def add(self, index: int, answer: Mapping[str, Any]) -> None:
        """Note an answer; afterwards it is on the disk.

        Raises:
            AnswersError: it cannot be written; the others are there.
        """
        self._append(index, {**answer, "digest": f"{self.run}-{self.questions[index].hex()}"})
        self.count += 1

    def add_failure(self, index: int, *failure: str | int) -> None:
        """Note `FAILURE`: why there is no answer. The next run asks again; raises as `add`."""
        self._append(index, dict(zip(FAILURE, failure, strict=True)))

    def finish(self) -> None:
        """Put all answers in order; raises as `add`, and none is lost then either."""
        ordered = beside(self.out, ORDERED)
        with _problems_told(ordered, KEPT):
            try:
                self._write_all(ordered)
                for file in self._files:
                    file.close()
                os.replace(ordered, self.out)
            except BaseException:
                with suppress(OSError):
                    ordered.unlink()
                raise
            _sync_folder(self.out.parent)
            self.part.unlink()
        self._log.close()

    def close(self) -> None:
        """Read and write no more; what was noted stays for the next run."""
        for file in self._files:
            file.close()
        if not self._log.closed:
            with suppress(OSError):
                if not os.fstat(self._log.fileno()).st_size:
                    self.part.unlink()
            self._log.close()

    def _append(self, index: int, record: Mapping[str, Any]) -> None:
        rest = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with _problems_told(self.part, KEPT):
            start = self._log.seek(0, os.SEEK_END)
            while rest:
                rest = rest[self._log.write(rest) :]
            os.fsync(self._log.fileno())
        self._places[index] = 2 * start

    def _write_all(self, path: Path) -> None:
        with path.open("wb") as file:
            for place in self._places:
                source = self._files[place % 2]
                source.seek(place // 2)
                file.write(source.readline().rstrip(b"\n") + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _find(self) -> None:
        """Note where the answers of earlier runs are."""
        index_of = {digest: index for index, digest in enumerate(self.questions) if digest}
        others = 0
        for which, path in enumerate([self.part, *[self.out] * os.path.exists(self.out)]):
            with _problems_told(path):
                self._files.append(path.open("rb"))
                for start, digest in self._stored(path, self._files[-1]):
                    index = index_of.get(digest)
                    if index is None:
                        others += 1
                    else:
                        self._places[index] = 2 * start + which
        self.count = sum(place >= 0 for place in self._places)
        if others and not self.count:
            raise AnswersError(f"{shown(path)} holds answers to other prompts; {ELSEWHERE}")
        with _problems_told(self.part):
            self._end_last_line()

    def _stored(self, path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Where the answers in a file begin, and the digests of their questions."""
        start = 0
        for line in file:
            run, question = _read_digest(line)
            if run is None and path == self.out:  # in `part`, what a machine's end left of a line
                raise AnswersError(f"{shown(path)} is no file of answers; {ELSEWHERE}")
            if run and run != self.run:
                raise AnswersError(
                    f"{shown(path)} holds answers of another model or of other settings; "
                    f"{ELSEWHERE}"
                )
            if run:
                yield start, question
            start += len(line)

    def _end_last_line(self) -> None:
        """A line that was cut short is to be one by itself."""
        part = self._files[0]
        if part.seek(0, os.SEEK_END):
            part.seek(-1, os.SEEK_END)
            if part.read(1) != b"\n":
                self._log.write(b"\n")


def beside(out: Path, suffix: str) -> Path:
    """A file of the run's own, next to its answers."""
    return out.with_name(out.name + suffix)


def _read_digest(line: bytes) -> tuple[str | None, bytes]:
    """Run and question of an answer; a run of "" for a failure, None for what is neither."""
    try:
        record = json.loads(line)
        if tuple(record) == FAILURE:
            return "", b""
        run, _, question = record["digest"].partition("-")
        return run or None, bytes.fromhex(question)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, b""


def _open_alone(path: Path) -> FileIO:
    """A file to append to, for one run at a time.

    Raises:
        AnswersError: another run has it.
    """
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    _sync_folder(path.parent)
    alone = True
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        alone = False
    except OSError:  # a file system that knows no locks
        pass
    if not alone:
        file.close()
        raise AnswersError(f"another run writes {shown(path)} now; let it end, or {ELSEWHERE}")
    return file


def _sync_folder(folder: Path) -> None:
    """Have a new name in a folder on the disk, where that can be asked for."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def _problems_told(path: Path, kept: str = "") -> Iterator[None]:
    """As one line."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise AnswersError(f"{shown(path)} cannot be written: {why}{kept}") from None
