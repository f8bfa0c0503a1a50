"""Refusing what does not fit, on devices that are made to look small."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, case_prompts
from stub_hub import REPO

from llama_vision import LlamaVision, Prompt, TrimmedLlama
from llama_vision.engine.engine import Engine
from llama_vision.errors import SettingError
from llama_vision.memory import fit, free
from llama_vision.memory.fit import MemoryLimitError, largest
from llama_vision.memory.units import human_bytes, parse_bytes

GREEDY = {"temperature": 0, "ignore_stop": True}


@pytest.fixture
def room(monkeypatch):
    """Sets what every device has free."""
    return lambda size: monkeypatch.setattr(fit, "free_memory", lambda _: size)


@pytest.mark.parametrize(
    ("free", "says"),
    [
        (
            3 * 2**20,
            "the weights take 3.6 MiB in float32 and 3.0 MiB are free on cpu, 573.3 KiB too few; "
            "try --dtype bfloat16 (half the size) or --quantize int8 (1.4 MiB), or go on all the "
            "same with --force (force=True)",
        ),
        (2**20, "a smaller model or a larger device is needed"),
    ],
)
def test_weights_that_do_not_fit_are_not_read(room, monkeypatch, free, says):
    room(free)
    monkeypatch.setattr("llama_vision.api.load_model", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(MemoryLimitError, match=re.escape(says)):
        LlamaVision.from_pretrained(TINY, device="cpu")


def test_weights_that_do_not_fit_are_not_fetched(room, hub):
    room(3 * 2**20)
    with pytest.raises(MemoryLimitError, match="the weights take"):
        LlamaVision.from_pretrained(REPO, device="cpu")
    assert {Path(name).name for name in hub.fetched} == {"config.json"}
    assert LlamaVision.from_pretrained(REPO, device="cpu", dtype="bfloat16")
    assert "model.safetensors.index.json" in {Path(name).name for name in hub.fetched}


def test_another_device_with_room_is_named(monkeypatch, tiny):
    rooms = {"cpu": 2**34, "cuda": 2**20}
    monkeypatch.setattr(fit, "free_memory", lambda device: rooms[torch.device(device).type])
    with pytest.raises(MemoryLimitError, match="try --device cpu, or go on"):
        fit.check_weights_fit(tiny.config, torch.float32, torch.device("cuda"))


def test_force_loads_and_runs_all_the_same(room):
    room(1)
    model = LlamaVision.from_pretrained(TINY, device="cpu", force=True)
    prompts = case_prompts("image_first")
    with pytest.raises(MemoryLimitError, match="no setting of this run makes it fit"):
        model.generate(prompts, max_new_tokens=2)
    assert len(model.generate(prompts, max_new_tokens=2, force=True)) == 1


def settings_in(error):
    """What a refusal offers, each as settings of `start`."""
    offers = re.findall(r"\((\w+=[^()]*(?:\([\d.]+\))?)\)", str(error.value))
    names = {"dict": dict, "TrimmedLlama": TrimmedLlama}
    return [eval(f"dict({offer})", names) for offer in offers if offer != "force=True"]


WAYS = {
    "image_first": {"max_seq_len", "visual_budget", "max_tiles"},
    "batch_ragged": {"slots", "max_seq_len", "visual_budget", "max_tiles"},
    "text": {"max_seq_len", "prefill_chunk"},
}


@pytest.mark.parametrize("case", WAYS)
def test_every_way_out_that_the_error_names_works(tiny, room, case):
    prompts = [Prompt([1] * 300)] if case == "text" else case_prompts(case)
    sizes = {"max_new_tokens": 400, "max_seq_len": 500, "slots": len(prompts)}
    plan = tiny.plan(prompts, **sizes)
    room(plan.total - plan.weights - 1)
    with pytest.raises(MemoryLimitError) as error:
        tiny.start(prompts, **sizes)
    message, offers = str(error.value), settings_in(error)
    assert f"the run takes {human_bytes(plan.total - plan.weights)} (text cache " in message
    assert "are free on cpu, 1 B too few; try " in message
    assert {name for offer in offers for name in offer} >= WAYS[case]
    space = fit.Room(tiny.config, torch.float32, tiny.device, loaded=True)
    for offer in offers:
        engine, requests = tiny.start(prompts, **{**sizes, **offer}, **GREEDY)
        assert requests[0] in engine.step()
        for name in offer.keys() - {"pruner", "prefill_chunk"}:  # and is the largest that does
            more = {**sizes, **offer, name: offer[name] + 1}
            assert not space.fits(tiny.workload(prompts, **more))


def test_of_too_many_prompts_as_many_are_answered_at_once_as_fit(tiny, room):
    prompts, sizes = case_prompts("batch_ragged") * 2, {"max_new_tokens": 200, **GREEDY}
    all_at_once = tiny.generate(prompts, **sizes)
    plan = tiny.plan(prompts, slots=3, **sizes)
    room(plan.total - plan.weights)
    engine, requests = tiny.start(prompts, **sizes)
    assert engine.cache.slots == 3 < len(prompts)
    assert [c.token_ids for c in engine.run(*requests)] == [c.token_ids for c in all_at_once]


@pytest.mark.parametrize("kind", ["prompts", "engine"])
def test_of_too_many_slots_the_number_that_fits_is_named(tiny, room, kind):
    prompts = case_prompts("image_first") * 40

    def start(slots):
        if kind == "engine":
            return Engine(tiny, slots=slots, max_seq_len=400)
        return tiny.start(prompts, slots=slots, max_new_tokens=400)[0]

    room(2**23)
    with pytest.raises(MemoryLimitError, match="of the 40 slots") as error:
        start(40)
    slots = settings_in(error)[0]["slots"]
    assert 1 < slots < 39
    assert start(slots).cache.slots == slots
    with pytest.raises(MemoryLimitError, match=f"try {slots} of the {slots + 1} slots"):
        start(slots + 1)


@pytest.mark.parametrize("size", [2**40, None])
def test_with_room_to_spare_nothing_is_simulated(tiny, room, monkeypatch, size):
    room(size)
    monkeypatch.setattr(fit, "plan_run", lambda *_, **__: pytest.fail("simulated"))
    assert tiny.generate(case_prompts("image_first"), max_new_tokens=2)


def test_free_memory_of_this_machine_is_some():
    assert 2**20 < free.free_memory("cpu") < 2**50


@pytest.mark.parametrize(("left", "least"), [(300, 300), (None, 1000), (5000, 1000)])
def test_a_container_s_limit_counts(monkeypatch, left, least):
    monkeypatch.setattr(free, "_available_on_host", lambda: 1000)
    monkeypatch.setattr(free, "_left_in_container", lambda: left)
    assert free.free_memory("cpu") == least


def test_free_memory_of_a_gpu_counts_what_the_allocator_holds(monkeypatch):
    allocator = {"memory_reserved": lambda _: 70, "memory_allocated": lambda _: 40}
    fake = SimpleNamespace(mem_get_info=lambda _: (500, 1000), **allocator)
    monkeypatch.setattr(torch, "cuda", fake)
    assert free.free_memory("cuda:0") == 530


@pytest.mark.parametrize("room", [0, 9, 10, 11, 57, 399, 400, 10**6])
@pytest.mark.parametrize(
    "size", [lambda n: 10 * n, lambda n: 7 + 3 * n, lambda n: max(10, n * n), lambda n: 5 + n // 7]
)
def test_the_search_finds_the_largest(size, room):
    assert largest(size, room, 40) == max((n for n in range(1, 41) if size(n) <= room), default=0)


def test_the_search_asks_seldom_where_bytes_grow_evenly():
    asked = []
    assert largest(lambda n: asked.append(n) or 1000 + 3 * n, 10_000, 100_000) == 3000
    assert len(set(asked)) <= 5


@pytest.mark.parametrize(
    ("size", "words"),
    [
        *((0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (2**20, "1.0 MiB")),
        *((5.5 * 2**30, "5.50 GiB"), (5 * 2**40, "5.00 TiB")),
    ],
)
def test_bytes_for_people(size, words):
    assert human_bytes(size) == words


@pytest.mark.parametrize(
    ("words", "size"),
    [
        *(("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("24g", 24 * 2**30)),
        *(("1.5MiB", 3 * 2**19), ("800", 800), ("800 B", 800)),
    ],
)
def test_sizes_are_read(words, size):
    assert parse_bytes(words) == size


@pytest.mark.parametrize("words", ["", "much", "GiB", "1.2.3GB", "-5GB"])
def test_what_is_no_size_is_told(words):
    with pytest.raises(SettingError, match="is no size; expected one such as 24GiB"):
        parse_bytes(words)
