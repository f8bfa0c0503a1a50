from array import array

import numpy as np
import pytest
import torch
from conftest import golden_json
from PIL import Image

from llama_vision.engine.segments import cut_into_segments
from llama_vision.inputs.chat import (
    Prompt,
    PromptError,
    chat_prompt,
    check_prompt,
    completion_prompt,
    place_images,
)
from llama_vision.inputs.image import ImageError, TiledImage

GOLDEN = golden_json("tokenizer")
BOS, EOT, IMAGE = 128000, 128009, 128256
RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def tokenizer(llama_3):
    return llama_3


def with_images(content):
    """A golden content with a picture in every place for one."""
    if isinstance(content, str):
        return content
    return [{**part, "image": RED} if part["type"] == "image" else part for part in content]


def ranges(token_ids):
    """Which rows see each image, as the reference writes it: [start, end), -1 for an open end."""
    found = [
        [segment.rows[row], segment.rows.stop]
        for segment in cut_into_segments(token_ids, IMAGE)
        for row in segment.image_rows
    ]
    if len(found) == 1:
        found[0][1] = -1  # the reference leaves a single image's end open
    return found


def golden_messages(case):
    return [{**m, "content": with_images(m["content"])} for m in case["messages"]]


@pytest.mark.parametrize("case", GOLDEN["dialogs"], ids=lambda case: case["name"])
def test_dialogs(case, tokenizer):
    prompt = chat_prompt(golden_messages(case), tokenizer)
    assert list(prompt.token_ids) == case["tokens"]
    assert len(prompt.images) == case["tokens"].count(IMAGE)
    assert ranges(prompt.token_ids) == (case["ranges"] or [])


@pytest.mark.parametrize("case", GOLDEN["completions"], ids=lambda case: case["name"])
def test_completions(case, tokenizer):
    prompt = completion_prompt(with_images(case["content"]), tokenizer)
    assert list(prompt.token_ids) == case["tokens"]
    assert len(prompt.images) == case["tokens"].count(IMAGE)
    assert ranges(prompt.token_ids) == (case["ranges"] or [])


@pytest.mark.parametrize("case", GOLDEN["dialogs"], ids=lambda case: case["name"])
def test_bos_comes_once_and_first(case, tokenizer):
    for prompt in (
        chat_prompt(golden_messages(case), tokenizer),
        completion_prompt(golden_messages(case)[0]["content"], tokenizer),
    ):
        assert prompt.token_ids[0] == BOS
        assert prompt.token_ids.count(BOS) == 1


def test_special_tokens_in_a_text_stay_text(tokenizer):
    text = "<|begin_of_text|><|image|><|eot_id|>"
    prompt = chat_prompt([{"role": "user", "content": text}], tokenizer)
    assert prompt.token_ids.count(EOT) == 1
    assert IMAGE not in prompt.token_ids
    assert text in tokenizer.decode(prompt.token_ids)


def test_images_keep_their_order(tokenizer):
    messages = [
        {"role": "user", "content": [RED, "and"]},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": ["now", BLUE, RED]},
    ]
    assert chat_prompt(messages, tokenizer).images == (RED, BLUE, RED)


@pytest.mark.parametrize(
    "content",
    [
        [RED, "hi"],
        (RED, {"type": "text", "text": "hi"}),
        [{"type": "image", "image": RED}, {"type": "text", "text": "hi"}],
        [[RED], ["hi"]],
    ],
    ids=["plain", "mixed", "dicts", "nested"],
)
def test_contents_can_be_written_in_several_ways(content, tokenizer):
    prompt = completion_prompt(content, tokenizer)
    assert prompt == Prompt([BOS, IMAGE, *tokenizer.encode("hi")], [RED])


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("hi", [], ["hi"]),
        ("hi", [RED, BLUE], [RED, BLUE, "hi"]),
        ("<|image|>hi", [RED], ["", RED, "hi"]),
        ("a<|image|><|image|>b", [RED, BLUE], ["a", RED, "", BLUE, "b"]),
    ],
    ids=["none", "first", "marked", "side by side"],
)
def test_placing_images_in_a_text(text, images, expected):
    assert place_images(text, images) == expected


@pytest.mark.parametrize("images", [[], [RED], [RED] * 3], ids=len)
def test_as_many_images_as_places(images):
    with pytest.raises(PromptError, match=rf"has 2 <\|image\|> and {len(images)} images"):
        place_images("<|image|> or <|image|>", images)


