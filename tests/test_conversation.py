"""Conversations: a turn runs its own rows only, and is what a fresh prefill of all would give."""

import json
import random

import pytest
import torch
from conftest import GOLDEN, assert_close
from PIL import Image

from llama_vision import Chat, ImageCache, LlamaVision, MaxMin, Prompt, TopK, TrimmedLlama
from llama_vision.cache.pruning import PruningError
from llama_vision.chat.saved import ChatFileError
from llama_vision.chat.turn import answer_ids_of, known_ids
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.engine.engine import EngineError
from llama_vision.errors import LlamaVisionError, SettingError
from llama_vision.inputs.image import ImageError, tile_image
from llama_vision.inputs.messages import PromptError

SHORT = {"temperature": 0, "max_new_tokens": 6, "top_logprobs": 2}
PICTURES = [GOLDEN / "images" / name for name in ("rgb_120x30.png", "rgb_57x200.png")]
RULES = [
    None,
    MaxMin(0.4, merge=True),
    TrimmedLlama(0.1, votes="last"),
    TopK(9, trim_first_layer=False),
]


@pytest.fixture(scope="module")
def pico() -> LlamaVision:
    """The small model that comes with the code: its answers end by themselves."""
    return LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype="float32")


def history(chat: Chat) -> Prompt:
    """All of a conversation as one prompt."""
    ids = [token for turn in chat.turns for token in (*turn.prompt.token_ids, *turn.answer_ids)]
    return Prompt(ids, [image for turn in chat.turns for image in turn.prompt.images])


def asked_at_once(model: LlamaVision, chat: Chat, content, **settings):
    """The answer to one more question, with all that was said before run anew."""
    so_far, question = history(chat), model.prompt([{"role": "user", "content": content}])
    ids = question.token_ids[1:] if chat.turns else question.token_ids
    prompt = Prompt([*so_far.token_ids, *ids], [*so_far.images, *question.images])
    return model.generate(prompt, max_seq_len=2048, **settings)


def assert_alike(got, want):
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert_close("logprobs", torch.tensor(got.logprobs), torch.tensor(want.logprobs), 1e-4)


@pytest.mark.parametrize("which", ["tiny", "pico"])
def test_three_turns_with_pictures_in_the_first_and_the_third(which, request):
    model = request.getfixturevalue(which)
    chat = model.chat(**SHORT)
    questions = [
        [Image.open(PICTURES[0]), "What is this?"],
        "Which colours has it?",
        [Image.open(PICTURES[1]), "And this?"],
    ]
    rows = 0
    for question in questions:
        want = asked_at_once(model, chat, question, **SHORT)
        unread = chat.turns[-1:] and len(chat.turns[-1].answer_ids) - len(
            chat.turns[-1].completion.token_ids
        )
        got = chat.ask(question)
        assert_alike(got, want)
        # Its own rows, the token of the last answer that was not fed back, and the end of a turn
        # where the answer had none.
        rows += len(chat.turns[-1].prompt.token_ids) + (0 if unread == [] else 1 + unread)
        assert chat.engine.counts.prefilled == rows
    assert chat.engine.counts.images == 2


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_done_is_as_if_only_what_is_left_had_been_asked(tiny, seed, rule, tmp_path):
    """Questions, taken back, asked anew, refused, saved and loaded, in any order."""
    draw, left = random.Random(seed), []
    how = {"pruner": rule, "temperature": 1.0, "max_new_tokens": 4}
    chat = tiny.chat(**how)
    for step in range(14):
        what = draw.choice(["ask", "ask", "ask", "undo", "again", "wrong", "reload"])
        if what == "ask":
            images = [Image.open(p) for p in draw.choice([[], [], PICTURES[:1], PICTURES])]
            left.append(([*images, f"Question {step}"], step))
            chat.ask(left[-1][0], seed=step)
        elif what == "undo" and left:
            left.pop()
            chat.undo()
        elif what == "again" and left:
            left[-1] = left[-1][0], step
            chat.regenerate(seed=step)
        elif what == "wrong":
            with pytest.raises(PruningError):
                chat.ask([Image.open(PICTURES[0])], pruner=lambda *_: None)
        elif what == "reload":
            chat.save(tmp_path / "talk.json")
            chat = tiny.chat(**how)
            chat.load(tmp_path / "talk.json")
    fresh = tiny.chat(**how)
    for content, number in left:
        fresh.ask(content, seed=number)
    for number, (got, want) in enumerate(zip(chat.turns, fresh.turns, strict=True)):
        assert got.completion.text == want.completion.text, number
        assert got.answer_ids == want.answer_ids, number
    last = [c.ask("And now?", seed=99) for c in (chat, fresh)]
    assert_alike(*last)


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(tiny):
    chat = tiny.chat(temperature=0, max_new_tokens=40, ignore_stop=True)
    pieces = chat.stream([Image.open(PICTURES[0]), "Go on"])
    while len(chat.engine.slots.held[0].token_ids if chat.engine.slots.held else ()) < 5:
        next(pieces)
    pieces.close()
    (turn,) = chat.turns
    assert turn.completion.finish_reason == "interrupted"
    assert 5 <= len(turn.completion.token_ids) < 40
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?", **SHORT), want)
    # What another question breaks off is noted too, and its pieces end.
    pieces = chat.stream("Go on again")
    first = "".join(next(pieces) for _ in range(4))
    chat.ask("And?", **SHORT)
    assert [turn.completion.finish_reason for turn in chat.turns][-2:] == ["interrupted", "length"]
    assert first + "".join(pieces) == chat.turns[-2].completion.text


