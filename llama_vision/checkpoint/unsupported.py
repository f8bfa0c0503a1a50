"""What people have that is near to a checkpoint of this layout: what it is, and what to do."""

import re
from pathlib import Path
from typing import Any

from llama_vision.config import ConfigError
from llama_vision.errors import printable, quote, some
from llama_vision.quantization import GROUPS, INT8, Format, nearest_int4
from llama_vision.reading import is_there, read_json, shown

ADAPTER = "adapter_config.json"
META_PARAMETERS = "params.json"

TEXT_ONLY = "mllama_text_model"
"""`model_type` of what transformers' MllamaForCausalLM saves."""

COMPRESSED = "compressed-tensors"
LAYOUTS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    "mixed-precision",  # each group of matrices has one of these
)
"""`format` of compressed-tensors that is read, see `layouts`."""

PUBLISHED_SIZES = {4096: "11B", 8192: "90B"}  # text_config.hidden_size
PUBLISHED = re.compile(r"llama-3\.2-(11b|90b)-vision(-instruct)?", re.IGNORECASE)
GUARD = re.compile(r"llama-guard-3-11b-vision", re.IGNORECASE)
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
QUANTISED_NAME = re.compile(
    r"bnb|[48]-?bit|gptq|awq|fp8|fp4|nf4|int[48]|w\da\d|quant|torchao|hqq|gguf", re.IGNORECASE
)


def refuse_unsupported(data: dict[str, Any], where: object = "") -> None:
    """Look at a parsed `config.json` for what cannot be loaded, before any weights are fetched.

    Args:
        data: the parsed file.
        where: the directory or repository that it is from, whose name may tell the model's.

    Raises:
        ConfigError: weights that are quantised in a way that cannot be read, see
            `declared_format`, or the text part alone.
    """
    if data.get("model_type") == TEXT_ONLY:
        raise ConfigError(
            f"config.json: model_type is {TEXT_ONLY!r}, the text part of Llama 3.2 Vision without "
            "its vision encoder; expected 'mllama', a full checkpoint "
            "(MllamaForConditionalGeneration): save or take that one"
        )
    for field, about in _quantised(data):
        if isinstance(unread := _format(about), str):
            raise ConfigError(
                f"config.json: {field} says that the weights are quantised "
                f"({unread}), which is not supported (bitsandbytes and compressed-tensors are); "
                f"take the unquantised checkpoint, {_unquantised(data, where)}"
            )


def declared_format(data: dict[str, Any]) -> Format | None:
    """What a parsed `config.json` says of how most matrices of the text blocks are stored.

    It is for an estimate before the weights are there, whose tensors then tell. Activations that a
    copy was to quantise too stay as they are: its weights are all that is read of it, and
    activations in bfloat16 lose nothing.

    Returns:
        The nearest of our formats; None where the weights are stored as they are, or in a way that
        `refuse_unsupported` refuses.
    """
    found = [_format(about) for _, about in _quantised(data)]
    return next((form for form in found if isinstance(form, Format)), None)


def _quantised(data: dict[str, Any]) -> list[tuple[str, Any]]:
    """All that a config.json says of how its weights are quantised, with the field's name."""
    sections = (data, data.get("text_config"))
    fields = ("quantization_config", "compression_config")
    return [
        (field, section[field])
        for section in sections
        for field in fields
        if isinstance(section, dict) and section.get(field)
    ]


def _format(about: Any) -> Format | str:
    """The nearest of our formats; or the name of a way to quantise that is not read."""
    name = _method(about)
    if not isinstance(about, dict):
        return name
    if about.get("quant_method") == COMPRESSED:
        unread = _unread(about)
        return f"{COMPRESSED}, {unread}" if unread else _coarsest(about)
    if about.get("quant_method") in (None, "bitsandbytes"):
        if about.get("load_in_8bit") is True:
            return INT8
        if about.get("load_in_4bit") is True:
            kind = about.get("bnb_4bit_quant_type", "fp4")
            return Format(4, GROUPS[0]) if kind in ("nf4", "fp4") else f"{name}, {quote(kind)}"
    return name


