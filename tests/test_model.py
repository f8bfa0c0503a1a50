import random

import pytest
import torch
from conftest import (
    CASES,
    TINY,
    assert_close,
    case_images,
    case_prompts,
    golden_tensors,
    new_cache,
    run_batch,
)
from oracle import Oracle, random_config, random_images, random_model, random_token_ids

from llama_vision import LlamaVision

TOLERANCE = 2e-4
HALF_TYPES = [torch.bfloat16, torch.float16]


def samples(case):
    """(token ids, images, golden logits) of every sample of a case."""
    tensors = golden_tensors(f"cases/{case}")
    for prompt, images, logits in zip(
        case_prompts(case), case_images(case), tensors["logits"], strict=True
    ):
        ids = list(prompt.token_ids)
        yield ids, images, logits[: len(ids)]


def tensors_in(value):
    """All tensors of a nested output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


# The reference's logits


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_each_prompt_alone(tiny, case, cached):
    for ids, images, expected in samples(case):
        cache = new_cache(tiny.model, 1) if cached else None
        (logits,) = run_batch(tiny.model, [ids], [images], cache)
        assert logits.dtype == torch.float32
        assert_close(case, logits, expected, TOLERANCE)


@pytest.mark.parametrize("cached", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_batch(tiny, case, cached):
    ids, images, expected = zip(*samples(case), strict=True)
    cache = new_cache(tiny.model, len(ids)) if cached else None
    for sample, logits in enumerate(run_batch(tiny.model, ids, images, cache)):
        assert_close(f"{case}, sample {sample}", logits, expected[sample], TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_last_rows_only(tiny, case):
    ids, images, expected = zip(*samples(case), strict=True)
    tensors, lengths = golden_tensors(f"cases/{case}"), [len(row) for row in ids]
    visual = tiny.model.encode_images(images)
    logits = tiny.model(tensors["tokens"], visual, lengths=lengths, last_row_only=True)
    assert_close(case, logits, torch.stack([rows[-1] for rows in expected]), TOLERANCE)


def test_padding_ids_change_nothing(tiny):
    ids, images, _ = zip(*samples("batch_ragged"), strict=True)
    tensors, lengths = golden_tensors("cases/batch_ragged"), [len(row) for row in ids]
    visual, shortest = tiny.model.encode_images(images), lengths.index(min(lengths))
    first = tensors["tokens"].clone()
    second = first.clone()
    second[shortest, lengths[shortest] :] = 77
    assert not torch.equal(first, second)
    outs = [tiny.model(tokens, visual, lengths=lengths)[shortest] for tokens in (first, second)]
    assert torch.equal(*(out[: lengths[shortest]] for out in outs))


# Random models


@pytest.mark.parametrize("seed", range(16))
def test_random_models_equal_the_oracle(seed):
    """A ragged batch of texts with none to three images, against loops over each sample alone."""
    draw = random.Random(seed)
    config = random_config(seed)
    model = random_model(config, seed)
    oracle = Oracle(model)
    counts = [draw.randint(0, 3) for _ in range(draw.randint(1, 3))]
    ids = [random_token_ids(config, n, n + draw.randint(1, 9), draw) for n in counts]
    images = [random_images(config, n, draw) for n in counts]
    plain = run_batch(model, ids, images)
    cached = run_batch(model, ids, images, new_cache(model, len(ids)))
    for sample, count in enumerate(counts):
        name = f"sample {sample} with {count} images"
        expected = oracle.logits(ids[sample], images[sample])
        assert expected.std() > 0.1, "logits that tell nothing"
        assert_close(name, plain[sample], expected, 1e-4)
        assert_close(f"{name}, cached", cached[sample], expected, 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_visual_tokens_of_random_models_equal_the_oracle(seed):
    config = random_config(seed)
    model, draw = random_model(config, seed), random.Random(seed)
    images = random_images(config, 4, draw)
    visual = model.encode_images([images[:3], [], images[3:]])
    expected = torch.cat([Oracle(model).project(image) for image in images])
    assert_close("features", visual.features[visual.valid], expected, 1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_images_encoded_in_groups_are_those_encoded_at_once(seed, monkeypatch):
    """Groups of one and of two, of images with equally many tiles."""
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed)
    images = [random_images(config, count, draw) for count in (3, 0, 4)]
    at_once = model.encode_images(images)
    tokens = config.vision.max_num_tiles * config.vision.tokens_per_tile
    seen = []
    model.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for most in (1, 2):
        monkeypatch.setattr("llama_vision.model.model.TOKENS_AT_ONCE", most * tokens)
        seen.clear()
        in_groups = model.encode_images(images)
        assert max(seen) <= most < len(seen)
        assert_close(f"groups of {most}", in_groups.features, at_once.features, 1e-5)
        assert torch.equal(in_groups.tile, at_once.tile)


def test_random_models_are_varied():
    """The seeds above reach every corner that a config can have."""
    configs = [random_config(seed) for seed in range(16)]
    taps = [config.vision.intermediate_layers_indices for config in configs]
    cross = [config.text.cross_attention_layers for config in configs]
    groups = {
        (config.text.num_attention_heads, config.text.num_key_value_heads) for config in configs
    }
    assert any(0 in indices for indices in taps)
    assert any(0 not in indices for indices in taps)
    assert any(0 in layers for layers in cross)
    assert any(c.text.num_hidden_layers - 1 in c.text.cross_attention_layers for c in configs)
    assert (6, 2) in groups
    assert len(groups) > 3
    assert len({config.vision.max_num_tiles for config in configs}) > 2
    assert any(config.text.rope_scaling is None for config in configs)
    assert any(config.vision.num_global_layers == 0 for config in configs)


# Half precision


@pytest.fixture(scope="module", params=HALF_TYPES, ids=str)
def half(request):
    return LlamaVision.from_pretrained(TINY, device="cpu", dtype=request.param).model


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_near_float32(half, case):
    for ids, images, expected in samples(case):
        (logits,) = run_batch(half, [ids], [images], new_cache(half, 1))
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() / expected.norm() < 3e-2


def test_no_type_changes_silently(half):
    """Weights, caches and the output of every module keep the model's type; logits are float32."""
    strays, calls = [], set()

    def check(name):
        def hook(_, args, out):
            calls.add(name)
            found = {t.dtype for t in tensors_in(out) if t.is_floating_point()}
            strays.extend((name, dtype) for dtype in found - {half.dtype})

        return hook

    hooks = [m.register_forward_hook(check(name)) for name, m in half.named_modules() if name]
    cache = new_cache(half, 2)
    ids, images, _ = zip(*samples("batch_ragged"), strict=True)
    run_batch(half, ids, images, cache)
    logits = run_batch(half, [[1], [2]], [[], []], cache)
    for hook in hooks:
        hook.remove()

    containers = (torch.nn.ModuleList,)
    called = {n for n, m in half.named_modules() if n and not isinstance(m, containers)}
    assert calls == called, "modules that were never checked"
    assert strays == []
    assert {tensor.dtype for tensor in half.state_dict().values()} == {half.dtype}
    stores = (cache.text, cache.visual)
    assert {t.dtype for s in stores for t in (*s.keys, *s.values)} == {half.dtype}
    assert half.encode_images(images).features.dtype == half.dtype
    assert {rows.dtype for rows in logits} == {torch.float32}
