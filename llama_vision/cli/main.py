"""The command: arguments in, text streamed to stdout, problems as one line on stderr."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from PIL.Image import Image

from llama_vision.api import LlamaVision, check_max_new_tokens
from llama_vision.cache.pruning import (
    KeyNorm,
    LastQuery,
    Pruner,
    PruningError,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.checkpoint.loading import choose_dtype, load_config, parse_device
from llama_vision.cli.reports import format_stats, make_report, print_plan
from llama_vision.config import LlamaVisionError
from llama_vision.engine.decode import check_compiler
from llama_vision.engine.engine import Generation
from llama_vision.engine.sampling import Sampling
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
from llama_vision.memory.largest import DEFAULT_SEQ_LEN, workload_alike
from llama_vision.memory.plan import PREFILL_CHUNK

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "weights" / "pico"
"""The small trained model beside the package, in a checkout."""

PRUNERS = {
    "top-k": TopK,
    "last-query": LastQuery,
    "key-norm": KeyNorm,
    "uniform": UniformGrid,
    "random": RandomTokens,
}


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


class _Parser(argparse.ArgumentParser):
    """argparse with one message for a mistake, and no page of usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; see --help\n")


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `--max-new-tokens`, `--max_new_tokens` and `--max-tokens` are one."""
    parser = _Parser(
        prog="llama-vision",
        description="Ask Llama-3.2-Vision about pictures.",
        epilog="Text streams to stdout; progress, statistics and problems go to stderr.",
    )
    add = parser.add_argument
    add(
        "--model",
        default=str(EMBEDDED_MODEL),
        metavar="DIR|REPO",
        help="checkpoint in the official layout (default: the small one in weights/)",
    )
    add("--image", action="append", default=[], metavar="PATH", help="a picture; may be repeated")
    add("--prompt", metavar="TEXT")
    add("--system", metavar="TEXT", help="system message")
    add(
        "--raw",
        action="store_true",
        help="no chat format: complete the text, for base models; <|image|> marks places for "
        "images, else they go first",
    )
    add("--max-new-tokens", "--max-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K", help="0 is no limit")
    add("--seed", type=int, metavar="N", help="make the random draws repeatable")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--max-seq-len", type=int, metavar="N", help="most tokens of prompt and answer together")
    add("--max-tiles", type=int, metavar="N", help="most tiles an image is cut into")
    add(
        "--prefill-chunk",
        type=int,
        default=PREFILL_CHUNK,
        metavar="N",
        help="most prompt tokens that go through a block at once (default: %(default)s); it "
        "changes no answer, only what memory a long prompt needs",
    )
    add(
        "--k-ratio",
        type=float,
        metavar="R",
        help="prune with Trimmed Llama: top-k per head, k = R·V",
    )
    add("--pruner", choices=PRUNERS, help="prune with a baseline; needs --keep")
    add(
        "--keep", type=number, metavar="R|N", help="visual tokens to keep: 0.5 is half, 800 a count"
    )
    add(
        "--visual-budget",
        type=number,
        metavar="R|N",
        help="most visual tokens to keep, and the size of their cache",
    )
    add(
        "--plan",
        action="store_true",
        help="print what memory the run takes and stop, before any weight is read; --model may "
        "also be 11b or 90b",
    )
    add(
        "--fit",
        nargs="?",
        const="free",
        metavar="SIZE",
        help="print the largest batch, images and lengths that fit into so much memory, such as "
        "24GiB (default: what is free), and stop",
    )
    add(
        "--compile",
        action="store_true",
        help="compile decoding: the first run waits for it; worth it for long answers, above all "
        "on CUDA",
    )
    add("--force", action="store_true", help="go on even where memory seems not to suffice")
    add("--ignore-stop", action="store_true", help="go on past stop tokens")
    add(
        "--stats",
        action="store_true",
        help="print tokens, times, and memory beside its plan to stderr",
    )
    add("--json", action="store_true", help="print one JSON object on the last line of stdout")
    return parser.parse_args([_with_dashes(argument) for argument in arguments])


def number(text: str) -> int | float:
    """`800` is a count, `0.5` a fraction."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