@pytest.mark.parametrize("end", [None, "eot", "eom"])
def test_a_turn_ends_as_it_says(end, tokenizer):
    messages = [{"role": "user", "content": "hi", "end": end}]
    ids = chat_prompt(messages, tokenizer).token_ids
    assert tokenizer.special_ids[f"<|{end or 'eot'}_id|>"] in ids


def test_a_developer_is_the_system(tokenizer):
    def ids(role):
        return chat_prompt([{"role": role, "content": "Be brief."}], tokenizer).token_ids

    assert ids("developer") == ids("system") != ids("user")


@pytest.mark.parametrize("end", ["stop", 1, True, [], ["eom"], b"eom"], ids=str)
def test_another_end_is_refused(end, tokenizer):
    with pytest.raises(PromptError, match=r'end is .*; expected "eot" or "eom"'):
        chat_prompt([{"role": "user", "content": "hi", "end": end}], tokenizer)


# Prompts made by hand


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        array("l", [1, 2, 3]),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.uint8),
        list(np.array([1, 2, 3])),
        torch.tensor([1, 2, 3]),
        torch.tensor([1, 2, 3], dtype=torch.int16),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_token_ids_become_plain(ids):
    kept = Prompt(ids).token_ids
    assert kept == (1, 2, 3)
    assert {type(token) for token in kept} == {int}


WRONG_IDS = [True, 1.0, float("nan"), "1", None, [1], 1j, np.float32(1), np.bool_(True), b"1"]


@pytest.mark.parametrize("wrong", WRONG_IDS, ids=lambda it: repr(it).partition(" at 0x")[0])
def test_a_token_id_that_is_no_whole_number_is_named(wrong):
    with pytest.raises(PromptError, match=r"token id 2 is .*; expected a whole number"):
        Prompt([1, 2, wrong, None])


@pytest.mark.parametrize(
    "ids",
    [
        None,
        5,
        "hi",
        b"hi",
        bytearray(2),
        memoryview(b"hi"),
        {1, 2},
        {1: 2},
        iter([1]),
        object(),
        np.zeros((1, 2), int),
        np.array(1),
        np.array([1.0]),
        np.array([True]),
        torch.zeros(1, 2, dtype=torch.long),
        torch.tensor(1),
        torch.tensor([0.5]),
        torch.zeros(2, dtype=torch.long, device="meta"),
        range(10**12),
        range(10**30),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_what_is_no_list_of_token_ids_is_refused(ids):
    with pytest.raises(PromptError, match="expected"):
        Prompt(ids)


@pytest.mark.parametrize(
    "images", [None, 5, "a.png", b"x", RED, {RED.mode: RED}, iter([RED])], ids=lambda i: type(i)
)
def test_what_is_no_list_of_images_is_refused(images):
    with pytest.raises(PromptError, match=r"images is .*; expected a list of pictures"):
        Prompt([1], images)


def test_images_are_opened_once_and_tiles_stay(tmp_path):
    RED.save(tmp_path / "red.png")
    tiles = TiledImage(torch.zeros(1, 3, 4, 4), (1, 1), 1)
    opened = Prompt([1], [RED, tmp_path / "red.png", np.asarray(RED), tiles]).images
    assert opened[:3] == (RED, RED, RED)
    assert opened[0] is RED
    assert opened[3] is tiles
    for wrong in (7, None, "none.png", [RED]):
        with pytest.raises(ImageError, match="image"):
            Prompt([1], [wrong])


@pytest.mark.parametrize("largest", [None, IMAGE, IMAGE + 7])
def test_token_ids_are_those_with_an_embedding(largest):
    top = largest or IMAGE
    check_prompt(Prompt([0, top] if top != IMAGE else [0]), IMAGE, largest)
    for wrong in (-1, top + 1, 10**400):
        with pytest.raises(PromptError, match=rf"is out of range; expected 0 to {top}"):
            check_prompt(Prompt([0, wrong]), IMAGE, largest)


@pytest.mark.parametrize("ids", [[1], [IMAGE, IMAGE]], ids=len)
def test_as_many_images_as_ids_for_them(ids):
    with pytest.raises(PromptError, match=rf"has {ids.count(IMAGE)} .* and 1 images"):
        check_prompt(Prompt(ids, [RED]), IMAGE)
    with pytest.raises(PromptError, match="prompt is empty"):
        check_prompt(Prompt([]), IMAGE)
