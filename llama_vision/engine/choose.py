"""The next token of each request: from the model's logits, what its settings make of them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llama_vision.engine.request import Chosen, Request, TokenLogprob
from llama_vision.engine.sampling import sample
from llama_vision.engine.settings import LogitsProcessor
from llama_vision.errors import LlamaVisionError, name_of, quote
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.parallel import agree


class LogitsError(LlamaVisionError):
    """Logits that no token can be chosen from."""


def choose_tokens(
    requests: Sequence[Request], logits: Tensor, model: LlamaVisionModel
) -> list[Chosen | LogitsError]:
    """The next token of each request, or why there is none; the same on all devices.

    Args:
        logits: [B, vocabulary], float32, a row for each request.
    """
    return agree(partial(_choose, requests, logits, model), model.config.text.devices)


def _choose(
    requests: Sequence[Request], logits: Tensor, model: LlamaVisionModel
) -> list[Chosen | LogitsError]:
    failed: dict[int, LogitsError] = {}
    draw_from = (
        _adjusted_rows(requests, logits, failed) if any(map(is_adjusted, requests)) else None
    )
    samplings, generators = zip(*((r.sampling, r.generator) for r in requests), strict=True)
    columns = (column.tolist() for column in sample(logits, samplings, generators, draw_from))
    chosen: list[Chosen | LogitsError] = []
    for row, (token, logprob, finite) in enumerate(zip(*columns, strict=True)):
        if not finite:
            failed[row] = not_finite(model)
        top = _likeliest(logits[row], requests[row].settings.top_logprobs)
        chosen.append(failed.get(row) or Chosen(token, logprob, top))
    return chosen


def is_adjusted(request: Request) -> bool:
    """Whether a request's tokens are chosen from other logits than the model's."""
    processors = request.settings.logits_processors
    return request.sampling.repetition_penalty != 1 or bool(processors or request.never)


def _adjusted_rows(
    requests: Sequence[Request], logits: Tensor, failed: dict[int, LogitsError]
) -> Tensor:
    """What each request's token is chosen from; those that cannot be had are noted in `failed`."""
    rows = logits.clone()
    for row, request in enumerate(requests):
        try:
            rows[row] = adjust(request, logits[row])
        except LogitsError as error:
            failed[row] = error
    return rows


def adjust(request: Request, logits: Tensor) -> Tensor:
    """What a request's next token is chosen from: logits [vocabulary] -> the same shape.

    Raises:
        LogitsError: see `process`.
    """
    penalty, device = request.sampling.repetition_penalty, logits.device
    if penalty != 1:
        seen = [token for token in request.seen if token < len(logits)]  # pictures left out
        logits = penalise(logits, torch.tensor(sorted(seen), device=device), penalty)
    for processor in request.settings.logits_processors:
        logits = process(logits, processor)
    if request.never:
        logits = logits.index_fill(0, torch.tensor(request.never, device=device), -torch.inf)
    return logits


def _likeliest(logits: Tensor, count: int) -> list[TokenLogprob]:
    if not count:
        return []
    logprobs, ids = logits.log_softmax(dim=-1).topk(min(count, len(logits)))
    return [TokenLogprob(*pair) for pair in zip(ids.tolist(), logprobs.tolist(), strict=True)]


def not_finite(model: LlamaVisionModel) -> LogitsError:
    """What to say of infinite logits, or none at all: the weight, or the type, to blame."""
    name = next((n for n, p in model.named_parameters() if not p.isfinite().all()), None)
    if name is not None:
        return LogitsError(f"the logits are not finite, for {name} is not; load the weights again")
    dtype = str(model.dtype).removeprefix("torch.")
    return LogitsError(
        f"the logits are not finite in {dtype}, though all weights are: a value grew beyond what "
        f"the type holds; use {'float32' if dtype == 'bfloat16' else 'bfloat16'} (--dtype, dtype=)"
    )


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply a `Sampling.repetition_penalty` to logits [vocabulary], for the ids `seen`."""
    of_seen = logits[seen]
    less = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    return logits.index_copy(0, seen, less)


def process(logits: Tensor, processor: LogitsProcessor) -> Tensor:
    """What a user's processor makes of logits [vocabulary]; it gets a copy.

    Raises:
        LogitsError: it fails, or its answer cannot be drawn from.
    """
    name = name_of(processor)
    try:
        answer = processor(logits.clone())
    except Exception as error:
        raise LogitsError(
            f"logits processor {name} raised {type(error).__name__}: {error}"
        ) from error
    is_tensor = isinstance(answer, Tensor) and answer.is_floating_point() and not answer.is_meta
    if not is_tensor or answer.layout != torch.strided or answer.shape != logits.shape:
        raise LogitsError(
            f"logits processor {name} returned {quote(answer)}; expected a tensor of floats "
            f"[vocabulary] = {list(logits.shape)}"
        )
    answer = answer.to(logits)
    most = float(answer.amax())
    if answer.isnan().any() or most in (torch.inf, -torch.inf):
        raise LogitsError(
            f"logits processor {name} returned NaN, +inf, or -inf for every token; expected "
            "numbers, -inf for what must not be chosen, and one token at least that may be"
        )
    return answer
