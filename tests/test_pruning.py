"""The hook, Trimmed Llama, the visual budget and the baselines."""

import itertools
import math
import random
from dataclasses import replace

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
    live_bytes,
)
from oracle import MaskedOracle, random_config, random_images, random_model, visible_images
from torch.utils._python_dispatch import TorchDispatchMode

from llama_vision import (
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
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine import prefill as passes
from llama_vision.model.layers import attend, attend_and_weigh

EXACT = 1e-5
GREEDY = {"temperature": 0, "ignore_stop": True}
IMAGE_CASES = [case for case in CASES if case != "text_only"]
TRIMMED = golden_json("manifest")["trimmed"]
RATIOS = ["0.05", "0.1", "0.25", "0.5", "1.0"]
BASELINES = [TopK, LastQuery, RandomTokens, UniformGrid, KeyNorm]


def trimmed_prompt(key):
    """The prompt of a golden file such as `batch_1`."""
    case, _, sample = key.rpartition("_")
    return case_prompts(case)[int(sample)]


def columns(visual, sample=0):
    """The golden files' number of each token: all four slots of an image count."""
    number = (visual.image * 4 + visual.tile) * 17 + visual.patch
    return number[sample, : visual.lengths[sample]]


def image_of_each_token(images):
    """The number of the image: [V]."""
    counts = torch.tensor([17 * len(image.pixels) for image in images])
    return torch.arange(len(images)).repeat_interleave(counts)


def kept_columns(completion):
    """The golden files' numbers of the kept tokens."""
    slots = torch.zeros(len(completion.kept), 4, 17, dtype=torch.bool)
    for image, kept in enumerate(completion.kept):
        slots[image, : len(kept)] = kept
    return slots.flatten().nonzero().flatten()


# Trimmed Llama, as the reference has it


def assert_golden(completion, key, ratio):
    facts = TRIMMED[key][ratio]
    if not facts["fragile_kept"]:
        kept = golden_tensors(f"trimmed/{key}")[f"r{ratio}.kept"]
        assert torch.equal(kept_columns(completion), kept)
        assert completion.visual_tokens.kept == len(kept)
        assert completion.visual_tokens.valid == facts["valid"]
    stable = facts["stable_steps"]
    assert stable > 0
    assert completion.token_ids[:stable] == facts["greedy"][:stable]


def test_the_golden_files_have_all_ratios():
    assert all(list(ratios) == RATIOS for ratios in TRIMMED.values())


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("key", TRIMMED)
def test_kept_tokens_and_answers_are_the_reference_s(tiny, key, ratio):
    pruner = TrimmedLlama(float(ratio))
    completion = tiny.generate(trimmed_prompt(key), max_new_tokens=16, pruner=pruner, **GREEDY)
    assert_golden(completion, key, ratio)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", ["batch", "batch_ragged"])
def test_a_batch_has_the_reference_s_kept_tokens_and_answers(tiny, case, ratio):
    pruner = TrimmedLlama(float(ratio))
    completions = tiny.generate(case_prompts(case), max_new_tokens=16, pruner=pruner, **GREEDY)
    assert len(completions) == 2
    for sample, completion in enumerate(completions):
        assert_golden(completion, f"{case}_{sample}", ratio)


@pytest.mark.parametrize("ratio", ["0.1", "0.25"])
@pytest.mark.parametrize("key", TRIMMED)
def test_logits_of_a_pruned_prompt_are_the_reference_s(tiny, key, ratio):
    logits = tiny.logits(trimmed_prompt(key), pruner=TrimmedLlama(float(ratio)))
    expected = golden_tensors(f"trimmed/{key}")[f"r{ratio}.prefill_logits"]
    assert_close(key, logits, expected, 2e-4)


@pytest.mark.parametrize("key", TRIMMED)
def test_saliency_is_the_reference_s_importance(tiny, key):
    spy = Spy()
    tiny.logits(trimmed_prompt(key), pruner=spy)
    (saliency,), (visual,) = spy.saliencies, spy.visuals
    importance = golden_tensors(f"trimmed/{key}")["importance"]
    assert saliency.dtype == torch.float32
    assert_close(key, saliency[0], importance[:, columns(visual)], 1e-5)


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_saliency_of_a_batch_is_zero_in_the_padding(tiny, case):
    spy = Spy()
    tiny.generate(case_prompts(case), max_new_tokens=1, pruner=spy)
    (saliency,), (visual,) = spy.saliencies, spy.visuals
    for sample, length in enumerate(visual.lengths):
        importance = golden_tensors(f"trimmed/{case}_{sample}")["importance"]
        expected = importance[:, columns(visual, sample)]
        assert_close(case, saliency[sample, :, :length], expected, 1e-5)
        assert not saliency[sample, :, length:].any()


@pytest.mark.parametrize("case", CASES)
def test_a_ratio_of_one_equals_no_pruning(tiny, case):
    prompts, pruner = case_prompts(case), TrimmedLlama(1.0)
    for prompt in prompts:
        assert_close(case, tiny.logits(prompt, pruner=pruner), tiny.logits(prompt), 1e-5)
    whole = tiny.generate(prompts, max_new_tokens=8, **GREEDY)
    pruned = tiny.generate(prompts, max_new_tokens=8, pruner=pruner, **GREEDY)
    assert [c.token_ids for c in pruned] == [c.token_ids for c in whole]
    assert [c.visual_tokens for c in pruned] == [c.visual_tokens for c in whole]


# Pruning is masking


def random_mask(draw):
    """A pruner that keeps few or many tokens, one at least of every sample that has any."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    share = draw.choice([0.02, 0.1, 0.5, 0.9])

    def prune(saliency, visual):
        mask = torch.rand(visual.image.shape, generator=generator) < share
        for row, length in zip(mask, visual.lengths, strict=True):
            row[draw.randrange(max(length, 1))] = True
        return mask

    return prune


def assert_equals_masking(conversation, trim_first_layer=True, most=EXACT):
    oracle = MaskedOracle(conversation.model)
    for number, said in enumerate(conversation.samples):
        expected = oracle.logits(
            said.token_ids, said.images, said.kept, said.passes, trim_first_layer
        )
        assert_close(f"sample {number}", torch.cat(said.logits), expected, most)


@pytest.mark.parametrize("trim_first_layer", [True, False], ids=["trimmed", "first layer whole"])
@pytest.mark.parametrize("seed", range(20))
def test_pruning_tokens_equals_masking_them(seed, trim_first_layer):
    """Random models, batches, turns and masks; rows of decoding between the turns."""
    draw, config = random.Random(seed), random_config(seed)
    conversation = Conversation(random_model(config, seed), draw.randint(1, 3))
    for _ in range(draw.randint(2, 3)):
        pruner = random_mask(draw)
        pruner.trim_first_layer = trim_first_layer
        conversation.go_on(*conversation.random_turn(draw), pruner)
        conversation.go_on([[draw.randrange(config.text.vocab_size)]] * len(conversation.samples))
    assert_equals_masking(conversation, trim_first_layer)


@pytest.mark.parametrize("trim_first_layer", [True, False], ids=["trimmed", "first layer whole"])
@pytest.mark.parametrize("group", [0, 1], ids=["first group kept", "last group kept"])
def test_rows_that_lost_all_their_tokens_are_blind_in_later_blocks(tiny, group, trim_first_layer):
    """Two groups of images; a mask that keeps tokens of one alone, in prefill and decoding."""
    image_id = tiny.config.text.image_token_id
    ids = [1, image_id, 2, image_id, 3, 4]
    images = random_images(tiny.config, 2, random.Random(1))
    owner = image_of_each_token(images)
    mask = (owner == group)[None] & (torch.arange(len(owner)) % 3 == 0)
    conversation, plain = Conversation(tiny.model, 1), Conversation(tiny.model, 1)
    for run, pruner in ((conversation, Keep(mask, trim_first_layer)), (plain, None)):
        run.go_on([ids], [images], pruner)
        run.go_on([[5]])
        run.go_on([[6]])
    assert_equals_masking(conversation, trim_first_layer)
    block = tiny.config.text.cross_attention_layers[1]
    blind = slice(1, 3) if group == 1 else slice(3, 6)
    ins, outs = states_around(tiny.model, block, ids, images, Keep(mask, trim_first_layer))
    assert torch.equal(ins[0, blind], outs[0, blind])
    changed = (conversation.samples[0].logits[2] - plain.samples[0].logits[2]).abs().max()
    assert changed > 1e-2
    held = conversation.cache.visual.lengths
    last = 17 * len(images[1].pixels)
    assert held[1] == [int(mask.sum()) if group == 1 else 0]
    assert held[0] == (held[1] if trim_first_layer else [last])


def states_around(model, index, ids, images, pruner):
    """The hidden states before and after one block of a prefill."""
    states = []
    hook = model.text.layers[index].register_forward_hook(
        lambda _, args, out: states.extend([args[0], out])
    )
    Conversation(model, 1).go_on([ids], [images], pruner)
    hook.remove()
    return states


# The visual budget


def laid_out(tiles, side=3, budget=None):
    """Visual tokens of images of so many tiles in each sample, on a grid of side · side patches."""
    features = [[torch.zeros(t, 1 + side**2, 1) for t in sample] for sample in tiles]
    grids = [[(1, t) for t in sample] for sample in tiles]
    return replace(VisualTokens.of_images(features, grids), budget=budget)


def random_saliency(visual, heads, levels, seed):
    """Many equal values, where there are few levels; zeros in the padding."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(visual.counts), heads, visual.image.shape[1])
    return torch.randint(levels, shape, generator=generator) / 8 * visual.valid[:, None]


def union_by_hand(saliency, k):
    """Of one sample, [H, V]: the first k of every head; of equals the earlier."""
    ranked = [sorted(range(len(head)), key=lambda v: (-head[v], v)) for head in saliency.tolist()]
    return {token for order in ranked for token in order[:k]}


def trim_by_hand(saliency, k_ratio, budget):
    """Of one sample: the union of the largest k that fits, else the strongest of the first."""
    tokens = saliency.shape[1]
    for k in range(math.ceil(k_ratio * tokens), 0, -1):
        if len(union_by_hand(saliency, k)) <= budget:
            return union_by_hand(saliency, k)
    total = saliency.sum(0).tolist()
    return set(sorted(union_by_hand(saliency, 1), key=lambda v: (-total[v], v))[:budget])


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("levels", [2, 5, 10_000], ids="{} levels".format)
def test_the_budget_finds_the_largest_k_that_fits(heads, levels):
    fallbacks, unions = 0, 0
    for seed in range(40):
        draw = random.Random(seed)
        tiles = [[draw.randint(1, 3)] * draw.randint(1, 2) for _ in range(draw.randint(1, 3))]
        visual = laid_out([*tiles, []])
        visual.budget = [draw.randint(1, length) for length in visual.lengths[:-1]] + [0]
        saliency = random_saliency(visual, heads, levels, seed)
        k_ratio = draw.choice([0.05, 0.3, 1.0])
        kept = TrimmedLlama(k_ratio)(saliency, visual)
        for sample, (length, budget) in enumerate(
            zip(visual.lengths[:-1], visual.budget, strict=False)
        ):
            heads_of_sample = saliency[sample, :, :length]
            expected = trim_by_hand(heads_of_sample, k_ratio, budget)
            assert set(kept[sample].nonzero().flatten().tolist()) == expected
            assert 1 <= len(expected) <= budget
            fallbacks += len(union_by_hand(heads_of_sample, 1)) > budget
            unions += len(union_by_hand(heads_of_sample, 1)) <= budget
        assert not kept[-1].any()
    assert unions > 0
    assert (fallbacks > 0) == (heads > 1), "with one head, k = 1 always fits"


@pytest.mark.parametrize("heads", [1, 4])
def test_without_a_budget_k_is_the_ratio_of_each_sample_s_tokens(heads):
    visual = laid_out([[2], [1, 1, 1], []])
    saliency = random_saliency(visual, heads, 10, 0)
    for k_ratio in (0.01, 0.1, 0.25, 0.37, 1.0):
        kept = TrimmedLlama(k_ratio)(saliency, visual)
        for sample, length in enumerate(visual.lengths):
            expected = union_by_hand(saliency[sample, :, :length], math.ceil(k_ratio * length))
            assert set(kept[sample].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("rule", BASELINES)
def test_baselines_keep_their_best_within_the_budget(rule):
    visual = laid_out([[2], [1, 1, 1], [], [1]], budget=[4, 30, 0, 1])
    visual.keys = torch.randn(4, 2, 30, 4, generator=torch.Generator().manual_seed(0))
    saliency = random_saliency(visual, 4, 10_000, 0)
    kept = rule(0.5)(saliency, visual)
    assert kept.sum(-1).tolist() == [4, 15, 0, 1]
    best = rule(4)(saliency, replace(visual, budget=None))
    assert torch.equal(kept[0], best[0])


@pytest.mark.parametrize("trim_first_layer", [True, False], ids=["trimmed", "first layer whole"])
@pytest.mark.parametrize("budget", [1, 5, 20, 0.1, 0.5, 1.0, 10_000])
def test_the_store_is_allocated_for_the_budget_to_the_byte(tiny, budget, trim_first_layer):
    prompts = case_prompts("batch_ragged")
    totals = [sum(len(image.pixels) * 17 for image in s) for s in case_images("batch_ragged")]
    most = [math.floor(budget * t) if isinstance(budget, float) else min(budget, t) for t in totals]
    pruner = TrimmedLlama(0.5, trim_first_layer=trim_first_layer)
    run = tiny.start(prompts, max_new_tokens=3, pruner=pruner, visual_budget=budget, **GREEDY)
    needs = [17 * len(images[-1].pixels) for images in case_images("batch_ragged")]
    plan = Cache.plan(
        tiny.config.text,
        batch=2,
        max_text_tokens=max(len(prompt.token_ids) for prompt in prompts) + 3,
        visual_capacity=max(most),
        first_visual_capacity=None if trim_first_layer else max(needs),
        dtype=torch.float32,
    )
    assert (run.cache.text.nbytes, run.cache.visual.nbytes) == (plan.text, plan.visual)
    before = [store.data_ptr() for store in run.cache.visual.keys]
    for _ in run:
        pass
    assert run.cache.nbytes == plan.total
    assert [store.data_ptr() for store in run.cache.visual.keys] == before
    for completion, limit in zip(run.completions(), most, strict=True):
        assert 1 <= completion.visual_tokens.kept <= limit


@pytest.mark.parametrize("rule", [*BASELINES, TrimmedLlama])
def test_every_rule_runs_within_a_budget(tiny, rule):
    prompts = [*case_prompts("batch_ragged"), *case_prompts("text_only")]
    run = tiny.start(prompts, max_new_tokens=3, pruner=rule(0.9), visual_budget=13, **GREEDY)
    for _ in run:
        pass
    counts = [completion.visual_tokens.kept for completion in run.completions()]
    assert counts[2] == 0
    assert all(0 < count <= 13 for count in counts[:2])
    if rule is not TrimmedLlama:
        assert counts[:2] == [13, 13]
    assert run.cache.visual.capacities == [13, 13]


def test_the_logits_of_a_prompt_are_those_under_the_budget(tiny):
    (prompt,) = case_prompts("consecutive")
    spy = Spy(TrimmedLlama(1.0))
    logits = tiny.logits(prompt, pruner=spy, visual_budget=40)
    mask = TrimmedLlama(1.0)(spy.saliencies[0], spy.visuals[0])
    assert 0 < mask.sum() <= 40
    assert_close("logits", logits, tiny.logits(prompt, pruner=Keep(mask)), EXACT)


def test_without_a_pruner_a_budget_below_the_need_is_an_error(tiny):
    says = r"need 68 visual tokens and the visual budget is 67; raise .* to 68, or choose a pruner"
    with pytest.raises(PruningError, match=says):
        tiny.generate(case_prompts("image_first"), max_new_tokens=1, visual_budget=67)


@pytest.mark.parametrize("budget", [68, 69, 10_000, 1.0])
def test_without_a_pruner_a_budget_of_the_need_changes_nothing(tiny, budget):
    prompts = case_prompts("image_first")
    (plain,) = tiny.generate(prompts, max_new_tokens=4, **GREEDY)
    (got,) = tiny.generate(prompts, max_new_tokens=4, visual_budget=budget, **GREEDY)
    assert got.token_ids == plain.token_ids
    assert got.visual_tokens == plain.visual_tokens


def test_without_a_pruner_the_need_is_what_decoding_reads(tiny):
    """Of two groups of images the last; the first is gone after the prefill."""
    prompts, ((_, last),) = case_prompts("two_images"), case_images("two_images")
    need = 17 * len(last.pixels)
    run = tiny.start(prompts, max_new_tokens=2, visual_budget=need, **GREEDY)
    assert len(list(run)) == 2
    assert run.cache.visual.capacities == [need] * 2
    with pytest.raises(PruningError, match=f"need {need} .* budget is {need - 1}"):
        tiny.start(prompts, visual_budget=need - 1)


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, -0.5, True, "half", float("nan")], ids=repr)
def test_a_budget_is_a_fraction_or_a_count(tiny, budget):
    says = r"visual_budget is .*; expected a fraction above 0 and at most 1\.0, or a whole number"
    with pytest.raises(PruningError, match=says):
        tiny.start(case_prompts("image_first"), pruner=TrimmedLlama(0.1), visual_budget=budget)


