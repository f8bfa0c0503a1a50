"""Settings at every door: the same kinds and ranges, whichever way they come in."""

import re

import numpy as np
import pytest
import torch
from conftest import case_prompts

from llama_vision import Engine, LlamaVisionError, Prompt, Settings, TopK, plan_memory
from llama_vision.engine.settings import MOST_TOP_LOGPROBS
from llama_vision.errors import SettingError

OVER = 5
NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["x", "1", b"1", [], [1], {}, True, NAN, INF, 1j, int, torch.ones(2), "\x1b[2J" * 99]
NO_WHOLE = [*NO_NUMBERS, 1.0, 0.5, 10**30, -1]
BAD = {
    "max_new_tokens": [*NO_WHOLE, 0, None],
    "temperature": [*NO_NUMBERS, -0.1, 10**400],
    "top_p": [*NO_NUMBERS, 0, 1.5],
    "top_k": NO_WHOLE,
    "min_p": [*NO_NUMBERS, -0.1, 1.5],
    "repetition_penalty": [*NO_NUMBERS, 0, -1],
    "seed": [v for v in NO_WHOLE if not isinstance(v, list)],
    "stop": [1, b"x", [""], "", [1], None, {}, NAN],
    "stop_ids": [5, "5", [-1], [0.5], ["x"], [None], [10**30], NAN],
    "ignore_stop": [0, 1, "no", None, NAN],
    "logits_processors": [print, 5, [5], [int], "x", None],
    "top_logprobs": [*NO_WHOLE, MOST_TOP_LOGPROBS + 1, None],
    "pruner": [5, "top-k", TopK, 0.5, [TopK(3)], NAN, True],
    "visual_budget": [*NO_NUMBERS, -1, 0, 0.0, 1.5, 10**30],
    "max_seq_len": [*NO_WHOLE, 0],
    "max_tiles": [*NO_WHOLE, 0, OVER],
    "prefill_chunk": [*NO_WHOLE, 0, None],
}
CASES = [(name, i) for name, values in BAD.items() for i in range(len(values))]
DOORS = {
    "generate": lambda model, prompt, **given: model.generate(prompt, **given),
    "a list": lambda model, prompt, **given: model.generate([prompt, prompt], **given),
    "stream": lambda model, prompt, **given: list(model.stream(prompt, **given)),
    "plan": lambda model, prompt, **given: model.plan([prompt], **given),
    "start": lambda model, prompt, **given: model.start([prompt], **given),
    "submit": lambda model, prompt, **given: Engine(model).submit(prompt, **given),
}


def refused(call, *names):
    with pytest.raises(LlamaVisionError) as error:
        call()
    message = str(error.value)
    assert re.match(rf"({'|'.join(names)}) (is|has) .*expected ", message), message
    assert message.isprintable()
    assert len(message) < 300


def test_every_setting_has_bad_values_here():
    assert list(BAD) == list(Settings.__dataclass_fields__)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_a_value_of_another_kind_or_out_of_range_is_told(tiny, name, i):
    """Settings refuses all but what only a model can judge; so do the doors, which make one."""
    value = BAD[name][i]
    if name != "max_tiles" or value is not OVER:
        refused(lambda: Settings(**{name: value}), name)
    refused(lambda: tiny.generate(Prompt([1, 2]), **{name: value}), name)
    refused(lambda: tiny.plan([Prompt([1, 2])], **{name: value}), name)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", BAD)
def test_all_doors_refuse_alike(tiny, door, name):
    value = "x" if name == "stop_ids" else BAD[name][0]
    refused(lambda: DOORS[door](tiny, Prompt([1, 2]), **{name: value}), name)


