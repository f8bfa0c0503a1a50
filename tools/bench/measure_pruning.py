"""What it costs to choose and merge visual tokens, and what fewer of them save in a step.

    python tools/bench/measure_pruning.py [340m] [--batch 16] [--tiles 4] [--keep 0.5]

Choosing, joining and merging are timed beside the encoding of the same image. Steps of decoding
with all tokens, with some trimmed, and with the same number merged run in turns in one process.
Random weights: values change no time. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from limits import timed
from machine import describe
from models import named_config, random_model

from llama_vision import Engine, LlamaVision, MaxMin, Prompt, TrimmedLlama
from llama_vision.cache.merging import merge, nearest_kept
from llama_vision.config import DTYPES
from llama_vision.engine.encode import encode_group
from llama_vision.inputs.image import TiledImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="340m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    options = parser.parse_args()
    device = torch.device(options.device)
    model = LlamaVision(
        random_model(named_config(options.config), DTYPES[options.dtype], device), stop_ids=[]
    )
    with torch.inference_mode():
        choosing = time_choosing(model, options)
    steps = time_steps(model, options)
    overhead = sum(choosing[name] for name in ("choose", "join", "merge")) / choosing["encode"]
    for name, seconds in choosing.items():
        print(f"{name:<10}{1000 * seconds:>10.1f} ms")
    print(f"choosing, joining and merging take {overhead:.1%} of the encoding")
    for name, seconds in steps.items():
        ratio = seconds / steps["whole"]
        print(f"step, {name:<10}{1000 * seconds:>10.1f} ms{ratio:>8.2f} of all tokens'")
    facts = {**vars(options), "device": describe(device), "choosing": choosing, "steps": steps}
    print(json.dumps({**facts, "overhead": overhead}))


def picture(model: LlamaVision, tiles: int, seed: int) -> TiledImage:
    """An image of random pixels, with so many tiles side by side."""
    side, generator = model.config.vision.image_size, torch.Generator().manual_seed(seed)
    pixels = torch.randn(tiles, 3, side, side, generator=generator)
    grid = (1, tiles)
    return TiledImage(pixels, grid, model.config.vision.aspect_id(grid))


def time_choosing(model: LlamaVision, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of encoding one image, and of each part of max-min with merging: medians."""
    image, rule = picture(model, options.tiles, 0), MaxMin(options.keep)
    group = encode_group(model.model, [image])
    keep = rule(None, group)
    stands = nearest_kept(group, keep)
    parts = {
        "encode": lambda: encode_group(model.model, [image]),
        "choose": lambda: rule(None, group),
        "join": lambda: nearest_kept(group, keep),
        "merge": lambda: merge(group.features, keep, stands),
    }
    return in_turns(parts, options.rounds, model.device)


def time_steps(model: LlamaVision, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step of all slots: with all tokens, some dropped, and some merged."""
    draw, image_id = random.Random(0), model.config.text.image_token_id
    rules = {
        "whole": {},
        "trimmed": {"pruner": TrimmedLlama(1.0), "visual_budget": options.keep},
        "merged": {"pruner": MaxMin(options.keep, merge=True), "visual_budget": options.keep},
    }
    engines = {}
    for name, settings in rules.items():
        engine = Engine(model, slots=options.batch, max_seq_len=1024, force=True)
        for seed in range(options.batch):
            ids = [1, image_id, *(draw.randrange(1000) for _ in range(30))]
            prompt = Prompt(ids, [picture(model, options.tiles, seed)])
            engine.submit(prompt, max_new_tokens=900, temperature=0, **settings)
        while engine.waiting:
            engine.step()
        engines[name] = engine

    def steps(engine: Engine) -> None:
        for _ in range(options.steps):
            engine.step()

    parts = {name: lambda engine=engine: steps(engine) for name, engine in engines.items()}
    seconds = in_turns(parts, options.rounds, model.device)
    return {name: each / options.steps for name, each in seconds.items()}


def in_turns(parts: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each part; they alternate, and the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, run in parts.items():
            seconds[name].append(timed(run, device))
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