def _unread(about: dict[str, Any]) -> str:
    """What is not read of what compressed-tensors writes; nothing if all is."""
    for way in (about, *_groups(about)):
        layout = way.get("format")
        if layout not in LAYOUTS and (layout is not None or way is about):
            return "no format" if layout is None else _word(layout)
    for field in ("kv_cache_scheme", "transform_config"):
        if about.get(field):
            return field
    sparsity = about.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        return "sparsity_config"
    return ""


def _groups(about: dict[str, Any]) -> list[dict[str, Any]]:
    """Of compressed-tensors: each a way to quantise, and the matrices that it is for."""
    groups = about.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def _coarsest(about: dict[str, Any]) -> Format:
    """Of several formats of compressed-tensors the one that takes the most memory."""
    found = []
    for group in _groups(about):
        weights = group.get("weights")
        if isinstance(weights, dict) and weights.get("num_bits") == 4:
            size = weights.get("group_size")
            found.append(nearest_int4(size if type(size) is int and size > 0 else GROUPS[-1]))
        elif isinstance(weights, dict):
            return INT8
    return min(found, key=lambda form: form.group, default=INT8)


def _method(about: Any) -> str:
    """The name of a way to quantise, and its bits where they are told."""
    if not isinstance(about, dict):
        return quote(about)
    bits = next((n for n in (4, 8) if about.get(f"load_in_{n}bit") is True), about.get("bits"))
    method = about.get("quant_method")
    if method is None:
        method = "bitsandbytes" if "load_in_4bit" in about or "load_in_8bit" in about else "unnamed"
    name = _word(method)
    return f"{name}, {bits}-bit" if type(bits) is int and 0 < bits < 64 else name


def _word(value: Any) -> str:
    return printable(value) if isinstance(value, str) else quote(value)


def _unquantised(data: dict[str, Any], where: object) -> str:
    """The repository that a quantised one was made from, as its names and sizes tell."""
    origin = data.get("_name_or_path")
    origin = origin if isinstance(origin, str) and REPOSITORY.fullmatch(origin) else ""
    if origin and not QUANTISED_NAME.search(origin):
        return origin
    names = f"{origin} {where}"
    if GUARD.search(names):
        return "meta-llama/Llama-Guard-3-11B-Vision"
    text = data.get("text_config")
    width = text.get("hidden_size") if isinstance(text, dict) else None
    size = PUBLISHED_SIZES.get(width) if type(width) is int else None
    instruct = "-Instruct" if "instruct" in names.lower() else ""
    if named := PUBLISHED.search(names):
        size, instruct = named[1].upper(), "-Instruct" if named[2] else ""
    if size is None:
        return "that it was made from"
    likely = f"meta-llama/Llama-3.2-{size}-Vision{instruct}"
    return likely if named or instruct else f"such as {likely} (or its -Instruct)"


def what_it_is(directory: Path) -> str:
    """What a directory without weights or config.json holds instead, for a message; or nothing."""
    if is_there(directory / ADAPTER):
        return _adapter(directory / ADAPTER)
    for meta in (directory, directory / "original"):
        parts = sorted(path.name for path in _matching(meta, "consolidated*.pth"))
        if parts or is_there(meta / META_PARAMETERS):
            held = some(parts) if parts else META_PARAMETERS
            return (
                f"{held} is of Meta's own layout: run "
                f"`python weights/convert_meta.py {shown(meta)} TARGET` and load TARGET"
            )
    kinds = ("*.bin", "*.pth", "*.pt")
    pickles = sorted(path.name for kind in kinds for path in _matching(directory, kind))
    if pickles:
        return (
            f"{some(pickles)} may run code when opened and is never loaded: save it as safetensors"
        )
    if ggufs := sorted(path.name for path in _matching(directory, "*.gguf")):
        return f"{some(ggufs)} is of llama.cpp; take the checkpoint in safetensors"
    return ""


def _adapter(path: Path) -> str:
    """Of a LoRA's file: the model that it was trained on."""
    try:
        base = read_json(path, ConfigError).get("base_model_name_or_path")
    except ConfigError:
        base = None
    named = isinstance(base, str) and base
    return (
        f"{ADAPTER} says that it is an adapter (LoRA), not a model: load "
        f"{printable(base) if named else 'the model that it was trained on'} "
        "and give this with --adapter (adapter=)"
    )


def _matching(directory: Path, pattern: str) -> list[Path]:
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []
