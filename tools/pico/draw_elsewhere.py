"""Pictures that other programs draw, for the exam.

    python tools/pico/draw_elsewhere.py tools/pico/elsewhere

Twenty pages of a browser (chromium), twenty SVG files (rsvg-convert) and twenty terminals (xterm
under Xvfb, photographed by ImageMagick's import), with a question and the right answer each, in
FOLDER/questions.json. None of it shares code with the pictures of the training.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

WORDS = (
    *("harbor", "lantern", "Tuesday", "OPEN", "coffee", "4711", "Exit"),
    *("maple", "B52", "silver", "Hello", "2026", "window", "PARK"),
)
COLORS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "star")
NUMBERS = ("no", "one", "two", "three", "four")
DISPLAY = ":97"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random("elsewhere")
    made = [*browser_pages(rng, folder), *svg_files(rng, folder), *terminals(rng, folder)]
    (folder / "questions.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def entry(picture: Path, question: str, answer: str) -> dict[str, str]:
    return {"picture": picture.name, "question": question, "answer": answer}


def browser_pages(rng: Random, folder: Path) -> Iterator[dict[str, str]]:
    for number in range(20):
        picture = folder / f"browser_{number:02}.png"
        text = " ".join(rng.sample(WORDS, rng.choice((1, 1, 2))))
        width, height = rng.choice(((112, 112), (224, 112), (112, 224), (300, 100)))
        color, font = rng.choice(COLORS), rng.choice(("serif", "sans-serif", "monospace"))
        size = min(34, int(1.5 * width / max(map(len, text.split()))))
        page = (
            f"<body style='margin:8px;color:{color};font:{size}px {font}'>"
            f"<div style='margin-top:{rng.randint(0, 30)}px'>{text}</div></body>"
        )
        with tempfile.NamedTemporaryFile("w", suffix=".html") as file:
            file.write(page)
            file.flush()
            run(
                "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                "--disable-background-networking", f"--window-size={width},{height}",
                f"--screenshot={picture}", f"file://{file.name}",
            )  # fmt: skip
        if number % 4 == 3:
            yield entry(picture, "What color is the text?", f"The text is {color}.")
        else:
            yield entry(picture, "What does the text say?", text)


def svg_files(rng: Random, folder: Path) -> Iterator[dict[str, str]]:
    for number in range(20):
        picture = folder / f"svg_{number:02}.png"
        places = rng.sample([(x, y) for x in (28, 84) for y in (28, 84)], rng.randint(1, 4))
        drawn = [(rng.choice(SHAPES), rng.choice(COLORS), place) for place in places]
        body = "".join(svg_shape(*shape, radius=rng.randint(14, 22)) for shape in drawn)
        source = (
            "<svg xmlns='http://www.w3.org/2000/svg' width='112' height='112'>"
            f"<rect width='112' height='112' fill='white'/>{body}</svg>"
        )
        run("rsvg-convert", "-o", str(picture), stdin=source)
        yield entry(picture, *svg_question(rng, drawn, number))


def svg_question(rng: Random, drawn: list[tuple], number: int) -> tuple[str, str]:
    kinds = [kind for kind, _, _ in drawn]
    kind, color, _ = rng.choice(drawn)
    if number % 3 == 0 and kinds.count(kind) == 1:
        return f"What color is the {kind}?", f"The {kind} is {color}."
    if number % 3 == 1:
        count = kinds.count(kind)
        are = f"is one {kind}" if count == 1 else f"are {NUMBERS[count]} {kind}s"
        return f"How many {kind}s are there?", f"There {are}."
    wanted = rng.choice(COLORS)
    found = any((wanted, kind) == (c, k) for k, c, _ in drawn)
    article = "an" if wanted[0] in "aeiou" else "a"
    return f"Is there {article} {wanted} {kind}?", "Yes." if found else "No."


def svg_shape(kind: str, color: str, center: tuple[int, int], radius: int) -> str:
    x, y = center
    if kind == "circle":
        return f"<circle cx='{x}' cy='{y}' r='{radius}' fill='{color}'/>"
    if kind == "square":
        side = f"width='{1.7 * radius}' height='{1.7 * radius}'"
        return f"<rect x='{x - 0.85 * radius}' y='{y - 0.85 * radius}' {side} fill='{color}'/>"
    corners, inner = (3, 1.0) if kind == "triangle" else (10, 0.45)
    points = []
    for corner in range(corners):
        reach = radius * (inner if corner % 2 and kind == "star" else 1.0)
        angle = 2 * math.pi * corner / corners - math.pi / 2
        points.append(f"{x + reach * math.cos(angle):.1f},{y + reach * math.sin(angle):.1f}")
    return f"<polygon points='{' '.join(points)}' fill='{color}'/>"


def terminals(rng: Random, folder: Path) -> Iterator[dict[str, str]]:
    screen = subprocess.Popen(["Xvfb", DISPLAY, "-screen", "0", "640x480x24"])
    try:
        time.sleep(2)
        for number in range(20):
            picture = folder / f"terminal_{number:02}.png"
            text = " ".join(rng.sample(WORDS, rng.choice((1, 1, 2))))
            dark = rng.random() < 0.5
            colors = ("white", "black") if dark else ("black", "white")
            window = subprocess.Popen([
                "xterm", "-display", DISPLAY, "-title", f"t{number}", "-geometry", "16x4+0+0",
                "-fa", "monospace", "-fs", str(rng.choice((12, 16, 20))), "+sb", "-uc",
                "-fg", colors[0], "-bg", colors[1], "-e", f"tput civis; echo '{text}'; sleep 60",
            ])  # fmt: skip
            time.sleep(2)
            run("import", "-display", DISPLAY, "-window", f"t{number}", str(picture))
            window.kill()
            window.wait()
            if number % 4 == 3:
                yield entry(
                    picture, "What color is the background?", f"The background is {colors[1]}."
                )
            else:
                yield entry(picture, "What does the text say?", text)
    finally:
        screen.kill()


def run(*command: str, stdin: str | None = None) -> None:
    subprocess.run(command, input=stdin, text=True, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
