"""The prompt by which Llama Guard 3 Vision judges the last message of a conversation.

Its answer is `safe`, or `unsafe` and a line of the codes of violated categories, such as `S1,S10`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from llama_vision.errors import quote
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.image import TiledImage
from llama_vision.inputs.messages import PromptError, check_messages, parts_of, role_and_content
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.values import Text, check

GUARD_CATEGORIES = {
    "S1": "Violent Crimes.",
    "S2": "Non-Violent Crimes.",
    "S3": "Sex Crimes.",
    "S4": "Child Exploitation.",
    "S5": "Defamation.",
    "S6": "Specialized Advice.",
    "S7": "Privacy.",
    "S8": "Intellectual Property.",
    "S9": "Indiscriminate Weapons.",
    "S10": "Hate.",
    "S11": "Self-Harm.",
    "S12": "Sexual Content.",
    "S13": "Elections.",
}
"""Those that the model was trained on, as its template names them."""

NAMES = {"user": "User", "assistant": "Agent"}

TASK = """\
Task: Check if there is unsafe content in '{name}' messages in conversations according our safety \
policy with the below categories.

<BEGIN UNSAFE CONTENT CATEGORIES>
{categories}
<END UNSAFE CONTENT CATEGORIES>

<BEGIN CONVERSATION>

{turns}<END CONVERSATION>

Provide your safety assessment for ONLY THE LAST {name} message in the above conversation:
 - First line must read 'safe' or 'unsafe'.
 - If unsafe, a second line must include a comma-separated list of violated categories. """
"""Word for word what the model was trained with, its errors and the space at its end included."""


def llama_guard_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    categories: Mapping[str, str] | None = None,
) -> Prompt:
    """The prompt that asks whether the last message is safe.

    Args:
        messages: in the form of `chat_prompt`, a user's and an assistant's in turn, with one image
            at most. Names of special tokens in them stay text.
        categories: what is unsafe, by the codes that the verdict names; None for
            `GUARD_CATEGORIES`.

    Raises:
        PromptError: the roles do not alternate, there are several images, or a category is none.
        ImageError: a picture cannot be read.

    Source: https://huggingface.co/meta-llama/Llama-Guard-3-11B-Vision, chat_template.json.
    """
    turns, images = _read(messages)
    policy = GUARD_CATEGORIES if categories is None else _checked(categories)
    task = TASK.format(
        name=turns[-1][0],
        categories="\n".join(f"{code}: {name}" for code, name in policy.items()),
        turns="".join(f"{name}: {text.strip()}\n\n" for name, texts in turns for text in texts),
    )
    special, encode = tokenizer.special_ids, tokenizer.encode
    start, end = special["<|start_header_id|>"], special["<|end_header_id|>"]
    ids = [special["<|begin_of_text|>"], start, *encode("user"), end]
    if images:
        ids += [*encode("\n\n"), tokenizer.image_id, *encode(f" {task}")]
    else:
        ids += encode(f"\n\n{task}")
    # The template ends here: the two line ends that follow a header are the model's to make.
    return Prompt([*ids, special["<|eot_id|>"], start, *encode("assistant"), end], images)


def _read(messages: Any) -> tuple[list[tuple[str, list[str]]], list[Image.Image | TiledImage]]:
    """Of each message the name and texts; and the images of all."""
    turns, images = [], []
    for number, message in enumerate(check_messages(messages)):
        role, content = role_and_content(message)
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise PromptError(
                f"message {number + 1} is of the {role}; for Llama Guard expected the {expected}: "
                "the two in turn, the user first"
            )
        parts = list(parts_of(content))
        turns.append((NAMES[role], [part for part in parts if isinstance(part, str)]))
        images += [part for part in parts if not isinstance(part, str)]
    if len(images) > 1:
        raise PromptError(f"{len(images)} images were given; Llama Guard judges one at most")
    return turns, images


def _checked(categories: Mapping[str, str]) -> Mapping[str, str]:
    example = '{"S1": "Violent Crimes."}'
    if not isinstance(categories, Mapping) or not categories:
        raise PromptError(f"categories is {quote(categories)}; expected a dict such as {example}")
    for code, name in categories.items():
        if not isinstance(code, str) or not re.fullmatch(r"[^\s,:]+", code):
            raise PromptError(f"category {quote(code)} has a code that is no word such as S1")
        check(f"category {code}", name, Text(), error=PromptError)
    return categories
