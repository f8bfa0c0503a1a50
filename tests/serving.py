"""What the tests of the server share: one on loopback, in this process or as a command."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from PIL import Image

from llama_vision import Engine, LlamaVision, Settings
from llama_vision.inputs.web_pictures import fetch_picture
from llama_vision.serve.app import Server, make_server
from llama_vision.serve.bodies import Reader
from llama_vision.serve.worker import Worker

GOLDEN = Path(__file__).parent / "golden"
LENGTH = 1024
NAME = "tiny"


def data_uri(path: Path | str = GOLDEN / "images" / "big_320x200.png") -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def small_uri(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asking(text: str, *urls: str) -> list[dict[str, Any]]:
    """A conversation of one question about pictures."""
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}]


def body(**fields):
    return {"model": NAME, "messages": asking("hi"), "max_tokens": 2, **fields}


def refused(response: httpx.Response, status: int) -> dict:
    """The error of a response in OpenAI's form."""
    assert response.status_code == status, response.text
    (name, error), *others = response.json().items()
    assert name == "error"
    assert not others
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    assert error["message"].isprintable()
    assert len(error["message"]) <= 600
    return error


PICTURES = {"max_images": 3, "fetch": partial(fetch_picture, hosts=())}


@contextmanager
def serving(model: LlamaVision, slots: int = 4, **limits: int) -> Iterator["Client"]:
    """A server in a thread of its own."""
    limits = {"max_queue": 256, "max_body": 2**20} | limits
    reader = Reader(model, NAME, Settings(max_new_tokens=LENGTH), LENGTH, PICTURES)
    server = Server(reader, Worker(Engine(model, slots=slots, max_seq_len=LENGTH)), None, **limits)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    running = make_server(server.app())
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        assert not server.worker.is_alive()


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Let the engine make no step meanwhile."""
    engine, go_on = server.worker.engine, threading.Event()
    step = engine.step

    def wait():
        go_on.wait()
        return step()

    engine.step = wait
    try:
        yield
    finally:
        go_on.set()
        engine.step = step


class Client:
    """Asks a server, by OpenAI's client or by bare HTTP."""

    def __init__(self, url: str, server: Server | None = None):
        self.url, self.server = url, server
        self.http = httpx.Client(base_url=url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, messages: list[dict[str, Any]], **fields: Any) -> Any:
        return self.openai.chat.completions.create(model=NAME, messages=messages, **fields)

    def post(self, body: Any = None, **how: Any) -> httpx.Response:
        how = how if body is None else {"json": body, **how}
        return self.http.post("/v1/chat/completions", **how)

    def send(self, body: Any, length: int | None = None) -> socket.socket:
        """Ask by a bare socket, to be closed by the caller; `length` is said of the body."""
        data = json.dumps(body).encode()
        connection = socket.create_connection(self.url.removeprefix("http://").split(":"))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
        connection.sendall(f"{head}{length or len(data)}\r\n\r\n".encode() + data)
        return connection

    def metrics(self) -> dict[str, float]:
        lines = self.http.get("/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name.removeprefix("llama_vision_"): float(value) for name, value in pairs}

    def until(self, *, nobody: bool = False, **wanted: float) -> dict[str, float]:
        """The metrics, once they are so, and with `nobody` no place is taken."""
        for _ in range(500):
            metrics, server = self.metrics(), self.server
            left = nobody and (server.worker.jobs or server.taken)
            if wanted.items() <= metrics.items() and not left:
                return metrics
            time.sleep(0.02)
        raise AssertionError(f"after ten seconds: {metrics}, {left}")

    def until_idle(self) -> dict[str, float]:
        return self.until(nobody=True, slots_in_use=0, queue_length=0)


@contextmanager
def command(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, Client]]:
    """`python -m llama_vision.serve` with the tiny model, once it answers; it tells two things."""
    given = ["--model", str(GOLDEN / "tiny"), "--device", "cpu", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "llama_vision.serve", *given, *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as process:
        try:
            lines = [process.stderr.readline(), process.stderr.readline()]
            found = re.search(r"http://127\.0\.0\.1:\d+", lines[1])
            assert found, lines
            yield process, Client(found[0])
        finally:
            process.kill()
