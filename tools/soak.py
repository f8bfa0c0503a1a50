"""Many generations in one process: memory, open files and threads must not grow.

    python tools/soak.py [--model weights/pico] [--generations 2000] [--json]

A dozen prompts with no, one and two pictures, rules of pruning, stop strings, processors that fail
and requests that are cancelled come in a random order of a fixed seed, through one engine of four
slots and, every tenth, an engine of their own. A line is fitted to the resident bytes after the
first quarter: what it rises by is the growth, and must stay within what single readings deviate.
(Before that, libraries fill their caches: oneDNN keeps compiled code for each new shape.)
"""

import argparse
import gc
import json
import os
import random
import statistics
import sys
import threading
from pathlib import Path

import torch
from PIL import Image

from llama_vision import (
    Engine,
    KeyNorm,
    LlamaVision,
    LlamaVisionError,
    RandomTokens,
    Request,
    TrimmedLlama,
    UniformGrid,
)

PRUNERS = (None, TrimmedLlama(0.3), RandomTokens(0.5), UniformGrid(9), KeyNorm(TrimmedLlama(0.2)))
SLOTS, LENGTH, EVERY = 4, 192, 20
PROMPTS = 12


def fails(logits: torch.Tensor) -> torch.Tensor:
    """A logits processor with a mistake."""
    raise KeyError("a mistake")


def random_settings(draw: random.Random) -> dict:
    """Settings of one request."""
    return {
        "max_new_tokens": draw.randint(1, 24),
        "temperature": draw.choice((0, 1.0)),
        "pruner": draw.choice(PRUNERS),
        "stop": draw.choice(((), ("e",), ("no", "such text"))),
        "repetition_penalty": draw.choice((None, 1.2)),
        "logits_processors": [fails] * (draw.random() < 0.05),
        "top_logprobs": draw.choice((0, 3)),
    }


def random_messages(draw: random.Random) -> list[dict]:
    """A question about up to two pictures of random sizes."""
    sizes = [(draw.randint(1, 300), draw.randint(1, 300)) for _ in range(draw.choice((0, 1, 1, 2)))]
    pictures = [Image.new("RGB", size, (draw.randrange(256), 99, 0)) for size in sizes]
    return [{"role": "user", "content": [*pictures, "What is it? " * draw.randint(1, 4)]}]


class Soak:
    """One process under load."""

    def __init__(self, model: LlamaVision, seed: int):
        self.model, self.draw = model, random.Random(seed)
        self.prompts = [model.prompt(random_messages(self.draw)) for _ in range(PROMPTS)]
        self.engine = Engine(model, slots=SLOTS, max_seq_len=LENGTH)
        self.running: list[Request] = []
        self.failed = self.cancelled = 0

    def generate(self, number: int) -> None:
        """Ask for one more, cancel some, and step until few are left."""
        prompt, settings = self.draw.choice(self.prompts), random_settings(self.draw)
        if number % 10 == 0:
            self._try(lambda: self.model.generate(prompt, **settings))
            return
        self.running.append(self.engine.submit(prompt, **settings))
        if self.draw.random() < 0.1:
            self.engine.cancel(self.draw.choice(self.running))
            self.cancelled += 1
        while len(self.running) > 2 * SLOTS:
            self._try(self.engine.step)
            self.running = [r for r in self.running if r.finish_reason is None]

    def end(self) -> None:
        """Finish what runs."""
        while any(request.finish_reason is None for request in self.running):
            self._try(self.engine.step)
        if self.engine.held or self.engine.waiting:
            raise RuntimeError("a slot was lost")

    def _try(self, run) -> None:
        try:
            run()
        except LlamaVisionError:
            self.failed += 1


def reading() -> dict[str, int]:
    """Resident bytes, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def soak(model: LlamaVision, generations: int, seed: int = 0) -> dict:
    """Run, and take a reading every so often."""
    run, readings = Soak(model, seed), []
    for number in range(1, generations + 1):
        run.generate(number)
        if number % EVERY == 0:
            readings.append({"generations": number, **reading()})
    run.end()
    late = readings[len(readings) // 4 :]
    counts, resident = ([r[name] for r in late] for name in ("generations", "resident"))
    slope, intercept = statistics.linear_regression(counts, resident)
    noise = [y - slope * x - intercept for x, y in zip(counts, resident, strict=True)]
    return {
        "generations": generations,
        "failed": run.failed,
        "cancelled": run.cancelled,
        "resident_after_a_quarter": resident[0],
        "resident_at_the_end": resident[-1],
        "growth": slope * (counts[-1] - counts[0]),
        "noise": 2 * statistics.pstdev(noise),
        "files": sorted({r["files"] for r in late}),
        "threads": sorted({r["threads"] for r in late}),
    }


def main() -> int:
    """Run the command; 1 where something grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default=Path(__file__).parents[1] / "weights" / "pico")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = soak(LlamaVision.from_pretrained(options.model), options.generations)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(
                f"{name:<26}{value:>16,.0f}"
                if isinstance(value, (int, float))
                else f"{name:<26}{value!s:>16}"
            )
    steady = len(result["files"]) == len(result["threads"]) == 1
    return 0 if steady and result["growth"] <= max(result["noise"], 2**20) else 1


if __name__ == "__main__":
    sys.exit(main())
