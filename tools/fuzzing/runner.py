"""Cases in processes of their own, so that none can hang or end the run."""

import faulthandler
import os
import re
import resource
import signal
import time
from collections.abc import Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory

from fuzzing.judge import LIMIT, LONGEST_WORDS, Kind, Outcome, judge, short
from llama_vision.errors import printable

MOST_MEMORY = 6 * 2**30
"""Bytes of address space that a worker may take beyond its own: it protects the machine."""

GRACE = 1.0
"""Seconds that a case has beyond its limit before its worker is ended."""


def run(
    kind: Kind, numbers: Iterable[int], *, workers: int = 2, limit: float = LIMIT
) -> Iterator[Outcome]:
    """Try cases of one kind, in any order; a worker that hangs or dies is replaced.

    Workers are forked, with all that the kind has prepared: torch must have started no threads.
    """
    waiting = iter(numbers)
    with TemporaryDirectory() as traces:
        team = [_Worker(kind, limit, Path(traces) / str(n)) for n in range(workers)]
        try:
            busy = [worker for worker in team if worker.take(next(waiting, None))]
            while busy:
                wait([worker.pipe for worker in busy], timeout=0.2)
                for worker in list(busy):
                    outcome = worker.outcome()
                    if outcome is not None:
                        yield outcome
                        if not worker.take(next(waiting, None)):
                            busy.remove(worker)
        finally:
            for worker in team:
                worker.end()


class _Worker:
    """One process, and the case that it is at."""

    def __init__(self, kind: Kind, limit: float, trace: Path):
        self.kind, self.limit, self.trace = kind, limit, trace
        self.number, self.since, self.again = 0, 0.0, False
        self.start()

    def start(self) -> None:
        context = get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=_work, args=(self.kind, self.limit, other, self.trace), daemon=True
        )
        self.process.start()
        other.close()

    def take(self, number: int | None, *, again: bool = False) -> bool:
        """Begin a case, if there is one."""
        if number is None:
            return False
        self.number, self.since, self.again = number, time.monotonic(), again
        self.words = "while it was made"
        self.pipe.send(number)
        return True

    def outcome(self) -> Outcome | None:
        """What came of the case, once that is known."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if isinstance(message, Outcome):
                    return self.first_or_again(message)
                self.words = message
        except (EOFError, OSError):
            self.process.join()
            return self.replaced(f"crash: exit code {self.process.exitcode}")
        if time.monotonic() - self.since > self.limit + GRACE:
            return self.first_or_again(self.replaced(f"hang: more than {self.limit:g} s"))
        return None

    def first_or_again(self, outcome: Outcome) -> Outcome | None:
        """A case that took too long is tried once more: the machine may have been busy."""
        slow = any(fault.startswith("hang") for fault in outcome.faults)
        if not slow or self.again:
            return outcome
        self.take(self.number, again=True)
        return None

    def replaced(self, fault: str) -> Outcome:
        """End this process, note where it was, and go on with another."""
        where = ""
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)  # writes the trace
            time.sleep(0.2)
            text = self.trace.read_text() if self.trace.exists() else ""
            found = re.search(r'File "([^"]*/llama_vision/[^"]*)", line (\d+)', text)
            where = f"{short(found[1])}:{found[2]}" if found else ""
        self.end()
        self.start()
        return Outcome(self.number, self.words, fault.partition(":")[0], (fault,), where)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _work(kind: Kind, limit: float, pipe: Connection, trace: Path) -> None:
    """The worker: a number comes, what it is goes, and then its outcome."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends the workers
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what is made for a case may write there too
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY,) * 2)
    with trace.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        while True:
            number = pipe.recv()
            case = kind.case(number)
            pipe.send(printable(case.words, LONGEST_WORDS))
            pipe.send(judge(case, number, limit))
