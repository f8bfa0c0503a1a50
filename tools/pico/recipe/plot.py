"""Curves: of a training run, from its table, and of answers with fewer visual tokens."""

import csv
from pathlib import Path
from typing import Any

from PIL import Image


def plot(table: Path, picture: Path) -> None:
    """One panel a stage: what was measured against the hours it took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    stages = sorted({row["stage"] for row in rows})
    figure, panels = pyplot.subplots(
        1, len(stages), figsize=(6 * len(stages), 5), squeeze=False, layout="constrained"
    )
    for stage, panel in zip(stages, panels[0], strict=True):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["stage"] != stage:
                continue
            for pair in row["metrics"].split():
                name, value = pair.split("=")
                point = (float(row["seconds"]) / 3600, float(value))
                curves.setdefault(name, []).append(point)
        for name, points in curves.items():
            if name != "loss":
                panel.plot(*zip(*points, strict=True), label=name)
        panel.set(title=f"stage {stage}", xlabel="hours", ylabel="part that is right", ylim=(0, 1))
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def plot_trimming(rows: list[dict[str, Any]], picture: Path) -> None:
    """What each rule loses at each share of tokens, see `trimming.compare_rules`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    for number, rule in enumerate(rules):
        own = sorted((row for row in rows if row["rule"] == rule), key=lambda row: row["kept"])
        merged = rule.endswith("merged")
        panel.errorbar(
            [100 * row["tokens"] for row in own],
            [100 * row["difference"] for row in own],
            [100 * row["interval"] for row in own],
            label=rule,
            color=f"C{number}",
            linestyle="-" if merged else "--",
            marker="o" if merged else "s",
            markersize=4,
            linewidth=1.4,
            capsize=2,
        )
    panel.axhline(0, color="gray", linewidth=0.8)
    panel.set(
        xlabel="visual tokens kept, %",
        ylabel="change of exact answers, points (95 % intervals)",
        title="pico, drawn pictures: fewer visual tokens",
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)
    Image.open(picture).convert("RGB").quantize(64).save(picture, optimize=True)
