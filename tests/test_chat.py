import pytest
from conftest import golden_json
from PIL import Image

from llama_vision.engine.segments import cut_into_segments
from llama_vision.inputs.chat import PromptError, chat_prompt, completion_prompt, place_images
from llama_vision.inputs.image import ImageError

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
    assert prompt.token_ids == case["tokens"]
    assert len(prompt.images) == case["tokens"].count(IMAGE)
    assert ranges(prompt.token_ids) == (case["ranges"] or [])


@pytest.mark.parametrize("case", GOLDEN["completions"], ids=lambda case: case["name"])
def test_completions(case, tokenizer):
    prompt = completion_prompt(with_images(case["content"]), tokenizer)
    assert prompt.token_ids == case["tokens"]
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
    assert chat_prompt(messages, tokenizer).images == [RED, BLUE, RED]


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
    assert (prompt.token_ids, prompt.images) == ([BOS, IMAGE, *tokenizer.encode("hi")], [RED])


def test_an_image_can_be_a_path(tokenizer, tmp_path):
    RED.save(tmp_path / "red.png")
    for path in (tmp_path / "red.png", str(tmp_path / "red.png")):
        (image,) = completion_prompt({"type": "image", "image": path}, tokenizer).images
        assert image.getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ImageError, match="does not exist"):
        completion_prompt({"type": "image", "image": tmp_path / "none.png"}, tokenizer)


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


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "conversation is empty"),
        (["hi"], "is no message"),
        ([{"role": "user"}], "is no message"),
        ([{"role": "tool", "content": "x"}], "role 'tool' is unknown"),
        ([{"role": "user", "content": 7}], "content of type int"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "video", "video": 1}]}], "is no content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "is no content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "is no content"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_conversation_is_refused(messages, says, tokenizer):
    with pytest.raises(PromptError, match=says):
        chat_prompt(messages, tokenizer)