def build_pruner(options: argparse.Namespace) -> Pruner | None:
    """The rule that --k-ratio or --pruner asks for."""
    if (options.pruner is None) != (options.keep is None):
        raise PruningError("--pruner NAME and --keep R|N need each other; give both")
    if options.k_ratio is not None and options.pruner is not None:
        raise PruningError("--k-ratio is Trimmed Llama; leave out --k-ratio or --pruner")
    if options.k_ratio is not None:
        return TrimmedLlama(options.k_ratio)
    if options.pruner is None:
        return None
    rule = PRUNERS[options.pruner]
    seed = {"seed": options.seed or 0} if options.pruner == "random" else {}
    return rule(options.keep, **seed)


def _with_dashes(argument: str) -> str:
    """`--max_seq_len=5` -> `--max-seq-len=5`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def run(options: argparse.Namespace) -> int:
    """Plan, or load, answer and report."""
    # First what can be refused without the weights: they take long to load.
    check_max_new_tokens(options.max_new_tokens)
    drawing = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    Sampling(**{name: value for name, value in drawing.items() if value is not None})
    sizes = {
        "max_new_tokens": options.max_new_tokens,
        "pruner": build_pruner(options),
        "visual_budget": options.visual_budget,
        "max_seq_len": options.max_seq_len,
        "max_tiles": options.max_tiles,
        "prefill_chunk": options.prefill_chunk,
    }
    images = [open_image(path) for path in options.image]
    if options.plan or options.fit is not None:
        return plan(options, images, sizes)
    if options.prompt is None:
        raise PromptError("there is no --prompt; expected a question or a text to go on from")
    start = time.perf_counter()
    if not options.force:
        check_before_download(options.model, options.dtype, options.device)
    model = LlamaVision.without_weights(options.model, device=options.device, dtype=options.dtype)
    if model.tokenizer is not None and isinstance(model.tokenizer.vocabulary, PlainBytes):
        note = "the checkpoint has no tokenizer; text is read and written as plain bytes"
        print(f"llama-vision: {note}", file=sys.stderr)
    prompt = build_prompt(model, options, images)
    if not options.force:
        model.check_fits(model.workload([prompt], **sizes))
    if options.compile:
        check_compiler(model.device.type)
    model.load_weights(force=options.force)
    load_seconds = time.perf_counter() - start
    generation = model.start(
        [prompt],
        **sizes,
        **drawing,
        seed=options.seed,
        ignore_stop=options.ignore_stop,
        compiled=options.compile,
        track_memory=options.stats or options.json,
        force=options.force,
    )
    return answer(model, prompt, generation, load_seconds, options)


def answer(
    model: LlamaVision,
    prompt: Prompt,
    generation: Generation,
    load_seconds: float,
    options: argparse.Namespace,
) -> int:
    """Stream the answer, then report; Ctrl-C ends the answer and keeps what there is of it."""
    exit_code = 0
    try:
        for piece in generation.text_pieces():
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    print()
    if options.stats or options.json:
        report = make_report(options.model, model, prompt, generation, load_seconds)
    if options.stats:
        print(format_stats(report), file=sys.stderr)
    if options.json:
        print(json.dumps(report))
    return exit_code


def plan(options: argparse.Namespace, images: list[Image], sizes: dict[str, Any]) -> int:
    """Print what the run would take, or the largest that would fit, and stop.

    Of a checkpoint that is here and a prompt the plan is exact. Otherwise it is for so many images
    as were given, or one of all tiles, and prompts as long as there is room for.
    """
    device = parse_device(options.device)
    if options.prompt is not None and Path(options.model).expanduser().is_dir():
        model = LlamaVision.without_weights(options.model, device="cpu", dtype=options.dtype)
        config, dtype = model.config, model.model.dtype
        workload = model.workload([build_prompt(model, options, images)], **sizes)
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
