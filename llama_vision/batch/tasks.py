"""What is to be answered: the lines of a file, or the pictures of a folder.

A line may be megabytes of pictures, and there may be a million of them: none is held. Of each are
known its place in the file, and the digest by which its answer is found again.
"""

import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from PIL import Image

from llama_vision.batch.task import Task, TaskError
from llama_vision.errors import LlamaVisionError, printable
from llama_vision.inputs.picture_files import FORMATS
from llama_vision.reading import MOST_BYTES, shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONGEST_LINE = MOST_BYTES + 2
"""Bytes that are read of a line: what is allowed, one more to see that there is more, its end."""


class BatchError(LlamaVisionError):
    """A file or folder of prompts that cannot be read, or has none."""


class Tasks(ABC):
    """Questions in order; `tasks[i]` reads one of them.

    Args:
        raws: of each its line's number and the line.
        folder: where relative paths of pictures begin.
        numbered: whether each draws by its place: in another place its answer is another.
    """

    def __init__(self, raws: Iterable[tuple[int, bytes]], folder: Path, *, numbered: bool):
        self.folder = folder
        self.digests: list[bytes] = []
        """Of each that can be told from the others, else empty."""
        self._lines = array("Q")
        self._twice: dict[int, int] = {}
        """Those whose id stands in an earlier line, and in which."""
        first: dict[str | int, int] = {}
        for index, (line, raw) in enumerate(raws):
            self._lines.append(line)
            task = self._task(index, raw)
            digest = b""
            if task.problem is None and first.setdefault(task.id, line) != line:
                self._twice[index] = first[task.id]
            elif task.problem is None:
                place = repr((task.id, index if numbered else None))
                digest = blake2b(raw + place.encode(), digest_size=16).digest()
            self.digests.append(digest)

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int) -> Task:
        task = self._task(index, self._raw(index))
        if index in self._twice:
            task.problem = TaskError(f"line {self._twice[index]} has the same id; expected another")
        return task

    @abstractmethod
    def name(self, task: Task) -> str:
        """What to call a question in a message."""

    @abstractmethod
    def close(self) -> None:
        """Read no more."""

    @abstractmethod
    def _raw(self, index: int) -> bytes:
        """The line, without blanks around it."""

    def _task(self, index: int, raw: bytes) -> Task:
        return Task(raw, index=index, line=self._lines[index], folder=self.folder)


class Lines(Tasks):
    """Those of a JSONL file.

    Raises:
        BatchError: it cannot be read.
    """

    def __init__(self, path: Path, *, numbered: bool):
        self.path, self._starts = path, array("Q")
        if os.path.exists(path) and not os.path.isfile(path):
            raise BatchError(f"{shown(path)} is no file; expected a line of JSON for each prompt")
        with _problems_told(path):
            self._file = path.open("rb")
            super().__init__(self._scan(), path.absolute().parent, numbered=numbered)

    def name(self, task: Task) -> str:
        """See `Tasks`."""
        return f"{printable(self.path)}:{task.line}"

    def close(self) -> None:
        """See `Tasks`."""
        self._file.close()

    def _raw(self, index: int) -> bytes:
        with _problems_told(self.path):
            self._file.seek(self._starts[index])
            return self._file.readline(LONGEST_LINE).strip()

    def _scan(self) -> Iterator[tuple[int, bytes]]:
        """All lines that are not blank; of one that is too long, the beginning."""
        line, start = 0, len(BYTE_ORDER_MARK)
        self._file.seek(start if self._file.read(start) == BYTE_ORDER_MARK else 0)
        while True:
            start = self._file.tell()
            raw = part = self._file.readline(LONGEST_LINE)
            if not raw:
                return
            while len(part) == LONGEST_LINE and not part.endswith(b"\n"):
                part = self._file.readline(LONGEST_LINE)
            line += 1
            if question := raw.strip():
                self._starts.append(start)
                yield line, question


class Pictures(Tasks):
    """Those of a folder and the folders in it, all asked about alike; the id is the path.

    Raises:
        BatchError: it cannot be read.
    """

    def __init__(self, path: Path, prompt: str, *, numbered: bool):
        self.path, self.prompt = path, prompt
        with _problems_told(path):
            self._paths = sorted(_pictures_in(path))
        raws = ((index + 1, self._raw(index)) for index in range(len(self._paths)))
        super().__init__(raws, path.absolute(), numbered=numbered)

    def name(self, task: Task) -> str:
        """See `Tasks`."""
        return shown(self.path / str(task.id))

    def close(self) -> None:
        """See `Tasks`; nothing is open."""

    def _raw(self, index: int) -> bytes:
        path = self._paths[index]
        return json.dumps({"id": path, "prompt": self.prompt, "images": [f"./{path}"]}).encode()


def open_tasks(path: Path, prompt: str | None, *, numbered: bool) -> Tasks:
    """The questions in a file, or one about every picture of a folder.

    Args:
        prompt: that about the pictures.
        numbered: see `Tasks`.

    Raises:
        BatchError: they cannot be read, or there are none.
    """
    if path.is_dir():
        tasks, what = Pictures(path, prompt or "", numbered=numbered), "picture"
    else:
        tasks, what = Lines(path, numbered=numbered), "prompt"
    if not len(tasks):
        raise BatchError(f"{shown(path)} has no {what} in it; there is nothing to answer")
    return tasks


def _pictures_in(folder: Path) -> Iterator[str]:
    """Paths from the folder, of what has the suffix of a format that is read."""
    formats = Image.registered_extensions()
    for place, _, names in os.walk(folder, onerror=_raise):
        for name in names:
            if formats.get(os.path.splitext(name)[1].lower()) in FORMATS:
                yield Path(place, name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def _problems_told(path: Path) -> Iterator[None]:
    """As one line."""
    try:
        yield
    except OSError as error:
        raise BatchError(f"{shown(path)} cannot be read: {error.strerror or error}") from None
