"""What the server refuses, in the form in which OpenAI says so."""

import base64
import json
import struct
import time
import zlib

import pytest
from serving import GOLDEN, NAME, asking, body, command, data_uri, paused, refused, serving

PICTURE = {"type": "image_url", "image_url": {"url": data_uri()}}


@pytest.fixture(scope="module")
def client(tiny):
    with serving(tiny, slots=1) as client:
        yield client
        client.until_idle()


@pytest.fixture(scope="module")
def commanded():
    """The command itself, with its own door for URLs."""
    with command("--allow-urls", "localhost,b.example", "--slots", "2") as (_, client):
        yield client


def says(*contents, role="user"):
    return body(messages=[{"role": role, "content": content} for content in contents])


def pictured(**picture):
    return says([{"type": "image_url", **picture}])


STRANGE = [
    True,
    5,
    -1,
    1.5,
    1e999,
    float("nan"),
    10**30,
    "",
    "x",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    [None],
]
FITTING = {
    "model": [],
    "messages": [],
    "stream": [True],
    "stream_options": [{}, {"a": 1}],
    "n": [5],
    "stop": ["x", []],
    "logprobs": [True],
    "top_logprobs": [],
    "temperature": [5, 1.5, 10**30],
    "top_p": [],
    "seed": [5],
    "max_tokens": [5],
    "max_completion_tokens": [5],
    "top_k": [5],
    "min_p": [],
    "repetition_penalty": [5, 1.5, 10**30],
    "max_tiles": [],
    "visual_budget": [5, 10**30],
    "k_ratio": [],
    "keep": [5, [1]],
    "pruner": [],
    "merge": [],
    "logit_bias": [{}],
    "tools": [[]],
    "functions": [[]],
}
"""Values of `STRANGE` that a field takes."""


@pytest.mark.parametrize("field", FITTING)
def test_values_of_wrong_kinds_are_refused(client, field):
    for value in STRANGE:
        fields = body(**{field: value})
        if field != "max_tokens" and field == "max_completion_tokens":
            del fields["max_tokens"]
        text = json.dumps(fields).encode()
        response = client.post(content=text)
        fits = any(type(value) is type(one) and value == one for one in FITTING[field])
        if not fits:
            refused(response, 404 if field == "model" else 400)
        elif value != 10**30:
            assert response.status_code == 200, (value, response.text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (body(tools=[{"type": "function"}]), "tools is"),
        (body(tool_choice="required"), "tool_choice is 'required', which is not supported"),
        (body(response_format={"type": "json_object"}), "response_format is"),
        (body(frequency_penalty=0.5), "frequency_penalty is 0.5"),
        (body(presence_penalty=-1), "presence_penalty is -1"),
        (body(logit_bias={"1": 5}), "logit_bias is"),
        (body(functions=[{}]), "functions is"),
        (body(modalities=["text", "audio"]), "modalities is"),
        (body(audio={"voice": "x"}), "audio is"),
        (body(prediction={}), "prediction is"),
        (body(reasoning_effort="high"), "reasoning_effort is"),
        (body(num_ctx=5), "there is no field num_ctx"),
        (body(tempreature=1), "there is no field tempreature; expected temperature"),
        (body(max_completion_tokens=2), "says max_new_tokens a second time"),
        (body(top_logprobs=2), "top_logprobs needs logprobs: true"),
        (body(logprobs=True, top_logprobs=21), "top_logprobs is 21; expected 0 to 20"),
        (body(n=17), "n is 17; expected 1 to 16"),
        (body(stop=["x"] * 17), "stop is"),
        (body(stop="x" * 1001), "stop is"),
        (body(keep=0.5, k_ratio=0.5), "leave out"),
        (body(stream=True, stream_options={"include_usage": 1}), "include_usage is 1"),
        ({"model": NAME}, "messages is None"),
        (says(), "the conversation is empty"),
        (says("hi", role="tool"), "role 'tool' is unknown"),
        (says("hi", role="\ud800"), "role '\\ud800' is unknown"),
        (says(""), "a user's message is empty"),
        (says([]), "a user's message is empty"),
        (says([{"type": "text", "text": ""}]), "a user's message is empty"),
        (says(None), "content is None"),
        (says("a\ud800"), "no UTF-8 or half of a character"),
        (says([PICTURE], role="system"), "a message of the system has a picture"),
        (says([PICTURE], role="assistant"), "a message of the assistant has a picture"),
        (says([{"type": "input_audio"}]), "is no content"),
        (says(["x"]), "content is"),
        (says([[PICTURE]]), "content is"),
        (body(messages=[{"role": "assistant", "content": "a", "tool_calls": [{}]}]), "tool_calls"),
        (body(messages=[*asking("hi"), "hi"]), "is no message"),
        (says([PICTURE] * 4), "have 4 pictures; expected 3 at most"),
        (pictured(image_url={"url": "data:image/png;base64,AAAA"}), "is not a picture"),
        (pictured(image_url={"url": "data:image/png;base64,?"}), "is no valid base64"),
        (pictured(image_url={"url": "data:"}), "has no comma"),
        (pictured(image_url={"url": "data:;base64,\ud800"}), "is no valid base64"),
        (pictured(image_url={}), "is no content"),
        (pictured(image_url=None), "is no content"),
        (pictured(image_url=[data_uri()]), "is no content"),
        (pictured(image="x.png"), "is no content"),
    ],
)
def test_what_is_not_understood_is_refused(client, fields, words):
    error = refused(client.post(content=json.dumps(fields).encode()), 400)
    assert words in error["message"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "PATH"},
        {"type": "image", "path": "PATH"},
        {"type": "image", "url": "PATH"},
        {"type": "image", "base64": "PATH"},
        {"type": "input_image", "image_url": "PATH"},
        {"type": "image_url", "image_url": "PATH"},
        {"type": "image_url", "image_url": {"url": "PATH"}},
        {"type": "image_url", "path": "PATH", "image_url": None},
    ],
)
@pytest.mark.parametrize("prefix", ["", "file://", "FILE://localhost", " ", "http://127.0.0.1"])
def test_files_of_the_server_are_not_read(commanded, part, prefix):
    path = prefix + str(GOLDEN / "images" / "big_320x200.png")
    fields = says([json.loads(json.dumps(part).replace("PATH", path))])
    error = refused(commanded.post(fields), 400)
    assert "is no content" in error["message"] or "is not taken from there" in error["message"]


