"""The plan, against what is really allocated."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY, case_prompts, live_bytes
from oracle import random_config, random_images, random_model, random_token_ids

from llama_vision import LlamaVision, Prompt, TrimmedLlama
from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import PruningError
from llama_vision.cli.main import EMBEDDED_MODEL
from llama_vision.config import DTYPES, official_config
from llama_vision.inputs.image import TiledImage
from llama_vision.memory.largest import workload_alike
from llama_vision.memory.plan import (
    PHASES,
    Tracker,
    Workload,
    plan_run,
    shallow,
    weight_parts,
    working_memory,
)
from llama_vision.model.model import model_without_weights

TYPES = list(DTYPES.values())
GREEDY = {"temperature": 0, "ignore_stop": True}


def random_run(seed, monkeypatch):
    """A random model, prompts with random images, and settings: what `start` takes."""
    draw = random.Random(seed)
    config = random_config(seed)
    model = random_model(config, seed).to(draw.choice(TYPES))
    images, prompts = [], []
    for _ in range(draw.randint(1, 4)):
        count = draw.choice([0, 1, 1, 2, 3])
        images.append(random_images(config, count, draw))
        ids = random_token_ids(config, count, count + draw.randint(1, 9), draw)
        prompts.append(Prompt(ids, [None] * count))
    # Handed over: the pictures are to live no longer than the run keeps them.
    monkeypatch.setattr(LlamaVision, "tile", lambda *_: images.pop(0))
    monkeypatch.setattr(LlamaVision, "check", lambda *_: None)
    settings = {"max_new_tokens": draw.randint(2, 6), "prefill_chunk": draw.choice([3, 8, 2048])}
    if draw.random() < 0.6:
        rule = TrimmedLlama(draw.choice([0.1, 1.0]), trim_first_layer=draw.random() < 0.7)
        settings |= {"pruner": rule, "visual_budget": draw.choice([0.3, 0.8, 5])}
    return LlamaVision(model), prompts, settings


# Weights and caches, to the byte


@pytest.mark.parametrize("seed", range(40))
def test_weights_and_caches_take_what_was_planned(seed, monkeypatch):
    """Random types, batches, tiles, images, budgets and lengths."""
    model, prompts, settings = random_run(seed, monkeypatch)
    generation = model.start(prompts, **settings, **GREEDY)
    plan = plan_run(model.config, generation.workload, dtype=model.model.dtype, device="cpu")
    for _ in generation:
        pass
    assert plan.weights == sum(p.nbytes for p in model.model.parameters())
    assert plan.text_cache == generation.cache.text.nbytes
    assert plan.visual_cache == generation.cache.visual.nbytes
    assert plan.total == plan.weights + generation.cache.nbytes + plan.working


@pytest.mark.parametrize("name", ["11b", "90b"])
@pytest.mark.parametrize("budget", [None, 0.5])
def test_the_official_models_take_what_was_planned(name, budget):
    config = official_config(name)
    load = workload_alike(config, batch=3, images=2, max_seq_len=500, visual_budget=budget)
    plan = plan_run(config, load, dtype=torch.bfloat16, device="cuda")
    model = model_without_weights(config).to(torch.bfloat16)
    sizes = load.cache_sizes(config)
    cache = Cache(config.text, dtype=torch.bfloat16, device="meta", **sizes)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert (plan.text_cache, plan.visual_cache) == (cache.text.nbytes, cache.visual.nbytes)
    assert sizes["visual_capacity"] == (2 * 4 * 1601 if budget is None else 1601 * 4)
    assert plan.weights == 2 * {"11b": 10_670_220_835, "90b": 88_593_355_323}[name]


def test_the_parts_are_those_of_the_model():
    config = official_config("11b")
    parts = weight_parts(config, torch.bfloat16)
    assert parts["projector"] == 2 * (7680 + 1) * 4096
    assert parts["embedding"] == 2 * (128256 + 8) * 4096
    assert parts["head"] == 2 * 128256 * 4096
    assert sum(parts.values()) == 21_340_441_670


def test_without_a_budget_the_plan_is_the_most_that_a_pruner_can_leave(tiny):
    (prompt,) = case_prompts("image_first")
    for k_ratio, equal in ((1.0, True), (0.05, False)):
        settings = {"pruner": TrimmedLlama(k_ratio), "max_new_tokens": 3}
        plan = tiny.plan([prompt], **settings)
        generation = tiny.start([prompt], **settings, **GREEDY)
        for _ in generation:
            pass
        actual = generation.cache.visual.nbytes
        assert actual == plan.visual_cache if equal else actual < plan.visual_cache


# Peaks


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_of_a_random_run_is_planned(seed, monkeypatch):
    """What the ledger says, and what torch's own profiler sees allocated.

    The profiler also sees what an operation takes for itself; beside models this small that counts.
    oneDNN is left out: its scratch, which is the library's, is a sixth of all in the smallest.
    """
    model, prompts, settings = random_run(seed, monkeypatch)
    generation = model.start(prompts, track_memory=True, **settings, **GREEDY)
    plan = plan_run(model.config, generation.workload, dtype=model.model.dtype, device="cpu")
    waiting = sum(image.pixels.nbytes for sample in generation.images for image in sample)
    with torch.backends.mkldnn.flags(enabled=False):
        live = live_bytes(lambda: list(generation))
    stays = plan.weights + generation.cache.nbytes
    assert generation.ledger.peak == pytest.approx(plan.total, rel=0.05)
    assert stays + waiting + max(live) == pytest.approx(plan.total, rel=0.05, abs=2**14)
    assert set(generation.ledger.peaks) == set(PHASES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_peak_of_the_embedded_model_is_planned(batch, tiles, dtype, monkeypatch):
    model = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype=dtype)
    side = model.config.vision.image_size
    image_id, grid = model.config.text.image_token_id, {1: (1, 1), 4: (2, 2)}[tiles]
    monkeypatch.setattr(LlamaVision, "check", lambda *_: None)
    monkeypatch.setattr(
        LlamaVision, "tile", lambda *_: [TiledImage(torch.randn(tiles, 3, side, side), grid, 0)]
    )
    prompts = [Prompt([1, image_id, *range(2, 30)], [None])] * batch
    generation = model.start(prompts, max_new_tokens=4, track_memory=True, **GREEDY)
    plan = plan_run(model.config, generation.workload, dtype=dtype, device="cpu")
    waiting = batch * tiles * 3 * side * side * 4
    live = live_bytes(lambda: list(generation))
    assert generation.ledger.peak == pytest.approx(plan.total, rel=0.05)
    measured = plan.weights + generation.cache.nbytes + waiting + max(live)
    assert measured == pytest.approx(plan.total, rel=0.05)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(12))
def test_a_shallow_model_has_the_peaks_of_the_whole(seed, device, monkeypatch):
    """Deeper than the random ones, so that something is left out."""
    config = random_config(seed)
    text = replace(config.text, num_hidden_layers=14, cross_attention_layers=(2, 5, 6, 10))
    vision = replace(
        config.vision,
        num_hidden_layers=9,
        num_global_layers=3,
        intermediate_layers_indices=(0, 3, 7)[: seed % 4],
    )
    config = replace(config, text=text, vision=vision)
    small = shallow(config)
    assert small.text.num_hidden_layers == 5
    assert small.vision.num_hidden_layers == max(2, 1 + seed % 4)
    budget = [None, 0.5][seed % 2]
    load = workload_alike(config, batch=2, images=2, max_seq_len=40, visual_budget=budget)
    load = replace(load, prefill_chunk=[None, 16][seed % 3 == 0])
    assert working_memory(small, load, torch.float32, device) == working_memory(
        config, load, torch.float32, device
    )


def test_pictures_that_wait_count_on_the_cpu_alone():
    config = official_config("11b")
    load = workload_alike(config, images=8, max_seq_len=64)
    on_cpu = plan_run(config, load, dtype=torch.bfloat16, device="cpu")
    on_cuda = plan_run(config, load, dtype=torch.bfloat16, device="cuda")
    pixels = 8 * 4 * 3 * 560 * 560 * 4
    assert on_cpu.phases["vision"] - on_cuda.phases["vision"] == pytest.approx(pixels, rel=0.02)


# Memory that does not grow


def test_the_memory_of_images_beyond_their_features_does_not_grow():
    """The encoder's own tensors are those of one group, however many images there are."""
    config = official_config("11b")
    token = config.text.hidden_size * 2 + 3 * 8
    peaks = {}
    for images in (4, 8, 16):
        load = workload_alike(config, images=images, max_seq_len=64)
        peak = plan_run(config, load, dtype=torch.bfloat16, device="cuda").phases["vision"]
        peaks[images] = peak - images * 4 * 1601 * token
    assert peaks[16] == pytest.approx(peaks[4], rel=1e-3)


