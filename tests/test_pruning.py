"""The hook: when a pruner is asked, what it is given, and what becomes of its answer."""

import math
import random
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import (
    CASES,
    Conversation,
    Keep,
    Spy,
    assert_close,
    case_images,
    case_prompts,
    golden_json,
    golden_tensors,
)
from oracle import MaskedOracle, random_config, random_images, random_model
from torch.utils._python_dispatch import TorchDispatchMode

from llama_vision import (
    Engine,
    KeyNorm,
    LastQuery,
    Prompt,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import PruningError
from llama_vision.engine import segment_forward
from llama_vision.model import text

EXACT = 1e-5
GREEDY = {"temperature": 0, "ignore_stop": True}
IMAGE_CASES = [case for case in CASES if case != "text_only"]
TRIMMED = golden_json("manifest")["trimmed"]
RATIOS = ["0.05", "0.1", "0.25", "0.5", "1.0"]
RULES = [TopK, LastQuery, RandomTokens, UniformGrid, KeyNorm, TrimmedLlama]


def trimmed_prompt(key):
    """The prompt of a golden file such as `batch_1`."""
    case, _, number = key.rpartition("_")
    return case_prompts(case)[int(number)]


def kept_columns(completion):
    """The golden files' numbers of the kept tokens: all four slots of an image count."""
    slots = torch.zeros(len(completion.kept), 4, 17, dtype=torch.bool)
    for image, kept in enumerate(completion.kept):
        slots[image, : len(kept)] = kept
    return slots.flatten().nonzero().flatten()


# Trimmed Llama, as the reference has it


@pytest.mark.parametrize("ratio", RATIOS)
def test_kept_tokens_and_answers_are_the_reference_s(tiny, ratio):
    """All prompts in an engine of four slots; of several groups are three of them."""
    assert sum(facts[ratio]["k"] == "per group" for facts in TRIMMED.values()) == 3
    prompts = [trimmed_prompt(key) for key in TRIMMED]
    pruner = TrimmedLlama(float(ratio))
    settings = {"max_new_tokens": 16, "pruner": pruner, **GREEDY}
    for key, completion in zip(TRIMMED, tiny.generate(prompts, slots=4, **settings), strict=True):
        facts = TRIMMED[key][ratio]
        if not facts["fragile_kept"]:
            kept = golden_tensors(f"trimmed/{key}")[f"r{ratio}.kept"]
            assert torch.equal(kept_columns(completion), kept), key
            assert completion.visual_tokens.kept == len(kept)
            assert completion.visual_tokens.valid == facts["valid"]
        stable = facts["stable_steps"]
        assert stable > 0
        assert completion.token_ids[:stable] == facts["greedy"][:stable], key


@pytest.mark.parametrize("ratio", ["0.1", "0.25"])
@pytest.mark.parametrize("key", TRIMMED)
def test_logits_of_a_pruned_prompt_are_the_reference_s(tiny, key, ratio):
    logits = tiny.logits(trimmed_prompt(key), pruner=TrimmedLlama(float(ratio)))
    expected = golden_tensors(f"trimmed/{key}")[f"r{ratio}.prefill_logits"]
    assert_close(key, logits, expected, 2e-4)


@pytest.mark.parametrize("key", TRIMMED)
def test_saliency_is_the_reference_s_importance(tiny, key):
    """A group after the other, they are asked about all images."""
    spy, images = Spy(), 0
    tiny.logits(trimmed_prompt(key), pruner=spy)
    importance = golden_tensors(f"trimmed/{key}")["importance"]
    for saliency, visual in zip(spy.saliencies, spy.visuals, strict=True):
        columns = ((images + visual.image) * 4 + visual.tile) * 17 + visual.patch
        assert saliency.dtype == torch.float32
        assert_close(key, saliency, importance[:, columns], 1e-5)
        images += len(visual.grids)
    assert images == len(trimmed_prompt(key).images)


@pytest.mark.parametrize("case", CASES)
def test_a_ratio_of_one_equals_no_pruning(tiny, case):
    prompts, pruner = case_prompts(case), TrimmedLlama(1.0)
    for prompt in prompts:
        assert_close(case, tiny.logits(prompt, pruner=pruner), tiny.logits(prompt), EXACT)
    whole = tiny.generate(prompts, max_new_tokens=8, **GREEDY)
    pruned = tiny.generate(prompts, max_new_tokens=8, pruner=pruner, **GREEDY)
    assert [c.token_ids for c in pruned] == [c.token_ids for c in whole]
    assert [c.visual_tokens for c in pruned] == [c.visual_tokens for c in whole]


# The saliency


@pytest.mark.parametrize("votes", ["all", "after", "last"])
@pytest.mark.parametrize("seed", range(8))
def test_saliency_is_the_attention_of_the_rows_that_vote(seed, votes):
    """Those of its segment alone: from a group's images to the next group, or the end of a turn."""
    draw, config = random.Random(seed), random_config(seed)
    said, spy = Conversation(random_model(config, seed)), Spy(TrimmedLlama(1.0, votes=votes))
    segments = []  # rows and number of images of each group
    for _ in range(3):
        ids, starts, counts = [], [], [draw.randint(1, 3) for _ in range(draw.randint(1, 2))]
        for count in counts:
            ids += [1] * draw.randint(1, 3)
            starts.append(len(said.token_ids) + len(ids))
            ids += [config.text.image_token_id] * count + [2] * draw.randint(0, 2)
        stops = [*starts[1:], len(said.token_ids) + len(ids)]
        segments += zip(map(range, starts, stops), counts, strict=True)
        images = random_images(config, sum(counts), draw)
        said.go_on(ids, images, pruner=spy, chunk=draw.choice([1, 3, 2048]))
    oracle = MaskedOracle(said.model)
    oracle.logits(said.token_ids, said.images, said.kept, said.passes)
    shares = oracle.shares[0].chunk(len(said.images), dim=-1)  # of each image [H, S, tokens]
    pairs = iter(zip(shares, said.images, strict=True))
    for saliency, (rows, count) in zip(spy.saliencies, segments, strict=True):
        rows = {"all": rows, "after": rows[count:], "last": rows[-1:]}[votes]
        expected = [
            of_image[:, rows, : len(image.pixels) * config.vision.tokens_per_tile].sum(1)
            for of_image, image in islice(pairs, count)
        ]
        assert_close(f"rows {rows}", saliency, torch.cat(expected, dim=-1), EXACT)


def test_the_keys_are_those_of_the_first_block(tiny):
    spy = Spy(KeyNorm(5))
    tiny.logits(case_prompts("image_first")[0], pruner=spy)
    (visual,) = spy.visuals
    attention = tiny.model.text.layers[tiny.config.text.cross_attention_layers[0]].cross_attn
    keys, _ = attention.project(visual.features[None])
    assert_close("keys", visual.keys, keys[0], EXACT)


# When it is asked


def test_a_pruner_is_asked_once_for_each_group_and_never_while_decoding(tiny):
    spy = Spy(TopK(0.5))
    tiny.generate(case_prompts("batch_ragged"), max_new_tokens=6, pruner=spy, **GREEDY)
    tokens = [17 * len(image.pixels) for of_one in case_images("batch_ragged") for image in of_one]
    assert [tuple(saliency.shape) for saliency in spy.saliencies] == [(4, n) for n in tokens]
    assert [visual.group for visual in spy.visuals] == [0, 0, 1]


def test_a_pruner_is_not_asked_about_text(tiny):
    spy, (prompt,) = Spy(), case_prompts("text_only")
    tiny.generate(prompt, max_new_tokens=3, pruner=spy, **GREEDY)
    tiny.logits(prompt, pruner=spy)
    assert spy.saliencies == []


def test_groups_are_numbered_along_the_conversation(tiny):
    """So that one rule can have a count for each of them."""
    (two,), (one,) = case_prompts("two_images"), case_prompts("image_first")
    spy, engine, last = Spy(TopK([3, 9, 4])), Engine(tiny, max_seq_len=64), None
    for prompt in (two, Prompt([5, 6]), one):
        last = engine.submit(prompt, after=last, hold=True, max_new_tokens=2, pruner=spy, **GREEDY)
        engine.run(last)
    assert [visual.group for visual in spy.visuals] == [0, 1, 2]
    assert [int(mask.sum()) for mask in last.kept] == [4]
    with pytest.raises(PruningError, match="keep has 3 counts and this is group 4 of images"):
        engine.run(engine.submit(one, after=last, pruner=spy))


def test_without_a_pruner_nothing_is_scored_or_selected(tiny, monkeypatch):
    called = []
    monkeypatch.setattr(text, "attention_with_saliency", lambda *_: called.append("score"))
    monkeypatch.setattr(segment_forward, "ask", lambda *_: called.append("check"))
    monkeypatch.setattr(segment_forward.SegmentForward, "_prune", lambda *_: called.append("prune"))
    tiny.generate(case_prompts("batch_ragged"), max_new_tokens=3, **GREEDY)
    assert called == []
    with pytest.raises(TypeError):  # they would have been called
        tiny.generate(case_prompts("batch_ragged"), pruner=TopK(0.5))
    assert called == ["score"]


class Operations(TorchDispatchMode):
    """Notes every operation, in order, between marks that hooks set."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))

    def between(self, start, stop):
        return self.names[self.names.index(start) + 1 : self.names.index(stop)]


def operations_of_prefill(pruner):
    """Those of a model with cross-attention in blocks 1, 3 and 5, with marks around the others."""
    config = random_config(3)
    of_text = replace(config.text, num_hidden_layers=7, cross_attention_layers=(1, 3, 5))
    model, operations = random_model(replace(config, text=of_text), 0), Operations()
    for index in (0, 2, 4):
        block = model.text.layers[index]
        block.register_forward_pre_hook(lambda *_, i=index: operations.names.append(f"begin {i}"))
        block.register_forward_hook(lambda *_, i=index: operations.names.append(f"end {i}"))
    ids = [1, *[of_text.image_token_id] * 3, 3, 4, 5]
    with operations:
        Conversation(model).go_on(ids, random_images(config, 3, random.Random(0)), pruner=pruner)
    return operations


def test_without_a_pruner_the_first_block_runs_no_operation_that_another_does_not():
    plain, pruned = operations_of_prefill(None), operations_of_prefill(TopK(0.5))
    assert len(plain.between("end 0", "begin 2")) > 20
    assert plain.between("end 0", "begin 2") == plain.between("end 2", "begin 4")
    first, second = pruned.between("end 0", "begin 2"), pruned.between("end 2", "begin 4")
    assert len(first) > len(second) == len(plain.between("end 2", "begin 4"))


# What becomes of the answer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("always", [True, False])
def test_class_tokens_can_be_kept_always(tiny, rule, always):
    pruner = rule(0.06, keep_class_tokens=always)
    completions = tiny.generate(case_prompts("batch_ragged"), max_new_tokens=1, pruner=pruner)
    class_tokens = torch.cat([kept[:, 0] for c in completions for kept in c.kept])
    assert bool(class_tokens.all()) == always


def test_a_baseline_s_count_of_another_pruner_is_that_of_its_own_run(tiny):
    trimmed, drawn = (
        [c.visual_tokens.kept for c in tiny.generate(prompts, max_new_tokens=1, pruner=pruner)]
        for prompts in [case_prompts("batch_ragged")]
        for pruner in (TrimmedLlama(0.1), RandomTokens(TrimmedLlama(0.1)))
    )
    assert trimmed == drawn == [TRIMMED[f"batch_ragged_{i}"]["0.1"]["kept"] for i in (0, 1)]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (
            lambda s, v: ~v.is_class[1:],
            r"returned a Tensor torch.bool \[67\]; expected .* \[V\] = \[68\]$",
        ),
        (
            lambda s, v: ~v.is_class[None],
            r"returned a Tensor torch.bool \[1, 68\].*= \[68\]: there is no",
        ),
        (
            lambda s, v: torch.ones(3, 68) > 0,
            r"returned a Tensor torch.bool \[3, 68\]; .*: there is no b",
        ),
        (lambda s, v: s.mean(0), r"returned a Tensor torch.float32 \[68\]; expected a torch.bool"),
        (lambda s, v: v.patch, r"returned a Tensor torch.int64 \[68\]; expected a torch.bool"),
        (lambda s, v: [0, 1], r"returned \[0, 1\]; expected a torch.bool tensor"),
        (lambda s, v: None, r"returned None; expected a torch.bool tensor"),
        (lambda s, v: v.patch < 0, r"kept none of the 68 visual tokens; expected one at least"),
    ],
    ids=["shape", "batch of one", "batch", "float", "integers", "list", "None", "nothing"],
)
def test_an_answer_that_is_no_keep_mask_is_an_error(tiny, answer, says):
    with pytest.raises(PruningError, match="pruner <lambda> " + says):
        tiny.generate(case_prompts("image_first"), max_new_tokens=1, pruner=answer)


class Failing:
    def __call__(self, saliency, visual):
        raise KeyError("a mistake")


@pytest.mark.parametrize(
    ("pruner", "says"),
    [
        (Failing(), "pruner Failing raised KeyError: 'a mistake'"),
        (lambda s, v: np.ones(68, bool), r"returned a ndarray bool \[68\]; expected a torch.bool"),
        (lambda s, v: (v.patch > 0).to_sparse(), r"returned a Tensor torch.bool \[68\]; expected"),
        (lambda s, v: (v.patch > 0).to("meta"), r"returned a Tensor torch.bool \[68\]; expected"),
        (lambda s, v: "x" * 10**6, r"returned 'xxx.*xxx'; expected a torch.bool"),
        (RandomTokens(lambda s, v: None), "returned None; expected a torch.bool"),
    ],
    ids=["raises", "array", "sparse", "meta", "long", "counted by"],
)
def test_a_pruner_that_fails_is_told_in_one_line(tiny, pruner, says):
    with pytest.raises(PruningError, match=says):
        tiny.generate(case_prompts("image_first"), max_new_tokens=1, pruner=pruner)


def poison(saliency, visual):
    """Keep the even tokens, and write over all that can be written over."""
    tensors = [t for t in (saliency, *vars(visual).values()) if isinstance(t, torch.Tensor)]
    assert len(tensors) == 6
    keep = visual.patch % 2 == 0
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
    visual.features, visual.keys, visual.grids, visual.group = None, None, (), 9
    return keep


class PoisonedRule(TopK):
    """What inherits from a rule that ships is trusted no more than others."""

    def scores(self, saliency, visual):
        scores = -visual.patch.float() % 2
        poison(saliency, visual)
        return scores


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("spoiler", [poison, PoisonedRule(0.5)], ids=["function", "rule"])
def test_a_pruner_cannot_change_what_it_is_shown(tiny, spoiler, trim):
    def even(saliency, visual):
        return visual.patch % 2 == 0

    class Spoiler:
        trim_first_layer = trim
        __call__ = staticmethod(spoiler)

    even.trim_first_layer = trim
    prompts = case_prompts("batch_ragged")
    if spoiler is poison:
        spoiled = tiny.generate(prompts, max_new_tokens=4, pruner=Spoiler(), **GREEDY)
        for one, other in zip(
            spoiled, tiny.generate(prompts, max_new_tokens=4, pruner=even, **GREEDY), strict=True
        ):
            assert one.token_ids == other.token_ids
            assert one.logprobs == other.logprobs
            assert all(map(torch.equal, one.kept, other.kept))
    else:
        for completion in tiny.generate(prompts, max_new_tokens=4, pruner=spoiler, **GREEDY):
            assert torch.tensor(completion.logprobs).isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("votes", "none", "'all', 'after' or 'last'"),
        ("votes", None, "'all', 'after' or 'last'"),
        ("trim_first_layer", 1, "True or False"),
    ],
)
def test_an_attribute_of_a_pruner_that_means_nothing_is_told(tiny, name, value, expected):
    def rule(saliency, visual):
        return visual.patch >= 0

    setattr(rule, name, value)
    says = f"{name} of pruner rule is {value!r}; expected {expected}"
    with pytest.raises(PruningError, match=says):
        tiny.generate(case_prompts("image_first"), pruner=rule)


def test_pruners_work_on_the_smallest_prompt(tiny):
    """An image and nothing else."""
    (picture,) = case_prompts("image_first")[0].images
    prompt = Prompt([tiny.config.text.image_token_id], [picture])
    completion = tiny.generate(prompt, max_new_tokens=2, pruner=TrimmedLlama(0.01), **GREEDY)
    assert 1 <= completion.visual_tokens.kept <= tiny.config.text.num_attention_heads


# The visual budget


@pytest.mark.parametrize("trim_first_layer", [True, False], ids=["trimmed", "first layer whole"])
@pytest.mark.parametrize("budget", [1, 5, 20, 0.1, 0.5, 1.0, 10_000])
def test_the_store_is_allocated_for_the_budget_to_the_byte(tiny, budget, trim_first_layer):
    """And holds what was kept, the first layer all of it where it is left whole."""
    prompts, images = case_prompts("batch_ragged"), case_images("batch_ragged")
    groups = [[17 * len(image.pixels) for image in of_one] for of_one in images]

    def limit(tokens):
        return math.floor(budget * tokens) if isinstance(budget, float) else min(budget, tokens)

    pruner = TrimmedLlama(0.5, trim_first_layer=trim_first_layer)
    settings = {"max_new_tokens": 3, "pruner": pruner, "visual_budget": budget, **GREEDY}
    engine, requests = tiny.start(prompts, **settings)
    plan = Cache.plan(
        tiny.config.text,
        slots=2,
        max_text_tokens=max(len(prompt.token_ids) for prompt in prompts) + 3,
        visual_capacity=max(limit(counts[-1]) for counts in groups),
        first_visual_capacity=None if trim_first_layer else max(counts[-1] for counts in groups),
        dtype=torch.float32,
    )
    assert (engine.cache.text.nbytes, engine.cache.visual.nbytes) == (plan.text, plan.visual)
    before = [store.data_ptr() for store in engine.cache.visual.keys]
    assert [engine.step() for _ in requests] == [[request] for request in requests]
    held = engine.cache.visual.lengths
    kept = [[int(mask.sum()) for mask in request.kept] for request in requests]
    assert held[1] == [counts[-1] for counts in kept]
    assert held[0] == (held[1] if trim_first_layer else [counts[-1] for counts in groups])
    for counts, tokens in zip(kept, groups, strict=True):
        assert all(1 <= n <= limit(t) for n, t in zip(counts, tokens, strict=True))
    engine.run(*requests)
    assert engine.cache.nbytes == plan.total
    assert [store.data_ptr() for store in engine.cache.visual.keys] == before


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_within_a_budget(tiny, rule):
    prompts = [*case_prompts("consecutive"), *case_prompts("batch"), *case_prompts("text_only")]
    settings = {"max_new_tokens": 3, "pruner": rule(0.9), "visual_budget": 13, **GREEDY}
    engine, requests = tiny.start(prompts, **settings)
    consecutive, *others, text = (c.visual_tokens.kept for c in engine.run(*requests))
    assert text == 0
    assert all(0 < count <= 13 for count in others)
    assert 13 < consecutive <= 26, "two groups, each within the budget"
    if rule is not TrimmedLlama:
        assert (consecutive, *others) == (26, 13, 13)
    assert engine.cache.visual.capacities == [13, 13]


@pytest.mark.parametrize("budget", [1.0, 0.5, 40])
def test_a_budget_is_of_each_group_whatever_the_last_one_s_size(tiny, budget):
    """Alone, and beside a prompt for which the store is larger."""
    (big,), (small, _) = case_images("image_first")[0], case_images("two_images")[0]
    image_id, settings = tiny.config.text.image_token_id, {"pruner": TopK(1.0), **GREEDY}
    prompts = Prompt([image_id, 1, image_id, 2], [big, small]), Prompt([image_id, 3], [big])
    for some in (prompts[:1], prompts):
        first, *_ = tiny.generate(some, max_new_tokens=2, visual_budget=budget, **settings)
        limits = [min(n, 40) if budget == 40 else int(budget * n) for n in (68, 17)]
        assert [int(mask.sum()) for mask in first.kept] == limits


def test_the_least_of_a_request_s_budget_and_the_engine_s_holds(tiny):
    (prompt,), engine = case_prompts("image_first"), Engine(tiny, max_seq_len=64, visual_budget=30)
    budgets = {}
    for budget in (None, 50, 20, 0.25, 0.9):
        spy = Spy(TopK(1.0))
        engine.run(engine.submit(prompt, max_new_tokens=1, pruner=spy, visual_budget=budget))
        budgets[budget] = spy.visuals[0].budget
    assert budgets == {None: 30, 50: 30, 20: 20, 0.25: 17, 0.9: 30}


def test_the_logits_of_a_prompt_are_those_under_the_budget(tiny):
    (prompt,), spy = case_prompts("image_first"), Spy(TrimmedLlama(1.0))
    logits = tiny.logits(prompt, pruner=spy, visual_budget=40)
    mask = TrimmedLlama(1.0)(spy.saliencies[0], spy.visuals[0])
    assert 0 < mask.sum() <= 40
    assert_close("logits", logits, tiny.logits(prompt, pruner=Keep(mask)), EXACT)


def test_without_a_pruner_a_budget_below_the_need_is_an_error(tiny):
    (prompt,) = case_prompts("image_first")
    says = r"need 68 visual tokens and the visual budget is {}; raise .* to 68, or choose a pruner"
    with pytest.raises(PruningError, match=says.format(67)):
        tiny.generate(prompt, max_new_tokens=1, visual_budget=67)
    with pytest.raises(PruningError, match=says.format(10)):
        tiny.logits(prompt, visual_budget=10)
    with pytest.raises(PruningError, match=says.format(67)):
        Engine(tiny, max_seq_len=64, visual_budget=67).submit(prompt)


def test_without_a_pruner_a_budget_of_the_need_changes_nothing(tiny):
    (prompt,) = case_prompts("image_first")
    plain, *others = (
        tiny.generate(prompt, max_new_tokens=4, visual_budget=budget, **GREEDY)
        for budget in (None, 68, 69, 10_000, 1.0)
    )
    for got in others:
        assert (got.token_ids, got.visual_tokens) == (plain.token_ids, plain.visual_tokens)


def test_without_a_pruner_the_need_is_what_decoding_reads(tiny):
    """Of two groups of images the last, here the smaller; the other is gone after the prefill."""
    (two,), image_id = case_prompts("two_images"), tiny.config.text.image_token_id
    prompt = Prompt([image_id, 1, image_id, 2], two.images[::-1])
    engine, requests = tiny.start([prompt], max_new_tokens=2, visual_budget=17, **GREEDY)
    engine.run(*requests)
    assert engine.cache.visual.capacities == [17] * 2
    with pytest.raises(PruningError, match=r"need 17 .* budget is 16"):
        tiny.start([prompt], visual_budget=16)


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, -0.5, True, "half", float("nan")], ids=repr)
def test_a_budget_is_a_fraction_or_a_count(tiny, budget):
    says = r"visual_budget is .*; expected a fraction above 0 and at most 1\.0, or a whole number"
    with pytest.raises(PruningError, match=says):
        tiny.start(case_prompts("image_first"), pruner=TrimmedLlama(0.1), visual_budget=budget)


def test_a_fraction_of_less_than_one_token_is_an_error(tiny):
    """Of any group."""
    says = r"visual_budget is 0\.02, less than one of the 17 visual tokens of a group"
    with pytest.raises(PruningError, match=says):
        tiny.start(case_prompts("two_images"), pruner=TrimmedLlama(0.1), visual_budget=0.02)


def test_a_pruner_that_exceeds_the_budget_is_named(tiny):
    def greedy_rule(saliency, visual):
        return visual.patch >= 0

    says = "pruner greedy_rule kept 68 visual tokens and the visual budget is 20"
    with pytest.raises(PruningError, match=says):
        tiny.generate(
            case_prompts("image_first"), pruner=greedy_rule, visual_budget=20, max_new_tokens=1
        )
