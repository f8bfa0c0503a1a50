import copy

import pytest
import torch
from conftest import TINY, assert_close, golden_tensors, needs_compiler
from oracle import masked_attention

from llama_vision.config import Config
from llama_vision.model.layers import (
    ONEDNN_PRODUCTS,
    GatedMLP,
    Linear,
    RMSNorm,
    attend,
    better_by_onednn,
    better_by_products,
    merge_heads,
    rotary_angles,
    rotary_frequencies,
    rotate,
    split_heads,
)

TEXT = Config.from_directory(TINY).text
FREQUENCIES = rotary_frequencies(TEXT, torch.device("cpu"))


def golden(name: str) -> torch.Tensor:
    return golden_tensors("modules")[f"rope.{name}"]


def test_rotary_frequencies_are_the_reference_s():
    ratio = rotary_frequencies(TEXT, torch.device("cpu")) / golden("inv_freq")
    assert_close("inv_freq", ratio, torch.ones_like(ratio), 1e-6)


def test_rotary_angles_are_the_reference_s():
    cos, sin = rotary_angles(FREQUENCIES, golden("positions")[None])
    assert cos.dtype == sin.dtype == torch.float32
    for half, name in zip((cos, sin), ("cos", "sin"), strict=True):
        first, second = half[0, 0].chunk(2, dim=-1)
        assert_close(name, second, golden(name), 1e-4)
        assert torch.equal(first, second if name == "cos" else -second)


def test_rotated_heads_are_the_reference_s():
    cos, sin = rotary_angles(FREQUENCIES, golden("positions")[None])
    out = rotate(golden("in").transpose(1, 2), cos, sin).transpose(1, 2)
    assert_close("rotate", out, golden("out"), 1e-4)


def test_only_distances_matter_after_rotation():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, TEXT.head_dim)

    def score(query_at, key_at):
        turned = [
            rotate(x, *rotary_angles(FREQUENCIES, torch.tensor([[at]])))
            for x, at in ((q, query_at), (k, key_at))
        ]
        return (turned[0] * turned[1]).sum()

    assert_close("shifted", score(9, 4), score(109, 104), 1e-4)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3


def test_rotation_is_computed_in_float32_and_keeps_the_type():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 5, TEXT.head_dim)
    cos, sin = rotary_angles(FREQUENCIES, torch.arange(3000, 3005)[None])
    out = rotate(x.bfloat16(), cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, rotate(x.bfloat16().float(), cos, sin).bfloat16())


def test_rms_norm():
    torch.manual_seed(0)
    norm, x = RMSNorm(8, 1e-2), torch.randn(3, 8)
    torch.nn.init.normal_(norm.weight)
    expected = torch.stack([row / (row.square().sum() / 8 + 1e-2).sqrt() for row in x])
    assert_close("norm", norm(x), expected * norm.weight, 1e-6)


def test_rms_norm_rounds_before_its_weight():
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-5).bfloat16(), torch.randn(16, 64).bfloat16()
    torch.nn.init.normal_(norm.weight)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), scaled.bfloat16() * norm.weight)


def test_gated_mlp():
    torch.manual_seed(0)
    mlp, x = GatedMLP(6, 10), torch.randn(4, 6)
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * up) @ mlp.down_proj.weight.T
    assert_close("mlp", mlp(x), expected, 1e-6)


def test_heads_split_and_merge():
    x = torch.arange(24.0).view(1, 2, 12)
    heads = split_heads(x, 3)
    assert heads.shape == (1, 3, 2, 4)
    assert torch.equal(heads[0, 1, 0], x[0, 0, 4:8])
    assert torch.equal(merge_heads(heads), x)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (6, 3), (5, 1)])
@pytest.mark.parametrize(
    ("rows", "keys", "how"),
    [(5, 5, "causal"), (1, 1, "causal"), (4, 7, "full"), (4, 7, "mask"), (1, 7, "mask")],
)
def test_attention_equals_loops_over_heads_and_rows(heads, groups, rows, keys, how):
    torch.manual_seed(heads * rows)
    q, k, v = (torch.randn(2, n, s, 8) for n, s in ((heads, rows), (groups, keys), (groups, keys)))
    allowed = torch.ones(2, rows, keys, dtype=torch.bool)
    if how == "causal":
        allowed = allowed.tril()
    if how == "mask":
        allowed = torch.rand(2, rows, keys) < 0.5
        allowed[0, 0] = False  # a row that may look nowhere
    mask = allowed[:, None] if how == "mask" else None
    out = attend(q, k, v, mask=mask, causal=how == "causal")
    expected = [masked_attention(*sample) for sample in zip(q, k, v, allowed, strict=True)]
    assert_close("attend", out, torch.stack(expected), 1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_by_products_equals_torchs(heads, groups, dtype, tolerance):
    """Of several blocks of rows, the last one shorter; the same tensors, in part of longer ones."""
    torch.manual_seed(heads)
    shapes = ((heads, 700), (groups, 3000), (groups, 3000))
    q, k, v = (torch.randn(2, s, n, 16).to(dtype).transpose(1, 2) for n, s in shapes)
    k, v = k[:, :, :2001], v[:, :, :2001]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), enable_gqa=True
    )
    with torch.inference_mode():
        assert better_by_products(q, k)
        assert not better_by_products(q[:, :, :1], k)
        assert_close("attend", attend(q, k, v).float(), expected, tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (2, 300)])
def test_every_way_of_a_linear_layer_is_the_product(rows, bias):
    """Large enough for oneDNN and too small; with a gradient; as one compiled row."""
    torch.manual_seed(0)
    for width in (8, 1024):
        layer, x = Linear(width, width + 8, bias=bias), torch.randn(*rows, width)
        exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        with torch.inference_mode():
            large = x.numel() * (width + 8) >= ONEDNN_PRODUCTS
            assert better_by_onednn(x, x.numel() * len(layer.weight)) == large
            assert_close("inference", layer(x), exact.float(), 1e-5)
            if rows == (1, 1):
                assert_close("one row", layer._one_row(x), exact.float(), 1e-5)
                narrow = copy.deepcopy(layer).bfloat16()._one_row(x.bfloat16())
                assert_close("bfloat16", narrow.float(), exact.float(), 0.05)
        x.requires_grad_()
        layer(x).sum().backward()
        assert_close("gradient", x.grad, layer.weight.sum(0).expand_as(x), 1e-5)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
def test_a_large_linear_layer_compiles_into_one_graph(rows):
    """Several rows go through the very product that they go through otherwise."""
    torch.manual_seed(0)
    layer, x = Linear(1024, 1032, bias=False), torch.randn(rows, 1, 1024)
    options = {"cpp_wrapper": True}
    with torch.inference_mode():
        compiled = torch.compile(layer, dynamic=True, fullgraph=True, options=options)
        assert_close("compiled", compiled(x), layer(x), 1e-5 if rows == 1 else 0)


def test_tokens_that_are_no_copy_of_their_own_go_through_onednn_alike():
    """Some rows of a batch, as the projector is given them."""
    torch.manual_seed(0)
    layer, x = Linear(512, 1024), torch.randn(3, 40, 512)
    with torch.inference_mode():
        assert better_by_onednn(x[:, 5:35], 30 * layer.weight.numel())
        assert torch.equal(layer(x[:, 5:35]), layer(x[:, 5:35].contiguous()))
