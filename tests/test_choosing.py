"""What the settings of a request make of the logits, and what ends its answer."""

import pytest
import torch
from conftest import assert_same, case_prompts

from llama_vision import Engine, LlamaVision, Prompt
from llama_vision.engine.answer_text import AnswerText
from llama_vision.engine.choose import LogitsError, penalise
from llama_vision.engine.sampling import Sampling
from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.inputs.vocabulary import PlainBytes, TokenizerError

GREEDY = {"temperature": 0, "ignore_stop": True}
NAN, INF = float("nan"), float("inf")


def next_logits(model, ids):
    return model.logits(Prompt(ids))[-1]


# Repetition penalty


@pytest.mark.parametrize("penalty", [0.5, 1.3, 4.0])
def test_the_penalty_is_that_of_transformers(penalty):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([0, 3, 17, 49])
    peer = processors.RepetitionPenaltyLogitsProcessor(penalty)
    assert torch.equal(penalise(logits, seen, penalty), peer(seen[None], logits[None].clone())[0])


@pytest.mark.parametrize("min_p", [0.01, 0.2, 0.9, 1.0])
def test_min_p_leaves_out_what_transformers_leaves_out(min_p):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    left = processors.MinPLogitsWarper(min_p)(None, logits.clone())[0].isfinite()
    sampling, generator = Sampling(1.0, min_p=min_p), torch.Generator().manual_seed(0)
    drawn = sampling.choose(logits.expand(20_000, -1), [generator] * 20_000)
    often = drawn.bincount(minlength=50) / 20_000
    expected = logits[0].masked_fill(~left, -INF).softmax(-1)
    assert torch.equal(often > 0, (expected > 2e-4) & left | (often > 0) & left)
    assert (often - expected).abs().max() < 0.02


def test_tokens_of_prompt_and_answer_are_penalised_at_every_step(tiny):
    prompt, penalty = Prompt([256, 10, 11, 12, 10]), 1.7
    got = tiny.generate(prompt, max_new_tokens=12, repetition_penalty=penalty, **GREEDY)
    ids = list(prompt.token_ids)
    for token, logprob in zip(got.token_ids, got.logprobs, strict=True):
        logits = next_logits(tiny, ids)
        assert token == penalise(logits, torch.tensor(sorted(set(ids))), penalty).argmax()
        assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
        ids.append(token)
    assert got.token_ids != tiny.generate(prompt, max_new_tokens=12, **GREEDY).token_ids


def test_a_conversation_is_penalised_from_its_beginning(tiny):
    first, more = Prompt([256, 10, 11, 12]), Prompt([13, 14])
    settings = {**GREEDY, "repetition_penalty": 1.7, "max_new_tokens": 6}
    engine = Engine(tiny, max_seq_len=64)
    begun = engine.submit(first, hold=True, **settings)
    (answer,) = engine.run(begun)
    (turn,) = engine.run(engine.submit(more, after=begun, **settings))
    whole = Prompt([*first.token_ids, *answer.token_ids, *more.token_ids])
    assert turn.token_ids == tiny.generate(whole, **settings).token_ids


def test_pictures_are_not_penalised(tiny):
    prompts = case_prompts("batch_ragged")
    alone = [tiny.generate(p, max_new_tokens=5, repetition_penalty=1.5, **GREEDY) for p in prompts]
    together = tiny.generate(prompts, max_new_tokens=5, repetition_penalty=1.5, **GREEDY)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)


# Logits processors


def test_processors_choose_in_order_and_each_request_has_its_own(tiny):
    def only(*ids):
        def processor(logits):
            allowed = torch.full_like(logits, -INF)
            allowed[list(ids)] = logits[list(ids)]
            return allowed

        return processor

    prompt, engine = Prompt([256, 10, 11]), Engine(tiny, slots=3, max_seq_len=32)
    settings = {**GREEDY, "max_new_tokens": 6}
    requests = [
        engine.submit(prompt, **settings),
        engine.submit(prompt, logits_processors=[only(5, 6, 7), only(6, 7)], **settings),
        engine.submit(prompt, logits_processors=(only(9),), **settings),
    ]
    plain, two, one = engine.run(*requests)
    assert_same(plain, tiny.generate(prompt, **settings))
    assert set(two.token_ids) <= {6, 7}
    assert one.token_ids == [9] * 6
    logits = next_logits(tiny, [256, 10, 11])
    assert one.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[9]), abs=1e-4)


