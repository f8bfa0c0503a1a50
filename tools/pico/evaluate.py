"""The embedded model's exam: exact answers by type, with intervals, and three controls.

    python tools/pico/evaluate.py weights/pico --json exam.json
    python tools/pico/evaluate.py weights/pico --trim --elsewhere tools/pico/elsewhere
    python tools/pico/evaluate.py weights/pico --first 500 --pictures 500 --questions 2 --trim
    python tools/pico/evaluate.py weights/pico --set clutter --set photographs --trim

The controls tell seeing from guessing: the same questions without an image, with another picture's
image, and the answers that are most frequent in training. --trim asks everything again with fewer
visual tokens, chosen by several rules, as many by each, see recipe/trimming.py. --set asks one of
the sets of recipe/sets.py instead of the exam. --elsewhere adds pictures that other programs have
drawn, see draw_elsewhere.py.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from recipe.answers import MAX_ANSWER, answer
from recipe.exam import Item, guess, make_exam, tally, wilson
from recipe.plot import plot_trimming
from recipe.sets import SETS, make_set
from recipe.trimming import FEW_KEPT, FEW_RULES, as_table, compare_rules, of_group

from llama_vision import LlamaVision
from llama_vision.config import DTYPES
from llama_vision.inputs.image import open_image


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


def ask_again(
    model: LlamaVision, items: list[Item], full: list[str], batch: int, **which: Any
) -> list[dict[str, Any]]:
    """The rows of `compare_rules`, printed as they come and as tables at the end."""
    rows = []
    for row in compare_rules(model, items, full, batch, **which):
        change = f"{row['difference']:+.1%} ± {row['interval']:.1%}"
        print(f"{row['kept']:.0%} {row['rule']}: {row['exact']:.1%} ({change})", flush=True)
        rows.append(row)
    print(f"\n### Fewer visual tokens: points against all of them\n\n{as_table(rows)}")
    for group in rows[0]["groups"]:
        print(f"\n{group}:\n\n{as_table(of_group(rows, group))}")
    return rows


def report(title: str, table: dict[str, tuple[int, int]]) -> None:
    """A table as Markdown."""
    print(f"\n### {title}\n\n| | right | of | exact | 95 % interval |\n|---|---|---|---|---|")
    for group, (right, asked) in table.items():
        low, high = wilson(right, asked)
        print(f"| {group} | {right} | {asked} | {right / asked:.1%} | {low:.1%} – {high:.1%} |")


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first picture")
    parser.add_argument("--questions", type=int, default=3, help="at most, for each picture")
    parser.add_argument("--set", action="append", choices=SETS, help="instead of the exam")
    parser.add_argument("--set-questions", type=int, default=400, help="of each set")
    parser.add_argument("--no-controls", action="store_true")
    parser.add_argument("--elsewhere", type=Path, metavar="FOLDER")
    parser.add_argument("--trim", action="store_true", help="also with fewer visual tokens")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="the exam's curves of --trim")
    parser.add_argument("--show-wrong", type=int, default=0, help="print so many wrong answers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minimal", action="store_true", help="without fonts' and words' packages")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Examine a checkpoint."""
    options = read_arguments(arguments)
    torch.set_num_threads(options.threads)
    model = LlamaVision.from_pretrained(
        options.checkpoint, device=options.device, dtype=options.dtype
    )
    tables = ask_sets(model, options) if options.set else ask_exam(model, options)
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def ask_sets(model: LlamaVision, options: argparse.Namespace) -> dict[str, Any]:
    """The sets that were asked for, each with all tokens and with fewer."""
    tables: dict[str, Any] = {}
    for name in options.set:
        items = make_set(name, options.set_questions, minimal=options.minimal)
        answers = answer(model, items, items, options.batch)
        tables[name] = tally(items, answers)
        report(name, tables[name])
        if options.trim:
            which = {"rules": FEW_RULES, "shares": FEW_KEPT}
            rows = ask_again(model, items, answers, options.batch, **which)
            tables[f"{name}, fewer visual tokens"] = rows
        show_wrong(items, answers, options.show_wrong)
    return tables


def ask_exam(model: LlamaVision, options: argparse.Namespace) -> dict[str, Any]:
    """The exam, its controls, and what else was asked for."""
    items = make_exam(
        options.pictures, options.questions, first=options.first, minimal=options.minimal
    )
    started = time.monotonic()
    answers = answer(model, items, items, options.batch)
    print(f"{len(items)} questions in {time.monotonic() - started:.0f} s")
    tables: dict[str, Any] = {"with its picture": tally(items, answers)}
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
        rows = ask_again(model, items, answers, options.batch)
        tables["fewer visual tokens"] = rows
        if options.plot:
            plot_trimming(rows, options.plot)
    show_wrong(items, answers, options.show_wrong)
    return tables


def show_wrong(items: list[Item], answers: list[str], most: int) -> None:
    """Print the first wrong answers."""
    wrong = [(i, a) for i, a in zip(items, answers, strict=True) if a != i.question.answer]
    for item, given in wrong[:most]:
        question = item.question
        print(
            f"{item.picture} {question.type}: {question.text} -> {given!r}, not {question.answer!r}"
        )


if __name__ == "__main__":
    main()
