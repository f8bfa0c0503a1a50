"""`generation_config.json`: how a checkpoint's authors would have it answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_vision.errors import SettingError
from llama_vision.reading import is_there, read_json, shown
from llama_vision.values import Either, Flag, Kind, ListOf, Number, Whole, check

TOKEN_IDS = Either((Whole(means="(a token id)"), ListOf(Whole(), least=1)))

UNSUPPORTED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "exponential_decay_length_penalty": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "forced_decoder_ids": None,
    "sequence_bias": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "dola_layers": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "stop_strings": None,
    "token_healing": False,
}
"""Settings of transformers that change an answer and are not built, and what switches them off."""

UNSUPPORTED_DRAWS = {
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
}
"""Those of them that count only where tokens are drawn."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What the file says; without a file, and without `do_sample` in it, answers are greedy.

    The numbers are of the right kind; their ranges are those of the engine's `Sampling`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] | None = None
    """None for those of the architecture, `TextConfig.eos_token_ids`."""
    repetition_penalty: float = 1.0
    """1.0 for none."""
    min_p: float = 0.0
    """0.0 for none."""
    unsupported: tuple[str, ...] = ()
    """Settings in the file that would change an answer and are left out."""


def read_generation_config(directory: Path) -> GenerationDefaults:
    """Read `directory/generation_config.json`, which need not be there.

    Raises:
        SettingError: the file is not JSON, or a value in it is of another kind.
    """
    path = Path(directory) / "generation_config.json"
    if not is_there(path):
        return GenerationDefaults()
    data = read_json(path, SettingError)

    def read(name: str, kind: Kind, default: Any) -> Any:
        value = data.get(name)
        return default if value is None else check(f"{shown(path)}: {name}", value, kind)

    draws = read("do_sample", Flag(), False)
    asked: dict[str, Any] = {"repetition_penalty": read("repetition_penalty", Number(), 1.0)}
    if draws:
        for name, default in (("temperature", 1.0), ("top_p", 1.0), ("min_p", 0.0)):
            asked[name] = read(name, Number(), default)
        asked["top_k"] = read("top_k", Whole(), 0)
    stop = read("eos_token_id", TOKEN_IDS, None)
    known = UNSUPPORTED | (UNSUPPORTED_DRAWS if draws else {})
    unsupported = tuple(name for name, off in known.items() if not _is_off(data.get(name), off))
    return GenerationDefaults(
        **asked, stop_ids=(stop,) if isinstance(stop, int) else stop, unsupported=unsupported
    )


def _is_off(value: Any, off: Any) -> bool:
    return value is None or value == off or (isinstance(value, (list, dict)) and not value)
