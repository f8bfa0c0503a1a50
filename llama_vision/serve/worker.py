"""The thread that owns the engine: it alone steps it, while handlers put in and take out."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Chosen, Request
from llama_vision.serve.bodies import Question


class Delta(NamedTuple):
    """What has come to one sample since its last delta: whole characters, and their tokens."""

    sample: int
    text: str
    tokens: list[Chosen]
    finish_reason: str | None


class Job:
    """A question on its way through the engine; its deltas go to the loop that made it."""

    def __init__(self, question: Question):
        self.question, self.loop = question, asyncio.get_running_loop()
        self.events: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self.requests: list[Request] = []
        self.open: dict[int, tuple[int, int]] = dict.fromkeys(range(len(question.samples)), (0, 0))
        """Of samples that have not ended: the characters and tokens that were sent."""

    async def deltas(self) -> AsyncIterator[Delta]:
        """All of them; raises what the engine raised."""
        left = len(self.question.samples)
        while left:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish_reason is not None
            yield event

    def send(self, event: Delta | Exception) -> None:
        """From the engine's thread."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def new_deltas(self) -> list[Delta]:
        """Of each sample that has more text, or has ended."""
        found = []
        for sample, (characters, tokens) in list(self.open.items()):
            request = self.requests[sample]
            text, reason = request.answer.settled, request.finish_reason
            if len(text) == characters and reason is None:
                continue
            columns = (request.token_ids, request.logprobs, request.top_logprobs)
            new = list(map(Chosen, *(column[tokens:] for column in columns)))
            found.append(Delta(sample, text[characters:], new, reason))
            self.open[sample] = len(text), tokens + len(new)
            if reason is not None:
                del self.open[sample]
        return found


class Worker(threading.Thread):
    """Steps an engine while there are jobs; new ones join between two steps."""

    def __init__(self, engine: Engine):
        super().__init__(name="engine", daemon=True)
        self.engine, self.jobs = engine, []
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.finished = Counter(stop=0, length=0, cancelled=0, error=0)
        """Samples, by why they ended."""

    def submit(self, job: Job) -> None:
        """Have a job answered."""
        self.inbox.put(partial(self._enter, job))

    def cancel(self, job: Job) -> None:
        """Free what a job holds; nothing where it has ended."""
        self.inbox.put(partial(self._end, job, "cancelled"))

    def stop(self) -> None:
        """End the thread, and wait for that."""
        self.inbox.put(None)
        self.join()

    def run(self) -> None:
        """See `threading.Thread`."""
        while True:
            while not self.jobs or not self.inbox.empty():
                command = self.inbox.get()
                if command is None:
                    return
                command()
            self._step()

    def _enter(self, job: Job) -> None:
        self.jobs.append(job)
        try:
            for settings in job.question.samples:
                job.requests.append(self.engine.submit(job.question.prompt, settings))
        except Exception as error:
            self._end(job, "error", error)

    def _step(self) -> None:
        """One step; what it raises is of the jobs that it ended, or else of all that run."""
        try:
            self.engine.step()
        except Exception as error:
            ended = [job for job in self.jobs if any(map(_interrupted, job.requests))]
            running = [job for job in self.jobs if any(r.slot is not None for r in job.requests)]
            for job in ended or running or list(self.jobs):
                self._end(job, "error", error)
        for job in list(self.jobs):
            for delta in job.new_deltas():
                job.send(delta)
                if delta.finish_reason is not None:
                    self.finished[delta.finish_reason] += 1
            if not job.open:
                self.jobs.remove(job)

    def _end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """Take a job out before its answers have ended."""
        if job not in self.jobs:
            return
        self.jobs.remove(job)
        self.finished[reason] += len(job.open)
        for request in job.requests:
            self.engine.cancel(request)
        if error is not None:
            job.send(error)


def _interrupted(request: Request) -> bool:
    return request.finish_reason == "interrupted"
