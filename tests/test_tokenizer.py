import base64
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import sentencepiece
from conftest import LLAMA_3, TINY, golden_json, llama_3_file

from llama_vision.checkpoint.config_json import read_config
from llama_vision.config import TextConfig
from llama_vision.inputs.tokenizer import TextStream, Tokenizer, load_tokenizer
from llama_vision.inputs.vocabulary import TokenizerError

TINY_TEXT = read_config(TINY).text
GOLDEN = golden_json("tokenizer")
STRINGS = [case for case in GOLDEN["strings"] if "text" in case]
RUNS = [case for case in GOLDEN["strings"] if "repeat" in case]
ALL_BYTES = b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))
UNREADABLE = "{} is not a tokenizer that can be read"
MULTIBYTE = "naïve 😀👨‍👩‍👧‍👦🏽 日本語 ﷺ𝒳 한국어"


def directory_with(tmp_path: Path, name: str, data: bytes) -> Path:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    return tmp_path


def with_vocabulary_of(size: int) -> TextConfig:
    """A config whose special tokens begin at `size`."""
    return dataclasses.replace(TINY_TEXT, bos_token_id=size, vocab_size=size + 12)


def sentencepiece_model() -> bytes:
    """A tiny SentencePiece model with byte fallback that keeps every space."""
    sentences = ["a red circle and a blue square", "the circle is left of it"] * 20
    model = io.BytesIO()
    sizes = {"vocab_size": 400, "hard_vocab_limit": False, "byte_fallback": True}
    spaces = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    how = {**sizes, **spaces, "normalization_rule_name": "identity", "minloglevel": 2}
    train = sentencepiece.SentencePieceTrainer.train
    train(sentence_iterator=iter(sentences), model_writer=model, **how)
    return model.getvalue()


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> Tokenizer:
    model = sentencepiece_model()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    directory = directory_with(tmp_path_factory.mktemp("pieces"), "tokenizer.model", model)
    return load_tokenizer(directory, with_vocabulary_of(size))


@pytest.fixture(scope="module")
def plain_bytes() -> Tokenizer:
    return load_tokenizer(TINY, TINY_TEXT)


@pytest.mark.parametrize("case", STRINGS, ids=lambda case: repr(case["text"])[:30])
def test_ids_of_golden_strings(llama_3, case):
    assert llama_3.encode(case["text"]) == case["ids"]
    assert llama_3.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", RUNS, ids=lambda case: f"{case['n']} times {case['repeat']!r}")
def test_ids_of_long_runs(llama_3, case):
    ids = llama_3.encode(case["repeat"] * case["n"])
    assert (len(ids), sum(ids)) == (case["ids_len"], case["ids_sum"])
    assert (ids[:8], ids[-8:]) == (case["first"], case["last"])


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: repr(case["text"]))
def test_decoding_with_special_tokens_by_name(llama_3, case):
    assert llama_3.decode(case["ids"], special=True) == case["text"]


def test_special_ids(llama_3):
    expected = {**GOLDEN["specials"], "<|image|>": 128256}
    assert expected.items() <= llama_3.special_ids.items()
    assert llama_3.image_id == 128256
    for name, id_ in {**expected, **GOLDEN["reserved_example"]}.items():
        assert llama_3.decode([id_], special=True) == name


@pytest.mark.parametrize("case", GOLDEN["strings_special_allowed"], ids=lambda case: case["text"])
def test_special_tokens_around_text(llama_3, case):
    """Ids built from special ids and text equal those of the reference for the whole string."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", case["text"]):
        special = llama_3.special_ids.get(part)
        ids += llama_3.encode(part) if special is None else [special]
    assert ids == [128256 if id_ == 128011 else id_ for id_ in case["ids"]]


@pytest.mark.parametrize("name", ["<|image|>", "<|eot_id|>", "<|reserved_special_token_7|>"])
@pytest.mark.parametrize("kind", ["llama_3", "pieces", "plain_bytes"])
def test_text_never_becomes_a_special_token(kind, name, request):
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(f"say {name} twice: {name}")
    assert max(ids) < tokenizer.first_special
    assert tokenizer.decode(ids) == f"say {name} twice: {name}"


def test_special_tokens_are_left_out_of_text(llama_3):
    ids = [128000, *llama_3.encode("hi"), 128256, 128011, 128255, 128009]
    assert llama_3.decode(ids) == "hi"


def test_a_very_long_text_round_trips(llama_3):
    text = "word " * 90_000 + "x" * 30_000 + " \n" * 15_000
    assert llama_3.decode(llama_3.encode(text)) == text


def printable_table() -> dict[int, str]:
    """Byte -> the character that stands for it, as GPT-2's files write it."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(moved)}


def test_tokenizer_json_gives_the_ids_of_tokenizer_model(llama_3, tmp_path):
    table, lines = printable_table(), llama_3_file().read_bytes().splitlines()
    vocab = {
        base64.b64decode(token).decode("latin-1").translate(table): int(rank)
        for token, rank in map(bytes.split, lines)
    }
    data = json.dumps({"model": {"type": "BPE", "vocab": vocab}}).encode()
    from_json = load_tokenizer(directory_with(tmp_path, "tokenizer.json", data), LLAMA_3)
    assert from_json.special_ids == llama_3.special_ids
    for case in STRINGS:
        assert from_json.encode(case["text"]) == case["ids"]
    for id_ in (0, 187, 255, 256, 99_999, 127_999):
        assert from_json.token_bytes(id_) == llama_3.token_bytes(id_)


