"""Merging: a kept token stands for others, exactly where they are alike."""

import random
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Conversation, assert_close, assert_same, case_prompts, decode, needs_compiler
from oracle import random_config, random_images, random_model, random_token_ids
from PIL import Image

from llama_vision import (
    Engine,
    FeatureNorm,
    KeyNorm,
    LastQuery,
    LlamaVision,
    MaxMin,
    Prompt,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.cache.diversity import most_different
from llama_vision.cache.merging import merge, nearest_kept
from llama_vision.cache.pruning import PruningError, ask
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine import prefill, shared_images
from llama_vision.engine.decode import Decoder

GREEDY = {"temperature": 0, "ignore_stop": True}
RULES = [
    TrimmedLlama(0.2, merge=True),
    LastQuery(0.3, merge=True),
    TopK(9, merge=True, keep_class_tokens=True),
    RandomTokens(0.4, merge=True),
    KeyNorm(0.25, merge=True),
    UniformGrid(0.3, merge=True),
    FeatureNorm(7, merge=True),
    MaxMin(0.4, merge=True),
    MaxMin(TrimmedLlama(0.1), merge=True),
]


def random_stands(visual: VisualTokens, seed: int) -> torch.Tensor:
    """A random assignment within each image."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(len(visual.image), generator=generator) < 0.4
    for image in range(len(visual.grids)):
        keep[(visual.image == image).nonzero()[0]] = True
    stands = torch.arange(len(keep))
    for image in range(len(visual.grids)):
        here = (visual.image == image).nonzero().squeeze(-1)
        kept = here[keep[here]]
        drawn = kept[torch.randint(len(kept), (len(here),), generator=generator)]
        stands[here] = torch.where(keep[here], here, drawn)
    return stands


@dataclass(frozen=True)
class Assign:
    """A pruner that answers with a random assignment."""

    needs_text: bool
    merge: bool = True
    votes: str = "all"

    def __call__(self, saliency, visual):
        assert (saliency is not None) == self.needs_text
        return random_stands(visual, visual.group)


@pytest.fixture
def alike(monkeypatch):
    """Pictures whose tokens are equal in every cluster of `random_stands`."""
    encode = prefill.encode_group

    def encode_alike(model, images, number=0):
        visual = encode(model, images, number)
        visual.features = visual.features[random_stands(visual, number)]
        return visual

    for module in (prefill, shared_images):
        monkeypatch.setattr(module, "encode_group", encode_alike)


@pytest.mark.parametrize("needs_text", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 2048])
@pytest.mark.parametrize("seed", range(6))
def test_clusters_of_equal_tokens_change_nothing(alike, seed, chunk, needs_text):
    """In any block, prompt chunked or not, over turns, prefilled and decoded."""
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed)
    whole, merged = Conversation(model), Conversation(model)
    for turn in range(3):
        ids, images = whole.random_turn(draw)
        want = whole.go_on(ids, images, first_group=turn)
        how = {"pruner": Assign(needs_text), "chunk": chunk, "first_group": turn}
        assert_close(f"turn {turn}", merged.go_on(ids, images, **how), want, 1e-5)
        for said in (whole, merged):
            decode(Decoder(model, said.cache), {said: 3})
        assert_close("decoded", merged.logits[-1], whole.logits[-1], 1e-5)
    if any(whole.held):
        assert sum(merged.held) < sum(whole.held)


@pytest.mark.parametrize("seed", range(3))
def test_one_token_a_cluster_equals_no_pruning(seed):
    def everyone(saliency, visual):
        return torch.arange(len(visual.image))

    everyone.merge = True
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed)
    for _ in range(3):
        ids, images = Conversation(model).random_turn(draw)
        want = Conversation(model).go_on(ids, images)
        got = Conversation(model).go_on(ids, images, pruner=everyone)
        assert_close("logits", got, want, 1e-6)


def small(seed: int = 6) -> LlamaVision:
    return LlamaVision(random_model(random_config(seed), seed), stop_ids=[])


def random_prompt(model: LlamaVision, draw: random.Random, count: int) -> Prompt:
    ids = random_token_ids(model.config, count, count + draw.randint(1, 6), draw)
    return Prompt(ids, random_images(model.config, count, draw))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_merged_and_whole_slots_side_by_side_answer_as_alone(rule):
    model, draw = small(), random.Random(3)
    prompts = [random_prompt(model, draw, count) for count in (1, 2, 0, 1, 3)]
    rules = [rule, None, rule, replace(rule, merge=False), rule]
    settings = {"max_new_tokens": 6, **GREEDY}
    engine = Engine(model, slots=3, max_seq_len=64)
    requests = [
        engine.submit(prompt, pruner=pruner, **settings)
        for prompt, pruner in zip(prompts, rules, strict=True)
    ]
    for request, together in zip(requests, engine.run(*requests), strict=True):
        pruner = request.settings.pruner
        assert_same(together, model.generate(request.prompt, pruner=pruner, **settings))
        assert len(together.stands) == (len(request.prompt.images) if together.stands else 0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_who_stands_for_a_token_is_the_nearest_kept_one_of_its_image(tiny, rule):
    seen = []

    def spy(saliency, visual):
        seen.append((ask(rule, saliency, visual), visual))
        return seen[-1][0].stands

    for name in ("votes", "merge", "needs_text"):
        setattr(spy, name, getattr(rule, name))
    (prompt,) = case_prompts("consecutive")
    completion = tiny.generate(prompt, max_new_tokens=2, pruner=spy, **GREEDY)
    for kept, visual in seen:
        likeness = F.cosine_similarity(visual.features[:, None], visual.features[None], dim=-1)
        for token, stands in enumerate(kept.stands.tolist()):
            near = [
                t for t in kept.mask.nonzero().squeeze(-1) if visual.image[t] == visual.image[token]
            ]
            near = near or kept.mask.nonzero().squeeze(-1).tolist()
            best = max(float(likeness[token, t]) for t in near)
            assert kept.mask[stands]
            assert stands == token if kept.mask[token] else True
            assert float(likeness[token, stands]) == pytest.approx(best, abs=1e-6)
    flat = torch.cat([stands.flatten() for stands in completion.stands])
    assert torch.equal(flat, torch.cat([kept.stands for kept, _ in seen]))
    assert all(map(torch.equal, completion.kept, tiny.generate(prompt, pruner=rule).kept))


def test_a_cluster_carries_its_mean_and_the_logarithm_of_its_size():
    features = torch.tensor([[1.0, 0], [3, 0], [0, 5], [0, 6], [0, 7]])
    stands = torch.tensor([0, 0, 3, 3, 3])
    keep = torch.tensor([True, False, False, True, False])
    means, log_counts = merge(features, keep, stands)
    assert torch.equal(means, torch.tensor([[2.0, 0], [0, 6]]))
    assert log_counts.tolist() == pytest.approx([0.6931472, 1.0986123])
    visual = VisualTokens.of_images(features[None], [(1, 1)])
    assert torch.equal(nearest_kept(visual, keep), stands)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 17])
@pytest.mark.parametrize("seed", range(4))
def test_max_min_adds_the_token_whose_nearest_chosen_one_is_farthest(seed, count):
    features = torch.randn(17, 6, generator=torch.Generator().manual_seed(seed))
    visual = VisualTokens.of_images(features[None], [(1, 1)])
    always = torch.zeros(17, dtype=torch.bool)
    directions = F.normalize(features, dim=-1).double()
    chosen = [int((directions @ directions.mean(0)).argmin())]
    while len(chosen) < count:
        nearest = (directions @ directions[chosen].T).amax(1)
        nearest[chosen] = 9
        chosen.append(int(nearest.argmin()))
    got = most_different(visual, count, always)
    assert got.nonzero().squeeze(-1).tolist() == sorted(chosen)
    always[3:5] = True
    assert most_different(visual, max(2, count), always)[3:5].all()


def test_max_min_keeps_one_of_each_kind_before_a_second_of_any():
    kinds = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 0, 1, 2, 3, 0, 1, 2])).float()
    visual = VisualTokens.of_images(kinds[None], [(1, 1)])
    chosen = most_different(visual, 4, torch.zeros(17, dtype=torch.bool))
    assert sorted(kinds[chosen].argmax(-1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda n: torch.arange(n) + 1, r"assigned a token to \d+; expected an index of 0 to \d+"),
        (lambda n: torch.arange(n) - 1, r"assigned a token to -1; expected an index of 0 to \d+"),
        (lambda n: torch.arange(n).roll(1), r"assigned token 0 to token \d+, which is not kept"),
        (lambda n: torch.zeros(9).long(), r"returned a Tensor torch.int64 \[9\]; expected a"),
        (lambda n: torch.zeros(n).int(), r"returned a Tensor torch.int32 \[\d+\]; expected a"),
        (lambda n: torch.zeros(n), r"returned a Tensor torch.float32 \[\d+\]; .* torch.int64"),
        (lambda n: torch.arange(n), r"kept \d+ visual tokens and the visual budget is 5"),
    ],
)
def test_an_assignment_that_is_none_is_told(tiny, answer, says):
    def rule(saliency, visual):
        return answer(len(visual.image))

    rule.merge = True
    with pytest.raises(PruningError, match=says):
        tiny.generate(case_prompts("bos_image"), max_new_tokens=1, pruner=rule, visual_budget=5)


def test_an_assignment_needs_the_pruner_to_say_so(tiny):
    def rule(saliency, visual):
        return torch.zeros(len(visual.image), dtype=torch.int64)

    with pytest.raises(PruningError, match=r"int64.*; expected a torch.bool .* has merge = True"):
        tiny.generate(case_prompts("bos_image"), max_new_tokens=1, pruner=rule)
    rule.merge = True
    assert tiny.generate(case_prompts("bos_image"), max_new_tokens=1, pruner=rule)


@pytest.mark.parametrize("make", [lambda: MaxMin(0.5), lambda: UniformGrid(0.5, merge=True)])
def test_features_that_are_not_finite_are_told(tiny, monkeypatch, make):
    encode = shared_images.encode_group

    def broken(*args):
        visual = encode(*args)
        visual.features[3, 2] = torch.nan
        return visual

    monkeypatch.setattr(shared_images, "encode_group", broken)
    with pytest.raises(PruningError, match="the visual features are not finite"):
        tiny.generate(case_prompts("bos_image"), max_new_tokens=1, pruner=make())


def test_merging_trims_every_layer():
    with pytest.raises(PruningError, match="merges and leaves the first layer whole; expected"):
        small().generate(Prompt([1]), pruner=TopK(0.5, merge=True, trim_first_layer=False))


@pytest.mark.parametrize("budget", [None, 0.5, 7])
@pytest.mark.parametrize("rule", [MaxMin(0.5, merge=True), TrimmedLlama(0.3, merge=True)], ids=repr)
def test_planned_bytes_are_those_taken_counts_included(rule, budget):
    model = small()
    image_id, pictures = model.config.text.image_token_id, (Image.new("RGB", (12, 12)),) * 2
    prompts = [Prompt([1, *[image_id] * n, 2], pictures[:n]) for n in (1, 2, 1)]
    settings = {"pruner": rule, "visual_budget": budget, "max_new_tokens": 4, **GREEDY}
    model.generate(prompts, **settings)  # what is done once in a process
    plan = model.plan(prompts, slots=2, **settings)
    engine, requests = model.start(prompts, slots=2, track_memory=True, **settings)
    before = engine.cache.visual.nbytes
    engine.run(*requests)
    if budget is None:  # enlarged to what was left after pruning
        assert engine.cache.visual.nbytes <= plan.visual_cache
    else:
        assert before == engine.cache.visual.nbytes == plan.visual_cache
        capacity = engine.cache.visual.capacities[0]
        whole = model.plan(prompts, slots=2, **{**settings, "pruner": replace(rule, merge=False)})
        assert plan.visual_cache == whole.visual_cache + 2 * capacity * 4
    assert engine.ledger.peak <= plan.total


def test_where_nothing_is_merged_nothing_is_held_for_it():
    model, draw = small(), random.Random(1)
    engine, (request,) = model.start([random_prompt(model, draw, 1)], pruner=MaxMin(0.5))
    engine.run(request)
    assert engine.cache.visual.log_counts is None


@needs_compiler
def test_merged_tokens_are_decoded_alike_where_it_is_compiled(tiny):
    prompts, settings = case_prompts("batch_ragged"), {"max_new_tokens": 6, **GREEDY}
    for rule in (MaxMin(0.4, merge=True), LastQuery(0.3, merge=True)):
        plain = tiny.generate(prompts, pruner=rule, **settings)
        compiled = tiny.generate(prompts, pruner=rule, compiled=True, **settings)
        assert [one.token_ids for one in compiled] == [one.token_ids for one in plain]
