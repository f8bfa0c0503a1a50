"""Every way to a product is the product, and the model is the reference's under each."""

import pytest
import torch
from conftest import assert_close, case_prompts, golden_tensors, needs_compiler

from llama_vision.model import kernels

WAYS = {"plain": kernels.PLAIN}
if torch.backends.mkldnn.is_available():
    WAYS["onednn"] = kernels.onednn


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_way_is_the_product(way, bias):
    """Of rows that are no copy of their own, too, as the projector is given them."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 40, 512)[:, 5:35], torch.randn(1024, 512)
    extra = torch.randn(1024) if bias else None
    expected = x.double() @ weight.double().T + (extra.double() if bias else 0)
    with torch.inference_mode():
        assert_close("product", way(x, weight, extra), expected.float(), 1e-3)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_model_is_the_reference_s_whichever_way_is_chosen(tiny, way, monkeypatch):
    used = []
    monkeypatch.setattr(kernels, "LARGE", 1)
    monkeypatch.setattr(kernels, "fastest", lambda: lambda *args: used.append(1) or way(*args))
    expected = golden_tensors("cases/two_images")["logits"]
    for sample, prompt in enumerate(case_prompts("two_images")):
        logits = tiny.logits(prompt)
        assert_close("two_images", logits, expected[sample, : len(logits)], 2e-4)
    assert used


def test_the_fastest_is_one_of_them():
    assert kernels.fastest() in WAYS.values()


@needs_compiler
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_code_has_the_product_too(rows, dtype, most):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, 256).to(dtype), torch.randn(264, 256).to(dtype)
    with torch.inference_mode():
        compiled = torch.compile(kernels.linear, dynamic=True, fullgraph=True)(x, weight)
        assert_close("compiled", compiled.float(), (x.float() @ weight.float().T), most)
