"""How fast, beside transformers and beside the machine's own limits?

    pip install -c constraints.txt -e ".[bench]"
    python tools/bench/benchmark.py weights/pico
    python tools/bench/benchmark.py 340m --batches 16 --tiles 4 --keep 0.5  # trimmed to half too
    python tools/bench/benchmark.py 11b --device cuda --dtype bfloat16 --batches 1 8 32
    python tools/bench/benchmark.py weights/pico --growth curve.png  # decode by text and images

Both run on the same weights (random ones, but for a directory's), the same prompt and pictures, in
the same process, taking turns; a ratio is the median over rounds of theirs to ours. The last line
of stdout is one JSON document; --save adds it, dated, to results/ beside this file.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from limits import Limits, decode_bytes, encode_operations, prefill_operations, timed
from machine import describe, processor, versions
from models import bench_parser, load, named_config, save_checkpoint
from peers import Ours, Peer, Run, Transformers, load_with_transformers
from progress import redraw

from llama_vision.checkpoint.loading import load_model
from llama_vision.config import DTYPES
from llama_vision.model.model import LlamaVisionModel

METRICS = ("image encoding", "first token", "decode")
"""Seconds: for all pictures of a batch; from pictures to the first token; for one step."""


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    config = named_config(options.model)
    model = load(options.model, config, dtype, device)
    limits = Limits.measured(dtype, device)
    print(
        f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{options.dtype}, {describe(device)}; copies {limits.bandwidth / 1e9:.1f} GB/s, "
        f"multiplies {limits.operations / 1e9:,.0f} GFLOP/s\n"
    )
    loading = compare_loading(model, options) if options.loading else None
    if options.growth:
        rows = growth(model, limits, options)
    else:
        rows = list(compare_all(model, limits, options))
    document = {
        "date": str(date.today()),
        "model": Path(options.model).name,
        "dtype": options.dtype,
        "device": describe(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "limits": vars(limits),
        "loading": loading,
        "rows": rows,
    }
    if options.save:
        kind = "growth" if options.growth else "batch-" + "-".join(map(str, options.batches))
        parts = [document["date"], document["model"], options.dtype, device.type, kind]
        parts += [options.save] if options.save is not True else []
        path = Path(__file__).parent / "results" / f"{'-'.join(parts)}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def parse() -> argparse.Namespace:
    parser = bench_parser(__doc__)
    parser.set_defaults(threads=2 if os.cpu_count() == 2 else 0)
    add = parser.add_argument
    add("--batches", type=int, nargs="+", default=[1])
    add("--tiles", type=int, nargs="+", default=[1, 4], choices=(1, 2, 3, 4))
    add("--keep", type=float, nargs="+", default=[], help="ours trimmed to this part, too")
    add("--prompt-tokens", type=int, default=40)
    add("--new-tokens", type=int, default=32)
    add("--compile", action="store_true", help="ours with compiled decoding too")
    add("--peers", nargs="*", default=["eager"], choices=("eager", "static", "compiled"))
    add("--loading", action="store_true", help="from files to the device, too")
    add("--growth", metavar="PNG", help="decode time against text length and visual tokens")
    add("--save", nargs="?", const=True, metavar="WORD", help="one more word for the file's name")
    return parser.parse_args()


def compare_all(
    model: LlamaVisionModel, limits: Limits, options: argparse.Namespace
) -> Iterator[dict]:
    """One row for each batch and number of tiles, of all contestants."""
    theirs = [Transformers(model, mode) for mode in options.peers]
    for batch, tiles in product(options.batches, options.tiles):
        run = Run.random(model.config, batch, tiles, options.prompt_tokens, options.new_tokens)
        ours = [
            Ours(model, run, keep, compiled)
            for keep in (1, *options.keep)
            for compiled in (False, True)[: 1 + options.compile]
        ]
        peers = {peer.name: peer for peer in (*ours, *(peer.on(run) for peer in theirs))}
        seconds = alternate(peers, options.rounds)
        peaks = {name: peer.peak_bytes() for name, peer in peers.items()}
        row = {"batch": batch, "tiles": tiles, "seconds": seconds, "peaks": peaks}
        row["caches"] = {peer.name: peer.cache_bytes() for peer in ours}
        row["limits"] = {peer.name: shortest(model, limits, run, peer.keep) for peer in ours}
        row["ratios"] = {
            name: {m: ratio(seconds[name][m], seconds["ours"][m]) for m in METRICS}
            | {"peak memory": peaks["ours"] / peaks[name]}
            for name in peers
            if name != "ours"
        }
        print(table(row), flush=True)
        yield row


def compare_loading(model: LlamaVisionModel, options: argparse.Namespace) -> dict:
    """Seconds from files, which the system has in its cache by then, to the device."""
    config, device, dtype = model.config, model.device, model.dtype
    with tempfile.TemporaryDirectory() as directory:
        save_checkpoint(model, Path(directory))
        loaders = {"ours": lambda: load_model(Path(directory), config, device=device, dtype=dtype)}
        if options.peers:
            loaders["transformers"] = lambda: load_with_transformers(directory, device, dtype)
        seconds = {name: [] for name in loaders}
        for number in range(options.rounds + 1):
            for name, work in loaders.items():
                gc.collect()
                took = timed(work, device)
                if number:
                    seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print("loading  " + "  ".join(f"{name} {value:.2f} s" for name, value in medians.items()))
    if options.peers:
        print(f"         to ours {ratio(seconds['transformers'], seconds['ours']):.2f} ×\n")
    return seconds


def alternate(peers: dict[str, Peer], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Everyone once a round, in turn; the first round warms up and is not counted."""
    seconds = {name: {metric: [] for metric in METRICS} for name in peers}
    for number in range(rounds + 1):
        for name, peer in peers.items():
            redraw(f"round {number} of {rounds}: {name}")
            gc.collect()
            took = peer.measure()
            if number:
                for metric, value in zip(METRICS, took, strict=True):
                    seconds[name][metric].append(value)
    redraw()
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def shortest(model: LlamaVisionModel, limits: Limits, run: Run, keep: float) -> dict[str, float]:
    """Seconds that the machine needs at least: operations to do, or bytes to read."""
    config, alike = model.config, model.vision.padding_tiles_alike
    visual = int(keep * run.tiles * config.vision.tokens_per_tile)
    encode = encode_operations(config, run.tiles, alike) * run.batch / limits.operations
    prefill = prefill_operations(config, run.prompt_tokens, run.tiles) * run.batch
    length = run.prompt_tokens + run.new_tokens // 2
    read = decode_bytes(config, run.batch, length, visual, model.dtype)
    times = (encode, encode + prefill / limits.operations, read / limits.bandwidth)
    return dict(zip(METRICS, times, strict=True))


