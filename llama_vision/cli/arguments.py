"""Arguments of the command, and the rule of pruning that they ask for."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

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
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.engine.workload import PREFILL_CHUNK

EXIT_USAGE = 2

PRUNERS = {
    "top-k": TopK,
    "last-query": LastQuery,
    "key-norm": KeyNorm,
    "uniform": UniformGrid,
    "random": RandomTokens,
}


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
    _add_question(parser.add_argument_group("question"))
    _add_answer(parser.add_argument_group("answer"))
    _add_pruning(parser.add_argument_group("pruning"))
    _add_memory(parser.add_argument_group("device and memory"))
    return parser.parse_args([_with_dashes(argument) for argument in arguments])


Group = argparse._ArgumentGroup


def _add_question(group: Group) -> None:
    add = group.add_argument
    add(
        "--model",
        default=str(EMBEDDED_MODEL),
        metavar="DIR|REPO",
        help="checkpoint in the official layout (default: the small one that comes with the code)",
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
    add("--max-tiles", type=int, metavar="N", help="most tiles an image is cut into")


def _add_answer(group: Group) -> None:
    add = group.add_argument
    add("--max-new-tokens", "--max-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, metavar="T", help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K", help="0 is no limit")
    add("--seed", type=int, metavar="N", help="make the random draws repeatable")
    add("--ignore-stop", action="store_true", help="go on past stop tokens")
    add(
        "--stats",
        action="store_true",
        help="print tokens, times, and memory beside its plan to stderr",
    )
    add("--json", action="store_true", help="print one JSON object on the last line of stdout")


def _add_pruning(group: Group) -> None:
    add = group.add_argument
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


def _add_memory(group: Group) -> None:
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--max-seq-len", type=int, metavar="N", help="most tokens of prompt and answer together")
    add(
        "--prefill-chunk",
        type=int,
        default=PREFILL_CHUNK,
        metavar="N",
        help="most prompt tokens that go through a block at once (default: %(default)s); it "
        "changes no answer, only what memory a long prompt needs",
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
        help="compile decoding: the first run waits for it; worth it for long answers",
    )
    add("--no-graphs", action="store_true", help="on CUDA, do not capture decoding as graphs")
    add("--force", action="store_true", help="go on even where memory seems not to suffice")


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