def test_ctrl_c_between_two_tokens_keeps_the_answer_and_in_a_prefill_the_chat(tiny, monkeypatch):
    chat = tiny.chat(temperature=0, max_new_tokens=8, ignore_stop=True)
    step, left = chat.engine.decoder.step, iter(range(3))

    def interrupted(tokens):
        logits = step(tokens)
        if next(left, None) is None:
            raise KeyboardInterrupt  # its row is in the cache, and its token not chosen
        return logits

    monkeypatch.setattr(chat.engine.decoder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Go on")
    monkeypatch.undo()
    assert len(chat.turns[0].completion.token_ids) == 4
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?", **SHORT), want)

    def never(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask([Image.open(PICTURES[0])], pruner=never)
    assert len(chat.turns) == 2
    want = asked_at_once(tiny, chat, "Still there?", **SHORT)
    assert_alike(chat.ask("Still there?", **SHORT), want)


def test_a_stop_string_is_no_part_of_what_the_conversation_goes_on_from(tiny):
    """The reader has not seen it, whatever tokens it came in."""
    whole = tiny.chat(**SHORT | {"max_new_tokens": 12, "ignore_stop": True}).ask("Go on").text
    chat = tiny.chat(**SHORT | {"max_new_tokens": 12, "ignore_stop": True})
    completion = chat.ask("Go on", stop=[whole[3:5]])
    assert whole.startswith(completion.text)
    assert len(completion.text) <= 3
    tokenizer = tiny.tokenizer
    ids = chat.turns[0].answer_ids
    assert tokenizer.decode(ids) == completion.text
    assert ids[-1] == tokenizer.special_ids["<|eot_id|>"]
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?", **SHORT), want)


def test_the_rest_of_a_token_that_a_stop_string_cuts_is_encoded_anew(llama_3, tiny):
    ids = llama_3.encode("Hello wonderful world")
    completion = tiny.generate(Prompt([1]), max_new_tokens=1)
    completion = type(completion)(
        **{**vars(completion), "token_ids": ids, "text": "Hello wond", "finish_reason": "stop"}
    )
    got = answer_ids_of(completion, llama_3)
    assert got[:1] == ids[:1]
    assert llama_3.decode(got) == "Hello wond"
    assert got[-1] == llama_3.special_ids["<|eot_id|>"]


def test_messages_are_what_was_said(tiny):
    chat = tiny.chat(system="Be brief.", **SHORT)
    image = Image.open(PICTURES[0]).convert("RGB")
    first = chat.ask([image, "What is this?"]).text
    second = chat.ask({"type": "text", "text": "And?"}).text
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, "What is this?"]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": ["And?"]},
        {"role": "assistant", "content": second},
    ]
    tiny.prompt(chat.messages)
    assert chat.undo().completion.text == second
    assert len(chat.messages) == 3


def test_a_turn_that_ends_to_call_a_tool_says_so(tiny):
    chat = tiny.chat(**SHORT)
    eom = tiny.tokenizer.special_ids["<|eom_id|>"]

    def call(logits):
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([eom]), 0)

    chat.ask("Call it", logits_processors=[call])
    assert chat.turns[0].answer_ids == [eom]
    assert chat.messages[-1]["end"] == "eom"


def test_another_checkpoint_reads_the_text_where_the_ids_are_not_its_own(tiny):
    eot = tiny.tokenizer.special_ids["<|eot_id|>"]
    for ids in ([5, 7], [], [10**9], [eot], tiny.tokenizer.encode("Yas")):
        assert tiny.tokenizer.decode(known_ids(ids, "Yes", tiny.tokenizer)) == "Yes"
    good = [*tiny.tokenizer.encode("Yes"), eot]
    assert known_ids(good, "Yes", tiny.tokenizer) == good