@pytest.mark.parametrize("door", DOORS)
def test_a_setting_that_is_not_there_is_told(tiny, door):
    with pytest.raises(SettingError, match=r"no setting max_new_token; expected max_new_tokens$"):
        DOORS[door](tiny, Prompt([1, 2]), max_new_token=5)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda model, bad: Engine(model, slots=bad), ["slots"]),
        (lambda model, bad: Engine(model, max_seq_len=bad), ["max_seq_len"]),
        (lambda model, bad: Engine(model, compiled=bad), ["compiled"]),
        (lambda model, bad: Engine(model, graphs=bad), ["graphs"]),
        (lambda model, bad: Engine(model, force=bad), ["force"]),
        (lambda model, bad: Engine(bad), ["model"]),
        (lambda model, bad: Engine(model).submit(bad), ["prompt"]),
        (lambda model, bad: Engine(model).submit(Prompt([1]), hold=bad), ["hold"]),
        (lambda model, bad: Engine(model).submit(Prompt([1]), bad), ["settings"]),
        (lambda model, bad: Engine(model).submit(Prompt([1]), after=bad), ["after"]),
        (lambda model, bad: model.start([Prompt([1])], slots=bad), ["slots"]),
        (lambda model, bad: model.start([Prompt([1])], track_memory=bad), ["track_memory"]),
        (lambda model, bad: model.generate([bad]), ["a prompt"]),
        (lambda model, bad: model.generate(bad), ["prompts", "a prompt"]),
        (lambda model, bad: model.logits(bad), ["prompts", "a prompt"]),
        *(
            (lambda model, bad, name=name: plan_memory(model.config, **{name: bad}), [name])
            for name in ("batch", "max_seq_len", "tiles", "images", "prompt_tokens")
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bad", ["x", 1.5, NAN, [True, 2], b"\x00"], ids=repr)
def test_what_is_no_setting_is_checked_alike(tiny, make, names, bad):
    refused(lambda: make(tiny, bad), *names)


def test_numbers_of_other_libraries_become_plain_ones():
    settings = Settings(
        np.int64(3), np.float32(0.5), top_k=np.int8(2), stop="end", stop_ids={4}, visual_budget=1.0
    )
    assert settings == Settings(3, 0.5, top_k=2, stop=("end",), stop_ids=(4,), visual_budget=1.0)
    assert type(settings.max_new_tokens) is int
    assert type(settings.temperature) is float


def test_messages_are_taken_by_every_door(tiny):
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tiny.prompt(messages)
    greedy = {"temperature": 0, "max_new_tokens": 3}
    expected = tiny.generate(prompt, **greedy)
    assert tiny.generate(messages, **greedy) == expected
    for answer in tiny.generate([messages, prompt], **greedy):
        assert answer.token_ids == expected.token_ids
    assert "".join(tiny.stream(messages, **greedy)) == expected.text
    assert tiny.plan([messages], **greedy) == tiny.plan([prompt], **greedy)
    assert torch.equal(tiny.logits(messages), tiny.logits(prompt))


SAMPLED = {"temperature": 1.0, "top_p": 1.0, "ignore_stop": True, "max_new_tokens": 8}


def test_without_a_seed_every_sample_draws_its_own(tiny):
    answers = tiny.generate(case_prompts("text_only") * 4, **SAMPLED)
    assert len({tuple(answer.token_ids) for answer in answers}) == 4


def test_with_a_seed_samples_differ_and_each_can_be_had_again(tiny):
    prompts = case_prompts("text_only")[:1] * 3
    ids = [answer.token_ids for answer in tiny.generate(prompts, seed=5, **SAMPLED)]
    assert len(set(map(tuple, ids))) == 3
    assert ids == [answer.token_ids for answer in tiny.generate(prompts, seed=5, **SAMPLED)]
    assert ids == [tiny.generate(prompts[0], seed=5 + i, **SAMPLED).token_ids for i in range(3)]
    back = tiny.generate(prompts, seed=[7, 6, 5], **SAMPLED)
    assert [answer.token_ids for answer in back] == ids[::-1]
    assert len(tiny.generate(prompts, seed=2**63 - 1, **SAMPLED)) == 3


@pytest.mark.parametrize("seed", [[1], [1, 2, 3], [1, -2], [1, "x"], "12", {}, NAN, 1.0])
def test_seeds_that_are_no_seeds_are_told(tiny, seed):
    for door in (tiny.generate, tiny.plan):
        refused(lambda: door(case_prompts("text_only")[:1] * 2, seed=seed), "seed")  # noqa: B023