def test_a_model_file_below_original_is_found(tmp_path):
    data = llama_3_file().read_bytes()
    tokenizer = load_tokenizer(directory_with(tmp_path, "original/tokenizer.model", data), LLAMA_3)
    assert tokenizer.encode("Hello world") == [9906, 1917]


def test_without_files_a_small_vocabulary_is_plain_bytes(plain_bytes):
    assert plain_bytes.encode("é!") == [0xC3, 0xA9, ord("!")]
    assert plain_bytes.special_ids["<|begin_of_text|>"] == TINY_TEXT.bos_token_id
    assert plain_bytes.image_id == TINY_TEXT.vocab_size
    assert plain_bytes.decode([104, 300, 105, TINY_TEXT.vocab_size]) == "hi"


@pytest.mark.parametrize("config", [LLAMA_3, with_vocabulary_of(255)])  # no room for bytes
def test_without_files_there_may_be_no_tokenizer(config, tmp_path):
    assert load_tokenizer(tmp_path, config) is None


@pytest.mark.parametrize(
    "text",
    ["a red circle", "  two  spaces ", "", "\n\n", MULTIBYTE, "<s></s><unk><0x41>", "zzz \x00"],
)
def test_sentencepiece_round_trips(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert all(0 <= id_ < pieces.first_special for id_ in ids)


def test_sentencepiece_uses_its_pieces(pieces):
    assert len(pieces.encode("a red circle")) < len("a red circle")
    assert pieces.decode([1, 2]) == ""  # its own <s> and </s>


def streamed(tokenizer: Tokenizer, ids: bytes | list[int]) -> tuple[list[str], str]:
    """What comes with each id, and what is left at the end."""
    stream = TextStream(tokenizer)
    return [stream.add(id_) for id_ in ids], stream.end()


@pytest.mark.parametrize("kind", ["llama_3", "pieces", "plain_bytes"])
def test_a_stream_gives_whole_characters_only(kind, request):
    tokenizer = request.getfixturevalue(kind)
    pieces, rest = streamed(tokenizer, tokenizer.encode(MULTIBYTE))
    assert "" in pieces  # some ids end inside a character
    assert "".join(pieces) == MULTIBYTE
    assert rest == ""


@pytest.mark.parametrize(
    ("ids", "pieces", "rest"),
    [
        ("é😀日".encode(), ["", "é", "", "", "", "😀", "", "", "日"], ""),
        ("😀".encode()[:3], ["", "", ""], "\ufffd"),  # it never becomes whole
        ([0xC3, 509, 0xA9], ["", "", "é"], ""),  # 509 is <|eot_id|>
    ],
)
def test_a_stream_gives_a_character_with_its_last_byte(plain_bytes, ids, pieces, rest):
    assert streamed(plain_bytes, ids) == (pieces, rest)


def test_a_sentencepiece_model_of_another_size_is_refused(tmp_path):
    directory = directory_with(tmp_path, "tokenizer.model", sentencepiece_model())
    with pytest.raises(TokenizerError, match="must be equal"):
        load_tokenizer(directory, with_vocabulary_of(10_000))


def test_a_config_without_room_for_special_tokens_is_refused(tmp_path):
    config = dataclasses.replace(TINY_TEXT, vocab_size=TINY_TEXT.bos_token_id + 5)
    with pytest.raises(TokenizerError, match="room for 5 special tokens"):
        load_tokenizer(tmp_path, config)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("tokenizer.model", ALL_BYTES, "256 tokens.*bos_token_id, at 500"),
        ("tokenizer.model", b"", "it is empty"),
        ("tokenizer.model", b"\x0a\xff\xff\xff garbage", UNREADABLE),
        ("tokenizer.model", b"YQ== 0\nYg== 2", UNREADABLE),  # a gap in the ranks
        ("tokenizer.model", b"YQ== 0\nYg== 1", f"{UNREADABLE}: 254 of the 256 bytes"),
        ("tokenizer.json", b"{", "{} cannot be read as JSON"),
        ("tokenizer.json", b"[]", "{} holds a list"),
        ("tokenizer.json", b"{}", UNREADABLE),
        ("tokenizer.json", b'{"model": 5}', UNREADABLE),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": []}}', UNREADABLE),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": "0"}}}', UNREADABLE),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": 1}}}', UNREADABLE),
        ("tokenizer.json", b'{"model": {"type": "Unigram", "vocab": {}}}', UNREADABLE),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"日": 0}}}'.encode(), UNREADABLE),
    ],
)
def test_a_file_that_does_not_fit_or_is_damaged_is_named(name, data, says, tmp_path):
    with pytest.raises(TokenizerError, match=says.format(name)):
        load_tokenizer(directory_with(tmp_path, name, data), TINY_TEXT)
