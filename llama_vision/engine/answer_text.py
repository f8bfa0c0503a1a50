"""The text of an answer as it grows, and the stop strings that end it."""

from collections.abc import Sequence

from llama_vision.inputs.tokenizer import TextStream, Tokenizer


class AnswerText:
    """Whole characters of the tokens so far; what ends the answer is never shown.

    Args:
        stop: strings, at the first of which the text ends. A string may come in several tokens, and
            begin or end inside of one.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stream, self.stop = TextStream(tokenizer), tuple(stop)
        self.text = ""
        self.stopped = False
        """Whether a stop string has come; it and what follows is cut off."""
        self._ended = False

    def add(self, token_id: int) -> None:
        """Go on with a token."""
        self._grow(self.stream.add(token_id))

    def end(self) -> None:
        """No more tokens come: what is left of a broken character is part of the text too."""
        if not self._ended:
            self._ended = True
            self._grow(self.stream.end())

    @property
    def settled(self) -> str:
        """The text without an end that may yet become a stop string."""
        if self._ended or self.stopped:
            return self.text
        held = max((_overlap(self.text, stop) for stop in self.stop), default=0)
        return self.text[: len(self.text) - held]

    def _grow(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        before, self.text = len(self.text), self.text + piece
        places = (self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop)
        first = min((place for place in places if place >= 0), default=None)
        if first is not None:
            self.text, self.stopped = self.text[:first], True


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
