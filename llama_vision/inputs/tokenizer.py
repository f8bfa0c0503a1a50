"""Text to token ids and back.

Behind one `Tokenizer` stands a vocabulary of ordinary tokens. Llama 3's special tokens follow its
ids; `<|image|>` is as a rule the first id past them all. Text that a user wrote never becomes a
special token; it may become one of the ordinary ones that fine-tuning has added.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_vision.config import TextConfig
from llama_vision.errors import quote
from llama_vision.inputs.vocabulary import (
    PlainBytes,
    TokenizerError,
    Vocabulary,
    read_vocabulary,
)
from llama_vision.reading import is_there, read_json, shown

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
"""In the order of their ids. The last is a placeholder: the model reads images at `image_id`."""

LLAMA_3_VOCABULARY = 128_256


class AddedToken(NamedTuple):
    """A token past the vocabulary, as the `tokenizers` library's files describe it."""

    content: str
    special: bool
    """Left out of text, and never made of text."""
    plain: bool
    """Whether it is made of text wherever its content stands there, spaces around it or not."""


class Tokenizer:
    """A vocabulary, and Llama 3's special tokens from `first_special` on.

    Args:
        image_id: of `<|image|>`.
        added: tokens past the vocabulary that the files name, by id. Those with rules about the
            spaces and words around them are read and not written: their text stays text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        first_special: int,
        image_id: int,
        added: Mapping[int, AddedToken] | None = None,
    ):
        self.vocabulary = vocabulary
        self.first_special = first_special
        self.image_id = image_id
        self.special_ids = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.special_ids["<|image|>"] = self.image_id
        named = set(self.special_ids.values())
        self.added = {i: token for i, token in (added or {}).items() if i not in named}
        self.written = {t.content: i for i, t in self.added.items() if t.plain and not t.special}
        longest_first = sorted(self.written, key=len, reverse=True)
        self._written = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS; `<|…|>` in it stays text."""
        if not self.written:
            return self.vocabulary.encode(text)
        ids: list[int] = []
        for part in filter(None, self._written.split(text)):
            token = self.written.get(part)
            ids += self.vocabulary.encode(part) if token is None else [token]
        return ids

    def decode(self, token_ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out, or written by name."""
        text = b"".join(self.token_bytes(token, special=special) for token in token_ids)
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes of one id. A character may need those of several ids."""
        if token_id < self.vocabulary.size:
            return self.vocabulary.token_bytes(token_id)
        if token := self.added.get(token_id):
            return token.content.encode() if special or not token.special else b""
        return self._special_name(token_id).encode() if special else b""

    def _special_name(self, token_id: int) -> str:
        number = token_id - self.first_special
        if token_id == self.image_id:
            return "<|image|>"
        if 0 <= number < len(SPECIAL_TOKENS):
            return SPECIAL_TOKENS[number]
        # Two reserved tokens stand among the named ones.
        return f"<|reserved_special_token_{number - len(SPECIAL_TOKENS) + 2}|>"


def needed(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer.

    Raises:
        TokenizerError: the checkpoint came without one.
    """
    if tokenizer is None:
        raise TokenizerError(
            "this checkpoint has no tokenizer.model or tokenizer.json, and text needs one; "
            "put the file beside config.json, or pass a Prompt of token ids"
        )
    return tokenizer


class TextStream:
    """Decodes ids as they come; gives out whole characters only."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """The characters that this id completes."""
        return self.decoder.decode(self.tokenizer.token_bytes(token_id))

    def end(self) -> str:
        """What is left of a character that never became whole."""
        return self.decoder.decode(b"", final=True)


def load_tokenizer(directory: Path, config: TextConfig) -> Tokenizer | None:
    """The tokenizer of a checkpoint.

    From `tokenizer.model` (Llama 3's or SentencePiece's), `original/tokenizer.model` or
    `tokenizer.json`. Without any of them: plain bytes where the vocabulary has room for them and is
    not Llama 3's (whose file then is missing): None.

    Raises:
        TokenizerError: a file is damaged, or its size contradicts config.json.
    """
    for name in ("tokenizer.model", "original/tokenizer.model", "tokenizer.json"):
        path = directory / name
        if is_there(path):
            vocabulary = read_vocabulary(path)
            if vocabulary.size != config.bos_token_id:
                raise TokenizerError(
                    f"{shown(path)} has {vocabulary.size} tokens and config.json puts the first "
                    f"special token, bos_token_id, at {config.bos_token_id}; they must be equal: "
                    "the tokenizer is not that of this checkpoint"
                )
            return _with_special_tokens(vocabulary, config, _read_added(directory, config))
    if config.vocab_size >= LLAMA_3_VOCABULARY or config.bos_token_id < PlainBytes.size:
        return None
    return _with_special_tokens(PlainBytes(), config, _read_added(directory, config))


def _with_special_tokens(
    vocabulary: Vocabulary, config: TextConfig, added: dict[int, AddedToken]
) -> Tokenizer:
    room = config.vocab_size - config.bos_token_id
    needed = SPECIAL_TOKENS.index("<|python_tag|>") + 1
    if room < needed:
        raise TokenizerError(
            f"config.json leaves room for {room} special tokens (bos_token_id "
            f"{config.bos_token_id}, vocab_size {config.vocab_size}), expected {needed} at least"
        )
    if config.image_token_id < config.bos_token_id + needed:
        raise TokenizerError(
            f"config.json: image_token_index is {config.image_token_id}, which is another token's "
            f"id; expected {config.bos_token_id + needed} or more"
        )
    return Tokenizer(vocabulary, config.bos_token_id, config.image_token_id, added)


def _read_added(directory: Path, config: TextConfig) -> dict[int, AddedToken]:
    """Tokens past the vocabulary, of tokenizer_config.json or else of tokenizer.json.

    Those that the model has no embedding for are left out.
    """
    for name, field in (
        ("tokenizer_config.json", "added_tokens_decoder"),
        ("tokenizer.json", "added_tokens"),
    ):
        path = directory / name
        data = read_json(path, TokenizerError) if is_there(path) else {}
        if not (entries := data.get(field)):
            continue
        try:
            if field == "added_tokens":
                entries = {entry["id"]: entry for entry in entries}
            tokens = {int(token_id): _added_token(entry) for token_id, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            raise TokenizerError(
                f"{shown(path)}: {field} is {quote(entries)}; expected the id, content and "
                "flags of each token"
            ) from None
        size, first = config.vocab_size, config.bos_token_id
        return {i: token for i, token in tokens.items() if first <= i < size}
    return {}


def _added_token(entry: dict[str, Any]) -> AddedToken:
    content, flags = entry["content"], ("lstrip", "rstrip", "single_word")
    if not isinstance(content, str) or not content.encode():  # which refuses half a character
        raise ValueError
    plain = not any(entry.get(flag) for flag in flags)
    return AddedToken(content, bool(entry.get("special")), plain)
