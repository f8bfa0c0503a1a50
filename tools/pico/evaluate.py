"""The embedded model's exam: exact answers by type, with intervals, and three controls.

    python tools/pico/evaluate.py weights/pico --json exam.json
    python tools/pico/evaluate.py weights/pico --trim --elsewhere tools/pico/elsewhere

The controls tell seeing from guessing: the same questions without an image, with another picture's
image, and the answers that are most frequent in training. --trim asks everything again with fewer
visual tokens, chosen by Trimmed Llama, at random and on a uniform grid, as many by each.
--elsewhere adds pictures that other programs have drawn, see draw_elsewhere.py.
"""

import argparse
import json
import time
from collections import defaultdict
from math import sqrt
from pathlib import Path

import torch
from recipe.drawing import draw
from recipe.exam import Item, guess, make_exam, tally, wilson

from llama_vision import LlamaVision, Pruner, RandomTokens, TrimmedLlama, UniformGrid
from llama_vision.config import DTYPES
from llama_vision.inputs.image import open_image

MAX_ANSWER = 64
KEPT = (0.75, 0.5, 0.25, 0.1)
ALL = TrimmedLlama(1.0)
RULES = {
    "trimmed": ALL,
    "trimmed, first layer whole": TrimmedLlama(1.0, trim_first_layer=False),
    "random": RandomTokens(keep=ALL),
    "uniform": UniformGrid(keep=ALL),
}
"""Under a visual budget each keeps as many tokens of a picture as Trimmed Llama does."""


def answer(
    model: LlamaVision,
    items: list[Item],
    shown: list[Item] | None,
    batch: int,
    pruner: Pruner | None = None,
    budget: float | None = None,
) -> list[str]:
    """Greedy answers to all questions.

    Args:
        shown: whose picture each question comes with; None for no picture at all.
    """
    groups = defaultdict(list)
    for place, item in enumerate(shown or items):
        groups[item.tiles].append(place)
    answers = [""] * len(items)
    for places in groups.values():
        for start in range(0, len(places), batch):
            some = places[start : start + batch]
            prompts = []
            for place in some:
                picture = [draw(shown[place].scene)] if shown is not None else []
                content = [*picture, items[place].question.text]
                prompts.append(model.prompt([{"role": "user", "content": content}]))
            completions = model.generate(
                prompts,
                max_new_tokens=MAX_ANSWER,
                temperature=0,
                pruner=pruner,
                visual_budget=budget,
            )
            for place, completion in zip(some, completions, strict=True):
                answers[place] = completion.text
    return answers


def compare_rules(model: LlamaVision, items: list[Item], full: list[str], batch: int) -> list[dict]:
    """Exact answers by rule and share of tokens kept, and the paired difference from all tokens."""
    rows = []
    right = [answer == item.question.answer for item, answer in zip(items, full, strict=True)]
    for budget in KEPT:
        for name, rule in RULES.items():
            answers = answer(model, items, items, batch, rule, budget)
            hits = [a == item.question.answer for item, a in zip(items, answers, strict=True)]
            difference, spread = paired_difference(hits, right)
            rows.append(
                {
                    "kept": budget,
                    "rule": name,
                    "exact": sum(hits) / len(hits),
                    "difference": difference,
                    "interval": spread,
                    "tables": tally(items, answers),
                }
            )
    return rows


def ask_elsewhere(model: LlamaVision, folder: Path) -> dict[str, tuple[int, int]]:
    """Right answers and questions about the pictures of a folder, by the program that drew them."""
    table: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        content = [open_image(folder / entry["picture"]), entry["question"]]
        prompt = model.prompt([{"role": "user", "content": content}])
        given = model.generate(prompt, max_new_tokens=MAX_ANSWER, temperature=0).text
        for group in ("overall", entry["picture"].split("_")[0]):
            table[group][0] += given == entry["answer"]
            table[group][1] += 1
    return {group: (right, asked) for group, (right, asked) in table.items()}


def paired_difference(hits: list[bool], others: list[bool]) -> tuple[float, float]:
    """Mean of hit minus other over the same questions, and half its 95 % interval."""
    differences = torch.tensor(hits).double() - torch.tensor(others).double()
    return differences.mean().item(), 1.96 * differences.std().item() / sqrt(len(hits))


def report_rules(rows: list[dict]) -> None:
    """The comparison as Markdown."""
    print("\n### Fewer visual tokens\n\n| kept | rule | exact | against all |\n|---|---|---|---|")
    for row in rows:
        change = f"{row['difference']:+.1%} ± {row['interval']:.1%}"
        print(f"| {row['kept']:.0%} | {row['rule']} | {row['exact']:.1%} | {change} |")


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
    parser.add_argument("--elsewhere", type=Path, metavar="FOLDER")
    parser.add_argument("--trim", action="store_true", help="also with fewer visual tokens")
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minimal", action="store_true", help="without fonts' and words' packages")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    model = LlamaVision.from_pretrained(
        options.checkpoint, device=options.device, dtype=options.dtype
    )
    items = make_exam(options.pictures, options.questions, minimal=options.minimal)
    started = time.monotonic()
    answers = answer(model, items, items, options.batch)
    print(f"{len(items)} questions in {time.monotonic() - started:.0f} s")
    tables = {"with its picture": tally(items, answers)}
    if not options.no_controls:
        # The questions of a picture stand together: three places on, another one is shown.
        away = options.questions
        others = items[away:] + items[:away]
        tables["no picture"] = tally(items, answer(model, items, None, options.batch))
        tables["another picture"] = tally(items, answer(model, items, others, options.batch))
        guesses = [guess(item.question, options.minimal) for item in items]
        tables["most frequent answer"] = tally(items, guesses)
    if options.elsewhere:
        tables["drawn by other programs"] = ask_elsewhere(model, options.elsewhere)
    for title, table in tables.items():
        report(title, table)
    if options.trim:
        tables["fewer visual tokens"] = compare_rules(model, items, answers, options.batch)
        report_rules(tables["fewer visual tokens"])
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
