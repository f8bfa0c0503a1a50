"""The server's command: how it begins and ends, and what it refuses."""

import json
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from conftest import TINY
from serving import Client, asking, body, command, refused

from llama_vision.serve.__main__ import main


@pytest.mark.parametrize("how", [{"given": True}, {"given": False}])
def test_a_key_is_asked_for(how):
    options = ("--api-key", "sécret") if how["given"] else ()
    with command(*options, LLAMA_VISION_API_KEY="other" if how["given"] else "sécret") as (
        _,
        client,
    ):
        wrong = {"Authorization": "Bearer x"}, {"Authorization": "Bearer sécre".encode()}
        for headers in ({}, *wrong):
            for response in (
                client.post(body(), headers=headers),
                client.http.get("/v1/models", headers=headers),
            ):
                assert refused(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "bearer sécret".encode()}
        assert client.post(body(), headers=right).status_code == 200
        assert client.http.get("/health").status_code == 200


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish(tiny, sent):
    messages = asking("What is this?")
    with command("--slots", "1") as (process, client):
        fields = body(messages=messages, max_tokens=1000, temperature=0, stream=True)
        with client.http.stream("POST", "/v1/chat/completions", json=fields) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.send_signal(sent)
            rest = list(lines)
        chunks = [
            json.loads(line.removeprefix("data: ")) for line in (first, *rest) if line[6:7] == "{"
        ]
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert text == tiny.generate(messages, max_new_tokens=1000, temperature=0).text
        assert rest[-2] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            client.http.get("/health")


def test_a_second_signal_ends_at_once():
    with command() as (process, client), client.send(body(), length=9999):
        assert [client.http.get("/health").status_code for _ in range(2)] == [200, 200]
        process.send_signal(signal.SIGINT)
        while can_connect(client):
            time.sleep(0.01)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def can_connect(client: Client) -> bool:
    try:
        socket.create_connection(client.url.removeprefix("http://").split(":")).close()
    except OSError:
        return False
    return True


def line_of(capsys, *options: str) -> str:
    """What the command says when it refuses."""
    assert main(["--model", str(TINY), "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *told, line = err.splitlines()
    assert told in (
        [],
        ["llama-vision: the checkpoint has no tokenizer; text is read and written as plain bytes"],
    )
    assert line.startswith("llama-vision-serve: ")
    return line


def test_a_port_that_is_taken_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen at '127.0.0.1', port {port}: " in line_of(capsys, "--port", port)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "192.0.2.1"], "cannot listen at '192.0.2.1'"),
        (["--host", "no such host"], "cannot listen at 'no such host'"),
        (["--port", "70000"], "--port is 70000; expected 0 to 65535"),
        (["--port", "x"], "'x' is not a whole number"),
        (["--slots", "0"], "slots is 0"),
        (["--max-seq-len", "131073"], "max_seq_len is 131073"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--max-images", "-1"], "--max-images is -1"),
        (["--max-body", "x"], "'x' is no size"),
        (["--image-cache", "x"], "'x' is no size"),
        (["--max-tiles", "9"], "max_tiles is 9"),
        (["--keep", "0"], "keep is 0"),
        (["--keep", "1", "--k-ratio", "1"], "leave out --k-ratio or --keep"),
        (["--quantize", "int3"], "int3"),
        (["--api-key", ""], "--api-key or LLAMA_VISION_API_KEY is empty"),
        (["--allow-urls", "http://x"], "'http://x' is no host"),
        (["--model", "no/such/place"], "no/such/place"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_arguments_that_cannot_be_are_refused(capsys, options, words):
    assert words in line_of(capsys, "--port", "0", *options)


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_its_extra_the_command_says_what_to_install(name):
    code = f"import sys; sys.modules[{name!r}] = None\n"
    code += "from llama_vision.serve.__main__ import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr
        == f'llama-vision-serve: the server needs {name}; pip install "llama-vision[server]"\n'
    )


def test_help_is_printed(capsys):
    assert main(["--help"]) == 0
    assert "--allow-urls" in capsys.readouterr().out
