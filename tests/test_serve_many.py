"""Many at once, those who go away, and what fails: the others get what they would alone."""

import asyncio
import random
import resource
import time
from itertools import groupby

import openai
import pytest
from serving import LENGTH, NAME, asking, data_uri, serving, small_uri

from llama_vision.serve.bodies import Reader

QUESTION = asking("What is this?", data_uri())
LONG = asking("What is this?")  # greedy, it goes on for more than 300 tokens


def test_a_late_request_joins_those_that_run(tiny, monkeypatch):
    with serving(tiny) as client:
        worker, running = client.server.worker, []
        step = worker.engine.step

        def noting():
            while len(running) == 20 and 2 not in running and worker.inbox.empty():
                time.sleep(0.001)  # until the late one comes
            stepped = step()
            running.append(len(worker.engine.slots.running))
            return stepped

        monkeypatch.setattr(worker.engine, "step", noting)
        long = client.ask(LONG, temperature=0, stream=True)
        texts = [next(long).choices[0].delta.content for _ in range(3)]
        assert client.ask(QUESTION, max_tokens=5, seed=0).usage.completion_tokens == 5
        texts += [chunk.choices[0].delta.content or "" for chunk in long]
        client.until_idle()
    want = tiny.generate(LONG, temperature=0, max_new_tokens=LENGTH, max_seq_len=LENGTH)
    assert "".join(texts) == want.text
    assert [count for count, _ in groupby(running)] == [1, 2, 1, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot_and_the_queue(tiny, stream):
    with serving(tiny, slots=1) as client:
        body = {"model": NAME, "messages": LONG, "temperature": 0, "stream": stream}
        running, waiting = client.send(body), client.send(body)
        client.until(slots_in_use=1, queue_length=1)
        waiting.close()
        client.until(slots_in_use=1, queue_length=0)
        running.close()
        metrics = client.until_idle()
        assert metrics['requests_finished_total{reason="cancelled"}'] == 2
        assert client.ask(asking("hi"), temperature=0).choices[0].finish_reason == "stop"


def failing(reader_read, fail):
    """`Reader.read`, where seed 13 fails by `fail`, a logits processor."""

    def read(self, data):
        question = reader_read(self, data)
        if question.samples[0].seed == 13:
            question.samples[0] = question.samples[0].but(logits_processors=[fail])
        return question

    return read


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 4])
def test_what_fails_fails_alone(tiny, monkeypatch, stream, after):
    calls = []

    def fail(logits):
        calls.append(0)
        if len(calls) > after:
            raise RuntimeError("broken")
        return logits

    monkeypatch.setattr(Reader, "read", failing(Reader.read, fail))
    with serving(tiny) as client:
        long = client.ask(LONG, temperature=0, max_tokens=200, stream=True)
        next(long)
        with pytest.raises(openai.APIError, match="broken") as failed:
            list(client.ask(asking("abc"), seed=13, temperature=1, stream=stream))
        if not (stream and after):
            assert failed.value.status_code == 500
        want = tiny.generate(LONG, temperature=0, max_new_tokens=200)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in long) == want.text
        assert client.until_idle()['requests_finished_total{reason="error"}'] == 1


def test_a_fault_ends_what_runs_and_the_server_goes_on(tiny, monkeypatch, capfd):
    with serving(tiny) as client:
        engine = client.server.worker.engine
        step, left = engine.step, [5]

        def break_once():
            left[0] -= 1
            if not left[0]:
                raise RuntimeError("secret of the machine")
            return step()

        monkeypatch.setattr(engine, "step", break_once)
        response = client.post({"model": NAME, "messages": LONG, "temperature": 0})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert client.ask(asking("hi"), temperature=0).choices[0].finish_reason == "stop"
        client.until_idle()
    assert "secret of the machine" in capfd.readouterr().err


def test_two_hundred_at_once_through_four_slots(tiny):
    """Seeded: a third goes away, at once or after some chunks; the others get what they ask for."""
    draw = random.Random(0)
    cases = [random_case(draw) for _ in range(200)]
    with serving(tiny, slots=4) as client:
        peaks = []
        for part in (cases[:100], cases[100:]):
            answers = asyncio.run(ask_all(client.url, part))
            metrics = client.until_idle()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            for (messages, fields, leaves), text in zip(part, answers, strict=True):
                if leaves is None:
                    settings = {**fields, "max_new_tokens": fields["max_tokens"]}
                    del settings["max_tokens"]
                    assert text == tiny.generate(messages, **settings).text
        ended = {name: n for name, n in metrics.items() if name.startswith("requests_finished")}
        assert sum(ended.values()) <= 200
        assert ended['requests_finished_total{reason="error"}'] == 0
        assert ended['requests_finished_total{reason="cancelled"}'] > 0
    assert peaks[1] - peaks[0] < 64 * 1024  # KiB


def random_case(draw):
    """Messages, settings, and after how many chunks or milliseconds the client goes away."""
    urls = [
        small_uri(draw.choice(["red", "blue", "white"])) for _ in range(draw.choice([0, 0, 1, 2]))
    ]
    messages = asking(draw.choice(["hi", "What is this?", "abc"]) * draw.randint(1, 9), *urls)
    fields = {"seed": draw.randrange(100), "temperature": 1, "max_tokens": draw.randint(1, 40)}
    return messages, fields, draw.randint(0, 12) if draw.random() < 0.34 else None


async def ask_all(url, cases):
    """All at once; the texts, None of those who went away."""
    async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def ask(number, messages, fields, leaves):
            create = client.chat.completions.create
            if leaves is not None and number % 2:
                whole = create(model=NAME, messages=messages, **fields)
                try:
                    await asyncio.wait_for(whole, leaves * 0.05)
                except asyncio.TimeoutError:
                    return None
            text = ""
            stream = await create(model=NAME, messages=messages, stream=True, **fields)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if leaves is not None:
                    leaves -= 1
                    if leaves < 0:
                        await stream.close()
                        return None
            return text

        return await asyncio.gather(*(ask(number, *case) for number, case in enumerate(cases)))
