"""The server gives what `generate` gives, to OpenAI's client, to many at once."""

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch
from conftest import TINY
from serving import GOLDEN, LENGTH, NAME, PICTURES, asking, data_uri, serving, small_uri

from llama_vision import Completion, MaxMin, TrimmedLlama
from llama_vision.engine.image_cache import ImageCache
from llama_vision.serve.metrics import metrics_text

QUESTION = asking("What is this?", data_uri())
LONG = asking("What is this?")  # greedy, it goes on for more than 300 tokens


@pytest.fixture(scope="module")
def client(tiny):
    with serving(tiny) as client:
        yield client
        client.until_idle()


def check_answer(choice, usage, want: Completion, prompt) -> None:
    assert choice.message.content == want.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == want.finish_reason
    counts = (len(prompt.token_ids), len(want.token_ids))
    assert (usage.prompt_tokens, usage.completion_tokens) == counts
    assert usage.total_tokens == sum(counts)


@pytest.mark.parametrize(
    ("messages", "fields", "settings"),
    [
        (asking("hi"), {"temperature": 0}, {"temperature": 0}),
        (asking("hi"), {"seed": 5, "max_completion_tokens": 9}, {"seed": 5, "max_new_tokens": 9}),
        (QUESTION, {"seed": 7, "temperature": 1.0, "top_p": 0.8, "max_tokens": 40}, None),
        (asking("Which?", data_uri(), small_uri("red")), {"seed": 1, "max_tokens": 30}, None),
        (LONG, {"temperature": 0, "stop": "O$"}, {"temperature": 0, "stop": "O$"}),
        (LONG, {"temperature": 0, "stop": ["zzz", "1\x00"]}, None),
        (
            QUESTION,
            {"temperature": 0, "max_tokens": 20, "extra_body": {"keep": 0.5}},
            {"temperature": 0, "max_new_tokens": 20, "pruner": MaxMin(0.5, merge=True)},
        ),
        (
            QUESTION,
            {
                "seed": 3,
                "max_tokens": 20,
                "extra_body": {"k_ratio": 0.2, "top_k": 4, "min_p": 0.01},
            },
            {"seed": 3, "max_new_tokens": 20, "pruner": TrimmedLlama(0.2), "top_k": 4}
            | {"min_p": 0.01},
        ),
        (
            [
                {"role": "system", "content": "Be brief."},
                *QUESTION,
                {"role": "assistant", "content": "A house."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}],
                },
            ],
            {"seed": 2, "max_tokens": 50},
            None,
        ),
    ],
)
def test_an_answer_is_that_of_generate(client, tiny, messages, fields, settings):
    if settings is None:
        settings = {**fields, "max_new_tokens": fields.get("max_tokens", LENGTH)}
        settings.pop("max_tokens", None)
    settings = {"max_new_tokens": LENGTH, "max_seq_len": LENGTH, **settings}
    prompt = tiny.prompt(messages)
    want = tiny.generate(prompt, **settings)
    answer = client.ask(messages, **fields)
    check_answer(answer.choices[0], answer.usage, want, prompt)
    assert (answer.object, answer.model) == ("chat.completion", NAME)
    assert answer.choices[0].logprobs is None
    streamed = list(client.ask(messages, **fields, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == want.text
    assert streamed[-1].choices[0].finish_reason == want.finish_reason
    assert {chunk.object for chunk in streamed} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in streamed}) == 1


def test_a_stream_is_in_openais_form(client, tiny):
    fields = {"model": NAME, "messages": LONG, "temperature": 0, "stop": ["O$O"], "stream": True}
    fields |= {"stream_options": {"include_usage": True}}
    response = client.post(fields)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    *chunks, last = chunks
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    want = tiny.generate(LONG, temperature=0, stop=["O$O"], max_new_tokens=LENGTH)
    assert "".join(pieces) == want.text
    assert want.finish_reason == "stop"
    assert want.text.count("�") == "".join(pieces).count("�")
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    count = len(tiny.prompt(LONG).token_ids)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == count
    assert last["usage"]["completion_tokens"] == len(want.token_ids)


