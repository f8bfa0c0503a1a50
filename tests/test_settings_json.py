"""Settings as JSON has them: OpenAI's names, and rules of pruning by a few numbers."""

import pytest

from llama_vision import MaxMin, RandomTokens, Settings, TopK, TrimmedLlama
from llama_vision.cache.choose_rule import choose_rule
from llama_vision.cache.pruning import PruningError
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.engine.settings_json import SETTING_NAMES, read_settings
from llama_vision.errors import SettingError

BASE = Settings(temperature=0.5, pruner=TopK(9))
RULES = [
    ({}, None),
    ({"keep": 0.5}, MaxMin(0.5, merge=True)),
    ({"keep": 9, "merge": False}, MaxMin(9, merge=True)),
    ({"k_ratio": 0.25}, TrimmedLlama(0.25)),
    ({"k_ratio": 0.25, "merge": True}, TrimmedLlama(0.25, merge=True)),
    ({"keep": 9, "pruner": "random", "seed": 3}, RandomTokens(9, seed=3)),
    *(
        ({"keep": 9, "pruner": name, "merge": merge}, rule(9, merge=merge))
        for name, rule in COUNTED_RULES.items()
        for merge in (False, True)
    ),
]


@pytest.mark.parametrize(("given", "rule"), RULES, ids=str)
def test_a_rule_by_its_numbers(given, rule):
    assert choose_rule(**given) == rule
    got = read_settings(given, BASE)
    assert got == BASE.but(pruner=rule or BASE.pruner, seed=given.get("seed"))


def test_every_setting_is_read_and_null_says_nothing():
    values = {
        "max_new_tokens": 3,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "seed": 4,
        "stop": ["a"],
        "ignore_stop": True,
        "top_logprobs": 2,
        "visual_budget": 7,
        "max_seq_len": 99,
        "max_tiles": 2,
        "prefill_chunk": 5,
    }
    assert tuple(values) == SETTING_NAMES
    assert read_settings(values, BASE) == BASE.but(**values)
    assert read_settings(dict.fromkeys(values), BASE) == BASE
    for name in ("max_tokens", "max_completion_tokens"):
        assert read_settings({name: 8}, BASE).max_new_tokens == 8


WRONG = {
    "an unknown name": ({"temprature": 1}, SettingError, "no setting temprature; expected temp"),
    "a name twice": ({"max_tokens": 1, "max_new_tokens": 1}, SettingError, "a second time"),
    "out of range": ({"temperature": -1}, SettingError, "temperature is -1"),
    "what JSON cannot say": ({"logits_processors": []}, SettingError, "no setting"),
    "a rule alone": ({"pruner": "top-k"}, PruningError, "give --keep"),
    "an unknown rule": ({"pruner": "best", "keep": 9}, PruningError, "there is no pruner 'best'"),
    "a rule of another kind": ({"pruner": 3, "keep": 9}, PruningError, "there is no pruner 3"),
    "two rules": ({"k_ratio": 1, "keep": 9}, PruningError, "leave out"),
    "merging nothing": ({"merge": True}, PruningError, "--keep alone merges anyway"),
    "merging by a number": ({"k_ratio": 1, "merge": 1}, PruningError, "merge is 1"),
    "a share out of range": ({"keep": 1.5}, PruningError, "keep is 1.5"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told(case):
    given, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        read_settings(given, BASE)
