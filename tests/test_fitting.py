"""Refusing what does not fit, on devices that are made to look small."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, case_prompts
from stub_hub import REPO

from llama_vision import LlamaVision, TrimmedLlama
from llama_vision.config import SettingError
from llama_vision.memory import fit as fitting
from llama_vision.memory.fit import (
    MemoryLimitError,
    free_memory,
    human_bytes,
    largest,
    parse_bytes,
)

CPU = torch.device("cpu")
GREEDY = {"temperature": 0, "ignore_stop": True}


@pytest.fixture
def room(monkeypatch):
    """Sets what every device has free."""
    return lambda size: monkeypatch.setattr(fitting, "free_memory", lambda _: size)


# The weights


def test_weights_that_do_not_fit_are_not_read(room, monkeypatch):
    room(3 * 2**20)
    monkeypatch.setattr("llama_vision.api.load_model", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(MemoryLimitError) as error:
        LlamaVision.from_pretrained(TINY, device="cpu")
    assert str(error.value) == (
        "the weights take 3.6 MiB in float32 and 3.0 MiB are free on cpu, 573.3 KiB too few; try "
        "--dtype bfloat16 (half the size), or go on all the same with --force (force=True)"
    )


def test_weights_that_do_not_fit_are_not_fetched(room, hub):
    room(3 * 2**20)
    with pytest.raises(MemoryLimitError, match="the weights take"):
        LlamaVision.from_pretrained(REPO, device="cpu")
    assert {name.rpartition("/")[2] for name in hub.fetched} == {"config.json"}
    assert LlamaVision.from_pretrained(REPO, device="cpu", dtype="bfloat16")
    assert "model.safetensors.index.json" in {name.rpartition("/")[2] for name in hub.fetched}


def test_the_type_that_the_error_names_is_accepted(room):
    room(3 * 2**20)
    assert LlamaVision.from_pretrained(TINY, device="cpu", dtype="bfloat16")


def test_weights_that_fit_nowhere_say_so(room):
    room(2**20)
    with pytest.raises(MemoryLimitError, match="a smaller model or a larger device is needed"):
        LlamaVision.from_pretrained(TINY, device="cpu")


def test_another_device_with_room_is_named(monkeypatch):
    rooms = {"cpu": 2**34, "cuda": 2**20}
    monkeypatch.setattr(fitting, "free_memory", lambda device: rooms[torch.device(device).type])
    config = LlamaVision.without_weights(TINY, device="cpu").config
    with pytest.raises(MemoryLimitError, match="try --device cpu, or go on"):
        fitting.check_weights_fit(config, torch.float32, torch.device("cuda"))


def test_force_loads_and_runs_all_the_same(room):
    room(1)
    model = LlamaVision.from_pretrained(TINY, device="cpu", force=True)
    prompts = case_prompts("image_first")
    with pytest.raises(MemoryLimitError):
        model.generate(prompts, max_new_tokens=2)
    assert len(model.generate(prompts, max_new_tokens=2, force=True)) == 1


# A run


def settings_in(message):
    """What the error offers, each as settings of `generate`."""
    offers = re.findall(r"\((\w+=[^()]*(?:\([\d.]+\))?)\)", message)
    names = {"dict": dict, "TrimmedLlama": TrimmedLlama}
    return [eval(f"dict({offer})", names) for offer in offers if offer != "force=True"]


@pytest.mark.parametrize("case", ["image_first", "two_images", "batch_ragged"])
def test_every_way_out_that_the_error_names_works(tiny, room, case):
    prompts = case_prompts(case)
    sizes = {"max_new_tokens": 400, "max_seq_len": 500}
    need = tiny.plan(prompts, **sizes).total - tiny.plan(prompts, **sizes).weights
    room(need - 1)
    with pytest.raises(MemoryLimitError) as error:
        tiny.generate(prompts, **sizes, **GREEDY)
    message = str(error.value)
    assert f"the run takes {human_bytes(need)} (text cache " in message
    assert "are free on cpu, 1 B too few; try --max-seq-len" in message
    offers = settings_in(message)
    assert {"max_seq_len", "visual_budget"} <= {name for offer in offers for name in offer}
    for offer in offers:
        generation = tiny.start(prompts, **{**sizes, **offer}, **GREEDY)
        next(iter(generation))
        for name in ("max_seq_len", "visual_budget", "max_tiles"):
            if name in offer:  # and is the largest that does
                with pytest.raises(MemoryLimitError):
                    tiny.start(prompts, **{**sizes, **offer, name: offer[name] + 1}, **GREEDY)


def test_a_batch_that_is_too_large_says_how_many_fit(tiny, room):
    prompts = case_prompts("image_first") * 6
    plans = [tiny.plan(prompts[:n], max_new_tokens=400) for n in range(1, 7)]
    room(plans[3].total - plans[3].weights)
    with pytest.raises(MemoryLimitError, match="4 of the 6 prompts at a time"):
        tiny.generate(prompts, max_new_tokens=400)
    assert len(tiny.generate(prompts[:4], max_new_tokens=400, temperature=0)) == 4


def test_no_way_out_is_told(tiny, room):
    room(1000)
    with pytest.raises(MemoryLimitError, match="no setting of this run makes it fit"):
        tiny.generate(case_prompts("image_first"), max_new_tokens=2)


def test_with_room_to_spare_nothing_is_simulated(tiny, monkeypatch):
    monkeypatch.setattr(fitting, "plan_run", lambda *_, **__: pytest.fail("simulated"))
    assert tiny.generate(case_prompts("image_first"), max_new_tokens=2)


def test_an_unknown_room_refuses_nothing(tiny, room):
    room(None)
    assert tiny.generate(case_prompts("image_first"), max_new_tokens=2)


# What is free


def test_free_memory_of_this_machine_is_some():
    assert 2**20 < free_memory("cpu") < 2**50


def test_a_container_s_limit_counts(monkeypatch):
    monkeypatch.setattr(fitting, "_available_on_host", lambda: 1000)
    for left, free in ((300, 300), (None, 1000), (5000, 1000)):
        monkeypatch.setattr(fitting, "_left_in_container", lambda left=left: left)
        assert free_memory("cpu") == free


def test_free_memory_of_a_gpu_counts_what_the_allocator_holds(monkeypatch):
    fake = SimpleNamespace(
        memory_reserved=lambda _: 70,
        memory_allocated=lambda _: 40,
        mem_get_info=lambda _: (500, 1000),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    assert free_memory("cuda:0") == 530


# The search


@pytest.mark.parametrize("room", [0, 9, 10, 11, 57, 399, 400, 10**6])
@pytest.mark.parametrize(
    "size", [lambda n: 10 * n, lambda n: 7 + 3 * n, lambda n: max(10, n * n), lambda n: 5 + n // 7]
)
def test_the_search_finds_the_largest(size, room):
    most = 40
    fitting_ones = [n for n in range(1, most + 1) if size(n) <= room]
    assert largest(size, room, most) == max(fitting_ones, default=0)


def test_the_search_asks_seldom_where_bytes_grow_evenly():
    asked = []
    assert largest(lambda n: asked.append(n) or 1000 + 3 * n, 10_000, 100_000) == 3000
    assert len(set(asked)) <= 5


# Sizes in words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20, "1.0 MiB"),
        (5.5 * 2**30, "5.50 GiB"),
        (5 * 2**40, "5.00 TiB"),
    ],
)
def test_bytes_for_people(size, words):
    assert human_bytes(size) == words


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 GB", 24 * 10**9),
        ("24g", 24 * 2**30),
        ("1.5MiB", 3 * 2**19),
        ("800", 800),
        ("800 B", 800),
    ],
)
def test_sizes_are_read(words, size):
    assert parse_bytes(words) == size


@pytest.mark.parametrize("words", ["", "much", "GiB", "1.2.3GB", "-5GB"])
def test_what_is_no_size_is_told(words):
    with pytest.raises(SettingError, match="is no size; expected one such as 24GiB"):
        parse_bytes(words)
