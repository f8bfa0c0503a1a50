"""The face that people use: the reference's answers, and every prompt as if it were alone."""

import math

import pytest
import torch
from conftest import (
    CASES,
    assert_close,
    assert_same,
    case_images,
    case_prompts,
    golden_json,
    golden_tensors,
)

from llama_vision import LlamaVision, Prompt, TrimmedLlama
from llama_vision.errors import SettingError
from llama_vision.inputs.chat import PromptError, chat_prompt
from llama_vision.inputs.vocabulary import TokenizerError

GREEDY = {"temperature": 0, "ignore_stop": True}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "ignore_stop": True}


def golden_samples(case):
    return golden_json("manifest")["cases"][case]["samples"]


def all_prompts():
    return [prompt for case in CASES for prompt in case_prompts(case)]


# The reference's answers


@pytest.mark.parametrize("slots", [1, None])
@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_and_their_log_probabilities(tiny, case, slots):
    """Of the prompts of a case one after the other, and together."""
    tensors = golden_tensors(f"cases/{case}")
    completions = tiny.generate(case_prompts(case), slots=slots, max_new_tokens=16, **GREEDY)
    for number, (completion, facts) in enumerate(
        zip(completions, golden_samples(case), strict=True)
    ):
        stable = facts["stable_steps"]
        assert completion.token_ids[:stable] == facts["greedy"][:stable]
        logprobs = tensors[f"greedy_logits.{number}"][:stable].log_softmax(-1).max(-1).values
        assert_close(case, torch.tensor(completion.logprobs[:stable]), logprobs, 2e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_prompt(tiny, case):
    expected = golden_tensors(f"cases/{case}")["logits"]
    for sample, prompt in enumerate(case_prompts(case)):
        logits = tiny.logits(prompt)
        assert logits.dtype == torch.float32
        assert_close(case, logits, expected[sample, : len(prompt.token_ids)], 2e-4)


def test_generated_rows_see_what_the_last_row_of_the_prompt_sees(tiny):
    """With two images the reference's own generate() loses both; see the golden README."""
    (prompt,), (facts,) = case_prompts("two_images"), golden_samples("two_images")
    completion = tiny.generate(prompt, max_new_tokens=16, **GREEDY)
    assert completion.token_ids == facts["greedy"]
    assert completion.token_ids != facts["greedy_meta_literal"]


# Every prompt as if it were alone


@pytest.mark.parametrize("slots", [None, 3])
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_prompts_of_a_list_equal_each_alone(tiny, settings, slots):
    """All cases at once: none to three images, other lengths, other ends (many ids stop here)."""
    settings = {**settings, "ignore_stop": False, "max_new_tokens": 24}
    model = LlamaVision(tiny.model, tiny.tokenizer, stop_ids=range(300, 350))
    together = model.generate(all_prompts(), slots=slots, **settings)
    for i, (completion, prompt) in enumerate(zip(together, all_prompts(), strict=True)):
        own = {**settings, "seed": settings["seed"] + i} if "seed" in settings else settings
        assert_same(completion, model.generate(prompt, **own))
    assert {completion.finish_reason for completion in together} == {"stop", "length"}
    assert len({len(completion.token_ids) for completion in together}) > 2


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_log_probabilities_are_those_of_the_model_at_temperature_one(tiny, settings):
    settings = {**settings, "max_new_tokens": 6}
    if settings["temperature"]:
        settings["temperature"] = 0.6
    for prompt, completion in zip(
        all_prompts(), tiny.generate(all_prompts(), **settings), strict=True
    ):
        ids, new = list(prompt.token_ids), completion.token_ids
        logits = tiny.logits(Prompt([*ids, *new[:-1]], prompt.images))[len(ids) - 1 :]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
        assert_close("logprobs", torch.tensor(completion.logprobs), expected, 1e-4)


# Where it ends


def test_a_stop_token_ends_an_answer_and_not_its_neighbours(tiny):
    prompts = case_prompts("batch_ragged")
    first, second = tiny.generate(prompts, max_new_tokens=16, temperature=0)
    greedy = golden_samples("batch_ragged")[1]["greedy"]
    stop = next(i for i, token in enumerate(greedy) if token in tiny.stop_ids)
    assert second.token_ids == greedy[: stop + 1]
    assert second.finish_reason == "stop"
    assert len(second.logprobs) == len(second.token_ids)
    assert first.token_ids == golden_samples("batch_ragged")[0]["greedy"]
    assert first.finish_reason == "length"
    assert second.text == tiny.tokenizer.decode(greedy[:stop]), "it is not part of the text"


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_max_new_tokens(tiny, tokens):
    (prompt,) = case_prompts("bos_image")
    completion = tiny.generate(prompt, max_new_tokens=tokens, **GREEDY)
    assert completion.token_ids == golden_samples("bos_image")[0]["greedy"][:tokens]
    assert completion.finish_reason == "length"


def test_max_seq_len_counts_prompt_and_answer(tiny):
    prompts = case_prompts("batch")
    lengths = [len(prompt.token_ids) for prompt in prompts]
    most = max(lengths) + 2
    completions = tiny.generate(prompts, max_new_tokens=16, max_seq_len=most, **GREEDY)
    for completion, length, facts in zip(
        completions, lengths, golden_samples("batch"), strict=True
    ):
        assert completion.token_ids == facts["greedy"][: most - length]
        assert completion.finish_reason == "length"


# Sampling


def test_a_seed_repeats_a_completion(tiny):
    (prompt,) = case_prompts("image_first")
    once, again = (tiny.generate(prompt, max_new_tokens=12, **SAMPLED) for _ in range(2))
    other = tiny.generate(prompt, max_new_tokens=12, **{**SAMPLED, "seed": 8})
    assert once.token_ids == again.token_ids
    assert once.token_ids != other.token_ids


def test_without_a_seed_draws_differ(tiny):
    (prompt,) = case_prompts("image_first")
    settings = {"temperature": 5.0, "top_p": 1.0, "ignore_stop": True, "max_new_tokens": 24}
    once, again = (tiny.generate(prompt, **settings) for _ in range(2))
    assert once.token_ids != again.token_ids


def test_settings_left_out_are_those_of_the_checkpoint(tiny):
    (prompt,) = case_prompts("image_first")
    given = {"temperature": 0.6, "top_p": 0.9, "top_k": 0}
    default = tiny.generate(prompt, seed=3, max_new_tokens=12, ignore_stop=True)
    explicit = tiny.generate(prompt, seed=3, max_new_tokens=12, ignore_stop=True, **given)
    assert_same(default, explicit)
    greedy = LlamaVision(tiny.model).generate(prompt, max_new_tokens=12, ignore_stop=True)
    assert greedy.token_ids == golden_samples("image_first")[0]["greedy"][:12]


# Text


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_make_the_text(tiny, seed):
    (prompt,) = case_prompts("bos_image")
    settings = {"temperature": 1.5, "seed": seed, "ignore_stop": True, "max_new_tokens": 40}
    pieces = list(tiny.stream(prompt, **settings))
    assert len(pieces) > 2
    assert "".join(pieces) == tiny.generate(prompt, **settings).text != ""


def test_a_stream_of_messages_answers_their_prompt(tiny):
    image = case_prompts("bos_image")[0].images[0]
    messages = [{"role": "user", "content": [image, "What is this?"]}]
    settings = {"max_new_tokens": 20, **GREEDY}
    completion = tiny.generate(chat_prompt(messages, tiny.tokenizer), **settings)
    assert "".join(tiny.stream(messages, **settings)) == completion.text


def test_a_model_without_tokenizer_gives_ids_and_no_text(tiny):
    silent = LlamaVision(tiny.model)
    completion = silent.generate(case_prompts("bos_image")[0], max_new_tokens=3, **GREEDY)
    assert completion.token_ids == golden_samples("bos_image")[0]["greedy"][:3]
    assert completion.text == ""
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        next(silent.stream([{"role": "user", "content": "hi"}]))


# What it reports


def test_visual_tokens_are_counted(tiny):
    for prompt in all_prompts():
        completion = tiny.generate(prompt, max_new_tokens=1, **GREEDY)
        tiles = [len(image.pixels) for image in tiny.tile(prompt)]
        total = 17 * sum(tiles)
        assert completion.visual_tokens == (len(tiles) * 4 * 17, total, total)
        assert [tuple(mask.shape) for mask in completion.kept] == [(t, 17) for t in tiles]


def test_one_prompt_gives_one_completion_and_a_list_gives_a_list(tiny):
    (prompt,) = case_prompts("text_only")
    (listed,) = tiny.generate([prompt], max_new_tokens=2, **GREEDY)
    assert_same(listed, tiny.generate(prompt, max_new_tokens=2, **GREEDY))


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.25)], ids=["whole", "pruned"])
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_whatever_the_chunk(tiny, case, pruner):
    settings = {"max_new_tokens": 8, "pruner": pruner, **GREEDY}
    whole, *others = (
        [c.token_ids for c in tiny.generate(case_prompts(case), prefill_chunk=n, **settings)]
        for n in (2048, 1, 7)
    )
    assert others == [whole] * 2


