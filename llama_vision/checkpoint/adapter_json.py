"""`adapter_config.json` as peft writes it: what it says of an adapter, checked and named."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.unsupported import ADAPTER
from llama_vision.errors import printable, quote, some
from llama_vision.reading import is_there, read_json, shown
from llama_vision.values import Flag, Kind, Number, Whole, check

WEIGHTS = "adapter_model.safetensors"
EXPECTED = f"a directory with {ADAPTER} and {WEIGHTS}, or a repository id that has them"

PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""`init_lora_weights` that leave the model's own weights as they are. The others (pissa, olora,
corda, loftq, lora_ga) take something away from them first, which the adapter's file does not have;
peft turns such adapters into plain ones as it saves them, and then says True."""

UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
READ = ("init_lora_weights", "lora_alpha", "lora_bias", "r", "use_dora", "use_rslora")
READ += ("alpha_pattern", "rank_pattern", "base_model_name_or_path", "peft_type")
UNNEEDED = {
    *("auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type"),
}
"""Fields that the tensors tell better, or that are of training alone. `fan_in_fan_out` is of layers
that keep W transposed: this model has none, and peft, too, passes it by for `nn.Linear`."""


@dataclass(frozen=True)
class Settings:
    """What an `adapter_config.json` says of the numbers to add."""

    alpha: float
    rank: int | None
    rslora: bool
    dora: bool
    bias: bool
    alphas: dict[str, float]
    """By patterns of names of modules, where they differ from `alpha`; `ranks` are alike."""
    ranks: dict[str, int]
    base: str
    """The model that it was trained on, to show; nothing where it is not told."""

    def rank_of(self, module: str) -> int | None:
        """The rank that a module should have, None: any; its name is as in the file."""
        return _by_pattern(self.ranks, module, self.rank)

    def scaling_of(self, module: str, rank: int) -> float:
        """What BA is multiplied by."""
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name is, or ends with after a point."""
    matching = (p for p in patterns if re.match(rf"(.*\.)?({p})$", module))
    return patterns.get(next(matching, ""), default)


def read_settings(directory: Path) -> Settings:
    """Read `directory/adapter_config.json`.

    Raises:
        CheckpointError: it is not there or damaged, or asks for what would change the weights in a
            way that is not supported; names the field.
    """
    path = directory / ADAPTER
    if not is_there(path):
        raise CheckpointError(f"{shown(directory)} has no {ADAPTER}; expected {EXPECTED}")
    data = {
        key: value for key, value in read_json(path, CheckpointError).items() if value is not None
    }
    _refuse_unsupported(data)

    def checked(name: str, kind: Kind, value: Any) -> Any:
        return check(f"{ADAPTER}: {name}", value, kind, error=CheckpointError)

    base = data.get("base_model_name_or_path", "")
    return Settings(
        alpha=checked("lora_alpha", Number(), data.get("lora_alpha")),
        rank=checked("r", Whole(1), data["r"]) if "r" in data else None,
        rslora=checked("use_rslora", Flag(), data.get("use_rslora", False)),
        dora=checked("use_dora", Flag(), data.get("use_dora", False)),
        bias=checked("lora_bias", Flag(), data.get("lora_bias", False)),
        alphas=checked("alpha_pattern", _Patterns(Number()), data.get("alpha_pattern", {})),
        ranks=checked("rank_pattern", _Patterns(Whole(1)), data.get("rank_pattern", {})),
        base=printable(base) if isinstance(base, str) else "",
    )


class _Patterns(NamedTuple):
    """Regular expressions, with a value each; see `values.Kind`."""

    each: Kind

    @property
    def expected(self) -> str:
        return f"patterns of names, for each {self.each.expected}"

    def read(self, value: Any) -> dict[str, Any]:
        try:
            return {p: self.each.read(v) for p, v in value.items() if re.compile(f"({p})")}
        except (AttributeError, re.error, RecursionError, OverflowError):
            raise ValueError from None


def _refuse_unsupported(data: dict[str, Any]) -> None:
    """Raise CheckpointError for the first thing of an adapter_config.json that cannot be done."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{ADAPTER}: peft_type is {quote(kind)}; expected 'LORA'")
    start = data.get("init_lora_weights", True)
    if not isinstance(start, bool) and str(start).lower() not in (*PLAIN_STARTS, "true", "false"):
        raise CheckpointError(
            f"{ADAPTER}: init_lora_weights is {quote(start)}, which fits a changed base model "
            "alone; save it as a plain LoRA (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it with peft and load that"
        )
    if found := [name for name in UNSUPPORTED if data.get(name)]:
        raise CheckpointError(
            f"{ADAPTER}: {found[0]} is {quote(data[found[0]])}, which is not supported; merge it "
            "with peft (merge_and_unload, then save_pretrained) and load what that writes"
        )
    known = {*UNSUPPORTED, *READ, *UNNEEDED}
    if strange := [name for name, value in data.items() if value and name not in known]:
        raise CheckpointError(
            f"{ADAPTER} has what is not known here: {some(strange)}; merge it with peft, or take "
            "it out of the file if it changes no weights"
        )
