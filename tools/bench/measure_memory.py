"""Is the plan right? Runs real batches and compares their peak of memory with the plan.

    python tools/bench/measure_memory.py                  # embedded model and 340m, on the CPU
    python tools/bench/measure_memory.py --device cuda --models 11b --dtypes bfloat16
    python tools/bench/measure_memory.py --growth 340m    # prefill against the prompt's length

On the CPU the peak is what torch's profiler sees allocated, beside weights and caches; on CUDA the
allocator's own counter. The last line of stdout is JSON.
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from limits import peak_of
from machine import describe
from models import named_config, random_model
from peers import GRIDS

from llama_vision import Engine, LlamaVision, Prompt, Request
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.config import DTYPES
from llama_vision.engine.workload import PREFILL_CHUNK
from llama_vision.memory.plan import plan_run
from llama_vision.model import kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=[str(EMBEDDED_MODEL), "340m"])
    add("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    add("--device", default="cpu")
    add("--batches", nargs="+", type=int, default=[1, 8])
    add("--tiles", nargs="+", type=int, default=[1, 4])
    add("--prompt-tokens", type=int, default=40)
    add("--growth", metavar="MODEL", help="measure longer and longer prompts instead")
    options = parser.parse_args()
    device = torch.device(options.device)
    with torch.inference_mode():  # the choice of a way to multiply is no part of a run
        kernels.linear(torch.zeros(64, 1024), torch.zeros(1024, 1024))
    rows = growth(options.growth, device) if options.growth else peaks(options, device)
    print(json.dumps({"device": describe(device), "torch": torch.__version__, "runs": rows}))


def peaks(options: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    print(
        f"{'model':<8}{'dtype':<10}{'batch':>6}{'tiles':>6}{'planned':>16}{'measured':>16}{'off':>8}"
    )
    for name, dtype in product(options.models, options.dtypes):
        model = LlamaVision(random_model(named_config(name), DTYPES[dtype], device))
        for batch, tiles in product(options.batches, options.tiles):
            run = start(model, batch, tiles, options.prompt_tokens, PREFILL_CHUNK)
            row = compare(model, *run)
            row |= {"model": Path(name).name, "dtype": dtype, "batch": batch, "tiles": tiles}
            rows.append(row)
            print(
                f"{row['model']:<8}{dtype:<10}{batch:>6}{tiles:>6}{row['planned']:>16,}"
                f"{row['measured']:>16,}{row['measured'] / row['planned'] - 1:>8.2%}",
                flush=True,
            )
    return rows


def growth(name: str, device: torch.device) -> list[dict]:
    """Temporary memory of prefill, whole and in chunks of 64 rows, as the prompt grows."""
    model = LlamaVision(random_model(named_config(name), torch.bfloat16, device))
    rows = []
    print(f"{'tokens':>8}{'text cache':>16}{'working, chunk 64':>20}{'working, whole':>20}")
    for tokens in (512, 1024, 2048, 4096):
        row = {"tokens": tokens}
        for key, chunk in (("chunked", 64), ("whole", tokens)):
            engine, requests = start(model, 1, 1, tokens, chunk)
            result = compare(model, engine, requests)
            row[key] = result["measured"] - result["weights"] - result["caches"]
            row["text_cache"] = engine.cache.text.nbytes
        rows.append(row)
        print(
            f"{tokens:>8}{row['text_cache']:>16,}{row['chunked']:>20,}{row['whole']:>20,}",
            flush=True,
        )
    return rows


def start(
    model: LlamaVision, batch: int, tiles: int, tokens: int, chunk: int
) -> tuple[Engine, list[Request]]:
    """A run of equal prompts with one image each, about to begin."""
    side, (rows, cols) = model.config.vision.image_size, GRIDS[tiles]
    ids = [0, model.config.text.image_token_id, *[7] * (tokens - 2)]
    return model.start(
        [Prompt(ids, [Image.new("RGB", (cols * side, rows * side))])] * batch,
        max_new_tokens=4,
        temperature=1.0,
        top_p=0.9,
        seed=0,
        ignore_stop=True,
        prefill_chunk=chunk,
        force=True,
    )


def compare(model: LlamaVision, engine: Engine, requests: list[Request]) -> dict[str, int]:
    plan = plan_run(model.config, engine.workload, dtype=model.model.dtype, device=model.device)
    caches = engine.cache.nbytes
    measured = plan.weights + caches + peak_of(lambda: engine.run(*requests), model.device)
    return {"planned": plan.total, "measured": measured, "weights": plan.weights, "caches": caches}


if __name__ == "__main__":
    main()
