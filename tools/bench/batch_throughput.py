"""Many prompts with answers of very different lengths: slot by slot, or in batches that wait.

    python tools/bench/batch_throughput.py weights/pico
    python tools/bench/batch_throughput.py 340m --dtype bfloat16 --rounds 3

The same engine answers the same prompts in three ways, in turns. slots: all are handed over at
once, and a slot whose answer has ended takes the next prompt. batches: each waits for its longest
answer, and a slot whose answer has ended stays empty. padded: it goes on with tokens that nobody
reads, as fixed batches do. Ratios are medians over rounds; those of decoding steps know no noise.
The last line of stdout is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from answerer import make_prompts
from machine import describe, versions
from models import bench_parser, load, named_config
from progress import redraw

from llama_vision import Engine, LlamaVision, Prompt
from llama_vision.config import DTYPES


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    engine, work = prepare(options)
    batches = in_parts(work, options.slots)
    longest = [max(length for _, length in batch) for batch in batches]
    padded = [[(p, most) for p, _ in b] for b, most in zip(batches, longest, strict=True)]
    groups = {"slots": [work], "batches": batches, "padded": padded}
    rounds = {name: [] for name in groups}
    answer(engine, [[(prompt, 4) for prompt, _ in work[: options.slots]]])  # warms up
    for number in range(1, options.rounds + 1):
        for name, parts in groups.items():
            redraw(f"round {number} of {options.rounds}: {name}")
            rounds[name].append(answer(engine, parts))
    redraw()
    report(options, rounds)


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--prompts", type=int, default=64)
    add("--slots", type=int, default=8, help="prompts that are answered at once")
    add("--tiles", type=int, default=1, choices=range(1, 5), help="of each prompt's picture")
    add("--prompt-tokens", type=int, default=20)
    add("--new-tokens", type=int, nargs=2, default=[4, 128], help="least and most of an answer")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> tuple[Engine, list[tuple[Prompt, int]]]:
    """An engine, and prompts with the lengths of their answers."""
    config, device = named_config(options.model), torch.device(options.device)
    model = LlamaVision(load(options.model, config, DTYPES[options.dtype], device))
    work = list(make_prompts(Prompt, model.config, options))
    most = max(len(prompt.token_ids) + length for prompt, length in work)
    return Engine(model, slots=options.slots, max_seq_len=most), work


def in_parts(work: list[Any], size: int) -> list[list[Any]]:
    return [work[start : start + size] for start in range(0, len(work), size)]


def answer(engine: Engine, parts: list[list[tuple[Prompt, int]]]) -> dict[str, Any]:
    """One part after the other: seconds, steps of decoding, and the answers."""
    answers, steps, start = [], 0, time.perf_counter()
    for part in parts:
        settings = {"temperature": 0, "ignore_stop": True}
        requests = [engine.submit(p, max_new_tokens=length, **settings) for p, length in part]
        while any(request.finish_reason is None for request in requests):
            waiting = len(engine.waiting)
            engine.step()
            steps += len(engine.waiting) == waiting  # else a prompt went in
        answers += [request.token_ids for request in requests]
    return {"seconds": time.perf_counter() - start, "steps": steps, "answers": answers}


def report(options: argparse.Namespace, rounds: dict[str, list[dict[str, Any]]]) -> None:
    tokens = sum(map(len, rounds["slots"][0]["answers"]))
    device = describe(torch.device(options.device))
    print(f"{options.model}, {options.dtype}, {device}: {options.prompts} prompts, {tokens} tokens")
    document = {"device": device, "versions": versions(), "settings": vars(options)}
    for name, made in rounds.items():
        seconds, steps = [one["seconds"] for one in made], made[0]["steps"]
        document[name] = {"seconds": seconds, "steps": steps}
        speed = tokens / statistics.median(seconds)
        print(
            f"{name:<8} {statistics.median(seconds):8.2f} s {speed:8.1f} tokens/s {steps:6} steps"
        )
    for name in ("batches", "padded"):
        pairs = list(zip(rounds["slots"], rounds[name], strict=True))
        ratio = statistics.median(other["seconds"] / slots["seconds"] for slots, other in pairs)
        of_steps = rounds[name][0]["steps"] / rounds["slots"][0]["steps"]
        answers = zip(*(one["answers"] for one in pairs[0]), strict=True)
        same = sum(ours == theirs[: len(ours)] for ours, theirs in answers)
        document[name] |= {"ratio": ratio, "ratio_of_steps": of_steps, "same_answers": same}
        print(
            f"slots: {ratio:.2f} × as fast as {name}, which take {of_steps:.2f} × as many steps; "
            f"{same} of {options.prompts} answers are the same"
        )
    print(json.dumps(document | {"tokens": tokens}))


if __name__ == "__main__":
    main()