def test_a_fraction_of_less_than_one_token_is_an_error(tiny):
    says = r"visual_budget is 0\.01.*less than one of the 68 visual tokens of sample 0"
    with pytest.raises(PruningError, match=says):
        tiny.start(case_prompts("image_first"), pruner=TrimmedLlama(0.1), visual_budget=0.01)


def test_a_pruner_that_exceeds_the_budget_is_named(tiny):
    def greedy_rule(saliency, visual):
        return visual.valid

    says = "pruner greedy_rule kept 68 visual tokens of sample 0 and the visual budget is 20"
    with pytest.raises(PruningError, match=says):
        tiny.generate(
            case_prompts("image_first"), pruner=greedy_rule, visual_budget=20, max_new_tokens=1
        )


# Each row of a batch as if it were alone


@pytest.mark.parametrize("budget", [None, 0.2], ids=["no budget", "a fifth"])
@pytest.mark.parametrize(
    "pruner",
    [
        pytest.param(TrimmedLlama(0.1), id="Trimmed Llama"),
        pytest.param(TrimmedLlama(0.3, votes="after", keep_class_tokens=True), id="after, class"),
        pytest.param(TrimmedLlama(0.05, trim_first_layer=False), id="first layer whole"),
        pytest.param(RandomTokens(0.3, seed=3), id="random"),
        pytest.param(TopK(0.25), id="top-k"),
        pytest.param(TopK(TrimmedLlama(0.05)), id="top-k as many as Trimmed Llama"),
        pytest.param(UniformGrid(0.25), id="uniform"),
        pytest.param(KeyNorm(0.15), id="key norm"),
        pytest.param(LastQuery(0.2), id="last query"),
    ],
)
def test_every_row_of_a_pruned_batch_equals_the_row_alone(tiny, pruner, budget):
    """Other lengths, images and kept counts, and one text without images."""
    settings = {"max_new_tokens": 6, "pruner": pruner, "visual_budget": budget, **GREEDY}
    prompts = [prompt for case in CASES for prompt in case_prompts(case)]
    together = tiny.generate(prompts, **settings)
    assert len({completion.visual_tokens.kept for completion in together}) > 2
    for prompt, got in zip(prompts, together, strict=True):
        alone = tiny.generate(prompt, **settings)
        assert got.token_ids == alone.token_ids
        assert got.visual_tokens == alone.visual_tokens
        assert all(map(torch.equal, got.kept, alone.kept))
        assert len(got.kept) == len(alone.kept) == len(prompt.images)
        assert_close("logprobs", torch.tensor(got.logprobs), torch.tensor(alone.logprobs), 1e-4)