def fails(logits):
    raise ZeroDivisionError("of nothing")


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        (fails, "logits processor fails raised ZeroDivisionError: of nothing"),
        (lambda logits: None, "returned None; expected a tensor of floats .vocabulary. = .512."),
        (lambda logits: logits[:-1], r"returned a Tensor torch.float32 \[511\]; expected"),
        (lambda logits: logits[None], r"returned a Tensor torch.float32 \[1, 512\]; expected"),
        (lambda logits: logits > 0, r"returned a Tensor torch.bool \[512\]; expected"),
        (lambda logits: logits.to("meta"), "returned a Tensor torch.float32"),
        (lambda logits: logits.to_sparse(), "returned a Tensor torch.float32"),
        (lambda logits: logits.tolist(), r"returned \[.*; expected a tensor"),
        (lambda logits: logits.numpy(), r"returned a ndarray float32 \[512\]; expected a tensor"),
        (lambda logits: logits * NAN, r"returned NaN, \+inf, or -inf for every token"),
        (lambda logits: logits - INF, r"returned NaN, \+inf, or -inf for every token"),
        (lambda logits: logits.index_fill(0, torch.tensor([3]), INF), r"returned NaN, \+inf"),
    ],
    ids=lambda value: "" if callable(value) else value[:40],
)
def test_a_processor_that_fails_ends_its_own_request(tiny, processor, says):
    engine, calls = Engine(tiny, slots=2, max_seq_len=32), []

    def late(logits):
        calls.append(logits)
        return logits if len(calls) < 3 else processor(logits)

    late.__name__ = getattr(processor, "__name__", "late")
    good = engine.submit(Prompt([256, 10]), max_new_tokens=6, **GREEDY)
    bad = engine.submit(Prompt([256, 11]), max_new_tokens=6, logits_processors=[late], **GREEDY)
    with pytest.raises(LogitsError, match=says):
        engine.run(good, bad)
    assert bad.finish_reason == "interrupted"
    assert len(bad.token_ids) == 2
    assert_same(engine.run(good)[0], tiny.generate(good.prompt, max_new_tokens=6, **GREEDY))
    assert engine.slots.held == {}


def test_a_processor_cannot_change_what_it_is_shown(tiny):
    def zero(logits):
        answer = logits.clone()
        logits.zero_()
        return answer

    prompt = Prompt([256, 10])
    got = tiny.generate(prompt, max_new_tokens=4, logits_processors=[zero], **GREEDY)
    assert got == tiny.generate(prompt, max_new_tokens=4, **GREEDY)


# Log-probabilities of the likeliest


def test_the_likeliest_tokens_are_noted_with_their_log_probabilities(tiny):
    ids = [256, 10, 11]
    got = tiny.generate(Prompt(ids), max_new_tokens=5, top_logprobs=4, **GREEDY)
    plain = tiny.generate(Prompt(ids), max_new_tokens=5, **GREEDY)
    assert plain.top_logprobs == [[]] * 5
    assert got.token_ids == plain.token_ids
    for token, top in zip(got.token_ids, got.top_logprobs, strict=True):
        logprobs, likeliest = next_logits(tiny, ids).log_softmax(-1).topk(4)
        assert [one.id for one in top] == likeliest.tolist()
        assert [one.logprob for one in top] == pytest.approx(logprobs.tolist(), abs=1e-4)
        ids.append(token)
    (all_of_them,) = tiny.generate(Prompt([1]), max_new_tokens=1, top_logprobs=999).top_logprobs
    assert len(all_of_them) == 512


# Logits that are not finite


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logits_that_are_not_finite_end_the_answer_and_name_the_weight(tiny_copy, value):
    weight = tiny_copy.model.text.lm_head.weight
    prompt = Prompt([256, 10])
    tiny_copy.generate(prompt, max_new_tokens=2, **GREEDY)
    weight.data[7, 3] = value
    says = "the logits are not finite, for text.lm_head.weight is not"
    for run in (tiny_copy.generate, tiny_copy.logits):
        with pytest.raises(LogitsError, match=says):
            run(prompt)
    weight.data[7, 3] = 0
    assert tiny_copy.generate(prompt, max_new_tokens=2, **GREEDY).finish_reason == "length"


