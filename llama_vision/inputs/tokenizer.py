"""Text to token ids and back.

Three vocabularies sit behind one `Tokenizer`: Llama 3's byte pairs (through tiktoken),
SentencePiece pieces, and, for checkpoints that carry none, plain bytes. Llama 3's special tokens
follow the vocabulary's own ids; `<|image|>` is the first id past them all. Text that a user wrote
never becomes a special token.
"""

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece
import tiktoken

from llama_vision.config import TextConfig
from llama_vision.errors import LlamaVisionError

# Source: llama_models/llama3/tokenizer.py, Tokenizer.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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

LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
"""Characters that tiktoken is given at once, and in one run of (non-)space: it is slow beyond."""

LLAMA_3_VOCABULARY = 128_256


class TokenizerError(LlamaVisionError):
    """A tokenizer file that is missing, damaged, or not that of the checkpoint."""


class Vocabulary(Protocol):
    """Ids 0 … size - 1 and the bytes that each stands for."""

    size: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, none of them special."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What an id below `size` stands for."""
        ...


class BytePairs:
    """Llama 3's byte-pair encoding."""

    def __init__(self, ranks: dict[bytes, int]):
        self.size = len(ranks)
        self.encoding = tiktoken.Encoding(
            name="llama-3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length."""
        pieces = (piece for part in _parts(text) for piece in _cut_runs(part))
        return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]

    def token_bytes(self, token_id: int) -> bytes:
        """What an id stands for."""
        return self.encoding.decode_single_token_bytes(token_id)


def _parts(text: str) -> Iterable[str]:
    return (text[i : i + LONGEST_TEXT] for i in range(0, len(text), LONGEST_TEXT))


def _cut_runs(text: str) -> Iterable[str]:
    """Cut after every `LONGEST_RUN` characters in a row that are all space, or all not."""
    start = 0
    for run in re.finditer(rf"\s{{{LONGEST_RUN}}}(?=\s)|\S{{{LONGEST_RUN}}}(?=\S)", text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


class Pieces:
    """A SentencePiece model with byte fallback."""

    def __init__(self, model: bytes):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self.processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.processor.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What an id stands for; nothing for SentencePiece's own control pieces."""
        if self.processor.is_control(token_id):
            return b""
        piece = self.processor.id_to_piece(token_id)
        if self.processor.is_byte(token_id):
            return bytes([int(piece[1:-1], 16)])  # <0xE2>
        return piece.replace("\u2581", " ").encode()


class PlainBytes:
    """One id per byte: for weights that came without any tokenizer, such as test checkpoints."""

    size = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode(errors="replace"))

    def token_bytes(self, token_id: int) -> bytes:
        """The byte itself."""
        return bytes([token_id])


class Tokenizer:
    """A vocabulary, and Llama 3's special tokens from `first_special` on."""

    def __init__(self, vocabulary: Vocabulary, first_special: int, vocab_size: int):
        self.vocabulary = vocabulary
        self.first_special = first_special
        self.image_id = vocab_size
        self.special_ids = {name: first_special + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.special_ids["<|image|>"] = self.image_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS; `<|…|>` in it stays text."""
        return self.vocabulary.encode(text)

    def decode(self, token_ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; special tokens are left out, or written by name."""
        text = b"".join(self.token_bytes(token, special=special) for token in token_ids)
        return text.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        """The bytes of one id. A character may need those of several ids."""
        if token_id < self.vocabulary.size:
            return self.vocabulary.token_bytes(token_id)
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
        if path.is_file():
            vocabulary = _read_vocabulary(path)
            if vocabulary.size != config.bos_token_id:
                raise TokenizerError(
                    f"{path} has {vocabulary.size} tokens and config.json puts the first special "
                    f"token, bos_token_id, at {config.bos_token_id}; they must be equal: "
                    "the tokenizer is not that of this checkpoint"
                )
            return _with_special_tokens(vocabulary, config)
    if config.vocab_size == LLAMA_3_VOCABULARY or config.bos_token_id < PlainBytes.size:
        return None
    return _with_special_tokens(PlainBytes(), config)


def _with_special_tokens(vocabulary: Vocabulary, config: TextConfig) -> Tokenizer:
    room = config.vocab_size - config.bos_token_id
    needed = SPECIAL_TOKENS.index("<|python_tag|>") + 1
    if room < needed:
        raise TokenizerError(
            f"config.json leaves room for {room} special tokens (bos_token_id "
            f"{config.bos_token_id}, vocab_size {config.vocab_size}), expected {needed} at least"
        )
    return Tokenizer(vocabulary, config.bos_token_id, config.vocab_size)


def _read_vocabulary(path: Path) -> Vocabulary:
    data = path.read_bytes()
    try:
        if not data:
            raise ValueError("it is empty")
        if path.suffix == ".json":
            return BytePairs(_ranks_of_json(json.loads(data)))
        try:
            ranks = _ranks_of_tiktoken(data)
        except (ValueError, binascii.Error):  # not lines of base64: SentencePiece's format
            return Pieces(data)
        return BytePairs(ranks)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise TokenizerError(f"{path} is not a tokenizer that can be read: {error!r}") from None


def _ranks_of_tiktoken(data: bytes) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank, which is its id."""
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token, validate=True)] = int(rank)
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{len(ranks)} ranks that do not count from 0")
    return ranks


def _ranks_of_json(data: dict) -> dict[bytes, int]:
    """The `tokenizers` library's file, in which every byte is written as a printable character."""
    if data["model"]["type"] != "BPE":
        raise ValueError(f"model type {data['model']['type']}, expected BPE")
    byte_of = {character: byte for byte, character in enumerate(_printable_bytes())}
    return {
        bytes(byte_of[character] for character in token): rank
        for token, rank in data["model"]["vocab"].items()
    }


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in `tokenizer.json`.

    Printable Latin-1 characters stand for themselves, the others are numbered from U+0100.
    Source: GPT-2's published byte table.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