# The hook


def test_a_pruner_is_asked_once_a_prefill_and_never_while_decoding(tiny):
    spy = Spy(TopK(0.5))
    tiny.generate(case_prompts("batch_ragged"), max_new_tokens=6, pruner=spy, **GREEDY)
    assert len(spy.saliencies) == 1
    assert spy.saliencies[0].shape == (2, tiny.config.text.num_attention_heads, 85)


def test_a_pruner_is_not_asked_about_text(tiny):
    spy = Spy()
    tiny.generate(case_prompts("text_only"), max_new_tokens=3, pruner=spy, **GREEDY)
    tiny.logits(case_prompts("text_only")[0], pruner=spy)
    assert spy.saliencies == []


def test_a_pruner_is_asked_again_about_the_images_of_a_later_turn_alone(tiny):
    image_id = tiny.config.text.image_token_id
    first, second = random_images(tiny.config, 2, random.Random(3))
    spy, conversation = Spy(), Conversation(tiny.model, 1)
    for ids, images in (([image_id, 1], [first]), ([2, 3], []), ([4, image_id, 5], [second])):
        conversation.go_on([ids], [images], spy)
    tokens = [17 * len(image.pixels) for image in (first, second)]
    assert [saliency.shape[-1] for saliency in spy.saliencies] == tokens
    votes = [saliency.sum(-1) for saliency in spy.saliencies]
    assert_close("rows that see it", torch.cat(votes), torch.full_like(torch.cat(votes), 2), 1e-5)


