"""The embedded model's exam, answered by this package and by transformers, on the same weights.

    pip install -c constraints.txt -e ".[bench]" -r tools/pico/requirements.txt
    python tools/pico/exam_transformers.py weights/pico

What transformers' vision features, one block late, do to a trained model. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from evaluate import MAX_ANSWER, answer
from recipe.drawing import draw
from recipe.exam import Item, make_exam, wilson

from llama_vision import LlamaVision

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))

from peers import Run, Transformers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=200, help="the first so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = LlamaVision.from_pretrained(options.checkpoint, device="cpu", dtype="float32")
    peer = Transformers(model.model, "eager")
    items = make_exam(-(-options.questions // 2))[: options.questions]
    theirs = [answer_with(peer, model, item) for item in items]
    table = {"this package": answer(model, items, items, batch=32)}
    table[f"transformers {transformers.__version__}"] = theirs
    rows = {name: count(items, answers) for name, answers in table.items()}
    for name, (right, asked) in rows.items():
        low, high = wilson(right, asked)
        print(f"{name:<24}{right:>5} of {asked}  {right / asked:.1%} ({low:.0%} – {high:.0%})")
    print(json.dumps(rows))


def answer_with(peer: Transformers, model: LlamaVision, item: Item) -> str:
    """Greedy; text in front of the picture is told to see nothing of it, as in training."""
    content = [draw(item.scene), item.question.text]
    prompt = model.prompt([{"role": "user", "content": content}])
    images = tuple(model.tile(prompt))
    ids = list(prompt.token_ids)
    peer.on(Run(ids, images, 1, len(images[0].pixels), MAX_ANSWER))
    new = peer.generate(MAX_ANSWER, stop_ids=list(model.stop_ids))[0].tolist()
    return model.tokenizer.decode([token for token in new if token not in model.stop_ids])


def count(items: list[Item], answers: list[str]) -> tuple[int, int]:
    hits = [a == item.question.answer for item, a in zip(items, answers, strict=True)]
    return sum(hits), len(hits)


if __name__ == "__main__":
    main()
