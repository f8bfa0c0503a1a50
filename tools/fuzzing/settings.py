"""Every setting, at every door that takes it, as every odd value: all combinations."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch

import llama_vision
from fuzzing.common import TINY, picture, prompt, tiny
from fuzzing.judge import Case, Expected, Kind
from fuzzing.odd import (
    VALUES,
    Rule,
    choice,
    flag,
    fraction_or_count,
    function_or_none,
    number,
    numbers_or_none,
    of_types,
    unless_refused,
    whole,
)
from llama_vision import Engine, LlamaVision, Settings, TopK, plan_memory

LONGEST = 64
"""Rows of prompt and answer: no answer is long, however many tokens are asked for."""


def _seed(value: Any) -> Expected:
    is_list = isinstance(value, (list, tuple, range))
    return "either" if is_list else unless_refused(whole(none=True))(value)


def _keep(value: Any) -> Expected:
    if isinstance(value, (list, tuple, range)):
        right = all(whole(1)(one) == "taken" for one in value)
        return "either" if right else "refused"
    if callable(value):
        return "refused" if isinstance(value, type) else "either"
    return "refused" if value is None else fraction_or_count(value)


OF_A_REQUEST: dict[str, Rule] = {
    "max_new_tokens": whole(1),
    "temperature": number(0, none=True),
    "top_p": number(0, 1, above=True, none=True),
    "top_k": whole(none=True),
    "seed": _seed,
    "stop_ids": numbers_or_none,
    "ignore_stop": flag,
    "pruner": function_or_none,
    "visual_budget": unless_refused(fraction_or_count),
    "max_seq_len": unless_refused(whole(1, none=True)),
    "max_tiles": unless_refused(whole(1, none=True)),
    "prefill_chunk": whole(1),
}
OF_A_RUN: dict[str, Rule] = {
    "slots": unless_refused(whole(1, none=True)),
    "compiled": flag,
    "graphs": flag,
    "track_memory": flag,
    "force": flag,
}
OF_A_PLAN: dict[str, Rule] = {
    "source": of_types(str, type(TINY).__mro__[1], llama_vision.Config),
    "dtype": of_types(str, torch.dtype),
    "device": of_types(str, torch.device),
    "batch": unless_refused(whole(1)),
    "max_seq_len": unless_refused(whole(1)),
    "tiles": unless_refused(whole(1, none=True)),
    "images": unless_refused(whole()),
    "visual_budget": unless_refused(fraction_or_count),
    "prompt_tokens": unless_refused(whole(1, none=True)),
    "prefill_chunk": unless_refused(whole(1)),
}
OF_AN_ENGINE: dict[str, Rule] = {
    "slots": unless_refused(whole(1)),
    "max_seq_len": unless_refused(whole(1)),
    "visual_budget": unless_refused(fraction_or_count),
    "compiled": flag,
    "graphs": flag,
    "force": flag,
}
OF_A_RULE: dict[str, Rule] = {
    "k_ratio": number(0, 1, above=True),
    "keep": _keep,
    "votes": choice("all", "after", "last"),
    "keep_class_tokens": flag,
    "trim_first_layer": flag,
    "seed": unless_refused(whole()),
}
RULES = ("KeyNorm", "LastQuery", "RandomTokens", "TopK", "TrimmedLlama", "UniformGrid")


def _given(setting: str, value: Any) -> dict[str, Any]:
    """The odd one, and others that keep the answer short."""
    given = {"max_new_tokens": 1, "temperature": 0.0, "max_seq_len": LONGEST}
    if setting == "visual_budget":
        given["pruner"] = TopK(3)
    return {**given, setting: value}


def _start(setting: str, value: Any) -> None:
    engine, requests = tiny().start([prompt()], **_given(setting, value))
    engine.run(*requests)


def _submit(setting: str, value: Any) -> None:
    engine = Engine(tiny(), max_seq_len=LONGEST)
    engine.run(engine.submit(prompt(), **_given(setting, value)))


def _chat(setting: str, value: Any) -> None:
    tiny().chat(**_given(setting, value)).ask([picture(), "hi"])


def _engine(setting: str, value: Any) -> None:
    engine = Engine(tiny(), **{"max_seq_len": LONGEST, setting: value})
    engine.run(engine.submit(prompt(), max_new_tokens=1, temperature=0.0, pruner=TopK(1)))


def _logits(setting: str, value: Any) -> None:
    pruner = {"pruner": TopK(3)} if setting == "visual_budget" else {}
    tiny().logits(prompt(), **{**pruner, setting: value})


def _rule(name: str, setting: str, value: Any) -> None:
    needed = {"k_ratio": 0.5} if name == "TrimmedLlama" else {"keep": 1}
    rule = getattr(llama_vision, name)(**{**needed, setting: value})
    if not callable(value):
        tiny().logits(prompt(), pruner=rule)


def _outline(setting: str, value: Any) -> None:
    LlamaVision.without_weights(**{"source": TINY, setting: value})


DOORS: dict[str, Callable[[str, Any], Any]] = {
    "Settings": lambda s, v: Settings(**{s: v}),
    "generate": lambda s, v: tiny().generate(prompt(), **_given(s, v)),
    "stream": lambda s, v: list(tiny().stream(prompt(), **_given(s, v))),
    "start": _start,
    "plan": lambda s, v: tiny().plan([prompt()], **_given(s, v)),
    "Engine": _engine,
    "submit": _submit,
    "chat": _chat,
    "logits": _logits,
    "from_pretrained": lambda s, v: LlamaVision.from_pretrained(**{"source": TINY, s: v}),
    "without_weights": _outline,
    "plan_memory": lambda s, v: plan_memory(**{"source": TINY, "device": "cpu", s: v}),
    "tile_image": lambda s, v: llama_vision.tile_image(
        **{"image": picture(), "tile_size": 56, "max_tiles": 4, s: v}
    ),
    **{name: partial(_rule, name) for name in RULES},
}


class Combination(NamedTuple):
    """A setting at a door as a value."""

    door: str
    setting: str
    value: str


def _either(_: Any) -> Expected:
    return "either"


def rules() -> dict[str, dict[str, Rule]]:
    """For each door the settings that it takes; of a setting that is new here all may be right."""
    fields = {f.name: OF_A_REQUEST.get(f.name, _either) for f in dataclasses.fields(Settings)}
    taken = inspect.signature(LlamaVision.logits).parameters
    loading = {name: OF_A_PLAN[name] for name in ("source", "device", "dtype")}
    return {
        # The largest are the model's, which bare settings do not know.
        "Settings": fields,
        **{door: {**fields, **OF_A_RUN} for door in ("generate", "stream", "start")},
        "plan": {**fields, "slots": OF_A_RUN["slots"]},
        "Engine": OF_AN_ENGINE,
        "submit": {**fields, "hold": flag, "after": of_types(none=True)},
        "chat": {
            **fields,
            **{name: OF_AN_ENGINE[name] for name in ("max_seq_len", "compiled", "graphs", "force")},
            "system": of_types(str, none=True),
        },
        "logits": {name: rule for name, rule in fields.items() if name in taken},
        "from_pretrained": {**loading, "force": flag},
        "without_weights": loading,
        "plan_memory": OF_A_PLAN,
        "tile_image": {
            "tile_size": unless_refused(whole(1)),
            "max_tiles": unless_refused(whole(1)),
        },
        **{name: _of_rule(name) for name in RULES},
    }


def _of_rule(name: str) -> dict[str, Rule]:
    names = inspect.signature(getattr(llama_vision, name)).parameters
    return {setting: rule for setting, rule in OF_A_RULE.items() if setting in names}


@cache
def combinations() -> list[Combination]:
    """All of them, in an order that does not change."""
    return [
        Combination(door, setting, value)
        for door, settings in rules().items()
        for setting in settings
        for value in VALUES
        if (setting, value) != ("compiled", "True")  # compiling takes longer than a case may
    ]


def kind(seed: int, scratch: Any) -> Kind:
    """See `fuzzing.kinds`; nothing is drawn."""
    tiny()
    every = rules()

    def case(i: int) -> Case:
        door, setting, name = combinations()[i]
        value = VALUES[name]()
        expected = every[door][setting](value) if name != "Prickly()" else "refused"
        words = f"{door}({setting}={name})"
        return Case(words, lambda: DOORS[door](setting, value), expected)

    return Kind("settings", len(combinations()), case)
