"""The same answers on every device that this machine has; mostly that is the CPU alone."""

import pytest
import torch
from conftest import TINY, assert_close, case_prompts, golden_json, golden_tensors, needs_compiler

from llama_vision import LlamaVision, TrimmedLlama

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")


@pytest.fixture(scope="module", params=DEVICES)
def model(request) -> LlamaVision:
    return LlamaVision.from_pretrained(TINY, device=request.param)


@pytest.mark.parametrize("case", ["batch_ragged", "two_images", "text_only"])
def test_a_batch_gives_the_reference_s_tokens(model, case):
    samples = golden_json("manifest")["cases"][case]["samples"]
    completions = model.generate(
        case_prompts(case), max_new_tokens=16, temperature=0, ignore_stop=True
    )
    for completion, sample in zip(completions, samples, strict=True):
        steps = sample["stable_steps"]
        assert completion.token_ids[:steps] == sample["greedy"][:steps]


@needs_compiler
def test_compiled_decoding_answers_alike(model):
    settings = {"max_new_tokens": 12, "temperature": 0, "ignore_stop": True}
    for case in ("image_first", "batch_ragged"):
        passes, steps = (
            model.generate(case_prompts(case), compiled=compiled, **settings)
            for compiled in (False, True)
        )
        assert [a.token_ids for a in passes] == [a.token_ids for a in steps]


def test_pruned_logits_are_the_reference_s(model):
    logits = model.logits(case_prompts("consecutive")[0], pruner=TrimmedLlama(0.25))
    golden = golden_tensors("trimmed/consecutive_0")["r0.25.prefill_logits"]
    assert_close("logits", logits.cpu(), golden, 2e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_and_within_its_budget(model, dtype):
    device = model.model.device.type
    half = LlamaVision.from_pretrained(TINY, device=device, dtype=dtype)
    prompt = case_prompts("two_images")[0]
    want, got = model.logits(prompt), half.logits(prompt)
    assert (got - want).norm() / want.norm() < 3e-2
    pruned = half.generate(
        [prompt, *case_prompts("batch")],
        max_new_tokens=8,
        temperature=0,
        pruner=TrimmedLlama(1.0),
        visual_budget=0.5,
    )
    for completion in pruned:
        assert 0 < completion.visual_tokens.kept <= completion.visual_tokens.valid / 2
