"""What the scoring of visual tokens costs, beside the block it happens in: time and peak memory.

One cross-attention block of the 11B's widths with random weights; forwards with and without scores
alternate in one process, and the medians of their times are compared. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from limits import peak_of, timed
from machine import describe

from llama_vision.config import DTYPES, official_config
from llama_vision.model.layers import attention, attention_with_saliency
from llama_vision.model.text import CrossAttentionBlock, VisualContext


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
    config, device = official_config("11b").text, torch.device(options.device)
    place = {"device": device, "dtype": DTYPES[options.dtype]}
    with device:
        block = CrossAttentionBlock(config, 0).to(**place)
    h = torch.randn(1, options.rows, config.hidden_size, **place)
    features = torch.randn(1, options.tiles * 1601, config.hidden_size, **place)
    votes = torch.ones(1, options.rows, device=device)

    def forward(votes: Tensor | None) -> None:
        block(h, VisualContext(*block.cross_attn.project(features), votes=votes))

    seconds: dict[str, list[float]] = {"block": [], "block and scoring": []}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name, counted in (("block", None), ("block and scoring", votes)):
            seconds[name].append(timed(lambda counted=counted: forward(counted), device))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    q = torch.randn(1, config.num_attention_heads, options.rows, config.head_dim, **place)
    k = torch.randn(1, config.num_key_value_heads, features.shape[1], config.head_dim, **place)
    plain = peak_of(lambda: attention(q, k, k), device)
    scored = peak_of(lambda: attention_with_saliency(q, k, k, votes), device)
    result = {
        "device": describe(device),
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


if __name__ == "__main__":
    main()
