"""The engine: requests come, share slots, are cancelled and gone on from, each as if alone."""

import random

import pytest
import torch
from conftest import assert_close, assert_same, case_prompts
from oracle import random_config, random_images, random_model, random_token_ids

from llama_vision import (
    Engine,
    KeyNorm,
    LastQuery,
    LlamaVision,
    Prompt,
    RandomTokens,
    Settings,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.cache.kv import CacheError
from llama_vision.cache.pruning import PruningError
from llama_vision.engine.engine import EngineError
from llama_vision.errors import SettingError
from llama_vision.inputs.chat import PromptError
from llama_vision.inputs.image import ImageError, TiledImage
from llama_vision.inputs.vocabulary import TokenizerError
from llama_vision.memory.fit import MemoryLimitError

GREEDY = {"temperature": 0, "ignore_stop": True}
GROUP = 3 * 4 * 5
"""Visual tokens of three images of four tiles: the most that a group has here."""
PRUNERS = [
    None,
    TrimmedLlama(0.2),
    TrimmedLlama(0.3, votes="after", keep_class_tokens=True),
    TrimmedLlama(0.1, trim_first_layer=False),
    LastQuery(0.3),
    TopK(TrimmedLlama(0.05)),
    RandomTokens(0.4, seed=3),
    UniformGrid(7),
    KeyNorm(0.15),
]


@pytest.fixture(scope="module")
def small() -> LlamaVision:
    """A small random model whose answers often end before they are long."""
    config = random_config(6)
    return LlamaVision(random_model(config, 6), stop_ids=range(6))


def new_engine(small, slots=4, **sizes):
    return Engine(small, slots=slots, **{"max_seq_len": 96, "visual_budget": GROUP, **sizes})


def random_prompt(small, draw, images=None, rows=6):
    count = draw.choice([0, 1, 1, 2, 3]) if images is None else images
    ids = random_token_ids(small.config, count, count + draw.randint(1, rows), draw)
    return Prompt(ids, random_images(small.config, count, draw))


def random_settings(draw):
    """Budgets only where a pruner chooses, for what is needed without one is not up to chance."""
    pruner = draw.choice(PRUNERS)
    return Settings(
        max_new_tokens=draw.randint(1, 9),
        temperature=draw.choice([0, 0, 0.7, 1.5]),
        top_p=draw.choice([1.0, 0.8]),
        top_k=draw.choice([0, 10]),
        seed=draw.randrange(1000),
        pruner=pruner,
        visual_budget=draw.choice([None, 0.5, 7]) if pruner else None,
        prefill_chunk=draw.choice([1, 3, 2048]),
    )


def alone(small, request):
    """The completion of the same request, and of those before it, in an engine of their own."""
    turns = [request]
    while turns[0].after:
        turns.insert(0, turns[0].after)
    engine, last = new_engine(small, slots=1, force=True), None
    for turn in turns:
        last = engine.submit(turn.prompt, turn.settings, after=last, hold=True)
        while last.finish_reason is None:
            engine.step()
            if turn.finish_reason == "interrupted" and len(last.token_ids) == len(turn.token_ids):
                engine.cancel(last)
    return engine.completion(last)


def all_idle(engine):
    """Whether no slot holds anything."""
    text, visual = engine.cache.text, engine.cache.visual
    nothing = [0] * engine.cache.slots
    lengths = text.lengths == nothing and visual.lengths == [nothing] * len(visual.lengths)
    return lengths and not engine.slots.held and not engine.waiting


def test_two_hundred_random_requests_are_each_answered_as_if_alone(small):
    """They join while others decode, are cancelled at any moment, and some are gone on from."""
    draw, engine, asked = random.Random(0), new_engine(small), []
    nbytes, longest_queue = engine.cache.nbytes, 0

    def submit(after=None):
        prompt, settings = random_prompt(small, draw), random_settings(draw)
        asked.append(engine.submit(prompt, settings, after=after, hold=draw.random() < 0.4))

    while len(asked) < 200 or engine.slots.held or engine.waiting:
        if len(asked) < 200 and (not asked or draw.random() < 0.5):
            submit()
        gone_on_from = [request.after for request in engine.waiting]
        for request in list(engine.slots.held.values()):
            ended = request.finish_reason and request not in gone_on_from
            if ended and draw.random() < 0.5:
                if len(asked) < 200 and engine.cache.text.lengths[request.slot] < 60:
                    submit(after=request)
                else:
                    engine.release(request)
        unfinished = [request for request in asked if request.finish_reason is None]
        if unfinished and draw.random() < 0.08:
            engine.cancel(draw.choice(unfinished))
        before = {request: len(request.token_ids) for request in asked}
        if any(request.finish_reason is None for request in engine.slots.held.values()) or (
            engine.waiting and len(engine.slots.held) < 4
        ):
            moved = engine.step()
            grown = [r for r in asked if len(r.token_ids) == before[r] + 1]
            assert sorted(map(id, moved)) == sorted(map(id, grown))
            assert len(moved) <= 4
        longest_queue = max(longest_queue, len(engine.waiting))

    assert len(asked) == 200
    assert engine.cache.nbytes == nbytes
    assert all_idle(engine)
    assert longest_queue > 4
    reasons = [request.finish_reason for request in asked]
    assert min(map(reasons.count, ("stop", "length", "interrupted"))) > 10
    assert sum(request.after is not None for request in asked) > 20
    for request in asked:
        if request.token_ids:
            assert_same(engine.completion(request), alone(small, request))


@pytest.mark.parametrize(
    ("pruner", "images_in"),
    [
        (None, "every turn"),
        (UniformGrid(0.3, trim_first_layer=False), "every turn"),
        (RandomTokens(0.4, seed=1, trim_first_layer=False), "every turn"),
        (KeyNorm(0.3, trim_first_layer=False), "every turn"),
        (TrimmedLlama(0.2), "the last turn"),
        (TrimmedLlama(0.2, votes="after"), "the last turn"),
        (LastQuery(0.3), "the last turn"),
    ],
    ids=["none", "uniform", "random", "key norm", "all", "after", "last"],
)
@pytest.mark.parametrize("seed", range(4))
def test_turn_by_turn_equals_one_long_prompt(small, seed, pruner, images_in):
    """Another conversation goes on beside it.

    Where the first layer is trimmed, or rows vote, that is so for images of the last turn: what is
    answered is in the long prompt of the pass that brought the earlier ones, and is not in turns.
    """
    draw, engine = random.Random(seed), new_engine(small, slots=2)
    engine.submit(random_prompt(small, draw), max_new_tokens=80, **GREEDY)
    settings = {"max_new_tokens": 5, "pruner": pruner, **GREEDY}
    ids, images, kept, last = [], [], [], None
    for turn in range(3):
        count = 3 if turn == 2 else draw.randint(1, 2) if images_in == "every turn" else 0
        prompt = random_prompt(small, draw, images=count)
        if prompt.token_ids[0] == small.config.text.image_token_id:
            prompt = Prompt([1, *prompt.token_ids], prompt.images)
        ids += [*(last.token_ids if last else []), *prompt.token_ids]
        images += prompt.images
        last = engine.submit(prompt, after=last, hold=True, **settings)
        got = engine.run(last)[0]
        kept += got.kept
    at_once = small.generate(Prompt(ids, images), **settings)
    assert got.token_ids == at_once.token_ids
    assert_close("logprobs", *(torch.tensor(c.logprobs) for c in (got, at_once)), 1e-4)
    assert len(kept) == len(images)
    assert all(map(torch.equal, kept, at_once.kept))
    if pruner is not None:
        assert not all(mask.all() for mask in kept)


# Requests and slots


def test_a_slot_whose_answer_has_ended_takes_the_next_request(small):
    draw, engine = random.Random(1), new_engine(small, slots=2)
    long, *short = [
        engine.submit(random_prompt(small, draw), max_new_tokens=count, **GREEDY)
        for count in (9, 2, 2, 2)
    ]
    assert [engine.step(), engine.step()] == [[long], [short[0]]]  # a prefill each
    slots = {request: slot for slot, request in engine.slots.held.items()}
    assert engine.step() == [long, short[0]]
    assert (short[0].finish_reason, short[0].slot) == ("length", None)
    assert engine.step() == [short[1]]
    assert short[1].slot == slots[short[0]]
    engine.run(long, *short)
    assert all_idle(engine)
    assert all(seconds > 0 for seconds in engine.seconds.values())


def test_a_cancelled_request_ends_where_it_is_and_frees_its_slot(small):
    draw, engine = random.Random(2), new_engine(small, slots=1)
    running, waiting, after_them = (
        engine.submit(random_prompt(small, draw), max_new_tokens=5, **GREEDY) for _ in range(3)
    )
    engine.step()
    engine.step()
    for request in (waiting, running, running):
        engine.cancel(request)
    assert (len(running.token_ids), len(waiting.token_ids)) == (2, 0)
    assert engine.completion(running).finish_reason == "interrupted"
    (completion,) = engine.run(after_them)
    assert_same(completion, alone(small, after_them))
    engine.cancel(after_them)
    assert after_them.finish_reason == "length", "what has ended stays as it ended"
    assert all_idle(engine)


def test_release_and_close_give_all_slots_back(small):
    engine, draw = new_engine(small, slots=2), random.Random(4)
    first, second, third = (
        engine.submit(random_prompt(small, draw), max_new_tokens=2, hold=True, **GREEDY)
        for _ in range(3)
    )
    engine.run(first, second)
    engine.release(first)
    engine.step()
    assert sorted(engine.slots.held) == [0, 1]
    assert third.finish_reason is None
    waiting = engine.submit(random_prompt(small, draw))
    engine.close()
    assert third.finish_reason == waiting.finish_reason == "interrupted"
    assert second.finish_reason == "length"
    assert all_idle(engine)
    with pytest.raises(EngineError, match="the engine is closed and takes no more requests"):
        engine.submit(random_prompt(small, draw))


def test_streams_of_several_requests_are_their_texts(tiny):
    """Whatever has been made before a stream is begun."""
    prompts = [*case_prompts("batch_ragged"), *case_prompts("bos_image")]
    engine, requests = tiny.start(prompts, slots=2, max_new_tokens=30, seed=1, temperature=1.5)
    texts = ["".join(engine.stream(request)) for request in requests]
    assert texts == [engine.completion(request).text for request in requests]
    assert all(texts)


# What it refuses


def test_going_on_from_what_is_not_held_or_has_not_finished_is_an_error(small):
    engine, draw = new_engine(small, slots=2), random.Random(5)
    prompt, settings = random_prompt(small, draw), {"max_new_tokens": 3, **GREEDY}
    held, passing = (engine.submit(prompt, hold=hold, **settings) for hold in (True, False))
    not_held = "the conversation is not held any more, or has gone on"
    with pytest.raises(EngineError, match=not_held):
        engine.submit(prompt, after=held, **settings)  # it waits
    engine.step()
    with pytest.raises(EngineError, match="the request to go on from has not finished"):
        engine.submit(prompt, after=held, **settings)
    engine.run(held, passing)
    with pytest.raises(EngineError, match=not_held):
        engine.submit(prompt, after=passing, **settings)
    second = engine.submit(prompt, after=held, hold=True, **settings)
    with pytest.raises(EngineError, match=not_held):
        engine.submit(prompt, after=held, **settings)  # another has, though it waits still
    assert_same(*engine.run(second), alone(small, second))
    with pytest.raises(EngineError, match=not_held):
        engine.submit(prompt, after=held, **settings)
    engine.release(second)
    with pytest.raises(EngineError, match=not_held):
        engine.submit(prompt, after=second, **settings)
    assert all_idle(engine)


def test_a_conversation_that_is_released_ends_what_waits_to_go_on(small):
    engine, draw = new_engine(small, slots=1), random.Random(7)
    first = engine.submit(random_prompt(small, draw), max_new_tokens=2, hold=True, **GREEDY)
    engine.run(first)
    second = engine.submit(random_prompt(small, draw), after=first, max_new_tokens=2, **GREEDY)
    other = engine.submit(random_prompt(small, draw), max_new_tokens=2, **GREEDY)
    engine.release(first)
    assert_same(*engine.run(other), alone(small, other))
    assert second.finish_reason == "interrupted"
    assert second.token_ids == []
    assert all_idle(engine)


def test_all_slots_held_while_others_wait_is_an_error_that_says_so(small):
    engine, draw = new_engine(small, slots=2), random.Random(8)
    held = [
        engine.submit(random_prompt(small, draw), max_new_tokens=2, hold=True) for _ in range(2)
    ]
    engine.run(*held)
    others = [engine.submit(random_prompt(small, draw), max_new_tokens=2) for _ in range(3)]
    says = "all 2 slots are held by conversations and 3 requests wait; release one of them"
    with pytest.raises(EngineError, match=says):
        engine.run(*others)
    engine.release(held[0])
    assert len(engine.run(*others)) == 3


def failing(saliency, visual):
    raise RuntimeError("a rule with a mistake")


@pytest.mark.parametrize(
    ("pruner", "says"),
    [
        (failing, "pruner failing raised RuntimeError: a rule with a mistake"),
        (lambda s, v: s > 0, r"torch.bool \[\d+, \d+\]; .* no batch axis"),
        (lambda s, v: (v.patch < 0)[None], r"\[1, \d+\]; .*: there is no batch axis"),
    ],
    ids=["raises", "a mask of each head", "a batch of one"],
)
def test_a_pruner_that_fails_loses_nothing_of_the_others(small, pruner, says):
    """Neither of those that decode, nor of those beside it that enter, new or going on."""
    draw, engine = random.Random(9), new_engine(small, slots=5)
    decoding, held, held_too = (
        engine.submit(random_prompt(small, draw, 1), max_new_tokens=count, hold=hold, **GREEDY)
        for count, hold in ((12, False), (2, True), (2, True))
    )
    engine.run(held, held_too)
    settings = {"max_new_tokens": 4, **GREEDY}
    before = engine.submit(random_prompt(small, draw), after=held_too, **settings)
    bad = engine.submit(random_prompt(small, draw, 1), max_new_tokens=4, pruner=pruner)
    after = [
        engine.submit(random_prompt(small, draw), after=of, **settings) for of in (None, held, None)
    ]
    with pytest.raises(PruningError, match=says):
        engine.run(before, *after)
    assert bad.finish_reason == "interrupted"
    assert bad not in engine.slots.held.values()
    for request, completion in zip(
        (decoding, before, *after), engine.run(decoding, before, *after), strict=True
    ):
        assert_same(completion, alone(small, request))
    assert all_idle(engine)


@pytest.mark.parametrize(
    ("sizes", "error", "says"),
    [
        ({"slots": 0}, SettingError, "slots is 0; expected 1 to"),
        ({"max_seq_len": 0}, SettingError, "max_seq_len is 0; expected 1 to 256 for this model"),
        ({"max_seq_len": 257}, SettingError, "max_seq_len is 257; expected 1 to 256"),
        ({"visual_budget": 0}, PruningError, "visual_budget is 0; expected a fraction above 0"),
        ({"visual_budget": 1.5}, PruningError, r"visual_budget is 1\.5; expected a fraction"),
    ],
    ids=str,
)
def test_an_engine_of_impossible_sizes_is_refused(small, sizes, error, says):
    with pytest.raises(error, match=says):
        new_engine(small, **sizes)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"max_seq_len": 97}, SettingError, "max_seq_len is 97; expected 1 to 96"),
        ({"max_seq_len": 3}, PromptError, r"4 tokens long .* is 3; expected at least 5"),
        ({"visual_budget": 2}, PruningError, "need 20 visual tokens and the visual budget is 2"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_engine_is_refused_at_once(small, settings, error, says):
    images = random_images(small.config, 99, random.Random(0))
    image = next(image for image in images if len(image.pixels) == 4)
    engine = new_engine(small)
    with pytest.raises(error, match=says):
        engine.submit(Prompt([1, small.config.text.image_token_id, 2, 3], [image]), **settings)
    assert not engine.waiting


def test_a_conversation_too_long_for_its_slot_is_refused(small):
    engine = new_engine(small, slots=1, max_seq_len=12)
    first = engine.submit(Prompt([1] * 6), max_new_tokens=4, hold=True, **GREEDY)
    engine.run(first)
    with pytest.raises(PromptError, match=r"12 tokens long .* is 12; expected at least 13"):
        engine.submit(Prompt([1] * 2), after=first)
    second = engine.submit(Prompt([1]), after=first, **GREEDY)
    engine.run(second)
    assert len(second.token_ids) == 1


def test_more_slots_than_fit_are_refused_with_the_number_that_would(small, monkeypatch):
    sizes = {"max_seq_len": 256, "visual_budget": GROUP}
    monkeypatch.setattr("llama_vision.memory.fit.free_memory", lambda _: 30 * 2**20)
    with pytest.raises(MemoryLimitError, match=r"of the 512 slots \(slots=\d+\)") as refusal:
        Engine(small, slots=512, **sizes)
    fitting = int(str(refusal.value).partition("(slots=")[2].partition(")")[0])
    assert 1 < fitting < 512
    assert Engine(small, slots=fitting, **sizes).cache.slots == fitting
    with pytest.raises(MemoryLimitError):
        Engine(small, slots=fitting + 1, **sizes)
    assert Engine(small, slots=fitting + 1, force=True, **sizes).cache.slots == fitting + 1


def test_a_stream_needs_a_tokenizer(small):
    engine = new_engine(small, slots=1)
    request = engine.submit(Prompt([1, 2]), max_new_tokens=2, **GREEDY)
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        next(engine.stream(request))


def test_a_first_layer_that_is_left_whole_needs_room_of_its_own(tiny):
    engine = Engine(tiny, max_seq_len=64, visual_budget=30)
    (prompt,) = case_prompts("image_first")
    pruner = TrimmedLlama(0.1, trim_first_layer=False)
    with pytest.raises(PruningError, match="needs 68 tokens where its cache holds 30; raise"):
        engine.submit(prompt, pruner=pruner)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((6, 3, 56, 56), (2, 3)), ((1, 3, 28, 28), (1, 1)), ((2, 3, 56, 56), (1, 1))],
    ids=["too many", "too small", "not its grid"],
)
def test_tiles_that_are_not_the_model_s_are_refused(tiny, shape, grid):
    prompt = Prompt([512, 1], [TiledImage(torch.zeros(shape), grid, 1)])
    with pytest.raises(ImageError, match=r"expected \[\d, 3, 56, 56\], and at most 4 tiles"):
        tiny.generate(prompt)


