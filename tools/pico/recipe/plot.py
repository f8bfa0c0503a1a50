"""The curves of a run, from its table."""

import csv
from pathlib import Path


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
