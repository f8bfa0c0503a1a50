"""What a request asks for beside its prompt: every setting, its kind and its range."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from torch import Tensor

from llama_vision.cache.pruning import PRUNER, Pruner, PruningError, check_options
from llama_vision.engine.sampling import (
    MIN_P,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Sampling,
)
from llama_vision.engine.workload import BUDGET, PREFILL_CHUNK
from llama_vision.errors import SettingError
from llama_vision.inputs.chat import PromptError
from llama_vision.values import (
    LARGEST,
    Flag,
    Function,
    Instance,
    ListOf,
    Text,
    Whole,
    check,
    check_fields,
    check_names,
)

MOST_TOP_LOGPROBS = 1000

LogitsProcessor = Callable[[Tensor], Tensor]
"""Logits [vocabulary], float32, of one request -> those to choose from, of the same kind; -inf for
what must not be chosen."""


@dataclass(frozen=True)
class Settings:
    """Of one request; `None` leaves a setting to the checkpoint or the model.

    Raises:
        SettingError, PruningError: a setting is of another kind or out of range.
    """

    max_new_tokens: Annotated[int, Whole(1)] = 256
    """Most tokens to make."""
    temperature: Annotated[float | None, TEMPERATURE] = None
    """For this and the next four see `Sampling`; None for the checkpoint's own."""
    top_p: Annotated[float | None, TOP_P] = None
    top_k: Annotated[int | None, TOP_K] = None
    min_p: Annotated[float | None, MIN_P] = None
    repetition_penalty: Annotated[float | None, REPETITION_PENALTY] = None
    seed: Annotated[int | None, Whole()] = None
    """Of the random draws; None for a new one each time."""
    stop: Annotated[Sequence[str], ListOf(Text())] = ()
    """Texts that end the answer and are not part of it, whatever tokens they come in."""
    stop_ids: Annotated[Collection[int] | None, ListOf(Whole(), ordered=False)] = None
    """Token ids that end the answer; None for the checkpoint's own."""
    ignore_stop: Annotated[bool, Flag()] = False
    """Go on past stop tokens."""
    logits_processors: Annotated[Sequence[LogitsProcessor], ListOf(Function())] = ()
    """Applied one after the other to the logits of this request, after the repetition penalty."""
    top_logprobs: Annotated[int, Whole(0, MOST_TOP_LOGPROBS)] = 0
    """Of how many of the likeliest tokens to note the log-probability, at every step."""
    pruner: Annotated[Pruner | None, PRUNER] = None
    """Chooses which visual tokens to keep, see `cache.pruning`; None keeps all."""
    visual_budget: Annotated[float | int | None, BUDGET] = None
    """Most visual tokens of a group of images to keep: a count, or (a float) a fraction of them."""
    max_seq_len: Annotated[int | None, Whole(1)] = None
    """Most tokens of prompt and answer together."""
    max_tiles: Annotated[int | None, Whole(1)] = None
    """Most tiles an image is cut into."""
    prefill_chunk: Annotated[int, Whole(1)] = PREFILL_CHUNK
    """Most prompt tokens that go through a block at once. It changes no answer, only what memory a
    long prompt needs."""

    def __post_init__(self):
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self, errors={"pruner": PruningError, "visual_budget": PruningError})
        if self.pruner is not None:
            check_options(self.pruner)

    def sampling(self, default: Sampling) -> Sampling:
        """How to draw, with what is left open taken from the checkpoint's own."""
        names = [field.name for field in dataclasses.fields(Sampling)]
        given = {name: getattr(self, name) for name in names}
        return dataclasses.replace(default, **{n: v for n, v in given.items() if v is not None})

    def but(self, **given: Any) -> "Settings":
        """The same with some settings, by name, in another way.

        Raises:
            SettingError, PruningError: there is no such setting, or see `Settings`.
        """
        check_names("setting", given, [field.name for field in dataclasses.fields(self)])
        return dataclasses.replace(self, **given)

    def of_samples(self, count: int, seed: int | Sequence[int] | None) -> "list[Settings]":
        """The same for each of several prompts, with draws of its own.

        Args:
            seed: one for each, or one from which they count: sample i draws with seed + i, as it
                would alone. None for new ones each time.

        Raises:
            SettingError: it is none of that, or not as many as prompts.
        """
        if seed is None or isinstance(seed, int):
            check("seed", 0 if seed is None else seed, Whole())
            seeds = [None if seed is None else (seed + i) & LARGEST for i in range(count)]
        else:
            seeds = check("seed", seed, ListOf(Whole()))
            if len(seeds) != count:
                raise SettingError(f"seed has {len(seeds)} numbers; expected {count}, one a prompt")
        return [dataclasses.replace(self, seed=one) for one in seeds]

    def limited(self, name: str, allowed: int) -> int:
        """A setting that the model or the engine limits, `allowed` where it is left open."""
        value = getattr(self, name)
        if value is None:
            return allowed
        return check(name, value, Whole(1, allowed, means="for this model"))

    def limit(self, rows: int, allowed: int) -> int:
        """Most rows of a prompt that has so many, its answer included.

        Raises:
            PromptError: there is no room for an answer.
        """
        most = self.limited("max_seq_len", allowed)
        if rows >= most:
            raise PromptError(
                f"the prompt is {rows} tokens long and --max-seq-len (max_seq_len) is {most}; "
                f"expected at least {rows + 1}, to leave room for an answer"
            )
        return min(rows + self.max_new_tokens, most)


SETTINGS = Instance(Settings, "a Settings")