def test_without_a_pruner_nothing_is_scored_or_selected(tiny, monkeypatch):
    called = []
    for name in ("attend_and_weigh", "check_keep_mask", "kept_first"):
        monkeypatch.setattr(passes, name, lambda *_, name=name: called.append(name))
    monkeypatch.setattr(passes.VisualPass, "keep", lambda *_: called.append("keep"))
    tiny.generate(case_prompts("batch_ragged"), max_new_tokens=3, **GREEDY)
    assert called == []


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
    """Those of a model with cross-attention in blocks 1, 3 and 5, with marks around each block."""
    config = random_config(3)
    text = replace(config.text, num_hidden_layers=7, cross_attention_layers=(1, 3, 5))
    model = random_model(replace(config, text=text), 0)
    operations = Operations()

    def begin(block, args, index):
        if index in (1, 3, 5):
            sight = args[1]  # what rows see is computed once, by whoever is first
            sight.chunk(block.cross_attn.layer, *sight.chunks)
        operations.names.append(f"begin {index}")

    def end(index):
        operations.names.append(f"end {index}")

    for index, block in enumerate(model.text.layers):
        block.register_forward_pre_hook(lambda block, args, index=index: begin(block, args, index))
        block.register_forward_hook(lambda *_, index=index: end(index))
    images = random_images(config, 3, random.Random(0))
    ids = [[1, text.image_token_id, 2, text.image_token_id], [text.image_token_id, 3, 4, 5]]
    with operations:
        Conversation(model, 2).go_on(ids, [images[:2], images[2:]], pruner)
    return operations


