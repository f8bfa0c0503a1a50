"""The command line of `tools/evaluate.py`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluation.answering import Answerer, check_template
from evaluation.arms import MERGED, NAMES, Arm, make_arms
from evaluation.datasets import BadRow, Row, read_rows, sha256
from evaluation.records import Records
from evaluation.report import as_markdown, as_paper_row, compare, write_files
from evaluation.run import ask_all
from evaluation.scoring import METRICS, checked, metric_of
from llama_vision import LlamaVision
from llama_vision.cache.rules import SHARE
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.arguments import Parser
from llama_vision.cli.parsing import real, text, whole
from llama_vision.cli.terminal import run_command, tell, write
from llama_vision.engine.workload import SLOTS
from llama_vision.errors import LlamaVisionError, printable, quote, some
from llama_vision.values import ListOf, Whole, check

PROGRAM = "evaluate"
RULES = ("trimmed", f"max-min{MERGED}", "uniform", "random")
SHARES = (0.75, 0.5, 0.25, 0.1)
SHORT, LONG = 128, 512
"""Tokens of an answer: a choice or yes or no, anything else. Source: VLMEvalKit."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `run_command`."""
    return run_command(PROGRAM, lambda: run(read_arguments(arguments)))


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        LlamaVisionError: it cannot be parsed, or a value is out of range.
    """
    parser = Parser(prog=PROGRAM, description="A benchmark with fewer visual tokens.")
    add = parser.add_argument
    add("--model", default=str(EMBEDDED_MODEL), metavar="DIR|REPO", help="default: pico")
    add("--data", type=Path, required=True, metavar="FILE", help="VLMEvalKit's .tsv, or .jsonl")
    add("--out", type=Path, required=True, metavar="DIR", help="where to write, and to go on")
    add("--metric", choices=METRICS, help="default: by the columns; OCRBench needs contains")
    names = f"of {', '.join(NAMES)}, each also with {MERGED}; trimmed is always there"
    add("--rules", nargs="+", type=text, default=RULES, metavar="RULE", help=names)
    add("--shares", nargs="+", type=real, default=SHARES, metavar="R", help="tokens to keep")
    add("--paper", type=real, metavar="K", help="print the row of the paper's table for K_ratio K")
    add("--limit", type=whole, metavar="N", help="the first N rows only")
    add("--batch", type=whole, default=1, metavar="N", help="rows answered together")
    add("--max-new-tokens", type=whole, metavar="N", help="of an answer; default: by the metric")
    parts = "the question's text, with {question}, {hint} and {options} in it"
    add("--prompt-template", type=text, metavar="TEXT", help=parts)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    check("--shares", options.shares, ListOf(SHARE, least=1))
    check("--batch", options.batch, SLOTS)
    for name in ("limit", "max_new_tokens"):
        if getattr(options, name) is not None:
            check(f"--{name.replace('_', '-')}", getattr(options, name), Whole(1))
    if options.paper is not None:
        check("--paper", options.paper, SHARE)
    check_template(options.prompt_template)
    return options


def run(options: argparse.Namespace) -> int:
    """Read, answer, compare and write."""
    arms = arms_of(options)
    rows = read_rows(options.data, options.limit)
    metric = options.metric or metric_of(rows)
    rows = [checked(row, metric) for row in rows]
    if options.metric is None:
        tell(f"scored by {metric}, for the columns; --metric chooses", PROGRAM)
    most = options.max_new_tokens or (SHORT if is_short(rows, metric) else LONG)
    folder = make_folder(options.out)
    model = LlamaVision.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    settings = settings_of(options, model, most)
    records = Records(folder / "answers.jsonl", settings)
    answerer = Answerer(model, max_new_tokens=most, template=options.prompt_template)
    ask_all(answerer, rows, arms, records, options.batch)
    records.close()
    found = compare(rows, arms, records, metric, settings)
    name = "comparison" if options.paper is None else "paper"
    written = write_files(found, folder, name)
    if options.paper is None:
        write(as_markdown(found), end="")
    else:
        write(as_paper_row(found, Path(options.model).name, options.data.stem), end="")
    if found["rows"]["bad"]:
        tell(f"left out {found['rows']['bad']} rows: {some(found['rows']['first'])}", PROGRAM)
    if "png" not in written:
        tell(f'no {name}.png: it needs matplotlib, pip install -e ".[tools]"', PROGRAM)
    return 0


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """All tokens, and the rules at all shares; or, for the paper's row, its rule at K_ratio."""
    if options.paper is not None:
        return make_arms(["trimmed"], shares=[], k_ratios=[options.paper])
    return make_arms(options.rules, shares=options.shares, k_ratios=[])


def is_short(rows: Sequence[Row | BadRow], metric: str) -> bool:
    """Whether answers are a letter, or yes or no."""
    return metric == "yes-no" or any(isinstance(row, Row) and row.options for row in rows)


def settings_of(options: argparse.Namespace, model: LlamaVision, most: int) -> dict[str, Any]:
    """All that answers hang on; rules, shares and the metric may change from run to run."""
    return {
        "model": options.model,
        "data": sha256(options.data),
        "limit": options.limit,
        "batch": options.batch,
        "max_new_tokens": most,
        "prompt_template": options.prompt_template,
        "device": model.device.type,
        "dtype": str(model.model.dtype).removeprefix("torch."),
    }


def make_folder(path: Path) -> Path:
    """The folder to write to, made where it is not there.

    Raises:
        LlamaVisionError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        why = printable(getattr(error, "strerror", None) or error)
        raise LlamaVisionError(f"--out {quote(str(path))} cannot be made: {why}") from None
    return path
