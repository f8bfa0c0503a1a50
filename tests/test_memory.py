"""The plan, against what is really allocated."""

import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY, case_prompts, live_bytes
from oracle import random_config, random_model, random_token_ids
from PIL import Image

from llama_vision import LlamaVision, Prompt, TrimmedLlama, plan_memory
from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import PruningError
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.config import DTYPES, official_config
from llama_vision.engine.workload import PromptSize, Workload, workload_alike
from llama_vision.memory.ledger import Tracker
from llama_vision.memory.plan import plan_run, weight_parts
from llama_vision.memory.simulation import shallow, working_memory
from llama_vision.model.model import model_without_weights

DRAWN = {"temperature": 1.0, "top_p": 0.9, "seed": 1, "ignore_stop": True}
"""As planned for: drawing takes the most."""


def random_run(seed):
    """A random model, prompts with random pictures, and settings: what `start` takes."""
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed).to(draw.choice(list(DTYPES.values())))
    prompts = []
    for _ in range(draw.randint(1, 4)):
        count = draw.choice([0, 1, 1, 2, 3])
        ids = random_token_ids(config, count, count + draw.randint(1, 9), draw)
        sizes = [(draw.randint(1, 60), draw.randint(1, 60)) for _ in range(count)]
        prompts.append(Prompt(ids, [Image.new("RGB", size) for size in sizes]))
    settings = {"max_new_tokens": draw.randint(2, 6), "prefill_chunk": draw.choice([3, 8, 2048])}
    settings["slots"] = draw.choice([None, None, 1, 2])
    if draw.random() < 0.6:
        rule = TrimmedLlama(draw.choice([0.1, 1.0]), trim_first_layer=draw.random() < 0.7)
        settings |= {"pruner": rule, "visual_budget": draw.choice([0.3, 0.8, 5])}
    return LlamaVision(model), prompts, settings


def run(model, prompts, **settings):
    """The engine after a run whose memory was tracked."""
    engine, requests = model.start(prompts, track_memory=True, **settings, **DRAWN)
    engine.run(*requests)
    return engine


def assert_as_planned(model, engine):
    """To the byte, but for what is planned and not always taken.

    Of a pruner, room for as many tokens as it may keep. While prompts wait, the inputs of a step
    that came before, and notes of all of them. Of decoding, masks for prompts that end one after
    the other; the ledger watches the first step, in which equal ones need none. Of drawing, the
    logits once more.
    """
    load, cache, text = engine.workload, engine.cache, model.config.text
    plan = plan_run(model.config, load, dtype=model.model.dtype, device="cpu")
    assert plan.weights == sum(p.nbytes for p in model.model.parameters())
    assert (plan.text_cache, plan.visual_cache) == (cache.text.nbytes, cache.visual.nbytes)
    stays, capacities = plan.weights + cache.nbytes, cache.visual.capacities
    assert plan.total == stays + plan.working
    waiting = load.slots < len(load.prompts)
    inputs = 32 * load.slots * waiting
    notes = sum(sum(prompt.groups(model.config)) for prompt in load.prompts) * waiting
    features = max(capacities) * text.hidden_size * model.model.dtype.itemsize
    slack = {
        "vision": inputs,
        "prefill": inputs + (load.pruner is not None) * features,
        "decode": notes + load.slots * (load.max_text_tokens + sum(capacities[:2]) + 2),
        "sampling": notes + load.slots * text.vocab_size * 4,
    }
    for phase, peak in engine.ledger.peaks.items():
        assert 0 <= stays + plan.phases[phase] - peak <= slack[phase], phase
    assert engine.ledger.peaks.keys() == {phase for phase, size in plan.phases.items() if size}
    return plan


