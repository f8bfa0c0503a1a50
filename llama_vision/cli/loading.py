"""The checkpoint that a command names: what is known of it first, and later its weights."""

import argparse
from typing import Any

from llama_vision.api import LlamaVision
from llama_vision.cli.terminal import tell
from llama_vision.engine.capture import check_compiler
from llama_vision.engine.image_cache import ImageCache
from llama_vision.errors import some
from llama_vision.inputs.vocabulary import PlainBytes
from llama_vision.memory.fit import check_before_download
from llama_vision.memory.units import parse_bytes


def load_outline(options: argparse.Namespace) -> LlamaVision:
    """All of the checkpoint but its weights, if they would fit."""
    if not options.force:
        check_before_download(
            options.model, options.dtype, options.device, options.quantize, options.devices or 1
        )
    cache = None if options.image_cache is None else ImageCache(parse_bytes(options.image_cache))
    model = LlamaVision.without_weights(options.model, device=options.device, **of_model(options))
    model.image_cache = cache
    if model.outline.conversion:
        tell(model.outline.conversion)
    if model.outline.adapter is not None:
        tell(f"the adapter is merged: {model.outline.adapter}")
    if model.tokenizer is not None and isinstance(model.tokenizer.vocabulary, PlainBytes):
        tell("the checkpoint has no tokenizer; text is read and written as plain bytes")
    if model.unsupported_settings:
        names = some(list(model.unsupported_settings))
        tell(f"generation_config.json asks for {names}, which is not supported and ignored")
    return model


def of_model(options: argparse.Namespace) -> dict[str, Any]:
    """What `LlamaVision.without_weights` takes beside the device."""
    return {
        "dtype": options.dtype,
        "quantize": options.quantize,
        "adapter": options.adapter,
        "devices": options.devices or 1,
    }


def load_weights(model: LlamaVision, options: argparse.Namespace) -> None:
    """Those of an outline; they take long, so what can be refused without them goes before."""
    if options.compile:
        check_compiler(model.device.type)
    model.load_weights(force=options.force)
