"""One turn of a conversation: a question, its answer, and the token ids of both."""

from dataclasses import dataclass
from typing import Any

from PIL import Image

from llama_vision.engine.request import Completion
from llama_vision.engine.settings import Settings
from llama_vision.inputs.chat import Content, Prompt, chat_prompt
from llama_vision.inputs.image import TiledImage
from llama_vision.inputs.messages import PromptError, parts_of
from llama_vision.inputs.tokenizer import Tokenizer

Part = str | Image.Image | TiledImage


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    content: tuple[Part, ...]
    """The question's texts and pictures."""
    settings: Settings
    prompt: Prompt
    """Of the question alone, and what comes before it in the first turn."""
    completion: Completion
    answer_ids: list[int]
    """With which the conversation goes on, see `answer_ids_of`."""


def read_content(content: Content) -> tuple[Part, ...]:
    """The texts and opened pictures of a question.

    Raises:
        PromptError, ImageError: it is empty, or see `parts_of`.
    """
    parts = tuple(parts_of(content))
    if all(isinstance(part, str) and not part for part in parts):
        raise PromptError("the question is empty; expected a text, a picture, or several of them")
    return parts


def question_prompt(
    content: tuple[Part, ...], tokenizer: Tokenizer, *, first: bool, system: str | None
) -> Prompt:
    """What goes in for a question: its own message, behind the system's where it is the first."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": list(content)}]
    if first and system is not None:
        messages.insert(0, {"role": "system", "content": system})
    prompt = chat_prompt(messages, tokenizer)
    return prompt if first else Prompt(prompt.token_ids[1:], prompt.images)  # no second BOS


def answer_ids_of(completion: Completion, tokenizer: Tokenizer) -> list[int]:
    """The ids of an answer as a reader saw it, and the end of the turn.

    Those that the model made, but for the ones of a stop string, of which a token may have begun in
    the text: what the text has of that is encoded anew.
    """
    ids, text = list(completion.token_ids), completion.text
    if ids[-1:] and ids[-1] in end_ids(tokenizer):
        return ids
    seen = tokenizer.decode(ids)
    while seen != text and not text.startswith(seen):
        ids.pop()
        seen = tokenizer.decode(ids)
    return [*ids, *tokenizer.encode(text[len(seen) :]), tokenizer.special_ids["<|eot_id|>"]]


def known_ids(token_ids: list[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids that were noted with a text, if they say it in this tokenizer and end the turn."""
    known = all(0 <= token < tokenizer.image_id for token in token_ids)
    ended = known and token_ids[-1:] != [] and token_ids[-1] in end_ids(tokenizer)
    if ended and tokenizer.decode(token_ids) == text:
        return token_ids
    return [*tokenizer.encode(text), tokenizer.special_ids["<|eot_id|>"]]


def end_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Ids that end a turn, and what `chat_prompt` calls such an end."""
    return {tokenizer.special_ids[f"<|{end}_id|>"]: end for end in ("eot", "eom")}