def test_without_a_pruner_the_first_block_runs_no_operation_that_another_does_not():
    plain, pruned = operations_of_prefill(None), operations_of_prefill(TopK(0.5))
    assert plain.between("begin 1", "end 1") == plain.between("begin 3", "end 3")
    assert plain.between("end 1", "begin 2") == []
    assert len(pruned.between("begin 1", "end 1")) > len(pruned.between("begin 3", "end 3"))
    assert len(pruned.between("end 1", "begin 2")) > 0


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda s, v: v.valid[:, 1:], r"returned torch.bool \[2, 84\]; expected .* = \[2, 85\]"),
        (lambda s, v: v.valid[0], r"returned torch.bool \[85\]; expected"),
        (lambda s, v: s.mean(1), r"returned torch.float32 \[2, 85\]; expected a torch.bool"),
        (lambda s, v: v.valid.long(), r"returned torch.int64 \[2, 85\]; expected a torch.bool"),
        (lambda s, v: [0, 1], r"returned \[0, 1\]; expected a torch.bool tensor"),
        (lambda s, v: None, r"returned None; expected a torch.bool tensor"),
        (
            lambda s, v: v.valid & torch.tensor([[True], [False]]),
            r"kept none of the 85 visual tokens of sample 1; expected one at least",
        ),
        (
            lambda s, v: ~v.valid,  # padding alone
            r"kept none of the 68 visual tokens of sample 0",
        ),
    ],
    ids=["shape", "rank", "float", "integers", "list", "None", "empty row", "padding"],
)
def test_an_answer_that_is_no_keep_mask_is_an_error(tiny, answer, says):
    with pytest.raises(PruningError, match="pruner <lambda> " + says):
        tiny.generate(case_prompts("batch_ragged"), max_new_tokens=1, pruner=answer)


def test_padding_in_the_answer_is_ignored(tiny):
    prompts = case_prompts("batch_ragged")
    everything = lambda saliency, visual: torch.ones_like(visual.valid)  # noqa: E731
    kept = [c.visual_tokens for c in tiny.generate(prompts, max_new_tokens=1, pruner=everything)]
    assert kept == [c.visual_tokens for c in tiny.generate(prompts, max_new_tokens=1)]


# Options


