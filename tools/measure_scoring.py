"""What the scoring of visual tokens costs, beside the block it happens in: time and peak memory.

One cross-attention block of the 11B's widths with random weights; prefills with and without a
pruner alternate in one process, and the medians of their times are compared. The pruner keeps
every token, so that the scoring is the only difference.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import DTYPES, official_config
from llama_vision.engine.prefill import VisualPass
from llama_vision.model.layers import attend, attend_and_weigh
from llama_vision.model.text import CrossAttentionBlock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="text rows")
    parser.add_argument("--tiles", type=int, default=4, help="tiles of the image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    options = parser.parse_args()
    with torch.inference_mode():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    config = official_config("11b").text
    place = {"device": options.device, "dtype": DTYPES[options.dtype]}
    with torch.device(options.device):
        block = CrossAttentionBlock(config, 0).to(**place)
    h = torch.randn(1, options.rows, config.hidden_size, **place)
    features = torch.randn(options.tiles, 1601, config.hidden_size, **place)
    token_ids = torch.zeros(1, options.rows, dtype=torch.int64)
    token_ids[0, 0] = config.image_token_id

    def forward(pruner: object) -> None:
        visual = VisualTokens.of_images([[features]], [[(1, options.tiles)]])
        sight = VisualPass(config, token_ids, [options.rows], visual, None, pruner, device=h.device)
        block(h, sight)

    seconds: dict[str, list[float]] = {"block": [], "block and scoring": []}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, pruner in (("block", None), ("block and scoring", keep_all)):
            seconds[name].append(timed(forward, pruner, options.device))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    q = torch.randn(1, config.num_attention_heads, options.rows, config.head_dim, **place)
    k = torch.randn(1, config.num_key_value_heads, options.tiles * 1601, config.head_dim, **place)
    votes = torch.ones(1, options.rows, device=options.device)
    plain = peak_bytes(lambda: attend(q, k, k), options.device)
    scored = peak_bytes(lambda: attend_and_weigh(q, k, k, votes), options.device)
    result = {
        "device": options.device,
        "dtype": options.dtype,
        "rows": options.rows,
        "visual_tokens": k.shape[2],
        "seconds": medians,
        "extra_time": medians["block and scoring"] / medians["block"] - 1,
        "attention_peak_bytes": {"plain": plain, "scored": scored},
        "extra_peak_bytes": scored - plain,
    }
    print(f"block              {medians['block']:.3f} s")
    print(f"block and scoring  {medians['block and scoring']:.3f} s")
    print(f"extra time         {result['extra_time']:.1%}")
    print(f"extra peak memory  {result['extra_peak_bytes'] / 2**20:.1f} MiB")
    print(json.dumps(result))


def keep_all(saliency: Tensor, visual: VisualTokens) -> Tensor:
    return visual.valid


def timed(forward: object, pruner: object, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    forward(pruner)
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes that a call holds beyond its inputs, read from the allocator."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    main()