def test_log_probabilities_are_those_of_generate(client, tiny):
    fields = {"temperature": 1, "seed": 4, "max_tokens": 25, "logprobs": True, "top_logprobs": 3}
    want = tiny.generate(QUESTION, temperature=1, seed=4, max_new_tokens=25, top_logprobs=3)
    whole = client.ask(QUESTION, **fields).choices[0].logprobs.content
    streamed = [
        token
        for chunk in client.ask(QUESTION, **fields, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    data = [tiny.tokenizer.token_bytes(token, special=True) for token in want.token_ids]
    for content in (whole, streamed):
        assert [bytes(token.bytes) for token in content] == data
        assert [token.token for token in content] == [d.decode(errors="replace") for d in data]
        logprobs = torch.tensor([token.logprob for token in content])
        assert (logprobs - torch.tensor(want.logprobs)).abs().max() < 1e-4
        for token, likeliest in zip(content, want.top_logprobs, strict=True):
            shown = [tiny.tokenizer.token_bytes(id, special=True) for id, _ in likeliest]
            assert [bytes(top.bytes) for top in token.top_logprobs] == shown
            values = torch.tensor([top.logprob for top in token.top_logprobs])
            assert (values - torch.tensor([p for _, p in likeliest])).abs().max() < 1e-4
    without = client.ask(QUESTION, **fields | {"top_logprobs": None}).choices[0].logprobs.content
    assert all(token.top_logprobs == [] for token in without)


def test_samples_count_their_seeds(client, tiny):
    answer = client.ask(QUESTION, n=3, seed=10, temperature=1, max_tokens=12)
    alone = [
        tiny.generate(QUESTION, seed=10 + i, temperature=1, max_new_tokens=12) for i in range(3)
    ]
    assert [choice.message.content for choice in answer.choices] == [one.text for one in alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in alone)
    texts = ["", "", ""]
    for chunk in client.ask(QUESTION, n=3, seed=10, temperature=1, max_tokens=12, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [one.text for one in alone]


def test_what_open_webui_sends_is_answered(client, tiny):
    """It lists the models, streams the answer, and asks for a title; it resends what was said."""
    (model,) = client.http.get("/v1/models").json()["data"]
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}]
    body = {
        "stream": True,
        "model": model["id"],
        "messages": [{"role": "system", "content": "You help."}, *said, *QUESTION],
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "top_p": 0.9,
        "max_tokens": 10,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "seed": 0,
        "stop": ["<end>"],
        "user": {"name": "N", "id": "1", "email": "n@example.org", "role": "admin"},
    }
    events = client.post(body).text.split("\n\n")
    pieces = [json.loads(e.removeprefix("data: "))["choices"] for e in events[:-2]]
    text = "".join(c["delta"].get("content", "") for choices in pieces for c in choices)
    assert text == tiny.generate(body["messages"], temperature=0, max_new_tokens=10).text
    title = {"model": model["id"], "messages": said[:1], "stream": False, "max_tokens": 5}
    assert client.post(title | {"max_completion_tokens": None}).status_code == 200


def test_what_openais_client_and_langchain_send_is_answered(client):
    """A message that came as an answer goes back as it is, and null says nothing."""
    answer = client.ask(asking("hi"), temperature=0).choices[0].message
    more = [*asking("hi"), answer.model_dump(), {"role": "user", "content": "more", "name": "n"}]
    fields = {"n": 1, "user": "u", "metadata": {"a": "b"}, "store": False, "seed": None}
    fields |= {"service_tier": "auto", "parallel_tool_calls": True, "tools": [], "stop": None}
    fields |= {"response_format": {"type": "text"}, "tool_choice": "none", "stop": []}
    fields |= {"modalities": ["text"], "safety_identifier": "x", "prompt_cache_key": "y"}
    assert client.ask(more, max_tokens=3, **fields).choices[0].message.content is not None


def test_the_model_has_a_name(client):
    (model,) = client.openai.models.list()
    assert (model.id, model.object) == (NAME, "model")
    assert client.openai.models.retrieve(NAME).id == NAME
    for name in ("other", "a/b", ""):
        error = client.http.get(f"/v1/models/{name}")
        assert (error.status_code, error.json()["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.openai.chat.completions.create(model="gpt", messages=LONG)
    assert client.http.get("/health").json() == {"status": "ok"}


def test_metrics_count(tiny):
    with serving(tiny, slots=2) as client:
        answer = client.ask(QUESTION, n=2, max_tokens=4, seed=0)
        stopped = client.ask(asking("hi"), temperature=0)
        metrics = client.until_idle()
        prompts = 2 * answer.usage.prompt_tokens + stopped.usage.prompt_tokens
        made = answer.usage.completion_tokens + stopped.usage.completion_tokens
        cache = client.server.worker.engine.cache
        assert metrics == {
            "slots": 2,
            "slots_in_use": 0,
            "queue_length": 0,
            'requests_finished_total{reason="stop"}': 1,
            'requests_finished_total{reason="length"}': 2,
            'requests_finished_total{reason="cancelled"}': 0,
            'requests_finished_total{reason="error"}': 0,
            "prompt_tokens_total": prompts,
            "generated_tokens_total": made,
            "images_encoded_total": 1,  # for both samples
            "cache_bytes": cache.nbytes,
        }
        described = [
            line.split()[2]
            for line in metrics_text(client.server.worker).splitlines()
            if line[0] == "#"
        ]
        assert described[::2] == described[1::2]


def test_a_picture_may_be_fetched(tiny, monkeypatch):
    asked, data = [], (GOLDEN / "images" / "big_320x200.png").read_bytes()
    monkeypatch.setitem(PICTURES, "fetch", lambda url: asked.append(url) or data)
    with serving(tiny) as client:
        answer = client.ask(asking("What is this?", "http://b.example/a"), seed=1, max_tokens=9)
    assert (
        answer.choices[0].message.content == tiny.generate(QUESTION, seed=1, max_new_tokens=9).text
    )
    assert asked == ["http://b.example/a"]


def test_a_picture_that_was_asked_about_is_not_encoded_again(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "image_cache", ImageCache(2**24))
    with serving(tiny) as client:
        for _ in range(3):
            client.ask(QUESTION, max_tokens=2)
        assert client.metrics()["images_encoded_total"] == 1


def test_the_benchmark_of_a_late_request_runs():
    script = Path(__file__).parents[1] / "tools" / "bench" / "serve_latency.py"
    sizes = ["--new-tokens", "12", "--rounds", "1", "--threads", "1"]
    command = [sys.executable, str(script), str(TINY), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["seconds"].keys() == {"joins", "waits"}
    assert f"{document['ratio']:.1f} × as soon" in done.stdout
