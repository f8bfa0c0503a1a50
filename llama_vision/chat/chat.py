"""A conversation: each question runs only its own rows, behind those that its slot holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_vision.cache.kv import CacheError
from llama_vision.chat.saved import SavedTurn, read_chat, write_chat
from llama_vision.chat.turn import (
    Part,
    Turn,
    answer_ids_of,
    end_ids,
    known_ids,
    question_prompt,
    read_content,
)
from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Checkpoint, Completion, Request
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import DEFAULT_SEQ_LEN
from llama_vision.inputs.chat import Content
from llama_vision.inputs.messages import PromptError, check_text
from llama_vision.inputs.tokenizer import needed
from llama_vision.values import Text, check

REPLAYED = {
    "max_new_tokens": 1,
    "temperature": 0,
    "repetition_penalty": 1,
    "stop": (),
    "logits_processors": (),
    "top_logprobs": 0,
}
"""Settings of a turn that is run again: its answer is known, and only its prompt is run."""


@dataclass
class _Question:
    """What is being answered."""

    content: tuple[Part, ...]
    settings: Settings
    request: Request
    instead_of: Turn | None
    """The turn that comes back where this fails."""


class Chat:
    """A conversation with a loaded checkpoint. Make one with `LlamaVision.chat`.

    Its slot holds the turns so far. New images take the place of the earlier ones in the cache,
    which earlier rows have read. Turns are run again, one by one, where the cache cannot be rewound
    to them, or a question has failed.

    Args:
        model: a `LlamaVision`.
        system: the system message.
        max_seq_len: most tokens of the whole conversation, for which the cache is allocated.
        compiled, graphs, force: see `Engine`.
        settings: of every answer, see `Settings`.

    Raises:
        LlamaVisionError: a setting is out of range, or the conversation does not fit.
    """

    def __init__(
        self,
        model: Checkpoint,
        *,
        system: str | None = None,
        max_seq_len: int = DEFAULT_SEQ_LEN,
        compiled: bool = False,
        graphs: bool = True,
        force: bool = False,
        **settings: Any,
    ):
        self.tokenizer = needed(model.tokenizer)
        self.system = None
        if system is not None:
            self.system = check_text(check("system", system, Text(), error=PromptError))
        self.settings = Settings().but(**settings)
        how = {"compiled": compiled, "graphs": graphs, "force": force}
        self.engine = Engine(model, max_seq_len=max_seq_len, **how)
        self.turns: list[Turn] = []
        self._latest: Request | None = None
        """What the next question goes on from; None where the turns are to be run again."""
        self._asked: _Question | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as `LlamaVision.prompt` takes it; pictures are PIL's."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        ends = end_ids(self.tokenizer)
        for turn in self.turns:
            end = ends[turn.answer_ids[-1]]
            messages.append({"role": "user", "content": list(turn.content)})
            answer = {"role": "assistant", "content": turn.completion.text}
            messages.append(answer if end == "eot" else {**answer, "end": end})
        return messages

    def ask(self, content: Content, **settings: Any) -> Completion:
        """Answer a question.

        Args:
            content: texts and pictures, see `inputs.chat.Content`.
            settings: of this answer, see `Settings`.

        Raises:
            LlamaVisionError: it cannot be read, or does not fit; the conversation stays as it was.
        """
        return self._whole(self.stream(content, **settings))

    def stream(self, content: Content, **settings: Any) -> Iterator[str]:
        """Answer a question, and yield the text in pieces of whole characters as they are made.

        Whoever takes no more pieces ends the answer there. For the rest see `ask`.
        """
        self._settle()
        return self._begin(read_content(content), self.settings.but(**settings))

    def undo(self) -> Turn:
        """Take the last question and its answer back; they are given out.

        Raises:
            PromptError: nothing has been asked.
        """
        self._settle()
        if not self.turns:
            raise PromptError("nothing has been asked yet; ask first")
        if self._latest is not None:
            try:
                self._latest = self.engine.undo(self._latest)
            except CacheError:
                self._forget()
        return self.turns.pop()

    def regenerate(self, **settings: Any) -> Completion:
        """Answer the last question anew.

        Args:
            settings: in the place of those that it was asked with.

        Raises:
            PromptError: nothing has been asked.
            LlamaVisionError: see `ask`; the old answer stays.
        """
        return self._whole(self.stream_again(**settings))

    def stream_again(self, **settings: Any) -> Iterator[str]:
        """Answer the last question anew, and yield the text; see `regenerate` and `stream`."""
        self._settle()
        changed = (self.turns[-1].settings if self.turns else self.settings).but(**settings)
        old = self.undo()
        return self._begin(old.content, changed, instead_of=old)

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON, its pictures in a folder beside it.

        Raises:
            ChatFileError: it cannot be written; what was there is still there.
        """
        self._settle()
        write_chat(path, self.system, self.turns)

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that was saved, instead of this one.

        Its turns are run again with the settings of this chat before the next question.

        Raises:
            LlamaVisionError: it cannot be read; the conversation stays as it was.
        """
        self._settle()
        system, saved = read_chat(path)
        turns = [self._turn_of(turn, not number, system) for number, turn in enumerate(saved)]
        self._forget()
        self.system, self.turns = system, turns

    def close(self) -> None:
        """Give the cache back; nothing more can be asked."""
        self.engine.close()
        self._latest = self._asked = None

    def _whole(self, pieces: Iterator[str]) -> Completion:
        for _ in pieces:
            pass
        return self.turns[-1].completion

    def _begin(
        self, content: tuple[Part, ...], settings: Settings, instead_of: Turn | None = None
    ) -> Iterator[str]:
        """Submit a question; its pieces."""
        try:
            first = not self.turns
            prompt = question_prompt(content, self.tokenizer, first=first, system=self.system)
            if self._latest is None:
                self._run_again()
            request = self.engine.submit(prompt, settings, after=self._latest, hold=True)
        except BaseException:
            self._restore(instead_of)
            raise
        self._asked = _Question(content, settings, request, instead_of)
        return self._pieces(self._asked)

    def _pieces(self, asked: _Question) -> Iterator[str]:
        try:
            yield from self.engine.stream(asked.request)
        except (GeneratorExit, KeyboardInterrupt):  # what there is of it stays
            self._end(asked)
            raise
        except BaseException:
            self._drop(asked)
            raise
        self._end(asked)

    def _settle(self) -> None:
        """End the answer that is being made where it is."""
        if self._asked is not None:
            self._end(self._asked)

    def _end(self, asked: _Question) -> None:
        """Note a question and what there is of its answer."""
        if asked is not self._asked:
            return
        request = asked.request
        self.engine.cancel(request)
        if not request.token_ids:
            self._drop(asked)
            return
        completion = request.completion()
        answer_ids = answer_ids_of(completion, self.tokenizer)
        self.engine.replace_answer(request, answer_ids)
        self.turns.append(
            Turn(asked.content, asked.settings, request.prompt, completion, answer_ids)
        )
        self._latest, self._asked = request, None

    def _drop(self, asked: _Question) -> None:
        """Be as if a question had never been asked."""
        if asked is not self._asked:
            return
        self.engine.cancel(asked.request)
        if asked.request.rows:  # it had begun
            self._forget()
        self._asked = None
        self._restore(asked.instead_of)

    def _restore(self, turn: Turn | None) -> None:
        if turn is not None:
            self._forget()
            self.turns.append(turn)

    def _forget(self) -> None:
        """Hold nothing in the cache."""
        for request in list(self.engine.slots.held.values()):
            self.engine.release(request)
        self._latest = None

    def _run_again(self) -> None:
        """Fill the cache with the turns so far."""
        try:
            for turn in self.turns:
                known = turn.settings.but(**REPLAYED)
                self._latest = self.engine.submit(turn.prompt, known, after=self._latest, hold=True)
                self.engine.run(self._latest)
                self.engine.replace_answer(self._latest, turn.answer_ids)
        except BaseException:
            self._forget()
            raise

    def _turn_of(self, saved: SavedTurn, first: bool, system: str | None) -> Turn:
        """A turn that was saved."""
        ids = known_ids(saved.token_ids, saved.text, self.tokenizer)
        prompt = question_prompt(saved.content, self.tokenizer, first=first, system=system)
        completion = Completion(ids, [], saved.text, saved.finish_reason)
        return Turn(saved.content, self.settings, prompt, completion, ids)