WRONG = {
    "nothing": ((), PromptError, "the question is empty"),
    "an empty text": ("", PromptError, "the question is empty"),
    "empty texts": (["", {"type": "text", "text": ""}], PromptError, "the question is empty"),
    "a number": (7, PromptError, "expected a text, a picture"),
    "no picture": ([b"no picture"], ImageError, "not a picture"),
    "too long": ("x" * 5000, PromptError, "expected at least"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_asked_changes_nothing(tiny, case):
    content, error, words = WRONG[case]
    chat = tiny.chat(**SHORT)
    chat.ask("Hello")
    with pytest.raises(error, match=words):
        chat.ask(content)
    with pytest.raises(SettingError, match="there is no setting temprature"):
        chat.ask("Hello", temprature=1)
    with pytest.raises(SettingError, match="temperature is -1"):
        chat.regenerate(temperature=-1)
    assert len(chat.turns) == 1
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?"), want)


def test_an_answer_that_cannot_be_made_anew_stays(tiny):
    chat = tiny.chat(**SHORT)
    first = chat.ask([Image.open(PICTURES[0]), "What is this?"])
    with pytest.raises(PruningError):
        chat.regenerate(pruner=lambda *_: None)
    assert [turn.completion for turn in chat.turns] == [first]
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?"), want)


def test_there_must_be_something_to_take_back(tiny):
    chat = tiny.chat()
    for act in (chat.undo, chat.regenerate):
        with pytest.raises(PromptError, match="nothing has been asked yet"):
            act()
    chat.close()
    with pytest.raises(EngineError, match="the engine is closed"):
        chat.ask("Hello")


@pytest.mark.parametrize("system", [7, "", b"x"])
def test_a_system_message_is_a_text(tiny, system):
    with pytest.raises(PromptError, match="system is"):
        tiny.chat(system=system)


def saved(tiny, tmp_path):
    chat = tiny.chat(**SHORT)
    chat.ask([Image.open(PICTURES[0]), "What is this?"])
    chat.save(tmp_path / "talk.json")
    return chat, tmp_path / "talk.json"


def damaged(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def in_answer(**fields):
    return lambda data: data["turns"][0]["answer"].update(fields)


DAMAGE = {
    "of a later version": lambda data: data.update(version=2),
    "no turns": lambda data: data.pop("turns"),
    "turns of another kind": lambda data: data.update(turns=7),
    "a turn of another kind": lambda data: data["turns"].append("x"),
    "no system": lambda data: data.pop("system"),
    "a system of another kind": lambda data: data.update(system=[]),
    "ids of another kind": in_answer(token_ids=["a"]),
    "no ids": in_answer(token_ids=None),
    "a text of another kind": in_answer(text=3),
    "a half character": in_answer(text="\ud800"),
    "another reason": in_answer(finish_reason="x"),
    "a picture elsewhere": lambda data: data["turns"][0]["content"].__setitem__(
        0, {"image": "../../secret.png"}
    ),
    "a picture that is gone": lambda data: data["turns"][0]["content"].__setitem__(
        0, {"image": "gone.png"}
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_told_and_the_chat_goes_on(tiny, tmp_path, case):
    chat, path = saved(tiny, tmp_path)
    damaged(path, DAMAGE[case])
    with pytest.raises(LlamaVisionError):
        chat.load(path)
    assert len(chat.turns) == 1
    want = asked_at_once(tiny, chat, "And?", **SHORT)
    assert_alike(chat.ask("And?"), want)


def test_what_cannot_be_written_leaves_what_was_there(tiny, tmp_path, monkeypatch):
    chat, path = saved(tiny, tmp_path)
    before = path.read_bytes()
    chat.ask("And?")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ChatFileError, match="No space left on device"):
        chat.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"talk.json", "talk.pictures"}
    for place in (tmp_path, tmp_path / "nowhere" / "talk.json", "\0"):
        with pytest.raises(ChatFileError):
            chat.save(place)
    image = tile_image(Image.open(PICTURES[0]), tile_size=56, max_tiles=4)
    chat.ask([image])
    with pytest.raises(ChatFileError, match="cut into tiles"):
        chat.save(path)


def test_equal_pictures_are_saved_once(tiny, tmp_path):
    chat = tiny.chat(**SHORT)
    for _ in range(2):
        chat.ask([Image.open(PICTURES[0]), "What is this?"])
    chat.save(tmp_path / "talk.json")
    (picture,) = (tmp_path / "talk.pictures").iterdir()
    assert Image.open(picture).tobytes() == Image.open(PICTURES[0]).convert("RGB").tobytes()


def cached(model: LlamaVision, most: int) -> LlamaVision:
    """The same model with a cache for pictures of its own."""
    other = LlamaVision(model.model, model.tokenizer, sampling=model.sampling)
    other.image_cache = ImageCache(most)
    return other


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_another_chat_about_the_same_picture_encodes_nothing(tiny, rule):
    model = cached(tiny, 10**8)
    how = SHORT | {"pruner": rule}
    question = [*map(Image.open, PICTURES), "What is this?"]
    first = model.chat(**how)
    want = tiny.chat(**how).ask(question)
    assert_alike(first.ask(question), want)
    assert first.engine.counts.images == 2
    second = model.chat(**how)
    got = second.ask(question)
    assert_alike(got, want)
    assert all(map(torch.equal, got.kept, want.kept))
    assert len(got.stands) == len(want.stands)
    assert all(map(torch.equal, got.stands, want.stands))
    assert second.engine.counts.images == 0
    # Other budgets, rules, tiles and questions.
    for change in ({"visual_budget": 7}, {"pruner": TopK(5)}, {"max_tiles": 1}):
        change = {"pruner": TopK(5)} | change
        want = tiny.chat(**how).ask(question, **change)
        assert_alike(model.chat(**how).ask(question, **change), want)


def test_what_is_chosen_without_the_text_is_kept_instead_of_all(tiny):
    sizes = []
    for rule in (None, MaxMin(0.25, merge=True)):
        model = cached(tiny, 10**8)
        model.chat(pruner=rule, **SHORT).ask([Image.open(PICTURES[0])])
        sizes.append(model.image_cache.nbytes)
    assert sizes[1] < 0.3 * sizes[0]


def test_the_least_recently_used_goes_first(tiny):
    model = cached(tiny, 0)
    model.image_cache = None
    pictures = [Image.new("RGB", (56, 56), (i, 0, 0)) for i in range(3)]
    one = 17 * tiny.config.text.hidden_size * 4
    model.image_cache = cache = ImageCache(2 * one)
    chat = model.chat(**SHORT)

    def encoded(number):
        before = chat.engine.counts.images
        chat.ask([pictures[number]], max_new_tokens=1)
        assert cache.nbytes <= cache.max_bytes
        return chat.engine.counts.images - before

    assert [encoded(i) for i in (0, 1, 0, 2, 0, 1)] == [1, 1, 0, 1, 0, 1]
    assert (len(cache), cache.nbytes) == (2, 2 * one)
    cache.clear()
    assert (len(cache), cache.nbytes, encoded(1)) == (0, 0, 1)
    model.image_cache = ImageCache(one - 1)  # nothing fits
    chat = model.chat(**SHORT)
    assert [encoded(i) for i in (0, 0)] == [1, 1]


def test_a_cache_is_of_one_model(tiny, pico):
    first = cached(tiny, 10**6)
    first.chat(**SHORT).ask([Image.open(PICTURES[0])])
    second = LlamaVision(pico.model, pico.tokenizer)
    second.image_cache = first.image_cache
    with pytest.raises(SettingError, match="the image cache is another model's"):
        second.chat()
    second.image_cache.clear()
    second.chat()
    second.image_cache = 2**20
    with pytest.raises(SettingError, match="image_cache is 1048576; expected an ImageCache"):
        second.chat()


@pytest.mark.parametrize("most", [-1, 1.5, "1GiB", None])
def test_the_limit_is_a_number_of_bytes(most):
    with pytest.raises(SettingError, match="max_bytes is"):
        ImageCache(most)


def test_a_batch_that_asks_ten_things_about_a_picture_encodes_it_once(tiny):
    """With no cache, whatever else is asked, and whatever slots there are."""
    one, other = map(Image.open, PICTURES)
    contents = [[one, f"Question {i}"] for i in range(10)]
    contents[3:3] = [[other, one, "Which of them?"], ["No picture"], [other, "And this?"]]
    prompts = [tiny.prompt([{"role": "user", "content": content}]) for content in contents]
    for slots in (None, 2):
        engine, requests = tiny.start(prompts, slots=slots, **SHORT)
        answers = engine.run(*requests)
        assert engine.counts.images == 2
        assert engine.images.held == {}
        for prompt, answer in zip(prompts, answers, strict=True):
            assert_alike(answer, tiny.generate(prompt, **SHORT))


def test_pictures_differ_by_what_they_show_and_by_their_tiles(tiny):
    image = Image.open(PICTURES[0]).convert("RGB")
    tiles = [tile_image(image, tile_size=56, max_tiles=most) for most in (4, 4, 1)]
    turned = image.transpose(Image.Transpose.ROTATE_180)
    contents = Prompt([1], [image, image.copy(), turned, *tiles]).contents
    assert contents[0] == contents[1]
    assert contents[3] == contents[4]
    assert len(set(contents)) == 4


def test_a_request_that_is_cancelled_no_longer_waits_for_its_picture(tiny):
    prompt = tiny.prompt([{"role": "user", "content": [Image.open(PICTURES[0]), "What?"]}])
    engine, (first, second) = tiny.start([prompt, prompt], slots=1, **SHORT)
    engine.step()
    assert len(engine.images.held) == 1
    engine.cancel(second)
    assert engine.images.held == {}
    engine.run(first)
