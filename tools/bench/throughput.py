"""Tokens a second where an engine answers many prompts, and how long each waits for its first.

    python tools/bench/throughput.py 340m --prompts 16
    python tools/bench/throughput.py 340m --prompts 64 --slots 16 --tiles 0 --new-tokens 4 128
    python tools/bench/throughput.py weights/pico --package ../other  # beside another checkout

Another checkout of this project answers the same prompts with the same weights in a process of its
own, in turns; the ratio is the median over rounds. The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from machine import describe, versions
from models import bench_parser, named_config, random_model, save_checkpoint
from progress import redraw

from llama_vision.config import DTYPES

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    options = parse()
    packages = {"this": ROOT}
    if options.package:
        packages["other"] = Path(options.package).resolve()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = describe(torch.device(options.device))
    print(
        f"{options.model}, {options.dtype}, {device}: {options.prompts} prompts of "
        f"{options.prompt_tokens} tokens and {options.tiles} tiles, {options.slots} slots"
    )
    with ExitStack() as stack:
        checkpoint = options.model
        if not Path(checkpoint).is_dir():
            checkpoint = stack.enter_context(tempfile.TemporaryDirectory())
            config, dtype = named_config(options.model), DTYPES[options.dtype]
            model = random_model(config, dtype, torch.device("cpu"))
            save_checkpoint(model, Path(checkpoint))
            del model
        answerers = {
            name: stack.enter_context(
                Answerer(package, {**vars(options), "checkpoint": checkpoint})
            )
            for name, package in packages.items()
        }
        rounds = alternate(answerers, options.rounds)
    document = {"device": device, "versions": versions(), "settings": vars(options)}
    print(json.dumps(document | compare(rounds)))


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--prompts", type=int, default=16)
    add("--slots", type=int, help="prompts that are answered at once (default: all)")
    add("--tiles", type=int, default=4, choices=range(5), help="of each prompt's picture; 0: none")
    add("--prompt-tokens", type=int, default=40)
    add("--new-tokens", type=int, nargs="+", default=[32], help="of all answers; or least and most")
    add("--compile", action="store_true")
    add("--package", metavar="DIR", help="another checkout to compare with")
    options = parser.parse_args()
    options.slots = options.slots or options.prompts
    return options


class Answerer:
    """A process of one checkout, which waits for its turn."""

    def __init__(self, package: Path, settings: dict[str, Any]):
        script = Path(__file__).with_name("answerer.py")
        command = [sys.executable, script, json.dumps({**settings, "package": str(package)})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        loaded = Path(self.read())
        assert loaded.is_relative_to(package), f"{loaded} is of another checkout than {package}"

    def __enter__(self) -> "Answerer":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def read(self) -> Any:
        """What it says next."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit("an answering process has ended; its error is above")
        return json.loads(line)

    def round(self) -> dict[str, Any]:
        """Let it answer everything once."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()


def alternate(answerers: dict[str, Answerer], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Everyone once a round, in turn; the first round warms up and is not counted."""
    made = {name: [] for name in answerers}
    for number in range(rounds + 1):
        for name, answerer in answerers.items():
            redraw(f"round {number} of {rounds}: {name}")
            result = answerer.round()
            if number:
                made[name].append(result)
    redraw()
    return made


def compare(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds, as a table; and whether all have answered the same."""
    tokens = sum(map(len, rounds["this"][0]["answers"]))
    document = {"tokens": tokens}
    print(f"{'':<8}{'seconds':>10}{'tokens/s':>10}{'first token after':>22}: first, median, last")
    for name, of_one in rounds.items():
        seconds = [result["seconds"] for result in of_one]
        firsts = zip(*(result["first"] for result in of_one), strict=True)
        first = [statistics.median(times) for times in firsts]
        speed = tokens / statistics.median(seconds)
        document[name] = {"seconds": seconds, "tokens_per_second": speed, "first_token": first}
        spread = (min(first), statistics.median(first), max(first))
        words = "".join(f"{time:>10.3f} s" for time in spread)
        print(f"{name:<8}{statistics.median(seconds):>10.3f}{speed:>10.1f}{words}")
    if "other" in rounds:
        this, other = rounds["this"], rounds["other"]
        answers = zip(this[0]["answers"], other[0]["answers"], strict=True)
        pairs = zip(this, other, strict=True)
        ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
        document |= {"ratio": ratio, "same_answers": sum(a == b for a, b in answers)}
        print(
            f"this is {ratio:.2f} × as fast; "
            f"{document['same_answers']} of {len(this[0]['answers'])} answers are the same"
        )
    return document


if __name__ == "__main__":
    main()
