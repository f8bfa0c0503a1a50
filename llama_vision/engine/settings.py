"""What a request asks for beside its prompt; every setting is checked here."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_vision.cache.pruning import Pruner
from llama_vision.engine.sampling import Sampling
from llama_vision.engine.workload import PREFILL_CHUNK, budget_in_tokens
from llama_vision.errors import SettingError
from llama_vision.inputs.chat import PromptError


@dataclass(frozen=True)
class Settings:
    """Of one request; `None` leaves a setting to the checkpoint or the model."""

    max_new_tokens: int = 256
    """Most tokens to make: 1 or more."""
    temperature: float | None = None
    """0 is greedy; None for the checkpoint's own, as of top_p and top_k."""
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    """Of the random draws; None for a new one each time."""
    stop_ids: Sequence[int] | None = None
    """Token ids that end the answer; None for the checkpoint's own."""
    ignore_stop: bool = False
    """Go on past stop tokens."""
    pruner: Pruner | None = None
    """Chooses which visual tokens to keep, see `cache.pruning`; None keeps all."""
    visual_budget: float | int | None = None
    """Most visual tokens of a group of images to keep: a count, or (a float) a fraction of them."""
    max_seq_len: int | None = None
    """Most tokens of prompt and answer together."""
    max_tiles: int | None = None
    """Most tiles an image is cut into."""
    prefill_chunk: int = PREFILL_CHUNK
    """Most prompt tokens that go through a block at once. It changes no answer, only what memory a
    long prompt needs."""

    def __post_init__(self):
        for name in ("max_new_tokens", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; expected 1 or more")
        budget_in_tokens(self.visual_budget, 0)
        self.sampling(Sampling())

    def sampling(self, default: Sampling) -> Sampling:
        """How to draw, with what is left open taken from the checkpoint's own."""
        names = ("temperature", "top_p", "top_k")
        given = {name: getattr(self, name) for name in names}
        return Sampling(
            **{name: getattr(default, name) if v is None else v for name, v in given.items()}
        )

    def limited(self, name: str, allowed: int) -> int:
        """A setting that the model or the engine limits, `allowed` where it is left open."""
        value = getattr(self, name)
        if value is None:
            return allowed
        if not 1 <= value <= allowed:
            raise SettingError(f"{name} is {value}; expected 1 to {allowed} for this model")
        return value

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