@pytest.mark.parametrize("url", ["http://b.example/a.png", "https://127.0.0.1/", "ftp://x/y", ""])
def test_picture_urls_are_off(client, url):
    message = refused(client.post(pictured(image_url={"url": url})), 400)["message"]
    assert message.endswith("is not taken from there; expected a data URI")


def test_hosts_that_are_allowed_must_be_public(commanded):
    message = refused(commanded.post(pictured(image_url="http://localhost/x")), 400)["message"]
    assert "which is no public address" in message
    message = refused(commanded.post(pictured(image_url="http://c.example/x")), 400)["message"]
    assert "expected a data URI, or http(s) from localhost, b.example" in message


def test_a_picture_of_too_many_pixels_is_refused(client):
    """A PNG's head, of 60,000 x 60,000 pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    assert "is too large" in refused(client.post(pictured(image_url=uri)), 400)["message"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'"x"',
        b'{"model": 1, "model": 2}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 5000 + b"]" * 5000,
        b"[[]," * 200_000,
    ],
)
def test_what_is_no_json_is_refused(client, data):
    assert "the body" in refused(client.post(content=data), 400)["message"]


def test_a_prompt_that_is_too_long_is_refused(client):
    error = refused(client.post(says("x" * 2000)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "tokens long" in error["message"]


def test_a_body_that_is_too_large_is_refused(client):
    assert "larger than 1048576 bytes" in refused(client.post(says("x" * 2**20)), 413)["message"]

    def parts():
        for _ in range(40):
            yield b"x" * 2**16

    refused(client.post(content=parts()), 413)


def test_what_is_not_there_is_said_in_the_same_form(client):
    assert "there is no GET /v1/x" in refused(client.http.get("/v1/x"), 404)["message"]
    response = client.http.get("/v1/chat/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(client.http.post("/metrics"), 405)


def test_a_full_queue_is_said(tiny):
    """One slot, and one that may wait: the third must come again."""
    with serving(tiny, slots=1, max_queue=1) as client, paused(client.server):
        with client.send(body()):
            while client.server.taken < 1:
                time.sleep(0.001)
            refused(client.post(body(n=2)), 429)
            with client.send(body()):
                while client.server.taken < 2:
                    time.sleep(0.001)
                response = client.post(body())
                assert refused(response, 429)["code"] == "rate_limit_exceeded"
                assert response.headers["retry-after"] == "1"
        while client.server.taken:
            time.sleep(0.001)  # those who wait have gone
        connection = client.send(body())
    assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()


def test_a_picture_may_be_the_only_part(client):
    assert client.post(says([PICTURE])).status_code == 200
