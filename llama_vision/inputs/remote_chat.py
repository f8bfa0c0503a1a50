"""The prompt of a conversation that came over a network: no text in it names a file of ours."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llama_vision.errors import printable, quote
from llama_vision.inputs.chat import Prompt, chat_prompt
from llama_vision.inputs.image import TiledImage, tile_image
from llama_vision.inputs.messages import PromptError, check_messages, role_and_content
from llama_vision.inputs.picture_files import is_data_uri
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.values import Instance, ListOf, check


class Picture(NamedTuple):
    """Where a message says that a picture is."""

    url: str


def remote_chat_prompt(
    messages: Any,
    tokenizer: Tokenizer,
    *,
    max_images: int,
    fetch: Callable[[str], bytes],
    **tiling: int,
) -> Prompt:
    """The prompt of messages in OpenAI's form; several threads may make some at once.

    Args:
        max_images: most pictures of all messages; they are counted before one is opened.
        fetch: the bytes at a URL that is no data URI; raises ImageError where it may not be read.
        tiling: of `tile_image`. A picture is cut up when it has been opened, so that only one is
            whole in memory.

    Raises:
        PromptError: there is something else in a message, or nothing.
        ImageError: a picture cannot be read.
    """
    read = [_read_message(message) for message in check_messages(messages)]
    count = sum(isinstance(part, Picture) for _, parts in read for part in parts)
    if count > max_images:
        raise PromptError(f"the messages have {count} pictures; expected {max_images} at most")

    def opened(part: str | Picture) -> str | dict[str, str | TiledImage]:
        if isinstance(part, str):
            return part
        source = part.url if is_data_uri(part.url) else fetch(part.url)
        return {"type": "image", "image": tile_image(source, **tiling)}

    whole = [{"role": role, "content": list(map(opened, parts))} for role, parts in read]
    return chat_prompt(whole, tokenizer)


def _read_message(message: Any) -> tuple[str, list[str | Picture]]:
    """A role, and texts and pictures in order."""
    role, content = role_and_content(message)
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in (None, "", [], {}):
            raise PromptError(f"a message's {printable(key)} is {quote(value)}; leave it out")
    parts = list(_parts(role, content))
    if role == "user" and not any(parts):
        raise PromptError("a user's message is empty; expected a text or a picture")
    return role, parts


def _parts(role: str, content: Any) -> Iterator[str | Picture]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in check("content", parts, ListOf(Instance(dict, "an object")), error=PromptError):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            yield part["text"]
        elif part.get("type") != "image_url" or not isinstance(url, str):
            raise PromptError(
                f'{quote(part)} is no content; expected {{"type": "text", "text": …}} or {{"type": '
                '"image_url", "image_url": {"url": "data:image/png;base64,…"}}'
            )
        elif role != "user":
            raise PromptError(f"a message of the {role} has a picture; only a user's may")
        else:
            yield Picture(url)