def saliency_by_hand(model, ids, images, votes):
    """Softmax of the first cross-attention block, row by row: [H, V]."""
    attention = model.text.layers[model.config.text.cross_attention_layers[0]].cross_attn
    seen = {}
    hooks = [
        attention.q_norm.register_forward_hook(lambda _, args, out: seen.update(q=out[0])),
        attention.k_norm.register_forward_hook(lambda _, args, out: seen.update(k=out[0])),
    ]
    Conversation(model, 1).go_on([ids], [images])
    for hook in hooks:
        hook.remove()
    q, k = seen["q"].double(), seen["k"].double()
    image_id = model.config.text.image_token_id
    owner = image_of_each_token(images)
    mass = torch.zeros(len(q), len(owner), dtype=torch.float64)
    for row, visible in enumerate(visible_images(ids, image_id)):
        counts = {"all": True, "after": ids[row] != image_id, "last": row == len(ids) - 1}[votes]
        tokens = torch.tensor([int(i) in visible for i in owner])
        if counts and tokens.any():
            for head in range(len(q)):
                keys = k[head // (len(q) // len(k)), tokens]
                mass[head, tokens] += (keys @ q[head, row] / keys.shape[-1] ** 0.5).softmax(0)
    return mass


@pytest.mark.parametrize("votes", ["all", "after", "last"])
@pytest.mark.parametrize("case", IMAGE_CASES)
def test_votes_choose_the_rows_whose_attention_counts(tiny, case, votes):
    spy = Spy(TrimmedLlama(1.0, votes=votes))
    prompts, images = case_prompts(case), case_images(case)
    tiny.generate(prompts, max_new_tokens=1, pruner=spy)
    for sample, prompt in enumerate(prompts):
        expected = saliency_by_hand(tiny.model, list(prompt.token_ids), images[sample], votes)
        got = spy.saliencies[0][sample, :, : expected.shape[1]]
        assert expected.sum() > 0
        assert_close(f"{case}, sample {sample}", got, expected, 1e-5)


def test_last_query_lets_the_last_row_vote(tiny):
    (prompt,) = case_prompts("two_images")
    completions = [
        tiny.generate(prompt, max_new_tokens=1, pruner=pruner)
        for pruner in (LastQuery(12), TopK(12, votes="last"), TopK(12))
    ]
    kept = [kept_columns(completion).tolist() for completion in completions]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("rule", [*BASELINES, TrimmedLlama])
def test_class_tokens_can_be_kept_always(tiny, rule):
    prompts = case_prompts("batch_ragged")
    for always in (True, False):
        pruner = rule(0.06, keep_class_tokens=always)
        completions = tiny.generate(prompts, max_new_tokens=1, pruner=pruner)
        class_tokens = torch.cat([kept[:, 0] for c in completions for kept in c.kept])
        assert bool(class_tokens.all()) == always


def test_class_tokens_count_towards_the_budget():
    visual = laid_out([[3]], budget=[5])
    saliency = random_saliency(visual, 4, 10_000, 0)
    kept = TrimmedLlama(1.0, keep_class_tokens=True)(saliency, visual)
    assert kept[visual.is_class].all()
    assert 3 <= kept.sum() <= 5


@pytest.mark.parametrize("whole", [False, True], ids=["trimmed", "first layer whole"])
def test_the_first_block_s_cache_is_trimmed_or_left_whole(tiny, whole):
    prompts = case_prompts("batch")
    pruner = TrimmedLlama(0.1, trim_first_layer=not whole)
    run = tiny.start(prompts, max_new_tokens=2, pruner=pruner, **GREEDY)
    assert len(list(run)) == 2
    kept = [completion.visual_tokens.kept for completion in run.completions()]
    all_ = [completion.visual_tokens.valid for completion in run.completions()]
    assert run.cache.visual.lengths == [all_ if whole else kept, kept]


# Where tokens sit


def spatial_prompts(tiny):
    """Prompts of pictures of other shapes, two of them in one; and their tiles."""
    image_id, generator = tiny.config.text.image_token_id, random.Random(5)
    images = random_images(tiny.config, 2, generator)
    while {image.grid for image in images} != {(1, 3), (2, 1)}:
        images = random_images(tiny.config, 2, generator)
    (square,) = (random_image(tiny.config, (2, 2)),)
    return [[image_id, image_id, 3], [1, image_id, 2]], [images, [square]]


def random_image(config, grid):
    draw = random.Random(0)
    while True:
        (image,) = random_images(config, 1, draw)
        if image.grid == grid:
            return image


def test_pruners_know_where_each_token_sits(tiny):
    ids, images = spatial_prompts(tiny)
    spy = Spy()
    Conversation(tiny.model, 2).go_on(ids, images, spy)
    (visual,) = spy.visuals
    for sample, length in enumerate(visual.lengths):
        places = [
            (image, tile, (row, col) == (-1, -1), row, col)
            for image, tiled in enumerate(images[sample])
            for tile in range(len(tiled.pixels))
            for row, col in [(-1, -1), *itertools.product(range(4), range(4))]
        ]
        fields = (visual.image, visual.tile, visual.is_class, visual.patch_row, visual.patch_col)
        got = list(zip(*(f[sample, :length].tolist() for f in fields), strict=True))
        assert got == places
        assert visual.valid[sample].tolist() == [True] * length + [False] * (85 - length)
        padding = [visual.patch_row, visual.patch_col, visual.image, visual.tile]
        assert all((place[sample, length:] == -1).all() for place in padding)


def test_selected_tokens_keep_their_places():
    visual = laid_out([[1, 2], [], [2]])
    visual.features = torch.randn(3, 30, 4)
    keep = (torch.arange(30) % 4 == 1) & visual.valid
    keep[2, :10] = False
    selected = visual.select(keep)
    assert selected.counts == [[3, 5], [], [2]]
    assert torch.equal(selected.valid, torch.arange(8) < torch.tensor([[8], [0], [2]]))
    for name in ("features", "image", "tile", "patch", "patch_row", "patch_col", "is_class"):
        before, after = getattr(visual, name), getattr(selected, name)
        for sample in range(3):
            assert torch.equal(after[sample, selected.valid[sample]], before[sample, keep[sample]])


def test_a_spatial_rule_keeps_the_left_half_of_each_image(tiny):
    ids, images = spatial_prompts(tiny)

    def left_half(saliency, visual):
        mask = torch.zeros_like(visual.valid)
        col = visual.tile_col * visual.patches_per_side + visual.patch_col
        for sample, grids in enumerate(visual.grids):
            for number, (_, tile_cols) in enumerate(grids):
                here = (visual.image[sample] == number) & ~visual.is_class[sample]
                mask[sample] |= here & (col[sample] < tile_cols * visual.patches_per_side / 2)
        return mask

    conversation = Conversation(tiny.model, 2)
    conversation.go_on(ids, images, left_half)
    for said in conversation.samples:
        for image, kept in zip(said.images, said.kept, strict=True):
            rows, cols = image.grid
            picture = kept[:, 1:].view(rows, cols, 4, 4).transpose(1, 2).reshape(4 * rows, 4 * cols)
            assert not kept[:, 0].any()
            assert picture[:, : 2 * cols].all()
            assert not picture[:, 2 * cols :].any()
    assert_equals_masking(conversation)


# Baselines


@pytest.fixture
def scored():
    """Random saliency and keys of three samples of 20, 30 and no tokens, on 3 · 3 patches."""
    visual = laid_out([[2], [1, 2], []])
    visual.keys = torch.randn(3, 2, 30, 4, generator=torch.Generator().manual_seed(1))
    return random_saliency(visual, 4, 10_000, 7), visual


@pytest.mark.parametrize("rule", BASELINES)
@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        (0.25, [5, 8, 0]),
        (0.01, [1, 1, 0]),
        (1.0, [20, 30, 0]),
        (1, [1, 1, 0]),
        (7, [7, 7, 0]),
        (25, [20, 25, 0]),
        ([3, 11, 5], [3, 11, 0]),
    ],
    ids=str,
)
def test_baselines_keep_exactly_so_many(scored, rule, keep, counts):
    kept = rule(keep)(*scored)
    assert kept.dtype == torch.bool
    assert kept.sum(-1).tolist() == counts
    assert not kept[~scored[1].valid].any()


