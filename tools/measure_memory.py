"""Is the plan right? Runs real batches and compares their peak of memory with the plan.

    python tools/measure_memory.py                        # embedded model and 340m, on the CPU
    python tools/measure_memory.py --device cuda --models 11b --dtypes bfloat16
    python tools/measure_memory.py --growth 340m          # prefill against the prompt's length

On the CPU the peak is what torch's profiler sees allocated, beside weights and caches; on CUDA the
allocator's own counter. The last line of stdout is JSON.
"""

import argparse
import json
import sys
from collections import deque
from functools import partial
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from limits import peak_of
from models import named_config, random_model

from llama_vision import LlamaVision, Prompt
from llama_vision.cli.main import EMBEDDED_MODEL
from llama_vision.config import DTYPES, Config
from llama_vision.engine.engine import Generation
from llama_vision.engine.sampling import Sampling
from llama_vision.inputs.image import TiledImage
from llama_vision.memory.plan import PREFILL_CHUNK, Workload, plan_run


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
    rows = growth(options.growth, device) if options.growth else peaks(options, device)
    print(json.dumps({"device": describe(device), "torch": torch.__version__, "runs": rows}))


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def peaks(options: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    print(
        f"{'model':<8}{'dtype':<10}{'batch':>6}{'tiles':>6}{'planned':>16}{'measured':>16}{'off':>8}"
    )
    for name, dtype in product(options.models, options.dtypes):
        config = named_config(name)
        model = LlamaVision(random_model(config, DTYPES[dtype], device))
        for batch, tiles in product(options.batches, options.tiles):
            generation = start(model, batch, tiles, options.prompt_tokens, PREFILL_CHUNK)
            row = compare(generation, config)
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
    config = named_config(name)
    model = LlamaVision(random_model(config, torch.bfloat16, device))
    rows = []
    print(f"{'tokens':>8}{'text cache':>16}{'working, chunk 64':>20}{'working, whole':>20}")
    for tokens in (512, 1024, 2048, 4096):
        row = {"tokens": tokens}
        for key, chunk in (("chunked", 64), ("whole", tokens)):
            generation = start(model, 1, 1, tokens, chunk)
            result = compare(generation, config)
            row[key] = result["measured"] - result["weights"] - result["caches"]
            row["text_cache"] = generation.cache.text.nbytes
        rows.append(row)
        print(
            f"{tokens:>8}{row['text_cache']:>16,}{row['chunked']:>20,}{row['whole']:>20,}",
            flush=True,
        )
    return rows


def start(model: LlamaVision, batch: int, tiles: int, tokens: int, chunk: int) -> Generation:
    """A run of equal prompts with one image each, about to begin."""
    config = model.config
    side, grid = config.vision.image_size, {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}[tiles]
    images = [
        [TiledImage(torch.randn(tiles, 3, side, side), grid, config.vision.aspect_id(grid))]
        for _ in range(batch)
    ]
    ids = [0, config.text.image_token_id, *[7] * (tokens - 2)]
    prompts = [Prompt(ids, [None])] * batch
    workload = Workload(
        (tuple(ids),) * batch,
        ((grid,),) * batch,
        tokens + 4,
        chunk,
        absent_tiles_alike=model.model.vision.absent_tiles_alike,
    )
    return Generation(
        model.model,
        None,
        prompts,
        images,
        workload,
        limits=[tokens + 4] * batch,
        sampling=Sampling(1.0, 0.9),
        seed=0,
        stop_ids=frozenset(),
        pruner=None,
        track_memory=False,
    )


def compare(generation: Generation, config: Config) -> dict[str, int]:
    model = generation.model
    plan = plan_run(config, generation.workload, dtype=model.dtype, device=model.device)
    caches = generation.cache.nbytes
    pixels = sum(image.pixels.nbytes for sample in generation.images for image in sample)
    run = partial(deque, generation, maxlen=0)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        measured = torch.cuda.max_memory_allocated()
    else:
        measured = plan.weights + caches + pixels + peak_of(run)
    return {"planned": plan.total, "measured": measured, "weights": plan.weights, "caches": caches}


if __name__ == "__main__":
    main()
