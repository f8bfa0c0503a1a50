import random
from itertools import pairwise

import pytest
import torch
from conftest import (
    CASES,
    assert_close,
    case_images,
    case_prompts,
    golden_json,
    golden_tensors,
    new_cache,
    run_batch,
)
from oracle import masked_attention, random_token_ids, visible_images

from llama_vision.cache.visual_tokens import Visibility, VisualTokens, find_stretches
from llama_vision.engine.prefill import attend_visible, row_chunks
from llama_vision.model.text import SelfAttentionBlock

TOLERANCE = 1e-4


def golden(name: str) -> torch.Tensor:
    return golden_tensors("modules")[name]


def run_case(model, case, cache=None):
    """One batched pass over the prompts of a case."""
    ids = [list(prompt.token_ids) for prompt in case_prompts(case)]
    return run_batch(model, ids, case_images(case), cache)


def hidden_states(model, case):
    """[(index of the block, its output [B, S, D])] of all blocks that ran."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out, index=index: seen.append((index, out)))
        for index, block in enumerate(model.text.layers)
    ]
    run_case(model, case)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", ["self_layer", "cross_layer"])
def test_block(tiny, name):
    """The block is given the reference's input within a run of the same prompt."""
    block = tiny.model.text.layers[golden_json("manifest")["module_layers"][f"{name}_hf"]]
    outputs = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: (golden(f"{name}.in"), *args[1:])),
        block.register_forward_hook(lambda _, args, out: outputs.append(out)),
    ]
    run_case(tiny.model, "bos_image")
    for hook in hooks:
        hook.remove()
    assert_close(name, outputs[0], golden(f"{name}.out"), TOLERANCE)


def test_final_norm(tiny):
    out = tiny.model.text.norm(golden("final_norm.in"))
    assert_close("final_norm", out, golden("final_norm.out"), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_every_block_gives_the_reference_s_hidden_states(tiny, case):
    """Fails at the first block that differs, and names it."""
    tensors = golden_tensors(f"cases/{case}")
    states = hidden_states(tiny.model, case)
    assert len(states) == len(tensors["hidden_states"])
    for (index, got), want in zip(states, tensors["hidden_states"], strict=True):
        for sample, length in enumerate(tensors["lengths"]):
            name = f"{case}, sample {sample}, block {index}"
            assert_close(name, got[sample, :length], want[sample, :length], 2e-4)


def test_a_text_without_images_runs_no_cross_attention(tiny):
    ran = [index for index, _ in hidden_states(tiny.model, "text_only")]
    blocks = tiny.model.text.layers
    assert ran == [i for i, block in enumerate(blocks) if isinstance(block, SelfAttentionBlock)]


def test_rows_that_see_no_image_pass_a_cross_attention_block_unchanged(tiny):
    states = dict(hidden_states(tiny.model, "text_before"))
    blind = golden_json("manifest")["cases"]["text_before"]["samples"][0]["visible"][0][0]
    for index in tiny.config.text.cross_attention_layers:
        before, after = states[index - 1][0], states[index][0]
        assert torch.equal(before[:blind], after[:blind])
        assert ((before - after)[blind:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("seed", range(20))
def test_attending_to_runs_equals_attending_under_a_mask(seed, tiny):
    """Random batches of random groups of images, all rows at once or the last one alone."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    batch, rows, tile = draw.randint(1, 3), draw.choice([1, 4, 9]), 3
    tiles = [
        [draw.randint(1, 3) for _ in range(draw.randint(0, min(3, rows)))] for _ in range(batch)
    ]
    tiles[0] = tiles[0] or [1]
    if seed % 4 == 0:
        tiles = [tiles[0]] * batch
    ids = [random_token_ids(tiny.config, len(sample), rows, draw) for sample in tiles]
    if seed % 4 == 0:
        ids = [ids[0]] * batch
    visual = VisualTokens.of_images(
        [[torch.zeros(t, tile, 1) for t in s] for s in tiles], [[(1, t) for t in s] for s in tiles]
    )

    image_id = tiny.config.text.image_token_id
    tokens = visual.features.shape[1]
    allowed = torch.zeros(batch, rows, tokens, dtype=torch.bool)
    for sample in range(batch):
        for row, images in enumerate(visible_images(ids[sample], image_id)):
            for image in images:
                allowed[sample, row] |= visual.image[sample] == image

    sights = [
        visual.sights(sample, find_stretches(ids[sample], image_id)) for sample in range(batch)
    ]
    q, k, v = torch.randn(batch, 6, rows, 4), *torch.randn(2, batch, 2, tokens, 4)
    out = attend_visible(q, k, v, Visibility(sights, (batch, rows, tokens), q.device))
    expected = [masked_attention(*sample) for sample in zip(q, k, v, allowed, strict=True)]
    assert_close("attend_visible", out, torch.stack(expected), 1e-5)


def test_images_are_projected_once(tiny):
    """Decoding reads keys and values from the cache; it never computes those of images again."""
    calls = []
    hooks = [
        tiny.model.text.layers[i].cross_attn.k_proj.register_forward_hook(
            lambda _, args, out: calls.append(args[0].shape[1])
        )
        for i in tiny.config.text.cross_attention_layers
    ]
    cache = new_cache(tiny.model, 1)
    run_case(tiny.model, "two_images", cache)
    prefill = list(calls)
    for token in (5, 6):
        run_batch(tiny.model, [[token]], [[]], cache)
    for hook in hooks:
        hook.remove()
    assert len(prefill) == len(tiny.config.text.cross_attention_layers)
    assert calls == prefill


def test_logits_are_asked_for_row_by_row(tiny):
    torch.manual_seed(0)
    h = torch.randn(2, 3, tiny.config.text.hidden_size)
    logits = tiny.model.text.logits(h)
    assert logits.shape == (2, 3, tiny.config.text.vocab_size)
    assert_close("last row", tiny.model.text.logits(h[:, -1]), logits[:, -1], 1e-5)


# Chunks


@pytest.mark.parametrize(
    ("sizes", "ends"),
    [
        ((1, 10, None), [10]),
        ((1, 10, 4), [4, 8, 10]),
        ((3, 10, 13), [4, 8, 10]),
        ((3, 4, 2), [1, 2, 3, 4]),
        ((1, 7, 100), [7]),
    ],
)
def test_rows_go_in_runs_of_all_samples_together(sizes, ends):
    chunks = row_chunks(*sizes)
    assert [chunk.stop for chunk in chunks] == ends
    assert [chunk.start for chunk in chunks] == [0, *ends[:-1]]


def test_no_mask_of_a_long_prompt_is_large():
    chunks = row_chunks(1, 131072, 2048, held=0)
    assert chunks[0] == slice(0, 2048)
    assert chunks[-1].stop == 131072
    assert all(a.stop == b.start for a, b in pairwise(chunks))
    entries = [(chunk.stop - chunk.start) * chunk.stop for chunk in chunks]
    assert max(entries) <= 2**25 < 2048 * 131072
