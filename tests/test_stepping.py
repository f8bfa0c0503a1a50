"""Steps of fixed shapes say what the ordinary passes say, compiled or not."""

import random

import pytest
import torch
from conftest import CASES, Conversation, Keep, assert_close, case_prompts, needs_compiler
from oracle import random_config, random_images, random_model

from llama_vision import LastQuery, LlamaVision, TrimmedLlama
from llama_vision.cli.main import main
from llama_vision.engine import decode as stepping
from llama_vision.engine.decode import Stepper

GREEDY = {"temperature": 0, "ignore_stop": True}
PRUNERS = {
    "none": None,
    "trimmed": TrimmedLlama(0.1),
    "first layer whole": TrimmedLlama(0.1, trim_first_layer=False),
    "last": LastQuery(5),
}


@pytest.fixture
def uncompiled(monkeypatch):
    """The same steps, run as they are written: fast enough for many cases."""
    monkeypatch.setattr(stepping, "compiled_step", lambda _: stepping.step)


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(12))
def test_a_step_gives_the_logits_of_a_pass(uncompiled, seed, pruner, monkeypatch):
    """Ragged batches, some without images; attention over several buckets."""
    monkeypatch.setattr(stepping, "BUCKET", 3)
    draw, config = random.Random(seed), random_config(seed)
    model = random_model(config, seed)
    batch = draw.randint(1, 4)
    passes, steps = Conversation(model, batch), Conversation(model, batch)
    turn = passes.random_turn(draw)
    passes.go_on(*turn, pruner)
    steps.go_on(*turn, pruner)
    stepper = Stepper(model, steps.cache)
    for number in range(6):
        ids = [draw.randrange(config.text.vocab_size) for _ in range(batch)]
        lengths = [int(sample != 1 or number < 2) for sample in range(batch)]
        rows = [[token] if length else [] for token, length in zip(ids, lengths, strict=True)]
        passes.go_on(rows)
        with torch.inference_mode():
            logits = stepper(ids, lengths)
        for sample, said in enumerate(passes.samples):
            if lengths[sample]:
                name = f"step {number}, sample {sample}"
                assert_close(name, logits[sample], said.logits[-1][0], 1e-5)
    assert steps.cache.position == passes.cache.position


def test_a_sample_whose_last_group_is_pruned_away_sees_nothing(uncompiled):
    """Only the first layer, which is left whole, still holds it."""
    config = random_config(0)
    model, image = random_model(config, 0), config.text.image_token_id
    images = random_images(config, 2, random.Random(0))
    counts = [len(picture.pixels) * config.vision.tokens_per_tile for picture in images]
    mask = torch.arange(sum(counts))[None] < counts[0]
    conversations = [Conversation(model, 1), Conversation(model, 1)]
    for conversation in conversations:
        conversation.go_on([[image, 1, image, 2]], [images], Keep(mask, trim_first_layer=False))
    conversations[0].go_on([[3]])
    with torch.inference_mode():
        logits = Stepper(model, conversations[1].cache)([3], [1])
    assert_close("logits", logits[0], conversations[0].samples[0].logits[-1][0], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_passes(uncompiled, tiny, case):
    prompts = case_prompts(case)
    passes, steps = (
        tiny.generate(prompts, max_new_tokens=8, compiled=compiled, **GREEDY)
        for compiled in (False, True)
    )
    assert [a.token_ids for a in passes] == [a.token_ids for a in steps]


def test_a_full_store_is_an_error_here_too(uncompiled, tiny):
    conversation = Conversation(tiny.model, 1, text=3)
    conversation.go_on([[1, 2]])
    stepper = Stepper(tiny.model, conversation.cache)
    with torch.inference_mode():
        stepper([3], [1])
        with pytest.raises(ValueError, match="the text cache holds 3 tokens and 4 are needed"):
            stepper([4], [1])


@needs_compiler
def test_compiled_steps_answer_alike_and_are_compiled_once(tiny, monkeypatch):
    """After a first run of a kind, no length, image, or number of kept tokens compiles anew.

    Kinds are: one sample, several, and one that sees no image. Answers go over several buckets.
    """
    monkeypatch.setattr(stepping, "BUCKET", 16)
    alone, several, without = map(case_prompts, ("image_first", "batch_ragged", "text_only"))
    kept = {"pruner": TrimmedLlama(0.3), "visual_budget": 0.5}
    settings = {"max_new_tokens": 5, "compiled": True, **GREEDY}
    for prompts in (alone, several, without):
        tiny.generate(prompts, **settings)
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for prompts in (alone, case_prompts("two_images"), several, several * 2, without):
            for trimmed in ({}, {"pruner": TrimmedLlama(0.2)}, kept):
                for count in (4, 9, 40):
                    settings |= {"max_new_tokens": count}
                    compiled = tiny.generate(prompts, **settings, **trimmed)
                    passes = tiny.generate(prompts, **{**settings, "compiled": False}, **trimmed)
                    assert [a.token_ids for a in compiled] == [a.token_ids for a in passes]
    finally:
        torch.compiler.set_stance("default")


def test_what_cannot_be_compiled_is_one_line(monkeypatch, capsys):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*_):
        raise TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr(stepping, "compiled_step", lambda _: fail)
    picture = str(main.__globals__["EMBEDDED_MODEL"] / "examples" / "sign.png")
    assert main(["--image", picture, "--prompt", "What does it say?", "--compile"]) == 2
    message = capsys.readouterr().err
    assert "decoding cannot be compiled here (no compiler); --compile" in message
    assert message.count("\n") == 1


def test_a_missing_compiler_is_told_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    stepping.check_compiler.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(LlamaVision, "load_weights", None)
    torch.compiler.reset()
    try:
        assert main(["--prompt", "What does it say?", "--compile", "--device", "cpu"]) == 2
    finally:
        stepping.check_compiler.cache_clear()
        torch.compiler.reset()
    message = capsys.readouterr().err
    assert "decoding cannot be compiled here" in message
    assert "C++ compiler" in message
    assert message.count("\n") == 1