def table(row: dict) -> str:
    lines = [
        f"batch {row['batch']}, {row['tiles']} tiles",
        f"{'':<26}{'encoding':>14}{'first token':>14}{'decode step':>14}"
        f"{'tokens/s':>10}{'peak':>12}{'cache':>12}",
    ]
    for name, seconds in row["seconds"].items():
        medians = [statistics.median(seconds[metric]) for metric in METRICS]
        speed, peak = row["batch"] / medians[2], row["peaks"][name] / 2**20
        words = "".join(f"{1000 * value:>11.1f} ms" for value in medians)
        lines.append(f"  {name:<24}{words}{speed:>10.1f}{peak:>8.0f} MiB")
        if name in row["caches"]:
            lines[-1] += f"{row['caches'][name]['taken'] / 2**20:>8.1f} MiB"
            shortest = row["limits"][name].values()
            parts = (limit / value for limit, value in zip(shortest, medians, strict=True))
            words = "".join(f"{part:>13.0%} " for part in parts)
            lines.append(f"  {'  of the limit':<24}{words}")
        if name != "ours":
            ratios = row["ratios"][name]
            words = "".join(f"{ratios[metric]:>12.2f} ×" for metric in METRICS)
            lines.append(f"  {'  to ours':<24}{words}{'':>10}{1 / ratios['peak memory']:>10.2f} ×")
    return "\n".join(lines) + "\n"


def growth(model: LlamaVisionModel, limits: Limits, options: argparse.Namespace) -> list[dict]:
    """Decode time against the text's length and against visual tokens, beside the bytes read."""
    config, batch = model.config, options.batches[0]
    room = config.text.max_position_embeddings - options.new_tokens
    per_tile = config.vision.tokens_per_tile
    cases = [("text", n, 0) for n in (256, 512, 1024, 2048, 4096, 8192) if n <= room]
    cases += [("images", 256, round(n / per_tile)) for n in (0, 400, 801, 1601, 3202, 4803, 6404)]
    runs = (Run.random(config, batch, tiles, n, options.new_tokens) for _, n, tiles in cases)
    peers = [Ours(model, run, compiled=options.compile) for run in runs]
    seconds = [[] for _ in cases]
    for number in range(options.rounds + 1):
        for case, peer in enumerate(peers):
            redraw(f"round {number} of {options.rounds}: {cases[case]}")
            _, step = peer.measure_tokens()
            if number:
                seconds[case].append(step)
    rows = []
    redraw()
    print(f"{'':<8}{'text':>8}{'visual':>8}{'step':>12}{'bytes read':>16}{'of the limit':>14}")
    for (kind, length, tiles), took in zip(cases, seconds, strict=True):
        step, visual = statistics.median(took), tiles * per_tile
        read = decode_bytes(config, batch, length + options.new_tokens // 2, visual, model.dtype)
        part = read / limits.bandwidth / step
        rows.append({"kind": kind, "text": length, "visual": visual, "step": step, "bytes": read})
        print(f"{kind:<8}{length:>8}{visual:>8}{1000 * step:>9.2f} ms{read:>16,}{part:>14.0%}")
    plot(rows, Path(options.growth))
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Step times and bytes, each relative to the first of its kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (kind, x) in zip(axes, (("text", "text"), ("images", "visual")), strict=True):
        points = [row for row in rows if row["kind"] == kind]
        for name, label in (("step", "step time"), ("bytes", "bytes read")):
            axis.plot(
                [p[x] for p in points],
                [p[name] / points[0][name] for p in points],
                "o-",
                label=label,
            )
        axis.set(xlabel=f"{x} tokens", ylabel="relative to the first", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