@pytest.mark.parametrize("seed", range(40))
def test_a_random_run_takes_what_was_planned(seed):
    """Random types, batches, slots, tiles, images, budgets, chunks and lengths."""
    model, prompts, settings = random_run(seed)
    assert_as_planned(model, run(model, prompts, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", [1, 4])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_peak_of_the_embedded_model_is_planned(batch, tiles, dtype):
    """The ledger says the same, and torch's own profiler sees no less allocated.

    More it may see: libraries take scratch, and how much depends on the processor.
    """
    model = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype=dtype)
    side = model.config.vision.image_size * {1: 1, 4: 2}[tiles]
    ids = [1, model.config.text.image_token_id, *range(2, 30)]
    # Different pictures: of equal ones the features are held for the prompts that wait.
    prompts = [Prompt(ids, [Image.new("RGB", (side, side), (i, 0, 0))]) for i in range(batch)]
    model.generate(prompts[0], max_new_tokens=1)  # what is done once in a process
    engine, requests = model.start(prompts, max_new_tokens=4, track_memory=True, **DRAWN)
    live = live_bytes(lambda: engine.run(*requests))
    plan = assert_as_planned(model, engine)
    assert engine.ledger.peak == plan.total <= plan.weights + engine.cache.nbytes + max(live)


@pytest.mark.parametrize("slots", [None, 2])
def test_features_that_several_prompts_share_are_planned(tiny, slots):
    (one,), (other,) = case_prompts("bos_image"), case_prompts("image_first")
    prompts = [one, other, one, one, other]
    engine = run(tiny, prompts, max_new_tokens=3, slots=slots)
    load = engine.workload
    plan = plan_run(tiny.config, load, dtype=torch.float32, device="cpu")
    shared = sum(sum(load.prompts[i].groups(tiny.config)) for i in (0, 1))
    assert load.shared_tokens == shared
    assert engine.counts.images == 2
    assert plan.total - shared * 4 * tiny.config.text.hidden_size <= engine.ledger.peak
    assert engine.ledger.peak <= plan.total
    on_cuda = (
        plan_run(tiny.config, w, dtype=torch.float32, device="cuda")
        for w in (load, replace(load, shared_tokens=0))
    )
    assert len({plan.total for plan in on_cuda}) == 1  # there they are on the host


@pytest.mark.parametrize("name", ["11b", "90b"])
@pytest.mark.parametrize("budget", [None, 0.5])
def test_the_official_models_take_what_was_planned(name, budget):
    config = official_config(name)
    load = workload_alike(config, batch=3, images=2, max_seq_len=500, visual_budget=budget)
    plan = plan_run(config, load, dtype=torch.bfloat16, device="cuda")
    sizes = load.cache_sizes(config)
    cache = Cache(config.text, dtype=torch.bfloat16, device="meta", **sizes)
    assert plan.weights == sum(2 * p.numel() for p in model_without_weights(config).parameters())
    assert (plan.text_cache, plan.visual_cache) == (cache.text.nbytes, cache.visual.nbytes)
    assert sizes["visual_capacity"] == (2 * 4 * 1601 if budget is None else 1601 * 4)
    assert plan.weights == 2 * {"11b": 10_670_220_835, "90b": 88_593_355_323}[name]


def test_the_parts_are_those_of_the_model():
    parts = weight_parts(official_config("11b"), torch.bfloat16)
    assert parts["projector"] == 2 * (7680 + 1) * 4096
    assert parts["embedding"] == 2 * (128256 + 8) * 4096
    assert parts["head"] == 2 * 128256 * 4096
    assert sum(parts.values()) == 21_340_441_670


@pytest.mark.parametrize(("k_ratio", "equal"), [(1.0, True), (0.05, False)])
def test_without_a_budget_the_plan_is_the_most_that_a_pruner_can_leave(tiny, k_ratio, equal):
    prompts, settings = case_prompts("image_first"), {"pruner": TrimmedLlama(k_ratio)}
    plan = tiny.plan(prompts, **settings)
    taken = run(tiny, prompts, max_new_tokens=3, **settings).cache.visual.nbytes
    assert taken == plan.visual_cache if equal else taken < plan.visual_cache


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_works_in_the_room_of_its_largest_prompt_or_of_a_step_of_all_slots(seed):
    draw, config = random.Random(seed), random_config(seed)
    prompts = []
    for images in (0, 1, 2, 3):
        ids = random_token_ids(config, images, images + draw.randint(1, 9), draw)
        prompts.append(PromptSize(tuple(ids), tuple(draw.choices(config.vision.grids, k=images))))
    load = Workload(tuple(prompts), 4, 40)

    def phases(slots, *prompts):
        some = replace(load, slots=slots, prompts=prompts)
        return working_memory(config, some, torch.float32, "cuda")

    whole, alone = phases(4, *prompts), [phases(1, prompt) for prompt in prompts]
    most_decoded = max(prompts, key=lambda prompt: prompt.decoded(config))
    for phase in ("vision", "prefill"):
        assert whole[phase] == max(one[phase] for one in alone)
    for phase in ("decode", "sampling"):
        assert whole[phase] == phases(4, most_decoded)[phase] > alone[0][phase]


def test_32_prompts_with_an_image_work_in_the_room_of_one():
    sizes = {"prompt_tokens": 64, "max_seq_len": 2048, "dtype": "bfloat16", "device": "cuda"}
    one, many = (plan_memory("11b", batch=batch, **sizes) for batch in (1, 32))
    assert many.working == one.working <= 0.4 * 2**30
    assert many.visual_cache == 32 * one.visual_cache


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("seed", range(12))
def test_a_shallow_model_has_the_peaks_of_the_whole(seed, device):
    """Deeper than the random ones, so that something is left out."""
    config = random_config(seed)
    text = replace(config.text, num_hidden_layers=14, cross_attention_layers=(2, 5, 6, 10))
    depths = {"num_hidden_layers": 9, "num_global_layers": 3}
    vision = replace(config.vision, **depths, intermediate_layers_indices=(0, 3, 7)[: seed % 4])
    config = replace(config, text=text, vision=vision)
    small = shallow(config)
    assert small.text.num_hidden_layers == 5
    assert small.vision.num_hidden_layers == max(2, 1 + seed % 4)
    sizes = {"batch": 2, "images": 2, "max_seq_len": 40, "prefill_chunk": [2048, 16][seed % 3 == 0]}
    load = workload_alike(config, visual_budget=[None, 0.5][seed % 2], **sizes)
    of_small, of_whole = (working_memory(c, load, torch.float32, device) for c in (small, config))
    assert of_small == of_whole


def vision_peak(images, device):
    return plan_memory("11b", images=images, max_seq_len=64, device=device).phases["vision"]


def test_pictures_of_a_group_count_on_the_cpu_alone():
    pixels = 8 * 4 * 3 * 560 * 560 * 4
    assert vision_peak(8, "cpu") - vision_peak(8, "cuda") == pytest.approx(pixels, rel=0.02)


def test_the_memory_of_images_beyond_their_features_does_not_grow():
    """The encoder's own tensors are those of one image, however many there are."""
    features = 4 * 1601 * official_config("11b").text.hidden_size * 2
    assert vision_peak(16, "cuda") - 16 * features == vision_peak(4, "cuda") - 4 * features


def prefill_growth(**sizes):
    """Bytes of temporary tensors in the 11B's prefill for each token more of the prompt."""
    sizes |= {"max_seq_len": 8192, "device": "cuda"}
    few, many = (plan_memory("11b", prompt_tokens=tokens, **sizes) for tokens in (4000, 8000))
    return (many.phases["prefill"] - few.phases["prefill"]) / 4000


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_long_prompt_in_chunks_takes_its_hidden_states_and_little_else(budget):
    """A row of D numbers a token, its id, and its column of a mask while the next is made."""
    hidden, rows = 2 * official_config("11b").text.hidden_size, 64
    growth = prefill_growth(prefill_chunk=rows, visual_budget=budget)
    assert hidden <= growth <= hidden + 2 * (8 + rows)
    assert prefill_growth(prefill_chunk=8192, visual_budget=budget) > 10 * hidden


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
    prompts, settings = case_prompts("batch_ragged"), {"max_new_tokens": 6, **DRAWN}
    engine, requests = tiny.start(prompts, track_memory=True, **settings)
    tracked, plain = engine.run(*requests), tiny.generate(prompts, **settings)
    assert [c.token_ids for c in tracked] == [c.token_ids for c in plain]
    assert tiny.start(prompts)[0].ledger is None


def test_the_plan_of_prompts_is_that_of_their_run(tiny):
    settings = {"max_new_tokens": 5, "max_tiles": 2, "prefill_chunk": 16}
    for prompts in map(case_prompts, ("two_images", "batch_ragged", "text_only")):
        assert tiny.workload(prompts, **settings) == tiny.start(prompts, **settings)[0].workload
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
    answers = (model.generate(prompts, max_new_tokens=3, **DRAWN)[0] for model in (outline, whole))
    assert next(answers).token_ids == next(answers).token_ids


@pytest.mark.parametrize("budget", [0, -1, 0.0, 1.5, True, "half"])
def test_a_budget_out_of_range_is_told(budget):
    with pytest.raises(PruningError, match=r"expected a fraction above 0 and at most 1\.0"):
        workload_alike(official_config("11b"), visual_budget=budget)


def test_a_second_run_of_the_same_sizes_asks_for_no_second_simulation():
    load = Workload((PromptSize((1, 2, 3)),), 1, 8)
    working_memory.cache_clear()
    for _ in range(3):
        plan_run(random_config(0), load, dtype=torch.float32, device="cpu")
    assert working_memory.cache_info().misses == 1
