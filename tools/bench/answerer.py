"""Answers the same prompts with one checkout of the package, a round for each line of stdin.

Started by `throughput.py`, in a process of its own. A checkout without an `Engine` answers in
batches of so many prompts as there are slots, each until its longest answer has ended.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

GRIDS = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}


def main() -> None:
    options = argparse.Namespace(**json.loads(sys.argv[1]))
    sys.path.insert(0, options.package)
    import llama_vision

    if options.threads:
        torch.set_num_threads(options.threads)
    model = llama_vision.LlamaVision.from_pretrained(
        options.checkpoint, device=options.device, dtype=options.dtype
    )
    work = list(make_prompts(llama_vision.Prompt, model.config, options))
    run = (InEngine if hasattr(llama_vision, "Engine") else InBatches)(model, work, options)
    print(json.dumps(llama_vision.__file__), flush=True)
    for _ in sys.stdin:
        print(json.dumps(run.round()), flush=True)


def make_prompts(kind: type, config: Any, options: argparse.Namespace) -> Iterator[tuple[Any, int]]:
    """Random text and a picture of noise in front of it, each with the length of its answer."""
    draw, text = random.Random(0), config.text
    rows, cols = GRIDS.get(options.tiles, (0, 0))
    size = cols * config.vision.image_size, rows * config.vision.image_size
    for _ in range(options.prompts):
        ids = [text.bos_token_id, *[text.image_token_id] * bool(options.tiles)]
        ids += [draw.randrange(text.bos_token_id) for _ in range(options.prompt_tokens - len(ids))]
        images = []
        if options.tiles:
            images = [Image.frombytes("RGB", size, draw.randbytes(3 * size[0] * size[1]))]
        yield kind(ids, images), draw.randint(min(options.new_tokens), max(options.new_tokens))


class InEngine:
    """All prompts are handed to one engine at once; it is the same in every round."""

    def __init__(self, model: Any, work: list[tuple[Any, int]], options: argparse.Namespace):
        from llama_vision import Engine

        self.work = work
        visual = options.tiles * model.config.vision.tokens_per_tile
        self.engine = Engine(
            model,
            slots=options.slots,
            max_seq_len=max(len(prompt.token_ids) + length for prompt, length in work),
            visual_budget=visual or None,
            compiled=options.compile,
            force=True,
        )

    def round(self) -> dict[str, Any]:
        """Seconds of all, and to the first token of each; the answers."""
        start, first = time.perf_counter(), {}
        settings = {"temperature": 0, "ignore_stop": True}
        requests = [
            self.engine.submit(prompt, max_new_tokens=length, **settings)
            for prompt, length in self.work
        ]
        while any(request.finish_reason is None for request in requests):
            for request in self.engine.step():
                first.setdefault(request, time.perf_counter() - start)
        return {
            "seconds": time.perf_counter() - start,
            "first": [first[request] for request in requests],
            "answers": [request.token_ids for request in requests],
        }


class InBatches:
    """Batch after batch."""

    def __init__(self, model: Any, work: list[tuple[Any, int]], options: argparse.Namespace):
        self.model = model
        self.settings = {"temperature": 0, "ignore_stop": True, "compiled": options.compile}
        self.batches = [work[i : i + options.slots] for i in range(0, len(work), options.slots)]

    def round(self) -> dict[str, Any]:
        """The same as of `InEngine`."""
        start, first, answers = time.perf_counter(), [], []
        for batch in self.batches:
            prompts, lengths = zip(*batch, strict=True)
            generation = self.model.start(
                prompts, max_new_tokens=max(lengths), force=True, **self.settings
            )
            for number, _ in enumerate(generation):
                if number == 0:
                    first += [time.perf_counter() - start] * len(batch)
            made = zip(generation.token_ids, lengths, strict=True)
            answers += [ids[:length] for ids, length in made]
        return {"seconds": time.perf_counter() - start, "first": first, "answers": answers}


if __name__ == "__main__":
    main()
