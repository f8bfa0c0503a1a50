"""Conversations and completions become prompts: token ids with an `<|image|>` for every picture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.image import TiledImage, open_image
from llama_vision.inputs.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
IMAGE_PLACE = "<|image|>"


class PromptError(LlamaVisionError):
    """A message or prompt that cannot be read, or whose images and places for them differ."""


@dataclass(frozen=True)
class Prompt:
    """What the model is asked to go on from."""

    token_ids: Sequence[int]
    images: Sequence[Image.Image | TiledImage] = ()
    """One for each `<|image|>` id, in order; those that are cut into tiles already stay so."""


def check_prompt(prompt: Prompt, image_token_id: int) -> None:
    """Raise PromptError for what the model cannot read."""
    ids = list(prompt.token_ids)
    if not ids:
        raise PromptError("the prompt is empty; expected at least one token id")
    strange = [token for token in ids if not 0 <= token <= image_token_id]
    if strange:
        raise PromptError(
            f"token id {strange[0]} is out of range; expected 0 to {image_token_id} (<|image|>)"
        )
    places = ids.count(image_token_id)
    if places != len(prompt.images):
        raise PromptError(
            f"the prompt has {places} <|image|> ids (id {image_token_id}) and "
            f"{len(prompt.images)} images; expected as many"
        )


Content = str | Image.Image | Sequence[Any]
"""A text, a picture, or a sequence of them; `{"type": "text", "text": …}` and
`{"type": "image", "image": picture or path}` stand for the same."""


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Prompt:
    """The prompt that asks for the assistant's next turn.

    Args:
        messages: each `{"role": "system" | "user" | "assistant", "content": Content}`; an assistant
            turn that ended to call a tool also has `"end": "eom"`.

    Raises:
        PromptError: another role, or content of another kind.

    Source: llama_models/llama3/chat_format.py, ChatFormat.encode_dialog_prompt.
    """
    if not messages:
        raise PromptError("the conversation is empty; expected at least one message")
    special = tokenizer.special_ids
    ids = [special["<|begin_of_text|>"]]
    images: list[Image.Image] = []
    for message in messages:
        role, content = _role_and_content(message)
        ids += _header(role, tokenizer)
        ids += _encode(content, images, tokenizer)
        ids.append(special["<|eom_id|>" if message.get("end") == "eom" else "<|eot_id|>"])
    return Prompt(ids + _header("assistant", tokenizer), images)


def completion_prompt(content: Content, tokenizer: Tokenizer) -> Prompt:
    """The prompt that asks a base model to go on: BOS once, then texts and images as they come."""
    images: list[Image.Image] = []
    ids = _encode(content, images, tokenizer)
    return Prompt([tokenizer.special_ids["<|begin_of_text|>"], *ids], images)


def place_images(text: str, images: Sequence[Image.Image]) -> list[Any]:
    """Put images where a text says `<|image|>`, or in front of it where it says so nowhere.

    Raises:
        PromptError: it says so more or less often than there are images.
    """
    first, *others = text.split(IMAGE_PLACE)
    if not others:
        return [*images, text]
    if len(others) != len(images):
        raise PromptError(
            f"the prompt has {len(others)} {IMAGE_PLACE} and {len(images)} images were given; "
            "expected as many, or a prompt without any (the images then go first)"
        )
    parts: list[Any] = [first]
    for image, part in zip(images, others, strict=True):
        parts += [image, part]
    return parts


def _role_and_content(message: Any) -> tuple[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f'{message!r} is no message; expected {{"role": …, "content": …}}')
    if message["role"] not in ROLES:
        raise PromptError(f"role {message['role']!r} is unknown; expected one of {ROLES}")
    return message["role"], message["content"]


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special_ids
    name, gap = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *gap]


def _encode(content: Content, images: list[Image.Image], tokenizer: Tokenizer) -> list[int]:
    """Ids of a content; its images are appended to `images`."""
    ids: list[int] = []
    for part in _parts(content):
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            ids.append(tokenizer.image_id)
            images.append(part)
    return ids


def _parts(content: Content) -> Iterable[str | Image.Image]:
    if isinstance(content, (str, Image.Image)):
        yield content
    elif isinstance(content, Mapping):
        yield _part_of_dict(content)
    elif isinstance(content, Sequence):
        for part in content:
            yield from _parts(part)
    else:
        raise PromptError(
            f"content of type {type(content).__name__}; expected a text, a PIL image, "
            "or a list of them"
        )


def _part_of_dict(part: Mapping[str, Any]) -> str | Image.Image:
    kind = part.get("type")
    value = part.get(kind) if kind in ("text", "image") else None
    if kind == "text" and isinstance(value, str):
        return value
    if kind == "image" and isinstance(value, Image.Image):
        return value
    if kind == "image" and value is not None:
        return open_image(value)
    raise PromptError(
        f'{dict(part)!r} is no content; expected {{"type": "text", "text": …}} or '
        '{"type": "image", "image": a PIL image or a path}'
    )