def prefill_growth(config, prefill_chunk, budget=None):
    """Bytes of temporary tensors in prefill for each token more of the prompt."""
    peaks = {}
    for tokens in (4000, 8000):
        load = workload_alike(config, max_seq_len=8192, prompt_tokens=tokens, visual_budget=budget)
        load = replace(load, prefill_chunk=prefill_chunk)
        peaks[tokens] = working_memory(shallow(config), load, torch.bfloat16, "cuda")["prefill"]
    return (peaks[8000] - peaks[4000]) / 4000


@pytest.mark.parametrize("budget", [None, 0.5], ids=["all", "pruned"])
def test_a_long_prompt_in_chunks_takes_its_hidden_states_and_nothing_else(budget):
    """One row of D numbers a token, its id and position and vote, and its columns of one mask."""
    config = official_config("11b")
    rows, heads = 64, config.text.num_attention_heads // config.text.num_key_value_heads
    in_chunks = prefill_growth(config, rows, budget)
    hidden = 2 * config.text.hidden_size
    mask = rows * (1 + heads * (1 + 2))  # bool, repeated for grouped heads, and as numbers
    assert hidden <= in_chunks <= hidden + mask + 64
    assert prefill_growth(config, None, budget) > 10 * hidden


# The counter


def test_the_tracker_counts_what_is_alive():
    tracker = Tracker("cpu")
    with tracker:
        a = torch.zeros(1000, dtype=torch.float32)
        b = a[:10] + 1  # a view takes nothing
        assert tracker.now == 4040
        del a
        assert (tracker.now, tracker.peak) == (40, 4040)
        c, d = torch.zeros(30).sort()
        assert tracker.now == 40 + 30 * (4 + 8)
    torch.zeros(999)  # outside
    del b, c, d
    assert (tracker.now, tracker.peak) == (0, 4040)


