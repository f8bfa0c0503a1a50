"""The whole model against the reference's logits, and against the slow, obvious one."""

import random

import pytest
import torch
from conftest import (
    CASES,
    TINY,
    Conversation,
    assert_close,
    cache_tensors,
    case_inputs,
    decode,
    golden_tensors,
    new_cache,
    random_pruner,
)
from oracle import MaskedOracle, Oracle, random_config, random_images, random_model

from llama_vision import LastQuery, LlamaVision, TrimmedLlama
from llama_vision.engine.decode import Decoder
from llama_vision.engine.encode import encode_group

HALF_TYPES = [torch.bfloat16, torch.float16]


def tensors_in(value):
    """All tensors of a nested output."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_reference_s(tiny, case):
    """Each prompt in a slot of its own, between others; all rows, or the last one alone."""
    cache = new_cache(tiny.model, 6)
    expected = golden_tensors(f"cases/{case}")["logits"]
    for number, (ids, images) in enumerate(case_inputs(case)):
        logits = Conversation(tiny.model, cache, 2 * number).go_on(ids, images)
        assert logits.dtype == torch.float32
        assert_close(f"{case}, {number}", logits, expected[number, : len(ids)], 2e-4)
        last = Conversation(tiny.model, cache, 2 * number + 1)
        logits = last.go_on(ids, images, every_row=False)
        assert_close(f"{case}, {number}", logits, expected[number, len(ids) - 1 : len(ids)], 2e-4)


# Random models

PRUNERS = {
    "none": lambda draw: None,
    "by chance": lambda draw: random_pruner(draw),
    "by chance, first layer whole": lambda draw: random_pruner(draw, trim_first_layer=False),
    "all rows": lambda draw: TrimmedLlama(0.2),
    "after": lambda draw: TrimmedLlama(0.2, votes="after", trim_first_layer=False),
    "last": lambda draw: LastQuery(0.4),
}


@pytest.mark.parametrize("make", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(16))
def test_random_models_equal_the_oracle(seed, make):
    """Ragged texts with none to three images in groups, over turns with steps between them.

    The same in four slots: at once, and in chunks of 1, 2 and 7 rows. Against loops over a model
    that trims nothing, and has masks where this one has dropped tokens.
    """
    config = random_config(seed)
    model = random_model(config, seed)
    cache = new_cache(model, 4)
    slots = {chunk: Conversation(model, cache, i) for i, chunk in enumerate((2048, 1, 2, 7))}
    whole, decoder, draw = slots[2048], Decoder(model, cache), random.Random(seed)
    for turn in range(draw.randint(2, 3)):
        inputs, token = whole.random_turn(draw), draw.randrange(config.text.vocab_size)
        for chunk, said in slots.items():
            said.go_on(*inputs, pruner=make(random.Random(seed + turn)), chunk=chunk)
        decode(decoder, dict.fromkeys(slots.values(), token))
    pruner = make(random.Random(seed))
    if pruner is None:
        expected = Oracle(model).logits(whole.token_ids, whole.images)
    else:
        notes = whole.token_ids, whole.images, whole.kept, whole.passes
        first_whole = not getattr(pruner, "trim_first_layer", True)
        expected = MaskedOracle(model).logits(*notes, trim_first_layer=not first_whole)
    assert expected.std() > 0.1, "logits that tell nothing"
    for chunk, said in slots.items():
        assert_close(f"chunks of {chunk}", torch.cat(said.logits), expected, 1e-5)
        assert all(map(torch.equal, said.kept, whole.kept))


@pytest.mark.parametrize("seed", range(8))
def test_visual_tokens_of_random_models_equal_the_oracle(seed, monkeypatch):
    """Of five images of one group, however many of them are encoded at once."""
    config = random_config(seed)
    model, images = random_model(config, seed), random_images(config, 5, random.Random(seed))
    expected = torch.cat([Oracle(model).project(image) for image in images])
    seen = []
    model.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    tokens = config.vision.max_num_tiles * config.vision.tokens_per_tile
    for most in (5, 2, 1):
        monkeypatch.setattr("llama_vision.engine.encode.TOKENS_AT_ONCE", most * tokens)
        seen.clear()
        assert_close(f"{most} at once", encode_group(model, images).features, expected, 1e-4)
        assert sum(seen) == 5
        assert max(seen) <= most


def test_random_models_are_varied():
    """The seeds above reach every corner that a config can have."""
    configs = [random_config(seed) for seed in range(16)]
    inputs = [config.vision.intermediate_layers_indices for config in configs]
    cross = [config.text.cross_attention_layers for config in configs]
    heads = {(c.text.num_attention_heads, c.text.num_key_value_heads) for c in configs}
    assert any(0 in indices for indices in inputs)
    assert any(0 not in indices for indices in inputs)
    assert any(0 in layers for layers in cross)
    assert any(c.text.num_hidden_layers - 1 in c.text.cross_attention_layers for c in configs)
    assert (6, 2) in heads
    assert len(heads) > 3
    assert len({config.vision.max_num_tiles for config in configs}) > 2
    assert any(config.text.rope_scaling is None for config in configs)
    assert any(config.vision.num_global_layers == 0 for config in configs)


# Half precision


@pytest.fixture(scope="module", params=HALF_TYPES, ids=str)
def half(request):
    return LlamaVision.from_pretrained(TINY, device="cpu", dtype=request.param).model


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_near_float32(half, case):
    expected = golden_tensors(f"cases/{case}")["logits"]
    for (ids, images), rows in zip(case_inputs(case), expected, strict=True):
        logits, rows = Conversation(half).go_on(ids, images), rows[: len(ids)]
        assert logits.dtype == torch.float32
        assert (logits - rows).norm() / rows.norm() < 3e-2


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.2)], ids=["whole", "pruned"])
def test_no_type_changes_silently(half, pruner):
    """Weights, caches and the output of every module keep the model's type; logits are float32."""
    strays, calls = [], set()

    def check(name):
        def hook(_, args, out):
            calls.add(name)
            found = {t.dtype for t in tensors_in(out) if t.is_floating_point()}
            strays.extend((name, dtype) for dtype in found - {half.dtype})

        return hook

    hooks = [m.register_forward_hook(check(name)) for name, m in half.named_modules() if name]
    conversation = Conversation(half)
    conversation.go_on(*case_inputs("batch_ragged")[1], pruner=pruner)
    decode(Decoder(half, conversation.cache), {conversation: 1})
    for hook in hooks:
        hook.remove()

    containers = (torch.nn.ModuleList,)
    called = {n for n, m in half.named_modules() if n and not isinstance(m, containers)}
    # The text decoder's blocks are called one by one in a prefill, all of it in a step.
    assert calls == called, "modules that were never checked"
    assert strays == []
    assert {tensor.dtype for tensor in half.state_dict().values()} == {half.dtype}
    assert {tensor.dtype for tensor in cache_tensors(conversation.cache)} == {half.dtype}
    images = case_inputs("image_first")[0][1]
    assert encode_group(half, images).features.dtype == half.dtype
    assert {rows.dtype for rows in conversation.logits} == {torch.float32}
