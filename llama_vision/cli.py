"""The command: arguments in, text streamed to stdout, problems as one line on stderr."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from llama_vision.chat import Prompt, PromptError, chat_prompt, completion_prompt, place_images
from llama_vision.config import LlamaVisionError
from llama_vision.decoding import Generation
from llama_vision.generation import PREFILL_CHUNK, LlamaVision, check_max_new_tokens
from llama_vision.image import open_image
from llama_vision.pruning import (
    KeyNorm,
    LastQuery,
    Pruner,
    PruningError,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.sampling import Sampling
from llama_vision.tokenizer import PlainBytes

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EMBEDDED_MODEL = Path(__file__).resolve().parent.parent / "weights" / "pico"
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
    add("--prompt", required=True, metavar="TEXT")
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
    add("--ignore-stop", action="store_true", help="go on past stop tokens")
    add("--stats", action="store_true", help="print tokens, memory and times to stderr")
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
    """Load, answer, report; Ctrl-C ends the answer and keeps what there is of it."""
    # First what can be refused without the weights: they take long to load.
    check_max_new_tokens(options.max_new_tokens)
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k")}
    Sampling(**{name: value for name, value in sampling.items() if value is not None})
    pruner = build_pruner(options)
    images = [open_image(path) for path in options.image]
    start = time.perf_counter()
    model = LlamaVision.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    load_seconds = time.perf_counter() - start
    if model.tokenizer is not None and isinstance(model.tokenizer.vocabulary, PlainBytes):
        note = "the checkpoint has no tokenizer; text is read and written as plain bytes"
        print(f"llama-vision: {note}", file=sys.stderr)
    prompt = build_prompt(model, options, images)
    generation = model.start(
        [prompt],
        max_new_tokens=options.max_new_tokens,
        **sampling,
        seed=options.seed,
        pruner=pruner,
        visual_budget=options.visual_budget,
        ignore_stop=options.ignore_stop,
        max_seq_len=options.max_seq_len,
        max_tiles=options.max_tiles,
        prefill_chunk=options.prefill_chunk,
    )
    exit_code = 0
    try:
        for piece in generation.text_pieces():
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    print()
    report = make_report(options.model, model, prompt, generation, load_seconds)
    if options.stats:
        print(format_stats(report), file=sys.stderr)
    if options.json:
        print(json.dumps(report))
    return exit_code


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


def make_report(
    name: str,
    model: LlamaVision,
    prompt: Prompt,
    generation: Generation,
    load_seconds: float,
) -> dict[str, Any]:
    """What --json prints: bytes, seconds, and the completion itself."""
    (completion,) = generation.completions()
    seconds = {"load": load_seconds, **generation.seconds}
    steps = len(completion.token_ids)
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_token_ids": list(prompt.token_ids),
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
        "model": str(name),
        "device": str(model.model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "visual_tokens": completion.visual_tokens._asdict(),
        "memory": {
            "weights": sum(parameter.nbytes for parameter in model.model.parameters()),
            "text_cache": generation.cache.text.nbytes,
            "visual_cache": generation.cache.visual.nbytes,
            "peak": peak_memory(model.model.device),
        },
        "seconds": seconds,
        "tokens_per_second": steps / seconds["decode"] if seconds["decode"] else 0.0,
    }


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far: the allocator's count on CUDA, this process's elsewhere.

    None where the system does not say (Windows, without CUDA).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts in bytes or in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def format_stats(report: dict[str, Any]) -> str:
    """The report as a few lines for people."""
    tokens, memory, seconds = report["visual_tokens"], report["memory"], report["seconds"]
    sizes = "  ".join(f"{name} {human_bytes(size)}" for name, size in memory.items() if size)
    times = "  ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return (
        f"tokens   prompt {len(report['prompt_token_ids'])}  "
        f"generated {len(report['token_ids'])} ({report['finish_reason']})  "
        f"{report['tokens_per_second']:.1f} per second\n"
        f"visual   encoded {tokens['encoded']}  valid {tokens['valid']}  kept {tokens['kept']}\n"
        f"memory   {sizes}\n"
        f"time     {times}\n"
        f"on       {report['device']}, {report['dtype']}"
    )


def human_bytes(size: float) -> str:
    """Bytes in the unit that keeps the number below 1024."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