def test_logits_beyond_the_type_name_the_type(tiny_copy):
    tiny_copy.model = tiny_copy.model.half()
    tiny_copy.model.text.norm.weight.data.fill_(6e4)
    tiny_copy.model.text.lm_head.weight.data.fill_(6e4)
    with pytest.raises(LogitsError, match=r"not finite in float16, though .* use bfloat16"):
        tiny_copy.generate(Prompt([256, 10]))


@pytest.fixture
def tiny_copy(tiny):
    """The tiny checkpoint with weights of its own, to be written over."""
    copy = LlamaVision.from_pretrained(tiny.outline.directory, device="cpu")
    return copy


# What ends an answer


def bytes_tokenizer():
    return Tokenizer(PlainBytes(), 256, 512)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("no end", ["x"], "no end"),
        ("héé!", ["é!"], "hé"),
        ("x", ["x"], ""),
        ("almost sto", ["stop"], "almost sto"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("abcd", ["cd", "bc"], "a"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(text, stop, expected):
    answer, shown = AnswerText(bytes_tokenizer(), stop), ""
    for token in text.encode():  # a byte each, so that every border is tried
        if not answer.stopped:
            answer.add(token)
        assert answer.settled.startswith(shown)
        shown = answer.settled
        assert expected.startswith(shown)
    answer.end()
    assert answer.settled == answer.text == expected
    assert answer.stopped == (expected != text)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_stop_strings_end_answers_and_streams_alike(tiny, pieces):
    prompt, settings = case_prompts("text_only")[0], {**GREEDY, "max_new_tokens": 24}
    whole = tiny.generate(prompt, **settings)
    stop = whole.text[pieces : 2 * pieces + 1]
    expected = whole.text[: whole.text.index(stop)]
    got = tiny.generate(prompt, stop=["never in it", stop], **settings)
    assert got.text == expected == "".join(tiny.stream(prompt, stop=stop, **settings))
    assert got.finish_reason == "stop"
    assert got.token_ids == whole.token_ids[: len(got.token_ids)]
    assert len(got.token_ids) < 24
    beside = tiny.generate([prompt, prompt, Prompt([1, 2])], stop=[stop], **settings)
    assert [answer.text for answer in beside[:2]] == [expected] * 2


def test_stop_strings_need_a_tokenizer(tiny):
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        LlamaVision(tiny.model).generate(Prompt([1]), stop=["a"])


@pytest.mark.parametrize("name", ["<|eot_id|>", "<|eom_id|>"])
def test_a_turn_ends_whatever_the_checkpoint_leaves_out(tiny, name):
    model = LlamaVision(tiny.model, tiny.tokenizer, stop_ids=[5])
    token = tiny.tokenizer.special_ids[name]

    def choose(logits):
        return torch.zeros_like(logits).index_fill(0, torch.tensor([token]), 1.0)

    ways = {"temperature": 0, "logits_processors": [choose], "max_new_tokens": 4}
    answer = model.generate(Prompt([1]), **ways)
    assert (answer.token_ids, answer.finish_reason, answer.text) == ([token], "stop", "")
    assert len(model.generate(Prompt([1]), stop_ids=[5], **ways).token_ids) == 4


def test_an_image_is_never_drawn_where_the_head_has_a_row_for_it(tiny):
    """A vocabulary that fine-tuning extended past `<|image|>`."""
    engine = Engine(tiny, max_seq_len=32)
    request = engine.submit(Prompt([1]), max_new_tokens=3, **GREEDY)
    (plain,) = engine.run(request)
    request = engine.submit(Prompt([1]), max_new_tokens=3, **GREEDY)
    request.never = [plain.token_ids[0]]
    (other,) = engine.run(request)
    likeliest = next_logits(tiny, [1]).topk(2).indices.tolist()
    assert likeliest[0] == plain.token_ids[0]
    assert likeliest[1] == other.token_ids[0]
    assert plain.token_ids[0] not in other.token_ids


def test_errors_of_the_door_are_one_kind():
    assert issubclass(LogitsError, LlamaVisionError)