def conversation(small, engine, draw, turns, **settings):
    """Requests that go on from one another, each held."""
    requests = []
    for number in range(turns):
        prompt = random_prompt(small, draw, images=number % 2)
        after = requests[-1] if requests else None
        request = engine.submit(prompt, after=after, hold=True, max_new_tokens=4, **settings)
        engine.run(request)
        requests.append(request)
    return requests


def as_one(small, requests, answers, prompt):
    """The answer to the same conversation and one more prompt, run at once."""
    ids, images = [], []
    for request, answer in zip(requests, answers, strict=True):
        ids += [*request.prompt.token_ids, *answer]
        images += request.prompt.images
    whole = Prompt([*ids, *prompt.token_ids], [*images, *prompt.images])
    return small.generate(whole, max_new_tokens=5, **GREEDY)


@pytest.mark.parametrize("seed", range(12))
def test_a_replaced_answer_is_what_the_conversation_goes_on_from(small, seed):
    """Longer, shorter, equal or empty, like the one that was made in the beginning or not."""
    draw, engine = random.Random(seed), new_engine(small)
    requests = conversation(small, engine, draw, 3, **GREEDY)
    answers = [request.token_ids for request in requests]
    made = answers[-1][: draw.randint(0, 4)]
    answers[-1] = made + [draw.randrange(60) for _ in range(draw.randint(0, 4))]
    engine.replace_answer(requests[-1], answers[-1])
    prompt = random_prompt(small, draw, images=0)
    got = engine.run(engine.submit(prompt, after=requests[-1], max_new_tokens=5, **GREEDY))[0]
    want = as_one(small, requests, answers, prompt)
    assert got.token_ids == want.token_ids
    assert_close("logprobs", torch.tensor(got.logprobs), torch.tensor(want.logprobs), 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_undone_requests_are_as_if_they_had_never_been(small, seed):
    draw, engine = random.Random(seed), new_engine(small)
    first, second, third = conversation(small, engine, draw, 3, **GREEDY)
    assert engine.undo(third) is second
    fourth = random_prompt(small, draw)
    got = engine.run(engine.submit(fourth, after=second, max_new_tokens=5, **GREEDY))[0]
    want = as_one(small, [first, second], [first.token_ids, second.token_ids], fourth)
    assert got.token_ids == want.token_ids
    with pytest.raises(EngineError, match="not held any more"):
        engine.undo(third)


def test_undoing_all_of_a_conversation_frees_its_slot(small):
    engine = new_engine(small, slots=1)
    first, second = conversation(small, engine, random.Random(0), 2, **GREEDY)
    assert engine.undo(second) is first
    assert engine.undo(first) is None
    assert engine.slots.held == {}


def test_an_image_that_took_the_place_of_another_cannot_be_undone(small):
    engine, draw = new_engine(small), random.Random(3)
    before = engine.submit(random_prompt(small, draw, images=1), hold=True, max_new_tokens=2)
    engine.run(before)
    after = engine.submit(random_prompt(small, draw, images=1), after=before, hold=True)
    engine.run(after)
    held = dict(engine.slots.held), list(engine.cache.text.lengths)
    with pytest.raises(CacheError, match="a later image"):
        engine.undo(after)
    assert held == (engine.slots.held, engine.cache.text.lengths)


def test_only_a_finished_request_that_is_held_can_be_undone_or_replaced(small):
    engine = new_engine(small)
    request = engine.submit(Prompt([1]), hold=True, max_new_tokens=3, **GREEDY)
    for change in (engine.undo, lambda request: engine.replace_answer(request, [1])):
        with pytest.raises(EngineError, match="not held"):
            change(request)
    engine.step()
    with pytest.raises(EngineError, match="has not finished"):
        engine.undo(request)
    engine.run(request)
    for ids in ([-1], [10**6], [small.config.text.image_token_id], ["a"]):
        with pytest.raises(PromptError):
            engine.replace_answer(request, ids)
    waiting = engine.submit(Prompt([1]), after=request)
    with pytest.raises(EngineError, match="has gone on"):
        engine.undo(request)
    engine.cancel(waiting)
    assert engine.undo(request) is None


def test_images_that_the_cache_cannot_be_enlarged_for_are_refused(small, monkeypatch):
    engine = new_engine(small, slots=3, visual_budget=None)
    draw = random.Random(5)
    images = [random_prompt(small, draw, images=count) for count in (1, 3)]
    room = small.room
    monkeypatch.setattr(type(small), "room", room)
    room.free = 2**30
    first = engine.submit(images[0], hold=True, **GREEDY)
    engine.run(first)
    room.free = 0
    with pytest.raises(MemoryLimitError, match=r"visual tokens of each slot, .* show fewer images"):
        engine.submit(images[1])
    assert engine.submit(images[0]) in engine.waiting  # what there is holds them
    assert engine.submit(images[1], pruner=TopK(2)) in engine.waiting
    room.free = 2**40
    assert engine.submit(images[1]) in engine.waiting
    forced = new_engine(small, slots=3, visual_budget=None, force=True)
    room.free = 0
    assert forced.submit(images[1]) in forced.waiting
