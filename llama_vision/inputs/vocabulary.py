"""The vocabularies that a checkpoint may come with, and the files that hold them.

Llama 3's byte pairs (through tiktoken), SentencePiece pieces, and, for checkpoints that carry none,
plain bytes.
"""

import base64
import binascii
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tiktoken

from llama_vision.errors import LlamaVisionError, printable, quote
from llama_vision.reading import read_bytes, read_json, shown

# Source: llama_models/llama3/tokenizer.py, Tokenizer.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_TEXT = 400_000
LONGEST_RUN = 25_000
"""Characters that tiktoken is given at once, and in one run of (non-)space: it is slow beyond."""


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
        self.bytes = [self._bytes(token_id) for token_id in range(self.size)]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; half a surrogate pair is read as U+FFFD."""
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.processor.encode(whole)

    def token_bytes(self, token_id: int) -> bytes:
        """What an id stands for; nothing for SentencePiece's own control pieces."""
        return self.bytes[token_id]

    def _bytes(self, token_id: int) -> bytes:
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


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.model` of either kind, or in a `tokenizer.json`.

    Raises:
        TokenizerError: the file is damaged, or of another kind.
    """
    try:
        if path.suffix == ".json":
            return BytePairs(_checked(_ranks_of_json(read_json(path, TokenizerError))))
        data = read_bytes(path, TokenizerError)
        if not data:
            raise ValueError("it is empty")
        try:
            ranks = _ranks_of_tiktoken(data)
        except (ValueError, binascii.Error):  # not lines of base64: SentencePiece's format
            return Pieces(data)
        return BytePairs(_checked(ranks))
    except TokenizerError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        what = printable(error, 200) if isinstance(error, ValueError) else type(error).__name__
        raise TokenizerError(f"{shown(path)} is not a tokenizer that can be read: {what}") from None


def _ranks_of_tiktoken(data: bytes) -> dict[bytes, int]:
    """Lines of a token in base64 and its rank, which is its id."""
    lines = [line.split() for line in data.splitlines()]
    return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


def _ranks_of_json(data: dict[str, Any]) -> dict[bytes, int]:
    """The `tokenizers` library's file, in which every byte is written as a printable character."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise ValueError(f"model type {quote(kind)}, expected BPE")
    byte_of = {character: byte for byte, character in enumerate(_printable_bytes())}
    if not isinstance(vocab := model.get("vocab"), dict):
        raise ValueError(f"vocab {quote(vocab)}, expected tokens and their ids")
    if not set().union(*vocab) <= byte_of.keys():
        raise ValueError("tokens of characters that stand for no byte")
    return {bytes(byte_of[character] for character in token): rank for token, rank in vocab.items()}


def _checked(ranks: dict[bytes, Any]) -> dict[bytes, int]:
    """Byte pairs count from 0, and all texts can be written in them."""
    if not all(type(rank) is int for rank in ranks.values()):
        raise ValueError("ranks that are no whole numbers")
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{len(ranks)} ranks that do not count from 0")
    lacking = sum(bytes([byte]) not in ranks for byte in range(256))
    if lacking:
        raise ValueError(f"{lacking} of the 256 bytes have no token")
    return ranks


def _printable_bytes() -> list[str]:
    """The character that stands for each byte in `tokenizer.json`.

    Printable Latin-1 characters stand for themselves, the others are numbered from U+0100.
    Source: GPT-2's published byte table.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
