"""The command: text streamed to stdout, problems as one line on stderr."""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from llama_vision.api import LlamaVision
from llama_vision.checkpoint.devices import parse_device
from llama_vision.checkpoint.hub import load_config
from llama_vision.checkpoint.resolve import resolve
from llama_vision.cli.arguments import build_pruner, build_quantization, read_arguments
from llama_vision.cli.batch import check_batch, run_batch
from llama_vision.cli.chat import check_chat, talk
from llama_vision.cli.loading import load_outline, load_weights, of_model
from llama_vision.cli.reports import format_stats, make_report, print_plan
from llama_vision.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    run_command,
    silent,
    tell,
    tell_table,
    write,
)
from llama_vision.config import divided
from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Request
from llama_vision.engine.settings import Settings
from llama_vision.engine.settings_json import SETTING_NAMES
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, workload_alike
from llama_vision.errors import SettingError, some
from llama_vision.inputs.chat import (
    IMAGE_PLACE,
    Prompt,
    PromptError,
    chat_prompt,
    completion_prompt,
    place_images,
)
from llama_vision.inputs.guard import llama_guard_prompt
from llama_vision.inputs.image import open_image
from llama_vision.inputs.special import BEGIN_OF_TEXT, reading_special, special_names
from llama_vision.inputs.tokenizer import Tokenizer
from llama_vision.model import parallel
from llama_vision.show.write import check_target, show_kept
from llama_vision.values import Whole, check

