"""One step of all slots says what a prefill of each row says, compiled or not."""

import random

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from conftest import (
    CASES,
    Conversation,
    assert_close,
    case_inputs,
    case_prompts,
    decode,
    needs_compiler,
    new_cache,
)
from oracle import random_config, random_model

from llama_vision import LastQuery, LlamaVision, TrimmedLlama
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.main import main
from llama_vision.engine import capture
from llama_vision.engine import decode as decoding
from llama_vision.engine.decode import Decoder

GREEDY = {"temperature": 0, "ignore_stop": True}
PRUNERS = {
    "none": None,
    "trimmed": TrimmedLlama(0.1),
    "first layer whole": TrimmedLlama(0.1, trim_first_layer=False),
    "last": LastQuery(5),
}


def process_settings():
    """What of torch is the same for all code of this process."""
    return (
        torch._dynamo.config.get_config_copy(),
        torch._inductor.config.get_config_copy(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )


UNTOUCHED = process_settings()


@pytest.fixture(params=["as written", "fixed shapes"])
def make_decoder(request, monkeypatch):
    """Decoders; those that would compile run the same step in the shapes of a compiled one."""
    monkeypatch.setattr(decoding, "BUCKET", 3)
    monkeypatch.setattr(decoding, "compiled_step", lambda _: decoding.decode_step)
    fixed = request.param == "fixed shapes"
    return lambda model, cache: Decoder(model, cache, compiled=fixed)


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(12))
def test_a_step_gives_the_logits_of_a_prefill(make_decoder, seed, pruner):
    """Slots of other lengths and images, some empty; others take part in every step."""
    draw, config = random.Random(seed), random_config(seed)
    model, slots = random_model(config, seed), draw.randint(1, 5)
    caches = [new_cache(model, slots) for _ in range(2)]
    prefilled, stepped = (
        [Conversation(model, cache, slot) for slot in range(slots)] for cache in caches
    )
    taken = draw.sample(range(slots), draw.randint(1, slots))
    for slot in taken:
        turn = prefilled[slot].random_turn(draw)
        for said in (prefilled[slot], stepped[slot]):
            said.go_on(*turn, pruner=pruner)
    decoder = make_decoder(model, caches[1])
    for _ in range(8):
        tokens = {
            slot: draw.randrange(config.text.vocab_size)
            for slot in sorted(draw.sample(taken, draw.randint(1, len(taken))))
        }
        decode(decoder, {stepped[slot]: token for slot, token in tokens.items()})
        for slot, token in tokens.items():
            prefilled[slot].go_on([token])
            got, expected = (said[slot].logits[-1] for said in (stepped, prefilled))
            assert_close(f"slot {slot}", got, expected, 1e-5)
        assert caches[1].text.lengths == caches[0].text.lengths
    for slot in taken:  # idle slots lost nothing: their next rows read all that they hold
        assert_close("after", stepped[slot].go_on([1, 2]), prefilled[slot].go_on([1, 2]), 1e-5)


def test_a_full_slot_can_be_idle_beside_others(make_decoder, tiny):
    """Its last row is lost, which no row will read any more; the others' and its first stay."""
    cache = new_cache(tiny.model, 3, text=12)
    full, other = Conversation(tiny.model, cache, 0), Conversation(tiny.model, cache, 2)
    full.go_on(list(range(12)))
    other.go_on([5, 6])
    decoder, fresh = make_decoder(tiny.model, cache), Conversation(tiny.model)
    fresh.go_on([5, 6])
    for token in (7, 8, 9):
        decode(decoder, {other: token})
        assert_close("other", other.logits[-1], fresh.go_on([token]), 1e-5)
    with pytest.raises(ValueError, match="the text cache holds 12 tokens and 13 are needed"):
        decoder.step({2: 1, 0: 1})
    assert cache.text.lengths == [12, 0, 5], "an error must change nothing"
    cache.rewind(0, 11)
    assert_close("rewound", full.go_on([11]), full.logits[0][-1:], 1e-5)


def test_all_cases_side_by_side_equal_each_alone(make_decoder, tiny):
    """Other lengths, none to three images; then three more rows for each."""
    inputs = [prompt for case in CASES for prompt in case_inputs(case)]
    cache = new_cache(tiny.model, len(inputs))
    slots = [Conversation(tiny.model, cache, slot) for slot in range(len(inputs))]
    decoder = make_decoder(tiny.model, cache)
    for said, (ids, images) in zip(slots, inputs, strict=True):
        said.go_on(ids, images)
    for token in (3, 1, 4):
        decode(decoder, dict.fromkeys(slots, token))
    for said, (ids, images) in zip(slots, inputs, strict=True):
        expected = Conversation(tiny.model).go_on([*ids, 3, 1, 4], images)
        assert_close(f"slot {said.slot}", torch.cat(said.logits), expected, 1e-5)


@needs_compiler
def test_compiled_steps_answer_alike_and_are_compiled_once(tiny, monkeypatch):
    """After a first run of a kind, no length, image, or number of kept tokens compiles anew.

    Kinds are: one slot or several, with or without images. Answers go over several buckets.
    """
    monkeypatch.setattr(decoding, "BUCKET", 16)
    alone, several, text = map(case_prompts, ("image_first", "batch_ragged", "text_only"))
    kept = {"pruner": TrimmedLlama(0.3), "visual_budget": 0.5}
    settings = {"max_new_tokens": 5, "compiled": True, **GREEDY}
    for prompts in (alone, several, text, text * 2):
        # As many tokens as a head is wide: a size that is one of the model's own by chance only.
        tiny.generate(prompts, pruner=TrimmedLlama(0.3), visual_budget=16, **settings)
    assert process_settings() == UNTOUCHED
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for prompts in (alone, case_prompts("two_images"), several, several * 2, text, text * 3):
            for trimmed in ({}, {"pruner": TrimmedLlama(0.2)}, kept):
                plain = tiny.generate(prompts, max_new_tokens=40, **GREEDY, **trimmed)
                for count in (4, 9, 40):
                    settings |= {"max_new_tokens": count}
                    compiled = tiny.generate(prompts, **settings, **trimmed)
                    assert [a.token_ids for a in compiled] == [a.token_ids[:count] for a in plain]
    finally:
        torch.compiler.set_stance("default")


def test_what_cannot_be_compiled_is_one_line(monkeypatch, capsys):
    def fail(*_):
        raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    capture.compiled.cache_clear()
    picture = str(EMBEDDED_MODEL / "examples" / "sign.png")
    try:
        assert main(["--image", picture, "--prompt", "What does it say?", "--compile"]) == 2
    finally:
        capture.compiled.cache_clear()
    message = capsys.readouterr().err
    assert "decoding cannot be compiled here (no compiler); --compile" in message
    assert message.count("\n") == 1


def test_a_missing_compiler_is_told_before_anything_is_loaded(monkeypatch, capsys, tmp_path):
    capture.check_compiler.cache_clear()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(LlamaVision, "load_weights", None)
    torch.compiler.reset()
    try:
        with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
            assert main(["--prompt", "What does it say?", "--compile", "--device", "cpu"]) == 2
    finally:
        capture.check_compiler.cache_clear()
        torch.compiler.reset()
    message = capsys.readouterr().err
    assert "decoding cannot be compiled here" in message
    assert "C++ compiler" in message
    assert message.count("\n") == 1
