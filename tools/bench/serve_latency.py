"""How long a late question waits for its first token while long answers are made.

    python tools/bench/serve_latency.py weights/pico
    python tools/bench/serve_latency.py 340m --new-tokens 128

It comes when a tenth of the others' answers is there, and has a slot. It joins them at once, as in
the server; or it waits until all of them have ended, as where a batch is made to its end. Both ways
in turns, on one engine; the ratio is the median over rounds. The last line of stdout is JSON.
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
    config, device = named_config(options.model), torch.device(options.device)
    model = LlamaVision(load(options.model, config, DTYPES[options.dtype], device))
    options.prompts = options.running + 1
    sizes = argparse.Namespace(**{**vars(options), "new_tokens": [1]})
    prompts = [prompt for prompt, _ in make_prompts(Prompt, model.config, sizes)]
    most = options.prompt_tokens + options.new_tokens
    engine = Engine(model, slots=options.prompts, max_seq_len=most)
    waits: dict[str, list[float]] = {"joins": [], "waits": []}
    for number in range(options.rounds + 1):
        for name, times in waits.items():
            redraw(f"round {number} of {options.rounds}: {name}")
            seconds = first_token(engine, prompts, options.new_tokens, joins=name == "joins")
            times += [seconds] * bool(number)  # the first round warms up
    redraw()
    report(options, waits)


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    add = parser.add_argument
    add("--running", type=int, default=3, help="answers that are being made")
    add("--new-tokens", type=int, default=256, help="of each of them")
    add("--tiles", type=int, default=1, choices=range(1, 5), help="of each prompt's picture")
    add("--prompt-tokens", type=int, default=20)
    return parser.parse_args()


def first_token(engine: Engine, prompts: list[Prompt], length: int, *, joins: bool) -> float:
    """Seconds from when the last prompt comes until it has a token."""
    settings = {"temperature": 0, "ignore_stop": True}
    *others, late = prompts
    running = [engine.submit(prompt, max_new_tokens=length, **settings) for prompt in others]
    while len(running[-1].token_ids) < max(1, length // 10):
        engine.step()
    start = time.perf_counter()
    if not joins:
        engine.run(*running)
    request = engine.submit(late, max_new_tokens=1, **settings)
    while not request.token_ids:
        engine.step()
    seconds = time.perf_counter() - start
    engine.run(*running)
    return seconds


def report(options: argparse.Namespace, waits: dict[str, list[float]]) -> None:
    device = describe(torch.device(options.device))
    print(
        f"{options.model}, {options.dtype}, {device}: {options.running} answers of "
        f"{options.new_tokens} tokens run"
    )
    for name, seconds in waits.items():
        print(f"{name}: {statistics.median(seconds):.3f} s to the first token of a late one")
    pairs = zip(waits["joins"], waits["waits"], strict=True)
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"joining, it comes {ratio:.1f} × as soon")
    document: dict[str, Any] = {"device": device, "versions": versions(), "settings": vars(options)}
    print(json.dumps(document | {"seconds": waits, "ratio": ratio}))


if __name__ == "__main__":
    main()
