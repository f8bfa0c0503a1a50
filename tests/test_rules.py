"""The rules that ship with the hook, each against its definition in plain words."""

import math
import random

import pytest
import torch

from llama_vision import KeyNorm, LastQuery, RandomTokens, TopK, TrimmedLlama, UniformGrid
from llama_vision.cache.pruning import PruningError
from llama_vision.cache.visual_tokens import VisualTokens

BASELINES = [TopK, LastQuery, RandomTokens, UniformGrid, KeyNorm]


def laid_out(*tiles, side=3, budget=None, group=0):
    """Visual tokens of images of so many tiles, on a grid of side · side patches."""
    features = torch.zeros(sum(tiles), 1 + side**2, 1)
    visual = VisualTokens.of_images(features, [(1, t) for t in tiles], group=group)
    visual.budget = budget
    generator = torch.Generator().manual_seed(1)
    visual.keys = torch.randn(2, len(visual.image), 4, generator=generator)
    return visual


def random_saliency(visual, heads=4, levels=10_000, seed=7):
    """Many equal values, where there are few levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (heads, len(visual.image)), generator=generator) / 8


def chosen(mask):
    return set(mask.nonzero().flatten().tolist())


# Trimmed Llama


def union_by_hand(saliency, k):
    """The first k of every head; of equals the earlier."""
    ranked = [sorted(range(len(head)), key=lambda v: (-head[v], v)) for head in saliency.tolist()]
    return {token for order in ranked for token in order[:k]}


def trim_by_hand(saliency, k_ratio, budget):
    """The union of the largest k that fits, else the strongest of the first."""
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
    for seed in range(80):
        draw = random.Random(seed)
        visual = laid_out(*[draw.randint(1, 3)] * draw.randint(1, 2))
        visual.budget = draw.randint(1, len(visual.image))
        saliency = random_saliency(visual, heads, levels, seed)
        k_ratio = draw.choice([0.05, 0.3, 1.0])
        expected = trim_by_hand(saliency, k_ratio, visual.budget)
        assert chosen(TrimmedLlama(k_ratio)(saliency, visual)) == expected
        assert 1 <= len(expected) <= visual.budget
        fits = len(union_by_hand(saliency, 1)) <= visual.budget
        fallbacks, unions = fallbacks + (not fits), unions + fits
    assert unions > 0
    assert (fallbacks > 0) == (heads > 1), "with one head, k = 1 always fits"


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("k_ratio", [0.01, 0.1, 0.25, 0.37, 1.0])
def test_without_a_budget_k_is_the_ratio_of_the_group_s_tokens(heads, k_ratio):
    for tiles in ([2], [1, 1, 1]):
        visual = laid_out(*tiles)
        saliency = random_saliency(visual, heads, 10)
        expected = union_by_hand(saliency, math.ceil(k_ratio * 10 * sum(tiles)))
        assert chosen(TrimmedLlama(k_ratio)(saliency, visual)) == expected


def test_class_tokens_count_towards_the_budget():
    visual = laid_out(3, budget=5)
    kept = TrimmedLlama(1.0, keep_class_tokens=True)(random_saliency(visual), visual)
    assert kept[visual.is_class].all()
    assert 3 <= kept.sum() <= 5


# Baselines


@pytest.mark.parametrize("rule", BASELINES)
@pytest.mark.parametrize(
    ("keep", "budget", "counts"),
    [
        (0.25, None, (5, 8)),
        (0.01, None, (1, 1)),
        (1.0, None, (20, 30)),
        (1, None, (1, 1)),
        (7, None, (7, 7)),
        (25, None, (20, 25)),
        ([3, 11, 5], None, (3, 11)),
        (0.5, 4, (4, 4)),
        (0.5, 12, (10, 12)),
    ],
    ids=str,
)
def test_baselines_keep_exactly_so_many(rule, keep, budget, counts):
    """Of a first group of 20 tokens and a second one of 30."""
    for group, (tiles, count) in enumerate(zip(([2], [1, 2]), counts, strict=True)):
        visual = laid_out(*tiles, budget=budget, group=group)
        kept = rule(keep)(random_saliency(visual), visual)
        assert (kept.dtype, kept.shape) == (torch.bool, visual.image.shape)
        assert kept.sum() == count
        visual.budget = None
        assert torch.equal(kept, rule(count)(random_saliency(visual), visual)), "the best of them"


@pytest.mark.parametrize("rule", [TopK, RandomTokens, UniformGrid, KeyNorm])
@pytest.mark.parametrize("tiles", [[2], [1, 2]], ids=str)
def test_baselines_keep_as_many_as_another_pruner(rule, tiles):
    visual, other = laid_out(*tiles), TrimmedLlama(0.2)
    saliency = random_saliency(visual)
    kept, of_other = rule(other)(saliency, visual), other(saliency, visual)
    assert kept.sum() == of_other.sum()
    assert not torch.equal(kept, of_other)


def test_top_k_takes_the_tokens_with_the_most_attention_of_all_heads():
    visual = laid_out(1, 2)
    saliency = random_saliency(visual)
    best = set(saliency.sum(0).topk(6).indices.tolist())
    assert chosen(TopK(6)(saliency, visual)) == chosen(LastQuery(6)(saliency, visual)) == best
    assert (TopK(6).votes, LastQuery(6).votes) == ("all", "last")


def test_key_norm_takes_the_tokens_with_the_shortest_keys():
    visual = laid_out(1, 2)
    norms = [visual.keys[:, v].pow(2).sum(-1).sqrt().sum() for v in range(30)]
    best = sorted(range(30), key=norms.__getitem__)[:6]
    assert chosen(KeyNorm(6)(random_saliency(visual), visual)) == set(best)


def test_random_tokens_are_drawn_evenly_and_repeat_with_their_seed():
    visual = laid_out(4)
    saliency = random_saliency(visual)
    counts = sum(RandomTokens(10, seed=seed)(saliency, visual) for seed in range(400))
    repeated = sum(RandomTokens(10, seed=seed)(saliency, visual) for seed in range(400))
    assert torch.equal(counts, repeated)
    assert 65 < counts.min() <= counts.max() < 135  # 100 each, 9 for one standard deviation


@pytest.mark.parametrize(
    ("side", "cell"), [(16, 1), (16, 2), (16, 4), (16, 8), (6, 2), (12, 2), (40, 2)]
)
def test_the_uniform_grid_is_even_in_space(side, cell):
    """All patches, a quarter, a sixteenth …: one in each cell, in every tile of every image."""
    visual = laid_out(2, 1, side=side)
    kept = UniformGrid(3 * (side // cell) ** 2)(random_saliency(visual), visual)
    assert not kept[visual.is_class].any()
    grids = kept[~visual.is_class].view(3, side, side)
    assert (grids.unfold(1, cell, cell).unfold(2, cell, cell).sum((-1, -2)) == 1).all()


# What they refuse


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TrimmedLlama(0), "k_ratio is 0; expected more than 0 and at most 1"),
        (lambda: TrimmedLlama(-0.1), r"k_ratio is -0\.1; expected"),
        (lambda: TrimmedLlama(1.5), r"k_ratio is 1\.5; expected"),
        (lambda: TrimmedLlama(0.5, votes="none"), "votes is 'none'; expected 'all', 'after' or"),
        *(
            (lambda keep=keep: TopK(keep), r"keep is .*; expected a fraction above 0 and at most 1")
            for keep in (0, -3, True, None, "x", float("nan"), [], [0, 5], [3, -1], [0.5], int, 1j)
        ),
        *(
            (lambda k=k: TrimmedLlama(k), "k_ratio is .*; expected more than 0 and at most 1")
            for k in (True, None, "0.5", float("nan"), [0.5], 10**30)
        ),
        (lambda: RandomTokens(0.5, seed=1.0), "seed is 1.0; expected 0 or more"),
        (lambda: TopK(0.5, keep_class_tokens="no"), "keep_class_tokens is 'no'; expected True or"),
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


def test_there_must_be_a_count_for_each_group():
    visual = laid_out(2, group=2)
    with pytest.raises(PruningError, match=r"keep has 2 counts and this is group 3 of images"):
        TopK([3, 4])(random_saliency(visual), visual)
