"""What people have that is near to a checkpoint of this layout: what it is, and what to do."""

import re
from pathlib import Path
from typing import Any

from llama_vision.config import ConfigError
from llama_vision.errors import printable, quote, some
from llama_vision.reading import is_there, read_json, shown

ADAPTER = "adapter_config.json"
META_PARAMETERS = "params.json"

TEXT_ONLY = "mllama_text_model"
"""`model_type` of what transformers' MllamaForCausalLM saves."""

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
        ConfigError: quantised weights, or the text part alone.
    """
    if data.get("model_type") == TEXT_ONLY:
        raise ConfigError(
            f"config.json: model_type is {TEXT_ONLY!r}, the text part of Llama 3.2 Vision without "
            "its vision encoder; expected 'mllama', a full checkpoint "
            "(MllamaForConditionalGeneration): save or take that one"
        )
    for section in (data, data.get("text_config")):
        for field in ("quantization_config", "compression_config"):
            about = section.get(field) if isinstance(section, dict) else None
            if about:
                raise ConfigError(
                    f"config.json: {field} says that the weights are quantised "
                    f"({_method(about)}), which is not supported; take the unquantised "
                    f"checkpoint, {_unquantised(data, where)}"
                )


def _method(about: Any) -> str:
    """The name of a way to quantise, and its bits where they are told."""
    if not isinstance(about, dict):
        return quote(about)
    bits = next((n for n in (4, 8) if about.get(f"load_in_{n}bit") is True), about.get("bits"))
    method = about.get("quant_method")
    if method is None:
        method = "bitsandbytes" if "load_in_4bit" in about or "load_in_8bit" in about else "unnamed"
    name = printable(method) if isinstance(method, str) else quote(method)
    return f"{name}, {bits}-bit" if type(bits) is int and 0 < bits < 64 else name


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
        f"{ADAPTER} says that it is an adapter (LoRA), not a model: merge it into "
        f"{printable(base) if named else 'the model that it was trained on'} "
        "(peft: merge_and_unload, then save_pretrained) and load what that writes"
    )


def _matching(directory: Path, pattern: str) -> list[Path]:
    try:
        return list(directory.glob(pattern))
    except OSError:
        return []