@pytest.mark.parametrize("rule", [TopK, RandomTokens, UniformGrid, KeyNorm])
def test_baselines_keep_as_many_as_another_pruner(scored, rule):
    other = TrimmedLlama(0.2)
    counts = other(*scored).sum(-1)
    kept = rule(other)(*scored)
    assert kept.sum(-1).tolist() == counts.tolist()
    assert not torch.equal(kept, other(*scored))
    assert counts[0] != counts[1]


def test_a_baseline_s_count_of_another_pruner_is_that_of_its_own_run(tiny):
    prompts = case_prompts("batch_ragged")
    runs = [
        tiny.generate(prompts, max_new_tokens=1, pruner=pruner)
        for pruner in (TrimmedLlama(0.1), RandomTokens(TrimmedLlama(0.1)))
    ]
    trimmed, drawn = ([c.visual_tokens.kept for c in completions] for completions in runs)
    assert trimmed == drawn == [TRIMMED[f"batch_ragged_{i}"]["0.1"]["kept"] for i in (0, 1)]


def test_top_k_takes_the_tokens_with_the_most_attention_of_all_heads(scored):
    saliency, visual = scored
    kept = TopK(6)(*scored)
    for sample, length in enumerate(visual.lengths[:2]):
        best = saliency[sample, :, :length].sum(0).topk(6).indices
        assert set(kept[sample].nonzero().flatten().tolist()) == set(best.tolist())


def test_key_norm_takes_the_tokens_with_the_shortest_keys(scored):
    _, visual = scored
    kept = KeyNorm(6)(*scored)
    for sample, length in enumerate(visual.lengths[:2]):
        norms = [visual.keys[sample, :, v].pow(2).sum(-1).sqrt().sum() for v in range(length)]
        best = sorted(range(length), key=norms.__getitem__)[:6]
        assert set(kept[sample].nonzero().flatten().tolist()) == set(best)


def test_key_norm_reads_the_keys_of_the_first_block(tiny):
    spy = Spy(KeyNorm(5))
    tiny.logits(case_prompts("image_first")[0], pruner=spy)
    (visual,) = spy.visuals
    attention = tiny.model.text.layers[tiny.config.text.cross_attention_layers[0]].cross_attn
    keys, _ = attention.project(visual.features)
    assert_close("keys", visual.keys, keys, EXACT)


def test_random_tokens_repeat_with_their_seed(scored):
    draws = [RandomTokens(8, seed=seed)(*scored) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_tokens_are_drawn_evenly():
    visual = laid_out([[4]])
    counts = sum(
        RandomTokens(10, seed=s)(random_saliency(visual, 2, 3, s), visual) for s in range(400)
    )
    assert 65 < counts.min() <= counts.max() < 135  # 100 each, 9 for one standard deviation


@pytest.mark.parametrize("cell", [1, 2, 4, 8])
def test_the_uniform_grid_is_even_in_space(cell):
    """Of 16 · 16 patches all, a quarter, a sixteenth …: one in each cell, in every tile."""
    visual = laid_out([[2], [1]], side=16)
    per_tile = (16 // cell) ** 2
    kept = UniformGrid([2 * per_tile, per_tile])(random_saliency(visual, 2, 3, 0), visual)
    for sample, tiles in ((0, 2), (1, 1)):
        for tile in range(tiles):
            grid = kept[sample, 257 * tile + 1 : 257 * (tile + 1)].view(16, 16)
            cells = grid.unfold(0, cell, cell).unfold(1, cell, cell).sum((-1, -2))
            assert (cells == 1).all()
            assert not kept[sample, 257 * tile]


@pytest.mark.parametrize("side", [6, 12, 40])
def test_the_uniform_grid_is_even_where_the_side_is_no_power_of_two(side):
    """A quarter of the patches: one in each cell of 2 · 2."""
    visual = laid_out([[1]], side=side)
    kept = UniformGrid(side**2 // 4)(torch.zeros(1, 1, 1 + side**2), visual)
    grid = kept[0, 1:].view(side, side)
    cells = grid.unfold(0, 2, 2).unfold(1, 2, 2).sum((-1, -2))
    assert (cells == 1).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrimmedLlama(0), "k_ratio is 0; expected more than 0 and at most 1"),
        (lambda: TrimmedLlama(-0.1), r"k_ratio is -0\.1; expected"),
        (lambda: TrimmedLlama(1.5), r"k_ratio is 1\.5; expected"),
        (lambda: TrimmedLlama(0.5, votes="none"), "votes is 'none'; expected 'all', 'after' or"),
        (lambda: TopK(0), "keep is 0; expected at least 1 token"),
        (lambda: TopK(-3), "keep is -3; expected at least 1 token"),
        (lambda: UniformGrid(0.0), r"keep is 0\.0; expected a fraction above 0 and at most 1"),
        (lambda: RandomTokens(1.2), r"keep is 1\.2; expected a fraction above 0 and at most 1"),
        (
            lambda: LastQuery(TrimmedLlama(0.1)),
            "LastQuery counts the votes of 'last' rows and TrimmedLlama of 'all'; expected the",
        ),
        (lambda: TopK(LastQuery(3)), "TopK counts the votes of 'all' rows and LastQuery of 'l"),
    ],
)
def test_settings_out_of_range_are_errors(make, says):
    with pytest.raises(PruningError, match=says):
        make()


def test_counts_must_be_as_many_as_samples(scored):
    with pytest.raises(PruningError, match="keep has 2 counts, expected 3 samples"):
        TopK([3, 4])(*scored)


def test_a_count_of_nothing_is_an_error(tiny):
    with pytest.raises(PruningError, match="pruner TopK kept none of the 85 visual tokens of sam"):
        tiny.generate(case_prompts("batch_ragged"), max_new_tokens=1, pruner=TopK([5, 0]))


def test_pruners_work_on_prompts_made_by_hand(tiny):
    """The smallest prompt: an image and nothing else."""
    (picture, *_) = case_prompts("image_first")[0].images
    prompt = Prompt([tiny.config.text.image_token_id], [picture])
    completion = tiny.generate(prompt, max_new_tokens=2, pruner=TrimmedLlama(0.01), **GREEDY)
    assert 1 <= completion.visual_tokens.kept <= tiny.config.text.num_attention_heads
    with pytest.raises(PruningError, match="kept none of the 68 visual tokens of sample 0"):
        tiny.generate(prompt, max_new_tokens=2, pruner=lambda s, v: torch.zeros_like(v.valid))


# Scoring


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_weighing_attends_and_sums_what_the_voting_rows_paid(heads, kv_heads, rows):
    torch.manual_seed(0)
    sizes = ((heads, rows), (kv_heads, 50), (kv_heads, 50))
    q, k, v = (torch.randn(2, h, n, 8) for h, n in sizes)
    votes = torch.rand(2, rows)
    repeated = k.repeat_interleave(heads // kv_heads, 1)
    shares = (q.double() @ repeated.double().mT / 8**0.5).softmax(-1)
    out, mass = attend_and_weigh(q, k, v, votes)
    assert mass.dtype == torch.float32
    assert_close("out", out, attend(q, k, v), 1e-5)
    assert_close("mass", mass, (shares * votes[:, None, :, None]).sum(2), 1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"),
    [(32, 8, 256), (8, 2, 2048)],
    ids=["all heads", "a quarter of them, long text"],
)
def test_scoring_at_the_11b_s_widths_takes_little_memory(heads, kv_heads, rows):
    torch.manual_seed(0)
    q, k = torch.randn(1, heads, rows, 128), torch.randn(1, kv_heads, 6404, 128)
    results = []
    live = live_bytes(lambda: results.append(attend_and_weigh(q, k, k, torch.ones(1, rows))))
    mass = results[0][1]
    assert mass.nbytes <= max(live) <= 64 * 2**20
    for head in (0, 5, heads - 1):
        expected = (q[0, head] @ k[0, head // 4].T / 128**0.5).softmax(-1).sum(0)
        assert ((mass[0, head] - expected).abs() / expected).max() < 1e-4


def test_scoring_in_half_precision_sums_in_float32():
    """Scores are of the model's type, as everywhere; the sums of many rows are exact."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 3000, 8).bfloat16(), torch.randn(1, 2, 40, 8).bfloat16()
    repeated = k.repeat_interleave(2, 1).float()
    expected = (q.float() @ repeated.mT / 8**0.5).softmax(-1).sum(2)
    out, mass = attend_and_weigh(q, k, k, torch.ones(1, 3000))
    assert (out.dtype, mass.dtype) == (torch.bfloat16, torch.float32)
    assert ((mass - expected).abs() / expected).max() < 5e-3