def test_pictures_of_fewer_tiles_and_those_cut_up_already(tiny):
    """A picture that is cut up stays as it is."""
    (prompt,), (whole,) = case_prompts("image_first"), case_images("image_first")
    for tiles in (1, 2, 4):
        settings = {"max_new_tokens": 3, "max_tiles": tiles, **GREEDY}
        want = tiny.generate(prompt, **settings)
        assert want.visual_tokens.valid == 17 * tiles
        cut_up = Prompt(prompt.token_ids, tiny.tile(prompt, tiles))
        assert_same(tiny.generate(cut_up, max_new_tokens=3, **GREEDY), want)
        got = tiny.generate(Prompt(prompt.token_ids, whole), **settings)
        assert got.visual_tokens.valid == 68


# What it refuses


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Prompt([]), "prompt is empty"),
        (Prompt([1, 513]), "token id 513 is out of range; expected 0 to 512"),
        (Prompt([-1]), "token id -1 is out of range"),
        (Prompt([512, 1]), r"has 1 <\|image\|> ids .* and 0 images"),
        (Prompt([1, 2], case_prompts("bos_image")[0].images), r"has 0 <\|image\|> ids"),
    ],
    ids=["empty", "too large", "negative", "too few images", "too many images"],
)
def test_inconsistent_prompts_are_refused(tiny, prompt, says):
    with pytest.raises(PromptError, match=says):
        tiny.generate(prompt)
    with pytest.raises(PromptError, match=says):
        tiny.logits(prompt)


def test_no_prompt_and_too_long_ones_are_refused(tiny):
    with pytest.raises(PromptError, match="no prompt"):
        tiny.generate([])
    with pytest.raises(PromptError, match=r"10 tokens long and --max-seq-len \(max_seq_len\) is 8"):
        tiny.generate(Prompt([1] * 10), max_seq_len=8)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0; expected 1 or more"),
        ({"slots": 0}, "slots is 0; expected 1 to"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"max_seq_len": 10**9}, "max_seq_len is 1000000000; expected 1 to 131072"),
        ({"max_tiles": 0}, "max_tiles is 0; expected 1 or more"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(tiny, settings, says):
    with pytest.raises(SettingError, match=says):
        tiny.generate(case_prompts("bos_image")[0], **settings)
