"""The body of a request in OpenAI's fields: it becomes a prompt, and settings for each sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from llama_vision.api import LlamaVision
from llama_vision.engine.settings import Settings
from llama_vision.engine.settings_json import read_settings
from llama_vision.errors import LlamaVisionError, quote
from llama_vision.inputs.messages import check_text
from llama_vision.inputs.pictures import ImageError
from llama_vision.inputs.prompts import Prompt
from llama_vision.inputs.remote_chat import PromptError, remote_chat_prompt
from llama_vision.reading import parse_object
from llama_vision.values import (
    Either,
    Flag,
    Instance,
    Kind,
    ListOf,
    Text,
    Whole,
    check,
    check_names,
)

SETTINGS = (
    *("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens"),
    *("top_k", "min_p", "repetition_penalty"),  # from here on ours
    *("max_tiles", "visual_budget", "k_ratio", "keep", "pruner", "merge"),
)
OTHERS = ("model", "messages", "stream", "stream_options", "n", "stop", "logprobs", "top_logprobs")
IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("reasoning_effort", "verbosity"), ()),
}
"""Fields that would change the answer, with the values that do not."""

MOST_SAMPLES, MOST_STOPS, LONGEST_STOP = 16, 16, 1000


class ApiError(LlamaVisionError):
    """An error that knows its HTTP status, OpenAI's code, and the field that it is about."""

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, **more: Any
    ) -> None:
        super().__init__(message)
        self.status, self.param = status, param
        self.code, self.headers = more.get("code"), more.get("headers")


class Question(NamedTuple):
    """What one body asks."""

    prompt: Prompt
    samples: list[Settings]
    stream: bool
    with_usage: bool
    logprobs: bool


@dataclass(frozen=True)
class Reader:
    """Reads bodies; several threads may at once.

    Args:
        name: what the model is called.
        base: settings that a body does not say.
        max_seq_len: most tokens of prompt and answer.
        pictures: see `remote_chat_prompt`.
    """

    model: LlamaVision
    name: str
    base: Settings
    max_seq_len: int
    pictures: Mapping[str, Any]

    def read(self, data: bytes) -> Question:
        """The question of a body.

        Raises:
            LlamaVisionError: it is none, or asks for what is not there.
        """
        body = parse_object(data, "the body", ApiError)
        body = {name: value for name, value in body.items() if value is not None}
        check_names("field", body, (*OTHERS, *SETTINGS, *IGNORED, *UNSUPPORTED))
        for name in UNSUPPORTED.keys() & body.keys():
            if body[name] not in UNSUPPORTED[name]:
                message = f"{name} is {quote(body[name])}, which is not supported; leave it out"
                raise ApiError(message, param=name)
        self.check_model(body.get("model"))
        field = partial(_field, body)
        logprobs, top = field("logprobs", Flag(), False), field("top_logprobs", Whole(0, 20), 0)
        if top and not logprobs:
            raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
        options = field("stream_options", Instance(dict, "an object"), {})
        said = {name: body[name] for name in SETTINGS if name in body}
        settings = read_settings(said, self.base).but(stop=_stops(body), top_logprobs=top)
        return Question(
            self._prompt(body.get("messages"), settings),
            settings.of_samples(field("n", Whole(1, MOST_SAMPLES), 1), settings.seed),
            stream=field("stream", Flag(), False),
            with_usage=_field(options, "include_usage", Flag(), False),
            logprobs=logprobs,
        )

    def check_model(self, name: Any) -> None:
        """Raise ApiError (404) for another model than the one that is served."""
        if name != self.name:
            message = f"there is no model {quote(name)}; expected {quote(self.name)}"
            raise ApiError(message, 404, param="model", code="model_not_found")

    def _prompt(self, messages: Any, settings: Settings) -> Prompt:
        vision, code = self.model.config.vision, None
        tiles = settings.limited("max_tiles", vision.max_num_tiles)
        how = {"tile_size": vision.image_size, "max_tiles": tiles, **self.pictures}
        try:
            prompt = remote_chat_prompt(messages, self.model.need_tokenizer(), **how)
            code = "context_length_exceeded"
            settings.limit(len(prompt.token_ids), self.max_seq_len)
        except (PromptError, ImageError) as error:
            raise ApiError(str(error), param="messages", code=code) from None
        _ = prompt.contents  # made here, not in the engine's thread
        return prompt


def _field(body: Mapping[str, Any], name: str, kind: Kind, default: Any) -> Any:
    value = body.get(name)
    return default if value is None else check(name, value, kind)


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Few and short ones: an answer is searched for all of them with every token."""
    expected = f"a text, or a list of {MOST_STOPS} at most, each of {LONGEST_STOP} characters"
    stops = _field(body, "stop", Either((Text(), ListOf(Text())), expected), ())
    stops = (stops,) if isinstance(stops, str) else stops
    if len(stops) > MOST_STOPS or any(len(check_text(stop)) > LONGEST_STOP for stop in stops):
        raise ApiError(f"stop is {quote(stops)}; expected {expected}", param="stop")
    return stops
