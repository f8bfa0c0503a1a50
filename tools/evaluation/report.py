"""The comparison, derived from what was answered and nothing else, and its four files.

Of a run that was killed and went on they differ from those of a run in one piece in the seconds
alone.
"""

import contextlib
import csv
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.arms import Arm
from evaluation.datasets import BadRow, Row
from evaluation.records import Records
from evaluation.scoring import METRICS
from evaluation.statistics import bootstrap, mcnemar, paired, wilson
from llama_vision.errors import LlamaVisionError, printable, some

WHY = 60
"""Characters of a reason, by which bad rows are counted."""


def compare(
    rows: Sequence[Row | BadRow],
    arms: Sequence[Arm],
    records: Records,
    metric: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The comparison, for JSON.

    Raises:
        LlamaVisionError: no row could be asked.
    """
    made: dict[str, dict[int, dict]] = {arm.name: {} for arm in arms}
    bad: dict[int, str] = {}
    for (_, arm), line in sorted(records.done.items()):
        if arm in made:
            made[arm] |= {answer["row"]: answer for answer in line["answers"]}
            bad = {row["row"]: row["why"] for row in line["bad"]} | bad
    asked = {row.number: row for row in rows if row.number not in bad}
    names = [f"{rows[number].index} ({printable(why, 200)})" for number, why in sorted(bad.items())]
    if not asked:
        raise LlamaVisionError(f"none of the {len(rows)} rows can be asked: {some(names, 1)}")
    scores = {
        name: {n: METRICS[metric](row, answers[n]["text"]) for n, row in asked.items()}
        for name, answers in made.items()
    }
    count = {"read": len(rows), "asked": len(asked), "bad": len(bad), "first": names[:3]}
    count["why"] = dict(sorted(Counter(why[:WHY] for why in bad.values()).items()))
    results = [
        _result(arm, asked, made[arm.name], scores[arm.name], scores["all"], metric) for arm in arms
    ]
    return {"settings": dict(settings), "metric": metric, "rows": count, "results": results}


def _result(
    arm: Arm,
    asked: Mapping[int, Row],
    made: Mapping[int, Mapping[str, Any]],
    scores: Mapping[int, float],
    whole: Mapping[int, float],
    metric: str,
) -> dict[str, Any]:
    """One line of the comparison."""
    n, own, others = len(asked), list(scores.values()), list(whole.values())
    result: dict[str, Any] = {"rule": arm.rule or "all tokens", "share": arm.share}
    result |= {"k_ratio": arm.k_ratio, "score": sum(own) / n}
    if metric == "anls":
        result["low"], result["high"] = bootstrap(own)
        differences = [a - b for a, b in zip(own, others, strict=True)]
        difference = (sum(differences) / n, *bootstrap(differences))
        gained, lost, p = sum(d > 0 for d in differences), sum(d < 0 for d in differences), None
    else:
        result["low"], result["high"] = wilson(round(sum(own)), n)
        difference = paired(own, others)
        gained = sum(a > b for a, b in zip(own, others, strict=True))
        lost = sum(a < b for a, b in zip(own, others, strict=True))
        p = mcnemar(gained, lost)
    result |= zip(("difference", "difference_low", "difference_high"), difference, strict=True)
    result |= {"gained": gained, "lost": lost, "p": p}
    answers = [made[number] for number in asked]
    for name in ("kept", "cache_bytes", "seconds"):
        result[name] = sum(answer[name] for answer in answers) / n
    result["kept_share"] = sum(a["kept"] for a in answers) / sum(a["tokens"] for a in answers)
    result["categories"] = _by_category(asked, scores)
    return result


def _by_category(asked: Mapping[int, Row], scores: Mapping[int, float]) -> dict[str, list]:
    """Mean score and number of rows of each category, where there are any."""
    groups: dict[str, list[float]] = {}
    for number, row in asked.items():
        if row.category:
            groups.setdefault(row.category, []).append(scores[number])
    return {name: [sum(s) / len(s), len(s)] for name, s in sorted(groups.items())}


def as_markdown(found: Mapping[str, Any]) -> str:
    """The comparison as a table, and what rows were left out."""
    count = found["rows"]
    lines = [
        f"{count['asked']:,} questions, scored by {found['metric']}; in points, with 95 % "
        "intervals, the change paired with all tokens.",
        "",
        "| kept | rule | score | change | p | tokens kept | visual cache | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["results"]:
        change = f"{100 * row['difference']:+.1f} ({_span(row, 'difference_')})"
        p = "–" if row["p"] is None else f"{row['p']:.2g}"
        if row["rule"] == "all tokens":
            change = p = "–"
        lines.append(
            f"| {_kept(row)} | {row['rule']} | {100 * row['score']:.1f} ({_span(row)}) | {change} "
            f"| {p} | {row['kept']:,.1f} | {row['cache_bytes'] / 2**20:,.2f} MiB "
            f"| {row['seconds']:.3g} |"
        )
    if count["bad"]:
        lines += ["", f"{count['bad']} of {count['read']} rows left out: {_left_out(count)}."]
    return "\n".join(lines) + "\n"


def as_paper_row(found: Mapping[str, Any], model: str, benchmark: str) -> str:
    """What a row of the paper's table needs: share kept and score of all tokens and of the rule."""
    lines = [
        f"| model | K_ratio | visual tokens kept | {benchmark} ({found['metric']}) | change "
        "| visual cache | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["results"]:
        k = "–" if row["k_ratio"] is None else f"{row['k_ratio']:g}"
        change = f"{100 * row['difference']:+.1f} ({_span(row, 'difference_')})"
        lines.append(
            f"| {model} | {k} | {row['kept_share']:.1%} | {100 * row['score']:.1f} ({_span(row)}) "
            f"| {change if row['k_ratio'] else '–'} | {row['cache_bytes'] / 2**20:,.2f} MiB "
            f"| {row['seconds']:.3g} |"
        )
    return "\n".join(lines) + "\n"


def _left_out(count: Mapping[str, Any]) -> str:
    more = count["bad"] - len(count["first"])
    return ", ".join(count["first"]) + (f", and {more} more" if more else "")


def _span(row: Mapping[str, Any], of: str = "") -> str:
    return f"{100 * row[of + 'low']:.1f} – {100 * row[of + 'high']:.1f}"


def _kept(row: Mapping[str, Any]) -> str:
    if row["k_ratio"] is not None:
        return f"k = {row['k_ratio']:g}"
    return "100 %" if row["share"] is None else f"{100 * row['share']:g} %"


def as_csv(found: Mapping[str, Any]) -> str:
    """The results without their categories."""
    text = io.StringIO()
    names = [name for name in found["results"][0] if name != "categories"]
    table = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(found["results"])
    return text.getvalue()


def as_png(found: Mapping[str, Any]) -> bytes:
    """Scores by the share of tokens kept, a line for each rule.

    Raises:
        ImportError: matplotlib is not there.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    whole, *others = found["results"]
    lines: dict[str, list[dict]] = {}
    for row in others:
        lines.setdefault(row["rule"], []).append(row)
    axes.axhline(100 * whole["score"], color="0.4", linestyle="--", label="all tokens")
    axes.axhspan(100 * whole["low"], 100 * whole["high"], color="0.9", zorder=0)
    for place, (name, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda row: row["kept_share"])
        aside = 0.8 * (place - (len(lines) - 1) / 2)  # or intervals would hide one another
        x = [100 * row["kept_share"] + aside for row in points]
        y = [100 * row["score"] for row in points]
        ends = [
            [100 * max(0.0, row["score"] - row["low"]) for row in points],
            [100 * max(0.0, row["high"] - row["score"]) for row in points],
        ]
        axes.errorbar(x, y, yerr=ends, marker="o", capsize=3, label=name)
    axes.set_xlim(0, 100)
    axes.set(xlabel="visual tokens kept, %", ylabel=f"{found['metric']}, %")
    axes.legend()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


def write_files(found: Mapping[str, Any], folder: Path, name: str = "comparison") -> list[str]:
    """Write comparison.json, .csv, .md, and .png where matplotlib is; their endings.

    Raises:
        LlamaVisionError: they cannot be written.
    """
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    files = {"json": text.encode(errors="backslashreplace"), "csv": as_csv(found).encode()}
    files["md"] = as_markdown(found).encode(errors="backslashreplace")
    with contextlib.suppress(ImportError):
        files["png"] = as_png(found)
    for kind, data in files.items():
        path = folder / f"{name}.{kind}"
        part = path.with_suffix(f".{kind}.part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError as error:
            raise LlamaVisionError(
                f"{printable(path)} cannot be written: {error.strerror or error}"
            ) from None
    return list(files)
