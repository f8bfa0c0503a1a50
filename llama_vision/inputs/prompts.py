"""Prompts in the forms in which they are handed over: ready, or as messages, one or several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_vision.errors import quote
from llama_vision.inputs.chat import PROMPT, Prompt, PromptError
from llama_vision.values import check

Messages = Sequence[Mapping[str, Any]]


def is_alone(prompts: Any) -> bool:
    """Whether this is one prompt, or the messages of one conversation."""
    return isinstance(prompts, Prompt) or _is_messages(prompts)


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def read_prompts(prompts: Any, prompt_of: Callable[[Messages], Prompt]) -> list[Prompt]:
    """The prompts of a list of prompts and messages, of which `prompt_of` makes prompts.

    Raises:
        PromptError: it is no list, or empty, or there is something else in it.
    """
    is_text = isinstance(prompts, (str, bytes, bytearray))
    if is_text or not isinstance(prompts, Sequence):
        raise PromptError(f"prompts is {quote(prompts)}; expected a list of prompts or messages")
    made = [prompt_of(p) if _is_messages(p) else p for p in prompts]
    if not made:
        raise PromptError("no prompt was given; expected at least one")
    return [check("a prompt", prompt, PROMPT, error=PromptError) for prompt in made]
