"""A vocabulary that fine-tuning has extended around `<|image|>`, whose id stays what it was."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, Conversation, assert_close, case_inputs
from safetensors.torch import load_file, save_file

from llama_vision.checkpoint.config_json import config_from_dict, config_to_dict, read_config
from llama_vision.checkpoint.loading import load_model
from llama_vision.inputs.tokenizer import load_tokenizer
from llama_vision.inputs.vocabulary import TokenizerError
from llama_vision.model.model import LlamaVisionModel

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
OLD, NEW, IMAGE, ADDED = 512, 514, 512, 513
CASES = ["text_only", "image_first", "two_images", "consecutive"]


def load(directory: Path) -> LlamaVisionModel:
    config = read_config(directory)
    return load_model(directory, config, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """The tiny checkpoint with two tokens more: the first of them has the id of `<|image|>`."""
    directory = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("extended") / "checkpoint"))
    data = json.loads((directory / "config.json").read_text())
    data["text_config"]["vocab_size"] = NEW
    (directory / "config.json").write_text(json.dumps(data))
    for shard in directory.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, rows in ((EMBEDDING, NEW + 8), (HEAD, NEW)):
            if name in tensors:
                more = torch.randn(rows - len(tensors[name]), 64)
                tensors[name] = torch.cat([tensors[name], more])
        save_file(tensors, shard)
    return directory


def test_the_image_id_stays_and_the_tensors_are_larger(extended):
    model = load(extended)
    assert model.config.text.vocab_size == NEW
    assert model.config.text.image_token_id == IMAGE < model.config.text.vocab_size
    assert model.config.text.largest_token_id == ADDED
    assert read_config(TINY).text.largest_token_id == IMAGE
    assert model.text.embed_tokens.weight.shape == (NEW + 8, 64)
    assert model.text.lm_head.weight.shape == (NEW, 64)
    assert config_from_dict(config_to_dict(model.config)) == model.config


@pytest.mark.parametrize("case", CASES)
def test_old_tokens_have_the_logits_that_they_had(extended, tiny, case):
    want, got = Conversation(tiny.model), Conversation(load(extended))
    token_ids, images = case_inputs(case)[0]
    logits = got.go_on(token_ids, images)
    assert logits.shape == (len(token_ids), NEW)
    assert_close("logits", logits[:, :OLD], want.go_on(token_ids, images), 1e-5)


def test_logits_are_those_of_transformers(tmp_path):
    """Of a checkpoint that transformers saved; with text alone, since its encoder is one late."""
    transformers = pytest.importorskip("transformers", minversion="5.17")
    mllama = importlib.import_module("transformers.models.mllama")
    data = config_to_dict(read_config(TINY))
    data["text_config"]["vocab_size"] = NEW
    torch.manual_seed(0)
    model = mllama.MllamaForConditionalGeneration(transformers.MllamaConfig(**data)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + name.endswith("norm.weight"))
        model.save_pretrained(tmp_path)
        token_ids = [500, 104, 105, ADDED, 511, 7, 300, 2]
        want = model(input_ids=torch.tensor([token_ids])).logits[0]
    assert_close("logits", Conversation(load(tmp_path)).go_on(token_ids), want, 2e-4)


FLAGS = dict.fromkeys(("lstrip", "rstrip", "single_word", "special"), False)
BOX = {"content": "<box>", **FLAGS}
PLACES = ["tokenizer_config.json", "tokenizer.json"]


def write_tokenizer(directory: Path, place: str, entries: object) -> Path:
    """Added tokens in one of the two files that may name them; the second needs a vocabulary."""
    data = {"added_tokens_decoder": entries}
    if place == "tokenizer.json":
        byte_of = [*range(33, 127), *range(161, 173), *range(174, 256)]
        characters = [*map(chr, byte_of), *(chr(256 + i) for i in range(256 - len(byte_of)))]
        pairs = [a + b for a in characters[:20] for b in characters[:20]][: 500 - 256]
        vocab = {token: rank for rank, token in enumerate(characters + pairs)}
        if isinstance(entries, dict):
            entries = [{"id": int(i), **entry} for i, entry in entries.items()]
        data = {"model": {"type": "BPE", "vocab": vocab}, "added_tokens": entries}
    (directory / place).write_text(json.dumps(data))
    return directory


@pytest.mark.parametrize("place", PLACES)
def test_added_tokens_are_read_and_written_by_their_content(extended, tmp_path, place):
    entries = {"500": {"content": "<|x|>", **FLAGS}, "511": BOX | {"content": "<loc>"}}
    entries |= {str(ADDED): BOX, "514": {"content": "<past>", **FLAGS}}
    write_tokenizer(tmp_path, place, entries)
    tokenizer = load_tokenizer(tmp_path, read_config(extended).text)
    text = "a <box><loc> <|x|><|image|><past>b<box>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [token for token in ids if token >= tokenizer.first_special] == [ADDED, 511, ADDED]
    assert tokenizer.image_id == IMAGE
    assert tokenizer.decode([500, IMAGE], special=True) == "<|begin_of_text|><|image|>"


@pytest.mark.parametrize("flag", FLAGS)
def test_added_tokens_with_rules_of_their_own_are_read_and_not_written(extended, tmp_path, flag):
    write_tokenizer(tmp_path, PLACES[0], {str(ADDED): BOX | {flag: True}})
    tokenizer = load_tokenizer(tmp_path, read_config(extended).text)
    assert tokenizer.encode("<box>") == list(b"<box>")
    assert tokenizer.decode([104, ADDED]) == ("h" if flag == "special" else "h<box>")
    assert tokenizer.decode([104, ADDED], special=True) == "h<box>"


@pytest.mark.parametrize(
    "text", ["<box>", "a<box>b", "<box2> <box>2", "<bo<box>x>", "<box", "<boxb<box>"]
)
def test_text_becomes_added_tokens_as_in_the_tokenizers_library(extended, tmp_path, text):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE({chr(i): i for i in range(256)}, []))
    contents = {511: "<box", ADDED: "<box>"}
    theirs.add_tokens([tokenizers.AddedToken(content) for content in contents.values()])
    names = {theirs.token_to_id(content): i for i, content in contents.items()}
    entries = {str(i): BOX | {"content": content} for i, content in contents.items()}
    write_tokenizer(tmp_path, PLACES[0], entries)
    ours = load_tokenizer(tmp_path, read_config(extended).text)
    assert ours.encode(text) == [names.get(token, token) for token in theirs.encode(text).ids]


ODD_ENTRIES = [
    *(5, "x", [5], [[]], True, [None], [{"id": float("inf"), "content": "x"}]),
    *({"513": entry} for entry in ({}, {"content": 5}, {"content": ""}, {"content": "\ud800"})),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("entries", ODD_ENTRIES, ids=lambda value: ascii(value)[:30])
def test_odd_entries_name_the_file(extended, tmp_path, place, entries):
    write_tokenizer(tmp_path, place, entries)
    with pytest.raises(TokenizerError, match=rf"{place}: added_tokens\w* is ") as error:
        load_tokenizer(tmp_path, read_config(extended).text)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("image_id", [1, 255, 499, 500, 510])
def test_an_image_id_that_is_another_token_s_is_refused(tmp_path, image_id):
    data = config_to_dict(read_config(TINY)) | {"image_token_index": image_id}
    with pytest.raises(TokenizerError, match=rf"image_token_index is {image_id}, .* 511 or more"):
        load_tokenizer(tmp_path, config_from_dict(data).text)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_a_tokenizer_file_that_is_no_file_is_named(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"{name} cannot be read"):
        load_tokenizer(tmp_path, read_config(TINY).text)
