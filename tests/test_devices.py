"""The same answers on every device that this machine has; mostly that is the CPU alone."""

import pytest
import torch
from conftest import (
    CASES,
    TINY,
    assert_close,
    case_prompts,
    golden_json,
    golden_tensors,
    needs_compiler,
)

from llama_vision import Engine, LlamaVision, TrimmedLlama

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append("cuda")
if torch.backends.mps.is_available():
    DEVICES.append("mps")


@pytest.fixture(scope="module", params=DEVICES)
def model(request) -> LlamaVision:
    return LlamaVision.from_pretrained(TINY, device=request.param)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.25)], ids=["whole", "pruned"])
def test_an_engine_gives_the_reference_s_tokens(model, pruner, graphs):
    """All prompts through three slots, which are taken again and again."""
    manifest = golden_json("manifest")
    prompts, facts = [], []
    for case in CASES:
        prompts += case_prompts(case)
        facts += manifest["cases"][case]["samples"]
        if pruner is not None and case != "text_only":
            count = len(case_prompts(case))
            facts[-count:] = [manifest["trimmed"][f"{case}_{i}"]["0.25"] for i in range(count)]
    settings = {"max_new_tokens": 16, "temperature": 0, "ignore_stop": True, "pruner": pruner}
    completions = model.generate(prompts, slots=3, graphs=graphs, **settings)
    for completion, sample in zip(completions, facts, strict=True):
        steps = sample["stable_steps"]
        assert completion.token_ids[:steps] == sample["greedy"][:steps]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_decoding_answers_alike_with_graphs_and_compiled(model, compiled, monkeypatch):
    """Answers of several lengths, one after the other in an engine, over several buckets."""
    monkeypatch.setattr("llama_vision.engine.decode.BUCKET", 16)
    answers = []
    for graphs in (False, True):
        how = {"compiled": compiled and graphs, "graphs": graphs, "force": True}
        engine = Engine(model, slots=2, max_seq_len=80, **how)
        requests = [
            engine.submit(prompt, max_new_tokens=count, temperature=0, ignore_stop=True)
            for count in (4, 40)
            for case in ("image_first", "batch_ragged", "text_only")
            for prompt in case_prompts(case)
        ]
        answers.append([completion.token_ids for completion in engine.run(*requests)])
    assert answers[0] == answers[1]


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
