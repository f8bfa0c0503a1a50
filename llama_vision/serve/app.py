"""The routes, and the way of a request through them."""

import asyncio
import hmac
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llama_vision.cli.terminal import EXIT_INTERRUPTED
from llama_vision.errors import LlamaVisionError, printable
from llama_vision.serve.bodies import ApiError, Reader
from llama_vision.serve.metrics import metrics_text
from llama_vision.serve.replies import Reply, read_error
from llama_vision.serve.worker import Job, Worker

BODY_SECONDS = 60
"""How long a body may take to come: it has a place in the queue while it does."""


class _EventStream(StreamingResponse):
    """Server-sent events; whatever ends them, the seat is left."""

    media_type = "text/event-stream"
    seat: ExitStack

    async def __call__(self, *channel: Any) -> None:
        with self.seat:
            await super().__call__(*channel)


@dataclass
class Server:
    """Answers requests with one worker's engine.

    Args:
        key: what clients must show, or None.
        max_queue: answers, and pictures of theirs, that may wait for a slot.
        max_body: bytes.
    """

    reader: Reader
    worker: Worker
    key: bytes | None
    max_queue: int
    max_body: int
    taken: int = 0
    """Places of what waits or runs: a body that is on its way, each sample more, each picture."""
    readers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4))
    """Few, for each may have a whole picture in memory."""

    def app(self) -> Starlette:
        """What uvicorn runs."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers = {HTTPException: _no_route, LlamaVisionError: _error, Exception: _error}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        self.started = int(time.time())
        self.worker.start()
        yield
        self.worker.stop()
        self.readers.shutdown(wait=False)

    async def _chat(self, request: Request) -> Response:
        self._check_key(request)
        with ExitStack() as seat:
            self._take(1, seat)
            data = await self._body(request)
            answer = asyncio.ensure_future(self._answer(data, seat))
            gone = asyncio.ensure_future(_gone(request))
            seat.callback(answer.cancel)
            seat.callback(gone.cancel)
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return Response(status_code=400)  # which nobody reads
            response = answer.result()
            if isinstance(response, _EventStream):
                gone.cancel()
                response.seat = seat.pop_all()
            return response

    async def _answer(self, data: bytes, seat: ExitStack) -> Response:
        loop = asyncio.get_running_loop()
        question = await loop.run_in_executor(self.readers, self.reader.read, data)
        self._take(len(question.samples) - 1 + len(question.prompt.images), seat)
        job = Job(question)
        seat.callback(self.worker.cancel, job)
        self.worker.submit(job)
        reply = Reply(question, self.reader.name, self.reader.model.need_tokenizer())
        if not question.stream:
            return await reply.whole(job.deltas())
        deltas = job.deltas()
        first = await anext(deltas)  # what fails before it has a status of its own
        return _EventStream(reply.events(first, deltas), headers={"Cache-Control": "no-cache"})

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        about = {"object": "model", "created": self.started, "owned_by": "llama-vision"}
        described = {"id": self.reader.name, **about}
        if "name" not in request.path_params:
            return JSONResponse({"object": "list", "data": [described]})
        self.reader.check_model(request.path_params["name"])
        return JSONResponse(described)

    async def _health(self, _: Request) -> Response:
        alive = self.worker.is_alive()
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(metrics_text(self.worker), media_type="text/plain; version=0.0.4")

    def _check_key(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        shown = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        if self.key is not None and not hmac.compare_digest(shown, self.key):
            message = "the API key is missing or wrong; expected Authorization: Bearer KEY"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(message, 401, code="invalid_api_key", headers=headers)

    def _take(self, places: int, seat: ExitStack) -> None:
        """Have places until the seat is left."""
        if self.taken + places > self.worker.engine.cache.slots + self.max_queue:
            code, headers = "rate_limit_exceeded", {"Retry-After": "1"}
            raise ApiError("too many requests wait; try again", 429, code=code, headers=headers)
        self.taken += places
        seat.callback(self._give, places)

    def _give(self, places: int) -> None:
        self.taken -= places

    async def _body(self, request: Request) -> bytes:
        async def read() -> bytes:
            data = bytearray()
            async for part in request.stream():
                data += part
                if len(data) > self.max_body:
                    raise ApiError(f"the body is larger than {self.max_body} bytes", 413)
            return bytes(data)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(f"the body has not come in {BODY_SECONDS} seconds", 408) from None
        except ClientDisconnect:
            raise ApiError("the body is cut short") from None


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _error(_: Request, error: Exception) -> Response:
    return JSONResponse(*read_error(error), getattr(error, "headers", None))


async def _no_route(request: Request, error: HTTPException) -> Response:
    what = f"there is no {request.method} {printable(request.scope['path'])}"
    return await _error(request, ApiError(what, error.status_code, headers=error.headers))


class _Drained(uvicorn.Server):
    """The first signal lets the answers that run finish; a second one ends all at once."""

    def handle_exit(self, *_: Any) -> None:
        """See `uvicorn.Server`."""
        if self.should_exit:
            os._exit(EXIT_INTERRUPTED)
        self.should_exit = True


def make_server(app: Starlette) -> uvicorn.Server:
    """What answers with an app, on the sockets that its `run` is given, until SIGTERM or SIGINT."""
    how = {"http": "h11", "ws": "none", "loop": "asyncio", "lifespan": "on"}
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, **how)
    return _Drained(config)
