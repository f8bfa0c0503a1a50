"""The command: text streamed to stdout, problems as one line on stderr."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from llama_vision.api import LlamaVision
from llama_vision.checkpoint.devices import choose_dtype, parse_device
from llama_vision.checkpoint.hub import load_config
from llama_vision.cli.arguments import EXIT_USAGE, build_pruner, read_arguments
from llama_vision.cli.reports import format_stats, make_report, print_plan
from llama_vision.engine.capture import check_compiler
from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Request
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, workload_alike
from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.chat import (
    Prompt,
    PromptError,
    chat_prompt,
    completion_prompt,
    place_images,
)
from llama_vision.inputs.image import open_image
from llama_vision.inputs.tokenizer import PlainBytes
from llama_vision.memory.fit import check_before_download

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. A user's mistake is 2 and one message."""
    try:
        return run(read_arguments(sys.argv[1:] if arguments is None else arguments))
    except LlamaVisionError as error:
        print(f"llama-vision: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("llama-vision: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def run(options: argparse.Namespace) -> int:
    """Plan, or load, answer and report."""
    # First what can be refused without the weights: they take long to load.
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "ignore_stop": options.ignore_stop,
        "pruner": build_pruner(options),
        "visual_budget": options.visual_budget,
        "max_seq_len": options.max_seq_len,
        "max_tiles": options.max_tiles,
        "prefill_chunk": options.prefill_chunk,
    }
    Settings(**settings)
    images = [open_image(path) for path in options.image]
    if options.plan or options.fit is not None:
        return plan(options, images, settings)
    if options.prompt is None:
        raise PromptError("there is no --prompt; expected a question or a text to go on from")
    start = time.perf_counter()
    model = load_outline(options)
    prompt = build_prompt(model, options, images)
    if not options.force:
        model.room.fitted(model.workload([prompt], **settings))
    if options.compile:
        check_compiler(model.device.type)
    model.load_weights(force=options.force)
    load_seconds = time.perf_counter() - start
    engine, (request,) = model.start(
        [prompt],
        compiled=options.compile,
        graphs=not options.no_graphs,
        track_memory=options.stats or options.json,
        force=options.force,
        **settings,
    )
    return answer(model, engine, request, load_seconds, options)


def load_outline(options: argparse.Namespace) -> LlamaVision:
    """All of the checkpoint but its weights, if they would fit."""
    if not options.force:
        check_before_download(options.model, options.dtype, options.device)
    model = LlamaVision.without_weights(options.model, device=options.device, dtype=options.dtype)
    if model.tokenizer is not None and isinstance(model.tokenizer.vocabulary, PlainBytes):
        note = "the checkpoint has no tokenizer; text is read and written as plain bytes"
        print(f"llama-vision: {note}", file=sys.stderr)
    return model


def answer(
    model: LlamaVision,
    engine: Engine,
    request: Request,
    load_seconds: float,
    options: argparse.Namespace,
) -> int:
    """Stream the answer, then report; Ctrl-C ends the answer and keeps what there is of it."""
    exit_code = 0
    try:
        for piece in engine.stream(request):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    print()
    if options.stats or options.json:
        report = make_report(options.model, model, engine, request, load_seconds)
    if options.stats:
        print(format_stats(report), file=sys.stderr)
    if options.json:
        print(json.dumps(report))
    return exit_code


def plan(options: argparse.Namespace, images: list[Image], settings: dict[str, Any]) -> int:
    """Print what the run would take, or the largest that would fit, and stop.

    Of a checkpoint that is here and a prompt the plan is exact. Otherwise it is for so many images
    as were given, or one of all tiles, and prompts as long as there is room for.
    """
    device = parse_device(options.device)
    if options.prompt is not None and Path(options.model).expanduser().is_dir():
        model = LlamaVision.without_weights(options.model, device="cpu", dtype=options.dtype)
        config, dtype = model.config, model.model.dtype
        workload = model.workload([build_prompt(model, options, images)], **settings)
    else:
        config = load_config(options.model)
        dtype = choose_dtype(options.dtype, config.dtype)
        workload = workload_alike(
            config,
            images=len(images) or 1,
            tiles=options.max_tiles,
            max_seq_len=options.max_seq_len or DEFAULT_SEQ_LEN,
            visual_budget=options.visual_budget,
            prefill_chunk=options.prefill_chunk,
        )
    return print_plan(
        options.model, config, workload, dtype, device, fit=options.fit, as_json=options.json
    )


def build_prompt(model: LlamaVision, options: argparse.Namespace, images: list[Any]) -> Prompt:
    """A chat of one turn, or with --raw a completion."""
    tokenizer = model.need_tokenizer()
    if options.raw:
        if options.system is not None:
            raise PromptError("--system needs the chat format; leave out --raw or --system")
        return completion_prompt(place_images(options.prompt, images), tokenizer)
    messages = [{"role": "user", "content": [*images, options.prompt]}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return chat_prompt(messages, tokenizer)
