"""Which matrices a model is to keep as integers: what the files hold, and what was asked for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from llama_vision.checkpoint.devices import choose_dtype
from llama_vision.checkpoint.stored import Stored
from llama_vision.config import DTYPES, Config
from llama_vision.errors import SettingError, quote
from llama_vision.model.quantized import COMPUTED_IN
from llama_vision.quantization import (
    FORMATS,
    INT8,
    PARTS,
    Format,
    Quantization,
    choose_quantization,
    part_of,
)

Asked = str | Quantization | None
"""None for what the files hold, "none" for no integers, int8 or int4, or in detail."""


def stored_quantization(config: Config, found: Mapping[str, Stored]) -> Quantization | None:
    """The formats that are nearest to how the matrices are stored; None where all are plain."""
    cross = config.text.cross_attention_layers
    forms: dict[str, Format | None] = {}
    for name, stored in found.items():
        module, _, leaf = name.rpartition(".")
        is_matrix = leaf == "weight" and len(stored.shape) == 2
        if is_matrix and not module.endswith(("embedding", "embed_tokens")):
            forms[module] = _suiting(stored)
    if not any(forms.values()):
        return None
    counts = {part: Counter() for part in PARTS}
    for module, form in forms.items():
        counts[part_of(module, cross)][form] += 1
    most = {part: count.most_common(1)[0][0] for part, count in counts.items() if count}
    others = [(m, form) for m, form in forms.items() if most[part_of(m, cross)] != form]
    return Quantization(**most, exceptions=tuple(others), stored=True)


def _suiting(stored: Stored) -> Format | None:
    """Its format, or int8 where the product of that does not take its size."""
    form = stored.form
    if form is None or form.bits == 8:
        return form
    outputs, inputs = stored.shape
    return INT8 if outputs % 16 or inputs % form.group else form


def resolve(
    config: Config,
    found: Mapping[str, Stored] | None,
    asked: Asked,
    dtype: str | torch.dtype,
) -> tuple[Config, torch.dtype]:
    """The configuration with the quantization that a model is to have, and its type.

    Args:
        found: how the weights are stored; None where only config.json is known, which tells nearly.

    Raises:
        SettingError: there is no such format, a copy that is quantised is to be quantised
            otherwise, or a type that integers are not multiplied in.
    """
    stored = config.quantization if found is None else stored_quantization(config, found)
    plain = choose_dtype(dtype, config.dtype)
    wanted = _wanted(asked)
    if stored is not None and wanted is not None:
        if (wanted.text, wanted.cross) != (stored.text, stored.cross):
            raise SettingError(
                f"this checkpoint is quantised already and is read as {stored}; leave out "
                "--quantize (quantize), or give none to make its weights bfloat16 again"
            )
        wanted = stored
    if asked is None and (dtype == "auto" or plain == COMPUTED_IN):
        wanted = stored
    if wanted is None:
        is_copy = stored is not None and dtype == "auto"
        return replace(config, quantization=None), COMPUTED_IN if is_copy else plain
    if dtype != "auto" and plain != COMPUTED_IN:
        name = next(name for name, one in DTYPES.items() if one == plain)
        raise SettingError(
            f"dtype is {name} and quantised weights are multiplied in bfloat16 alone; leave out "
            "--dtype or --quantize"
        )
    return replace(config, quantization=wanted), COMPUTED_IN


def _wanted(asked: Asked) -> Quantization | None:
    if asked is None or asked == "none":
        return None
    if isinstance(asked, Quantization):
        return asked
    if isinstance(asked, str) and asked in FORMATS:
        return choose_quantization(asked)
    raise SettingError(f"quantize is {quote(asked)}; expected int8, int4 or none")


def conversion(config: Config, found: Mapping[str, Stored]) -> str:
    """What becomes of a quantised copy, in a phrase; nothing of a plain checkpoint."""
    libraries = sorted({stored.library for stored in found.values() if stored.library})
    if not libraries:
        return ""
    becomes = str(config.quantization) if config.quantization else "weights of the type asked for"
    return f"the checkpoint is quantised ({', '.join(libraries)}) and becomes {becomes}"
