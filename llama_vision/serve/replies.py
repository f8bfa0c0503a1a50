"""What is sent back, in the shapes of OpenAI: completions, chunks of a stream, errors."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import JSONResponse

from llama_vision.engine.choose import LogitsError
from llama_vision.engine.engine import EngineError
from llama_vision.engine.request import Chosen
from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.serve.bodies import ApiError, Question
from llama_vision.serve.worker import Delta

LOG = logging.getLogger("uvicorn.error")
LEAST_LOGPROB = -9999.0
"""What OpenAI says for a token that cannot come, as JSON has no -inf."""


def read_error(error: Exception) -> tuple[dict[str, Any], int]:
    """The body of an error, and its status; a fault of ours does not say what it is."""
    fault = not isinstance(error, LlamaVisionError)
    status = 500 if fault or isinstance(error, (LogitsError, EngineError)) else 400
    said = {
        "message": "the server failed at this request; its log says why" if fault else str(error),
        "type": "server_error" if status == 500 else "invalid_request_error",
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
    }
    return {"error": said}, error.status if isinstance(error, ApiError) else status


class Reply:
    """The answer to one question, at once or in chunks."""

    def __init__(self, question: Question, model: str, tokenizer: Tokenizer):
        self.question, self.tokenizer, self.generated = question, tokenizer, 0
        name, now = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.head = {"id": name, "object": "chat.completion", "created": now, "model": model}
        self.of_chunk = self.head | {"object": "chat.completion.chunk"}

    async def whole(self, deltas: AsyncIterator[Delta]) -> JSONResponse:
        """All choices, when the last one has ended."""
        of_samples: list[list[Delta]] = [[] for _ in self.question.samples]
        async for delta in deltas:
            of_samples[delta.sample].append(delta)
            self.generated += len(delta.tokens)
        choices = []
        for sample, parts in enumerate(of_samples):
            text, tokens = "".join(p.text for p in parts), [t for p in parts for t in p.tokens]
            said = {"role": "assistant", "content": text, "refusal": None}
            choices.append(self._choice(sample, {"message": said}, tokens, parts[-1].finish_reason))
        return JSONResponse(self.head | {"choices": choices, "usage": self._usage()})

    async def events(self, first: Delta, deltas: AsyncIterator[Delta]) -> AsyncIterator[str]:
        """Server-sent events; what fails on the way is the last of them."""
        for sample in range(len(self.question.samples)):
            begin = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk([self._choice(sample, begin, [], None)])
        try:
            yield self._part(first)
            async for delta in deltas:
                yield self._part(delta)
        except Exception as error:
            LOG.error("an answer broke off", exc_info=error)
            yield _event(read_error(error)[0])
            return
        if self.question.with_usage:
            yield self._chunk([], self._usage())
        yield "data: [DONE]\n\n"

    def _part(self, delta: Delta) -> str:
        self.generated += len(delta.tokens)
        said = {"delta": {"content": delta.text} if delta.text else {}}
        return self._chunk([self._choice(delta.sample, said, delta.tokens, delta.finish_reason)])

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        more = {"usage": usage} if self.question.with_usage else {}
        return _event(self.of_chunk | {"choices": choices} | more)

    def _choice(
        self, sample: int, said: dict[str, Any], tokens: list[Chosen], reason: str | None
    ) -> dict[str, Any]:
        shown = {"content": list(map(self._token, tokens))} if self.question.logprobs else None
        return {"index": sample, **said, "logprobs": shown, "finish_reason": reason}

    def _token(self, chosen: Chosen) -> dict[str, Any]:
        top = [self._logprob(*likely) for likely in chosen.top]
        return self._logprob(chosen.token, chosen.logprob) | {"top_logprobs": top}

    def _logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token_id, special=True)
        text = data.decode(errors="replace")
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}

    def _usage(self) -> dict[str, int]:
        asked, made = len(self.question.prompt.token_ids), self.generated
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
