import pytest
import torch
from conftest import (
    CASES,
    Conversation,
    assert_close,
    case_inputs,
    decode,
    golden_json,
    golden_tensors,
)
from oracle import masked_attention

from llama_vision.engine.decode import Decoder
from llama_vision.model.layers import attention
from llama_vision.model.text import CrossAttentionBlock, SelfAttentionBlock, visible_prefix

TOLERANCE = 1e-4


def golden(name: str) -> torch.Tensor:
    return golden_tensors("modules")[name]


def hidden_states(model, token_ids, images):
    """The states [S, D] behind each block of a prefill, one after the other.

    Cross-attention blocks see some rows only: their states are what the next block is given.
    """
    ins: dict[int, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, index=index: ins.setdefault(index, []).append(args[0].clone())
        )
        for index, module in enumerate([*model.text.layers, model.text.norm])
        if not isinstance(module, CrossAttentionBlock)
    ]
    outs: dict[int, list[torch.Tensor]] = {}
    hooks += [
        block.register_forward_hook(
            lambda _, args, out, index=index: outs.setdefault(index, []).append(out.clone())
        )
        for index, block in enumerate(model.text.layers)
        if isinstance(block, SelfAttentionBlock)
    ]
    Conversation(model).go_on(token_ids, images)
    for hook in hooks:
        hook.remove()
    states = []
    for index, block in enumerate(model.text.layers):
        if isinstance(block, SelfAttentionBlock):
            states.append(torch.cat(outs[index], dim=1)[0])
        elif images:
            behind = [rows.view(-1, rows.shape[-1]) for rows in ins[index + 1]]
            states.append(torch.cat(behind))
    return states


@pytest.mark.parametrize("name", ["self_layer", "cross_layer"])
def test_block(tiny, name):
    """The block is given the reference's input within a run of the same prompt."""
    block = tiny.model.text.layers[golden_json("manifest")["module_layers"][f"{name}_hf"]]
    outputs, (inputs,) = [], case_inputs("bos_image")
    # The first row sees no image, and so is not given to a cross-attention block.
    first = 1 if name == "cross_layer" else 0
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args: (golden(f"{name}.in")[:, first:], *args[1:])
        ),
        block.register_forward_hook(lambda _, args, out: outputs.append(out.clone())),
    ]
    Conversation(tiny.model).go_on(*inputs)
    for hook in hooks:
        hook.remove()
    assert_close(name, outputs[0], golden(f"{name}.out")[:, first:], TOLERANCE)


def test_final_norm(tiny):
    out = tiny.model.text.norm(golden("final_norm.in"))
    assert_close("final_norm", out, golden("final_norm.out"), TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_every_block_gives_the_reference_s_hidden_states(tiny, case):
    """Fails at the first block that differs, and names it."""
    tensors = golden_tensors(f"cases/{case}")
    for number, (ids, images) in enumerate(case_inputs(case)):
        states = hidden_states(tiny.model, ids, images)
        for index, (got, want) in enumerate(zip(states, tensors["hidden_states"], strict=True)):
            name = f"{case}, prompt {number}, block {index}"
            assert_close(name, got, want[number, : len(ids)], 2e-4)


def test_rows_that_see_no_image_pass_a_cross_attention_block_unchanged(tiny):
    states = hidden_states(tiny.model, *case_inputs("text_before")[0])
    sees_none = golden_json("manifest")["cases"]["text_before"]["samples"][0]["visible"][0][0]
    assert sees_none > 0
    for index in tiny.config.text.cross_attention_layers:
        before, after = states[index - 1], states[index]
        assert torch.equal(before[:sees_none], after[:sees_none])
        assert ((before - after)[sees_none:].abs().amax(-1) > 1e-3).all()


def test_a_text_without_images_runs_no_cross_attention(tiny):
    ran = []
    hooks = [
        block.register_forward_hook(lambda *_, block=block: ran.append(type(block)))
        for block in tiny.model.text.layers
    ]
    Conversation(tiny.model).go_on(*case_inputs("text_only")[0])
    for hook in hooks:
        hook.remove()
    assert ran == [SelfAttentionBlock] * tiny.config.text.num_self_attention_layers


@pytest.mark.parametrize("seed", range(20))
def test_seeing_a_prefix_equals_attending_under_a_mask(seed):
    """Rows that see none get zero, though the mask lets them look at one token."""
    torch.manual_seed(seed)
    slots, rows, tokens = 1 + seed % 3, 1 + seed % 5, 1 + seed % 7
    visible = torch.randint(tokens + 1, (slots, rows))
    visible[0, 0] = 0
    mask, sees = visible_prefix(visible, tokens)
    q, k, v = torch.randn(slots, 6, rows, 4), *torch.randn(2, slots, 2, tokens, 4)
    out = attention(q, k, v, mask=mask) * sees[:, None]
    allowed = torch.arange(tokens) < visible[..., None]
    expected = [masked_attention(*slot)[0] for slot in zip(q, k, v, allowed, strict=True)]
    assert_close("attention", out, torch.stack(expected), 1e-5)
    assert not out[0, :, 0].any()


def test_images_are_projected_once(tiny):
    """Decoding reads keys and values from the cache; it never computes those of images again."""
    (ids, images), rows = case_inputs("two_images")[0], []
    hooks = [
        tiny.model.text.layers[index].cross_attn.k_proj.register_forward_hook(
            lambda _, args, out: rows.append(args[0].shape[1])
        )
        for index in tiny.config.text.cross_attention_layers
    ]
    conversation = Conversation(tiny.model)
    conversation.go_on(ids, images)
    tokens = [17 * len(image.pixels) for image in images]
    assert rows == [count for count in tokens for _ in hooks]
    decoder = Decoder(tiny.model, conversation.cache)
    for token in (5, 6):
        decode(decoder, {conversation: token})
    conversation.go_on([7, 8])
    for hook in hooks:
        hook.remove()
    assert len(rows) == 2 * len(hooks)


def test_logits_are_asked_for_row_by_row(tiny):
    h = torch.randn(2, 3, tiny.config.text.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = tiny.model.text.logits(h)
    assert logits.shape == (2, 3, tiny.config.text.vocab_size)
    assert_close("last row", tiny.model.text.logits(h[:, -1]), logits[:, -1], 1e-5)
