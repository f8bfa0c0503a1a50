"""Special tokens that a text names, such as `<|eot_id|>`: to find them, and to read them as such.

A text stays text unless its owner asks for this: whoever can write `<|eot_id|>` into a prompt that
is read so can end the user's turn and begin another.
"""

import copy
import re
from functools import partial

from llama_vision.inputs.tokenizer import Tokenizer

BEGIN_OF_TEXT = "<|begin_of_text|>"


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of every special token, by name: those without a use, and those added, too."""
    added = tokenizer.added
    ids = {*range(tokenizer.first_special, tokenizer.image_id), *added}
    special = [token for token in sorted(ids) if token not in added or added[token].special]
    names = {tokenizer.decode([token], special=True): token for token in special}
    return names | tokenizer.special_ids


def special_names(text: str, tokenizer: Tokenizer) -> list[str]:
    """The names of special tokens in a text, each once, in the order in which they come."""
    return list(dict.fromkeys(_names(special_tokens(tokenizer)).findall(text)))


def encode_with_special(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which the names of special tokens are read as those tokens."""
    tokens = special_tokens(tokenizer)
    ids: list[int] = []
    for part in _names(tokens).split(text):
        ids += [tokens[part]] if part in tokens else tokenizer.encode(part)
    return ids


def reading_special(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer whose `encode` is `encode_with_special`, to make prompts with."""
    reader = copy.copy(tokenizer)
    reader.encode = partial(encode_with_special, tokenizer=tokenizer)
    return reader


def _names(tokens: dict[str, int]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, tokens))})")