def test_the_tracker_counts_only_its_devices():
    tracker = Tracker("meta")
    with tracker:
        torch.zeros(1000)
        kept = torch.zeros(10, device="meta")
    assert tracker.now == tracker.peak == kept.nbytes


def test_tracking_memory_changes_no_answer(tiny):
    prompts = case_prompts("batch_ragged")
    plain, tracked = (
        tiny.start(prompts, max_new_tokens=6, track_memory=track, **GREEDY)
        for track in (False, True)
    )
    assert list(plain) == list(tracked)
    assert plain.ledger is None


# Workloads


def test_the_plan_of_prompts_is_that_of_their_run(tiny):
    for case in ("two_images", "batch_ragged", "text_only"):
        prompts = case_prompts(case)
        settings = {"max_new_tokens": 5, "max_tiles": 2, "prefill_chunk": 16}
        assert tiny.workload(prompts, **settings) == tiny.start(prompts, **settings).workload
        assert tiny.plan(prompts, **settings).total > 0


def test_a_checkpoint_without_weights_plans_and_does_not_answer():
    outline = LlamaVision.without_weights(TINY, device="cpu")
    whole = LlamaVision.from_pretrained(TINY, device="cpu")
    prompts = case_prompts("image_first")
    assert outline.plan(prompts) == whole.plan(prompts)
    for answer in (outline.generate, lambda p: outline.logits(p[0])):
        with pytest.raises(ValueError, match="has no weights and can only plan"):
            answer(prompts)
    outline.load_weights()
    settings = {"max_new_tokens": 3, **GREEDY}
    assert outline.generate(prompts, **settings)[0].token_ids == (
        whole.generate(prompts, **settings)[0].token_ids
    )


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, True, "half"])
def test_a_budget_out_of_range_is_told(budget):
    with pytest.raises(PruningError, match=r"expected a fraction above 0 and at most 1\.0"):
        workload_alike(official_config("11b"), visual_budget=budget)


def test_plans_are_remembered():
    """A second run of the same sizes asks for no second simulation."""
    config = random_config(0)
    load = Workload(((1, 2, 3),), ((),), 8)
    working_memory.cache_clear()
    for _ in range(3):
        plan_run(config, load, dtype=torch.float32, device="cpu")
    assert working_memory.cache_info().misses == 1
