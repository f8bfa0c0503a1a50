"""The embedded model's exam: exact answers by type, with intervals, and three controls.

    python tools/evaluate_embedded.py runs/embedded/checkpoint --json exam.json

The controls tell seeing from guessing: the same questions without an image, with another picture's
image, and the answers that are most frequent in training.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from embedded.chat import Chat, Message
from embedded.drawing import draw
from embedded.exam import Item, guess, make_exam, tally, wilson
from embedded.export import load

from llama_vision.cache import Cache
from llama_vision.config import DTYPES
from llama_vision.image import TiledImage, tile_image
from llama_vision.model import LlamaVisionModel

MAX_ANSWER = 64


@torch.inference_mode()
def decode(
    model: LlamaVisionModel, chat: Chat, prompts: list[list[int]], images: list[list[TiledImage]]
) -> list[str]:
    """Greedy answers of a batch of prompts, whose images are of one size."""
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.full((len(prompts), max(lengths)), chat.padding, device=model.device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    visual = model.encode_images(images)
    cache = Cache(
        model.config.text,
        batch=len(prompts),
        max_text_tokens=max(lengths) + MAX_ANSWER,
        visual_capacity=max(visual.lengths) if visual is not None else 0,
        dtype=model.dtype,
        device=model.device,
    )
    stop = chat.special("<|eot_id|>")
    logits = model(ids, visual, lengths=lengths, cache=cache, last_row_only=True)
    written = [logits.argmax(-1)]
    done = written[-1] == stop
    while len(written) < MAX_ANSWER and not bool(done.all()):
        logits = model(written[-1][:, None], cache=cache, last_row_only=True)
        written.append(logits.argmax(-1))
        done |= written[-1] == stop
    rows = torch.stack(written, dim=1).tolist()
    return [chat.decode(row[: row.index(stop)] if stop in row else row) for row in rows]


def answer(
    model: LlamaVisionModel, chat: Chat, items: list[Item], shown: list[Item] | None, batch: int
) -> list[str]:
    """Answers to all questions.

    Args:
        shown: whose picture each question comes with; None for no picture at all.
    """
    vision = model.config.vision
    pictures: dict[int, TiledImage] = {}
    groups = defaultdict(list)
    for place, item in enumerate(shown or items):
        if shown is not None and item.picture not in pictures:
            pictures[item.picture] = tile_image(
                draw(item.scene), tile_size=vision.image_size, max_tiles=vision.max_num_tiles
            )
        groups[item.tiles].append(place)
    answers = [""] * len(items)
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            prompts = [
                chat.prompt([Message("user", items[i].question.text, int(shown is not None))])
                for i in some
            ]
            images = [[pictures[shown[i].picture]] if shown is not None else [] for i in some]
            for place, text in zip(some, decode(model, chat, prompts, images), strict=True):
                answers[place] = text
    return answers


def report(title: str, table: dict[str, tuple[int, int]]) -> None:
    """A table as Markdown."""
    print(f"\n### {title}\n\n| | right | of | exact | 95 % interval |\n|---|---|---|---|---|")
    for group, (right, asked) in table.items():
        low, high = wilson(right, asked)
        print(f"| {group} | {right} | {asked} | {right / asked:.1%} | {low:.1%} – {high:.1%} |")


def main(arguments: list[str] | None = None) -> None:
    """Examine a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--questions", type=int, default=3, help="at most, for each picture")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minimal", action="store_true", help="without fonts' and words' packages")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    model, chat = load(options.checkpoint)
    model = model.to(options.device, DTYPES[options.dtype])
    items = make_exam(options.pictures, options.questions, minimal=options.minimal)
    started = time.monotonic()
    answers = answer(model, chat, items, items, options.batch)
    print(f"{len(items)} questions in {time.monotonic() - started:.0f} s")
    tables = {"with its picture": tally(items, answers)}
    if not options.no_controls:
        # The questions of a picture stand together: three places on, another one is shown.
        away = options.questions
        others = items[away:] + items[:away]
        tables["no picture"] = tally(items, answer(model, chat, items, None, options.batch))
        tables["another picture"] = tally(items, answer(model, chat, items, others, options.batch))
        guesses = [guess(item.question, options.minimal) for item in items]
        tables["most frequent answer"] = tally(items, guesses)
    for title, table in tables.items():
        report(title, table)
    wrong = [(i, a) for i, a in zip(items, answers, strict=True) if a != i.question.answer]
    for item, given in wrong[: options.show_wrong]:
        question = item.question
        print(
            f"{item.picture} {question.type}: {question.text} -> {given!r}, not {question.answer!r}"
        )
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
