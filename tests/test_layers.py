import pytest
import torch
from conftest import TINY, assert_close, golden_tensors, live_bytes
from oracle import masked_attention

from llama_vision.checkpoint.config_json import read_config
from llama_vision.model.layers import (
    GatedMLP,
    RMSNorm,
    attention,
    attention_with_saliency,
    merge_heads,
    rotary_angles,
    rotary_frequencies,
    rotate,
    split_heads,
)

TEXT = read_config(TINY).text
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
        allowed[..., 2] = True  # every row may look somewhere
    mask = allowed[:, None] if how == "mask" else None
    out = attention(q, k, v, mask=mask, causal=how == "causal")
    expected = [masked_attention(*slot)[0] for slot in zip(q, k, v, allowed, strict=True)]
    assert_close("attention", out, torch.stack(expected), 1e-5)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "mask"])
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
def test_saliency_is_what_the_voting_rows_pay(heads, groups, rows, masked, monkeypatch):
    """In blocks of rows, the last one shorter."""
    monkeypatch.setattr("llama_vision.model.layers.SCORES_BYTES", 4 * heads * 50 * 6)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, s, 8) for n, s in ((heads, rows), (groups, 50), (groups, 50)))
    votes = torch.rand(1, rows)
    allowed = torch.rand(rows, 50) < 0.3 if masked else torch.ones(rows, 50, dtype=torch.bool)
    allowed[:, 2] = True
    expected, shares = masked_attention(q[0].double(), k[0].double(), v[0].double(), allowed)
    mask = allowed[None, None] if masked else None
    out, saliency = attention_with_saliency(q, k, v, votes, mask)
    assert saliency.dtype == torch.float32
    assert_close("out", out[0], expected, 1e-5)
    assert_close("saliency", saliency, (shares * votes[..., None]).sum(1), 1e-5)


@pytest.mark.parametrize(("heads", "groups", "rows"), [(32, 8, 256), (8, 2, 2048)])
def test_saliency_at_the_11b_s_widths_takes_little_memory(heads, groups, rows):
    """All heads; or a quarter of them, of a long text."""
    torch.manual_seed(0)
    q, k = torch.randn(1, heads, rows, 128), torch.randn(1, groups, 6404, 128)
    results = []
    votes = torch.ones(1, rows)
    live = live_bytes(lambda: results.append(attention_with_saliency(q, k, k, votes)))
    saliency = results[0][1]
    assert saliency.nbytes <= max(live) <= 64 * 2**20
    for head in (0, 5, heads - 1):
        expected = (q[0, head] @ k[0, head // 4].T / 128**0.5).softmax(-1).sum(0)
        assert ((saliency[head] - expected).abs() / expected).max() < 1e-4


def test_saliency_in_half_precision_is_summed_in_float32():
    """Scores are of the model's type, as everywhere; the sums of many rows are exact."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 3000, 8).bfloat16(), torch.randn(1, 2, 40, 8).bfloat16()
    repeated = k.repeat_interleave(2, 1).float()
    expected = (q.float() @ repeated.mT / 8**0.5).softmax(-1).sum(2)[0]
    out, saliency = attention_with_saliency(q, k, k, torch.ones(1, 3000))
    assert (out.dtype, saliency.dtype) == (torch.bfloat16, torch.float32)
    assert ((saliency - expected).abs() / expected).max() < 5e-3
