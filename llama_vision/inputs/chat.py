"""Conversations and completions become prompts: token ids with an `<|image|>` for every picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from PIL import Image

from llama_vision.errors import quote
from llama_vision.inputs.image import TiledImage, content_of
from llama_vision.inputs.messages import (
    PromptError,
    check_messages,
    parts_of,
    role_and_content,
)
from llama_vision.inputs.pictures import is_picture, open_image
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.values import Instance

IMAGE_PLACE = "<|image|>"
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Prompt:
    """What the model is asked to go on from.

    Raises:
        PromptError: the token ids are no whole numbers, or the images no list.
        ImageError: an image cannot be read.
    """

    token_ids: Sequence[int]
    """Kept as a tuple; a range, or an array or tensor of one dimension, is taken too."""
    images: Sequence[Any] = ()
    """One for each `<|image|>` id, in order: what `open_image` takes, kept as RGB of PIL, or a
    `TiledImage`, which stays as it is."""

    def __post_init__(self):
        object.__setattr__(self, "token_ids", _read_ids(self.token_ids))
        object.__setattr__(self, "images", _read_images(self.images))

    @cached_property
    def contents(self) -> tuple[bytes, ...]:
        """A digest of each image, see `content_of`."""
        return tuple(map(content_of, self.images))

    def __repr__(self) -> str:
        return f"<Prompt of {len(self.token_ids)} token ids and {len(self.images)} images>"


PROMPT = Instance(Prompt, "a Prompt, such as model.prompt(messages) makes")


def check_prompt(prompt: Prompt, image_token_id: int, largest_id: int | None = None) -> None:
    """Raise PromptError for what the model cannot read.

    Args:
        prompt: what it is asked to go on from.
        image_token_id: the id of `<|image|>`.
        largest_id: the largest that has an embedding; None for `image_token_id`.
    """
    ids, largest = prompt.token_ids, image_token_id if largest_id is None else largest_id
    if not ids:
        raise PromptError("the prompt is empty; expected at least one token id")
    strange = next((token for token in ids if not 0 <= token <= largest), None)
    if strange is not None:
        marker = " (<|image|>)" if largest == image_token_id else ""
        raise PromptError(
            f"token id {quote(strange)} is out of range; expected 0 to {largest}{marker}"
        )
    places = ids.count(image_token_id)
    if places != len(prompt.images):
        raise PromptError(
            f"the prompt has {places} <|image|> ids (id {image_token_id}) and "
            f"{len(prompt.images)} images; expected as many"
        )


def _read_ids(ids: Any) -> tuple[int, ...]:
    expected = "expected a list of whole numbers, or an array or tensor of one dimension"
    wrong = PromptError(f"token_ids is {quote(ids)}; {expected}")
    if isinstance(ids, (str, bytes, bytearray, memoryview)):
        raise wrong
    try:
        if len(ids) > MOST_TOKENS:
            raise PromptError(
                f"the prompt is {len(ids)} tokens long; expected {MOST_TOKENS} at most"
            )
        if hasattr(ids, "tolist"):  # NumPy, torch, array
            ids = ids.tolist() if getattr(ids, "ndim", 1) == 1 else None
    except PromptError:
        raise
    except Exception:  # no length, or more than can be counted; tensors without values
        raise wrong from None
    if not isinstance(ids, Sequence):
        raise wrong
    for place, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise PromptError(f"token id {place} is {quote(token)}; expected a whole number")
    return tuple(map(int, ids))


def _read_images(images: Any) -> tuple[Image.Image | TiledImage, ...]:
    is_one = isinstance(images, (str, TiledImage)) or is_picture(images)
    if is_one or not isinstance(images, Sequence):
        raise PromptError(f"images is {quote(images)}; expected a list of pictures")
    return tuple(i if isinstance(i, TiledImage) else open_image(i) for i in images)


Content = str | Image.Image | Mapping[str, Any] | Sequence[Any]
"""A text, a picture (anything `open_image` takes except a text), or a sequence of them.

`{"type": "text", "text": …}` and `{"type": "image", "image": picture, path, URL or data URI}` stand
for the same; instead of "image" the key may be "path", "url" or "base64". So do OpenAI's
`{"type": "image_url", "image_url": {"url": "data:…"}}`, and "input_text" and "input_image".
"""


def chat_prompt(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Prompt:
    """The prompt that asks for the assistant's next turn.

    Args:
        messages: each `{"role": "system" | "user" | "assistant", "content": Content}`; an assistant
            turn that ended to call a tool also has `"end": "eom"`. "developer" is "system".
        tokenizer: the checkpoint's.

    Raises:
        PromptError: another role, or content of another kind.
        ImageError: a picture cannot be read.

    Source: llama_models/llama3/chat_format.py, ChatFormat.encode_dialog_prompt.
    """
    special = tokenizer.special_ids
    ids = [special["<|begin_of_text|>"]]
    images: list[Image.Image | TiledImage] = []
    for message in check_messages(messages):
        role, content = role_and_content(message)
        ids += _header(role, tokenizer)
        ids += _encode(content, images, tokenizer)
        ids.append(special[_end_of(message)])
    return Prompt(ids + _header("assistant", tokenizer), images)


def completion_prompt(content: Content, tokenizer: Tokenizer) -> Prompt:
    """The prompt that asks a base model to go on: BOS once, then texts and images as they come.

    Raises:
        PromptError: content of another kind.
        ImageError: a picture cannot be read.
    """
    images: list[Image.Image | TiledImage] = []
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


def _end_of(message: Mapping[str, Any]) -> str:
    end = message.get("end")
    if end is not None and not (isinstance(end, str) and end in ("eot", "eom")):
        raise PromptError(f'a message\'s end is {quote(end)}; expected "eot" or "eom"')
    return f"<|{end or 'eot'}_id|>"


def _header(role: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special_ids
    name, gap = tokenizer.encode(role), tokenizer.encode("\n\n")
    return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *gap]


def _encode(
    content: Content, images: list[Image.Image | TiledImage], tokenizer: Tokenizer
) -> list[int]:
    """Ids of a content; its images are appended to `images`."""
    ids: list[int] = []
    for part in parts_of(content):
        if isinstance(part, str):
            ids += tokenizer.encode(part)
        else:
            ids.append(tokenizer.image_id)
            images.append(part)
    return ids