__all__ = ["EXIT_INTERRUPTED", "EXIT_USAGE", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `run_command`."""
    given = sys.argv[1:] if arguments is None else arguments
    return parallel.leave(run_command("llama-vision", lambda: run_divided(read_arguments(given))))


def run_divided(options: argparse.Namespace) -> int:
    """Run alone, or as one of the processes that torchrun starts, of which the first talks."""
    processes = parallel.start()
    try:
        if processes == 1:
            return run(options)
        if options.devices not in (None, processes):
            raise SettingError(f"--devices is {options.devices} and torchrun runs {processes}")
        options.devices = processes
        if options.device in ("auto", "cuda") and torch.cuda.is_available():
            options.device = f"cuda:{os.environ['LOCAL_RANK']}"
        with silent() if parallel.rank() else contextlib.nullcontext():
            return run(options)
    finally:
        parallel.stop()


def run(options: argparse.Namespace) -> int:
    """Refuse what can be refused without the weights; then plan, or answer."""
    options.quantize = build_quantization(options)
    if options.devices is not None:
        check("devices", options.devices, Whole(1, 1024))
        if not (parallel.is_shared() or options.plan or options.fit is not None):
            raise SettingError(
                "--devices is of --plan and --fit; to run, torchrun --nproc-per-node "
                f"{options.devices} generate.py …"
            )
    check_question(options)
    check_batch(options)
    check_chat(options)
    settings = chosen_settings(options)
    Settings(**settings)
    check_target(
        options.show_kept, options.image, pruned="pruner" in settings, others=options.show_rules
    )
    images = [open_image(path) for path in options.image]
    if options.plan or options.fit is not None:
        return plan(options, images, settings)
    if options.batch is not None:
        return run_batch(options, settings, load_outline(options))
    if options.chat:
        return talk(options, images, settings, load_outline(options))
    if options.prompt is None:
        raise PromptError("there is no --prompt; expected a question or a text to go on from")
    return ask(options, images, settings)


def ask(options: argparse.Namespace, images: list[Image], settings: dict[str, Any]) -> int:
    """Load, answer one prompt and report."""
    start = time.perf_counter()
    model = load_outline(options)
    prompt = build_prompt(model, options, images)
    if not options.force:
        model.room.fitted(model.workload([prompt], **settings))
    load_weights(model, options)
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


def check_question(options: argparse.Namespace) -> None:
    """Refuse what cannot be asked for together.

    Raises:
        PromptError: says what to leave out.
    """
    if options.response is not None and not options.guard:
        raise PromptError("--response is an answer that --guard judges; give both, or neither")
    if options.raw and options.system is not None:
        raise PromptError("--system needs the chat format; leave out --raw or --system")
    for flag in ("raw", "system", "parse_special"):
        if options.guard and getattr(options, flag):
            name = flag.replace("_", "-")
            raise PromptError(f"--guard has a format of its own; leave out --guard or --{name}")


def chosen_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Those of `Settings` that were given; the others stay at its defaults."""
    given = {name: getattr(options, name) for name in SETTING_NAMES}
    given["pruner"] = build_pruner(options)
    if options.guard and options.temperature is None:
        given["temperature"] = 0  # a verdict is no matter of chance
    return {name: value for name, value in given.items() if value is not None}


def answer(
    model: LlamaVision,
    engine: Engine,
    request: Request,
    load_seconds: float,
    options: argparse.Namespace,
) -> int:
    """Stream the answer, then report; Ctrl-C ends the answer and keeps what there is of it."""
    exit_code = 0
    begun = not options.guard  # Llama Guard's verdict comes after two line ends
    try:
        for piece in engine.stream(request):
            shown = piece if begun else piece.lstrip("\n")
            begun = begun or bool(shown)
            write(shown, end="")
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    write("")
    if options.stats or options.json:
        report = make_report(options.model, model, engine, request, load_seconds)
    if options.stats:
        tell_table(format_stats(report))
    if options.json:
        write(json.dumps(report, allow_nan=False))
    if options.show_kept is not None and request.kept and not parallel.rank():
        how = {"question": options.prompt, "others": options.show_rules}
        show_kept(options.show_kept, model, request, **how)
    return exit_code


def plan(options: argparse.Namespace, images: list[Image], settings: dict[str, Any]) -> int:
    """Print what the run would take, or the largest that would fit, and stop.

    Of a checkpoint that is here and a prompt the plan is exact. Otherwise it is for so many images
    as were given, or one of all tiles, and prompts as long as there is room for.
    """
    device = parse_device(options.device)
    if options.prompt is not None and os.path.isdir(os.path.expanduser(options.model)):
        model = LlamaVision.without_weights(options.model, device="cpu", **of_model(options))
        config, dtype = model.config, model.model.dtype
        workload = model.workload([build_prompt(model, options, images)], **settings)
    else:
        config = divided(load_config(options.model), options.devices or 1)
        config, dtype = resolve(config, None, options.quantize, options.dtype)
        workload = workload_alike(
            config,
            images=len(images) or 1,
            tiles=options.max_tiles,
            max_seq_len=options.max_seq_len or DEFAULT_SEQ_LEN,
            visual_budget=options.visual_budget,
            pruner=settings.get("pruner"),
            prefill_chunk=options.prefill_chunk,
        )
    return print_plan(
        options.model, config, workload, dtype, device, fit=options.fit, as_json=options.json
    )


def build_prompt(model: LlamaVision, options: argparse.Namespace, images: list[Any]) -> Prompt:
    """A chat of one turn, with --raw a completion, with --guard what Llama Guard judges."""
    tokenizer = model.need_tokenizer()
    text, content = options.prompt, [*images, options.prompt]
    if options.parse_special:
        tokenizer = reading_special(tokenizer)
    else:
        tell_of_special(options, tokenizer)
    if options.raw or options.parse_special:
        text = text.removeprefix(BEGIN_OF_TEXT) if options.parse_special else text
        content = place_images(text, images)
    if options.raw:
        return completion_prompt(content, tokenizer)
    messages = [{"role": "user", "content": content}]
    if options.guard:
        answers = [] if options.response is None else [options.response]
        messages += [{"role": "assistant", "content": answer} for answer in answers]
        return llama_guard_prompt(messages, tokenizer)
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return chat_prompt(messages, tokenizer)


def tell_of_special(options: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Say which special tokens a text names that is not read for them."""
    remedy = "" if options.guard else "; --parse-special reads such names as tokens"
    for flag in ("system", "prompt", "response"):
        names = special_names(getattr(options, flag) or "", tokenizer)
        if options.raw:
            names = [name for name in names if name != IMAGE_PLACE]  # it is read, as a place
        if names:
            tell(f"--{flag} has {some(names)}, taken as text{remedy}")
