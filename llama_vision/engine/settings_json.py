"""Settings as JSON has them: a rule of pruning by its numbers, and OpenAI's names for some."""

from collections.abc import Mapping
from typing import Any

from llama_vision.cache.choose_rule import RULE_OPTIONS, choose_rule
from llama_vision.engine.settings import Settings
from llama_vision.errors import SettingError
from llama_vision.values import check_names

SETTING_NAMES = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_stop",
    "top_logprobs",
    "visual_budget",
    "max_seq_len",
    "max_tiles",
    "prefill_chunk",
)
"""Of `Settings`, those that numbers and texts can say."""

RENAMED = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
"""What OpenAI calls a setting of ours."""


def read_settings(given: Mapping[str, Any], base: Settings) -> Settings:
    """The settings of a request that says some of them, by name; null says nothing.

    Args:
        given: of `SETTING_NAMES`, `RENAMED` and `RULE_OPTIONS`.
        base: the others.

    Raises:
        SettingError, PruningError: there is no such setting, it is said twice, or see `Settings`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    check_names("setting", given, (*SETTING_NAMES, *RENAMED, *RULE_OPTIONS))
    plain: dict[str, Any] = {}
    for name, value in given.items():
        ours = RENAMED.get(name, name)
        if ours in plain:
            raise SettingError(f"{name} says {ours} a second time; give one of them")
        plain[ours] = value
    rule = {name: plain.pop(name) for name in RULE_OPTIONS if name in plain}
    chosen = choose_rule(**rule, seed=plain.get("seed"))
    if chosen is not None:
        plain["pruner"] = chosen
    return base.but(**plain)
