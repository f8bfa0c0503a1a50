import pytest
import torch

from llama_vision.engine.sampling import Sampling, sample
from llama_vision.errors import SettingError

DRAWS = 20_000
LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.2, 1.1, -30.0, 0.9])


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def random_logits(batch, vocabulary=50):
    return 3 * torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0))


def frequencies(sampling):
    """How often each token of LOGITS is drawn."""
    drawn = sampling.choose(LOGITS.expand(DRAWS, -1), generators(0) * DRAWS)
    return drawn.bincount(minlength=len(LOGITS)) / DRAWS


def exact(temperature=1.0, top_p=1.0, top_k=0):
    """The probabilities by definition: go through the tokens from the likeliest on."""
    probabilities = (LOGITS.double() / temperature).softmax(0).tolist()
    order = sorted(range(len(LOGITS)), key=lambda i: -probabilities[i])[: top_k or None]
    of_top_k = sum(probabilities[i] for i in order)
    kept, before = torch.zeros(len(LOGITS), dtype=torch.float64), 0.0
    for token in order:
        if before <= top_p:
            kept[token] = probabilities[token] / of_top_k
        before += probabilities[token] / of_top_k
    return kept / kept.sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.8, "top_k": 5},
        {"temperature": 1.0, "top_k": 100},
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should_be(settings):
    drawn, expected = frequencies(Sampling(**settings)), exact(**settings)
    assert (drawn[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((drawn - expected).abs() <= 4 * deviation + 1e-12).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 9},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-9},
        {"temperature": 1e-4},
    ],
    ids=str,
)
def test_these_settings_take_the_likeliest(settings):
    logits = random_logits(40)
    chosen = Sampling(**settings).choose(logits, generators(*range(40)))
    assert torch.equal(chosen, logits.argmax(-1))
    assert chosen.dtype == torch.int64


def test_a_seed_repeats_its_draws():
    def draw(seed):
        (generator,) = generators(seed)
        return [int(sampling.choose(logits[None], [generator])) for logits in random_logits(30)]

    sampling = Sampling(1.0, 0.95, 40)
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_row_draws_what_it_draws_alone_whatever_the_others_settings():
    logits = random_logits(12)
    ways = [Sampling(1.0, 0.9, 30), Sampling(), Sampling(0.7), Sampling(1.0, 0.9, 30)] * 3
    tokens, logprobs, finite = sample(logits, ways, generators(*range(12)))
    for row, (of_row, sampling) in enumerate(zip(logits.split(1), ways, strict=True)):
        alone, alone_logprobs, _ = sample(of_row, [sampling], generators(row))
        assert alone == tokens[row] == sampling.choose(of_row, generators(row))
        expected = float(of_row.log_softmax(-1)[0, tokens[row]])
        got = (float(logprobs[row]), float(alone_logprobs))
        assert got == pytest.approx((expected, expected), abs=1e-6)
    assert not torch.equal(tokens, logits.argmax(-1))
    assert finite.all()


def test_choosing_leaves_the_logits_as_they_were():
    logits = random_logits(3)
    before = logits.clone()
    Sampling(0.7, 0.5, 5).choose(logits, generators(1, 2, 3))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        Sampling(**settings)
