"""The loop: questions go into an engine as there is room for them, and answers go to the disk."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llama_vision.batch.answers import Answers
from llama_vision.batch.task import Task
from llama_vision.batch.tasks import Tasks
from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Request
from llama_vision.engine.settings import Settings
from llama_vision.errors import LONGEST_MESSAGE, LlamaVisionError, printable

AHEAD = 2
"""Questions in the engine for each of its slots: those that wait may share the encoding of a
picture with those that run."""


class Ended(NamedTuple):
    """A question that is done with."""

    task: Task
    error: str | None
    """Why it has no answer."""


class Batch:
    """Questions on their way through an engine.

    Args:
        base: the settings of questions that say nothing else.
        system: the system message of those that have none.
        with_tokens: note the ids of the tokens and their log-probabilities too.
    """

    def __init__(
        self,
        engine: Engine,
        tasks: Tasks,
        answers: Answers,
        base: Settings,
        *,
        system: str | None = None,
        with_tokens: bool = False,
    ):
        self.engine, self.tasks, self.answers = engine, tasks, answers
        self.base, self.system, self.with_tokens = base, system, with_tokens
        self._running: dict[Request, Task] = {}

    def run(self) -> Iterator[Ended | None]:
        """Answer all that is not answered yet; None is a step in which nothing has ended.

        Raises:
            AnswersError: an answer cannot be written.
        """
        left = (index for index in range(len(self.tasks)) if index not in self.answers)
        while True:
            yield from self._fill(left)
            if not self._running:
                return
            error = self._step()
            yield None
            yield from self._collect(error)

    def _fill(self, left: Iterator[int]) -> Iterator[Ended]:
        """Hand over the next questions; what cannot be has ended."""
        while len(self._running) < AHEAD * self.engine.cache.slots:
            index = next(left, None)
            if index is None:
                return
            task = self.tasks[index]
            try:
                prompt = task.prompt(self.engine.checkpoint, self.system)
                self._running[self.engine.submit(prompt, task.settings(self.base))] = task
            except LlamaVisionError as error:
                yield self._fail(task, error)

    def _step(self) -> Exception | None:
        """One step of the engine, and what has ended one of the questions in it.

        Whatever that is: the others are as they were.
        """
        try:
            self.engine.step()
        except Exception as error:
            if any(request.finish_reason == "interrupted" for request in self._running):
                return error
            raise
        return None

    def _collect(self, error: Exception | None) -> Iterator[Ended]:
        """Write down what has ended."""
        for request in [r for r in self._running if r.finish_reason is not None]:
            task = self._running.pop(request)
            if request.finish_reason == "interrupted":
                yield self._fail(task, error)
            else:
                self.answers.add(task.index, self._record(task, request))
                yield Ended(task, None)

    def _record(self, task: Task, request: Request) -> dict[str, Any]:
        completion = self.engine.completion(request)
        record = {
            "id": task.id,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(request.prompt.token_ids),
            "generated_tokens": len(completion.token_ids),
            "visual_tokens": completion.visual_tokens._asdict(),
        }
        if self.with_tokens:
            record |= {"token_ids": completion.token_ids, "logprobs": completion.logprobs}
        if self.with_tokens and request.settings.top_logprobs:
            steps = completion.top_logprobs
            record["top_logprobs"] = [[one._asdict() for one in step] for step in steps]
        return record

    def _fail(self, task: Task, error: Exception) -> Ended:
        own = isinstance(error, LlamaVisionError)
        why = printable(error if own else f"{type(error).__name__}: {error}", LONGEST_MESSAGE)
        self.answers.add_failure(task.index, task.id, task.line, why)
        return Ended(task, why)
