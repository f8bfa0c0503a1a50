"""Messages read into texts and pictures: the forms of transformers and of OpenAI's interface."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image

from llama_vision.errors import LlamaVisionError, quote
from llama_vision.inputs.image import TiledImage
from llama_vision.inputs.pictures import is_picture, open_image

ROLES = ("system", "user", "assistant")
RENAMED = {"developer": "system"}
"""What OpenAI calls a role of ours."""

TEXT_TYPES = ("text", "input_text", "output_text")
IMAGE_KEYS = {
    "image": ("image", "path", "url", "base64"),
    "image_url": ("image_url",),
    "input_image": ("image_url",),
}
"""The keys of a picture, by its part's type.

Source: transformers' `ProcessorMixin.apply_chat_template`; OpenAI's chat completions and responses.
"""

LONGEST_TEXT = 1 << 20
"""Characters: eight for each of the 131,072 tokens that the published models read."""
MOST_PARTS = 100_000
DEEPEST = 8
"""Parts of a content, and lists within one another; a list may hold itself."""

EXPECTED_MESSAGE = '{"role": "user", "content": a text, or a list of texts and pictures}'


class PromptError(LlamaVisionError):
    """A message or prompt that cannot be read, or whose images and places for them differ."""


def check_messages(messages: Any) -> Sequence[Any]:
    """A conversation of one message or more; what each is, `role_and_content` says.

    Raises:
        PromptError: it is no list or tuple, or empty.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise PromptError(f"messages is {quote(messages)}; expected a list of {EXPECTED_MESSAGE}")
    if not messages:
        raise PromptError("the conversation is empty; expected at least one message")
    return messages


def role_and_content(message: Any) -> tuple[str, Any]:
    """One of `ROLES`, and the content as it came.

    Raises:
        PromptError: it is no message, or its role is another.
    """
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f"{quote(message)} is no message; expected {EXPECTED_MESSAGE}")
    role = message["role"]
    role = RENAMED.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"role {quote(role)} is unknown; expected one of {', '.join(ROLES)}")
    return role, message["content"]


def parts_of(content: Any) -> Iterator[str | Image.Image | TiledImage]:
    """The texts and opened pictures of a content, in order.

    Raises:
        PromptError: there is something else in it, or it is nested too deep or too long.
        ImageError: a picture cannot be read.
    """
    left, lists = MOST_PARTS, [iter((content,))]
    while lists:
        for part in lists[-1]:
            left -= 1
            if left < 0:
                raise PromptError(f"a content has more than {MOST_PARTS} parts; expected fewer")
            if isinstance(part, Sequence) and not isinstance(part, str) and not is_picture(part):
                if len(lists) > DEEPEST:
                    raise PromptError(f"a content is nested more than {DEEPEST} lists deep")
                lists.append(iter(part))
                break
            yield _part(part)
        else:
            lists.pop()


def check_text(text: str) -> str:
    """The text itself.

    Raises:
        PromptError: it is longer than models read, or has lone surrogates, which stand for bytes
            that are no UTF-8.
    """
    if len(text) > LONGEST_TEXT:
        raise PromptError(
            f"a text has {len(text):,} characters; expected {LONGEST_TEXT:,} at most, eight for "
            "each token that the models read"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"a text has {quote(text[error.start])} at character {error.start}, a byte that is no "
            "UTF-8 or half of a character; expected valid Unicode"
        ) from None
    return text


def _part(part: Any) -> str | Image.Image | TiledImage:
    if isinstance(part, Mapping):
        return _part_of_dict(part)
    if isinstance(part, str):
        return check_text(part)
    if isinstance(part, TiledImage):
        return part
    if is_picture(part):
        return open_image(part)
    raise PromptError(
        f"content of type {type(part).__name__}, {quote(part)}; expected a text, a picture (path, "
        "bytes, open file, PIL image, array), or a list of them"
    )


def _part_of_dict(part: Mapping[str, Any]) -> str | Image.Image | TiledImage:
    kind = part.get("type")
    kind = kind if isinstance(kind, str) else None
    if kind in TEXT_TYPES and isinstance(part.get("text"), str):
        return check_text(part["text"])
    given = [key for key in IMAGE_KEYS.get(kind, ()) if part.get(key) is not None]
    picture = _source(given[0], part[given[0]]) if len(given) == 1 else None
    if picture is None:
        raise PromptError(
            f'{quote(dict(part))} is no content; expected {{"type": "text", "text": …}}, {{"type": '
            '"image", "image": …}} with the picture in it, or {"type": "image_url", "image_url": '
            '{"url": "data:…"}}'
        )
    return picture if isinstance(picture, TiledImage) else open_image(picture)


def _source(key: str, value: Any) -> Any:
    """What `open_image` takes, or None."""
    if key == "image_url" and isinstance(value, Mapping):
        value = value.get("url")
    if key == "base64":
        is_text = isinstance(value, str)
        return f"data:;base64,{value.rpartition(',')[2]}" if is_text else None
    return value if isinstance(value, (str, TiledImage)) or is_picture(value) else None
