"""The exam of the embedded model, the sets beside it, and what fewer visual tokens change."""

import importlib.util
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "pico"))

import evaluate
from recipe import sources
from recipe.answers import answer
from recipe.drawing import cut, draw
from recipe.exam import Item, guess, make_exam, tally, wilson
from recipe.model import PATCH, TILE
from recipe.plot import plot_trimming
from recipe.questions import Question, place_of
from recipe.sampling import new_scene
from recipe.scenes import Background, Canvas, Scene, Shape, reading_order
from recipe.sets import NOISE, SETS, make_set, stands_out
from recipe.sources import COLORS, PHOTOGRAPHS
from recipe.trimming import (
    COUNTING,
    RULES,
    as_table,
    compare,
    compare_rules,
    of_group,
    paired_difference,
)

from llama_vision import LlamaVision
from llama_vision.checkpoint.hub import EMBEDDED_MODEL

PACKAGE = sources._package


@pytest.fixture(autouse=True, scope="module")
def photographs(tmp_path_factory) -> Path:
    """Pictures as large as the package's photographs are, in the place of these."""
    folder = tmp_path_factory.mktemp("skimage")
    (folder / "data").mkdir()
    for number, name in enumerate(PHOTOGRAPHS):
        coarse = np.random.default_rng(number).integers(60, 190, (30, 45, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((450, 300)).save(folder / "data" / name)
    sources.photograph.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_package", lambda name, wanted: folder)
        yield folder
    sources.photograph.cache_clear()


@pytest.fixture(scope="module")
def embedded() -> LlamaVision:
    return LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype="float32")


def plain(scene: Scene) -> Scene:
    """The scene before it was worn."""
    return replace(scene, blur=0.0, quality=None, noise=0.0)


def test_which_pictures_there_are_besides_changes_no_picture():
    items = make_exam(10, minimal=True)
    assert make_exam(5, minimal=True) == [item for item in items if item.picture < 5]
    assert make_exam(5, first=5, minimal=True) == [item for item in items if item.picture >= 5]


@pytest.mark.parametrize("name", SETS)
def test_a_set_hangs_on_its_name_and_numbers_alone(name):
    items = make_set(name, 6, minimal=True)
    again = make_set(name, 4, minimal=True)
    assert items[:4] == again
    assert len(items) == 6
    assert {item.part for item in items} == {name}
    for item, other in zip(items, again, strict=False):
        assert draw(item.scene).tobytes() == draw(other.scene).tobytes()
    assert max(Counter((i.picture, i.question.type) for i in items).values()) == 1


def meant_by(question: Question, scene: Scene) -> set[str]:
    """All answers that a question could have, whichever thing it means."""
    words = question.text.lower().strip("?.").split()
    colors, lines = [w for w in words if w in COLORS], reading_order(scene.lines)
    kinds = [shape.kind for shape in scene.shapes if shape.kind in words]
    if question.type == "line":
        at = [place for place, word in enumerate(("first", "second")) if word in words]
        return {
            line.text for line in ([lines[at[0]]] if at else lines) if at or line.color in colors
        }
    if question.type == "color" and "text" in words:
        return {f"The text is {line.color}." for line in lines}
    if question.type == "color":
        return {f"The {s.kind} is {s.color}." for s in scene.shapes if s.kind in kinds}
    if question.type == "shape":
        return {f"A {s.kind}." for s in scene.shapes if s.color in colors}
    named = [s for s in scene.shapes if s.kind in kinds and (not colors or s.color in colors)]
    return {f"In the {place_of(scene, shape)}." for shape in named}


def test_a_question_about_clutter_has_one_answer():
    items = make_set("clutter", 60, minimal=True)
    assert {item.question.type for item in items} == {"line", "color", "shape", "place"}
    for item in items:
        assert (len(item.scene.lines), len(item.scene.shapes)) == (2, 5)
        assert meant_by(item.question, item.scene) == {item.question.answer}, item.question


def test_three_of_four_tiles_are_empty():
    for item in make_set("one tile of four", 8, minimal=True):
        scene = plain(item.scene)
        assert (scene.size, scene.canvas.grid) == ((2 * TILE, 2 * TILE), (2, 2))
        drawn = np.asarray(draw(scene)).astype(int)
        ink = (drawn != np.asarray(draw(replace(scene, shapes=[], lines=[])))).any(-1)
        patches = ink.reshape(2, TILE // PATCH, PATCH, 2, TILE // PATCH, PATCH).any((2, 5))
        assert sorted(patches.any((1, 3)).ravel()) == [False, False, False, True]
        assert 0.05 <= patches.mean() <= 0.2  # labels count patches half covered


def test_noise_is_as_strong_as_it_says():
    scene = new_scene(Random(0), (1, 1), TILE)
    gray = Background((128, 128, 128), (128, 128, 128), "gray")
    noisy = replace(plain(scene), background=gray, noise=NOISE)
    pixels = np.asarray(draw(noisy)).astype(float) - 128
    assert pixels.std() == pytest.approx(NOISE, rel=0.03)
    assert abs(pixels.mean()) < 0.3
    other = np.asarray(draw(replace(noisy, noise_seed=1))).astype(float) - 128
    assert abs((pixels * other).mean()) < 0.03 * NOISE**2
    for item in make_set("noise", 6, minimal=True):
        assert item.scene.noise == NOISE
        assert item.scene.canvas.scale == (1, 1)


def test_only_what_is_drawn_hides_the_photograph():
    for item in make_set("photographs", 6, minimal=True):
        scene = plain(item.scene)
        drawn, photo = (np.array(p) for p in (draw(scene), cut(scene.photo, scene.size)))
        for left, top, right, bottom in [*scene.boxes, *(box for box, _ in scene.plates)]:
            margin = 4 + 0.5 * (bottom - top)  # letters reach under the line, and a little aside
            rows = slice(max(0, int(top - margin)), int(bottom + margin))
            cols = slice(max(0, int(left - margin)), int(right + margin))
            photo[rows, cols] = drawn[rows, cols]
        assert (drawn == photo).all()


def test_a_question_on_a_photograph_is_about_what_is_drawn():
    for item in make_set("photographs", 40, minimal=True):
        assert item.question.type in ("text", "line", "color", "shape", "place")
        words = {*item.question.text.strip("?.").split(), *item.question.answer.strip(".").split()}
        assert not {"background", "no", "circle", "square", "rectangle"} & words


@pytest.mark.parametrize(("rgb", "clear"), [((0, 0, 0), True), ((200, 190, 200), False)])
def test_a_thing_stands_out_from_what_it_lies_on(rgb, clear):
    shape = Shape("star", "any", rgb, (10, 10, 40, 40), 0.0, 0.0)
    assert stands_out(shape, np.full((60, 60, 3), 200, np.uint8), 0.2) is clear


@pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None,
    reason="the photographs need tools/pico/photographs.txt",
)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_package_ships_the_photographs(name):
    (folder,) = importlib.util.find_spec("skimage").submodule_search_locations
    with Image.open(Path(folder) / "data" / name) as image:
        assert min(image.size) >= 300


def test_a_missing_package_is_named():
    with pytest.raises(ModuleNotFoundError, match="no-such is not installed; run: pip install it"):
        PACKAGE("no_such", "it")


def made_items(types: list[str]) -> list[Item]:
    canvas = Canvas.of((TILE, TILE), TILE, 4)
    scene = Scene((TILE, TILE), canvas, Background((0, 0, 0), (0, 0, 0), "black"))
    return [Item(i, "made", scene, Question(kind, "?", "!")) for i, kind in enumerate(types)]


@pytest.mark.parametrize("seed", range(4))
def test_types_and_groups_sum_to_all(seed):
    rng = Random(seed)
    kinds = ("text", "line", "describe", "color", "count")[: 3 + seed % 3]
    items = made_items([rng.choice(kinds) for _ in range(50)])
    hits, right = ([rng.random() < share for _ in items] for share in (0.6, 0.9))
    row = compare(items, hits, right)
    sums = np.sum(list(row["types"].values()), axis=0).tolist()
    assert sums == [sum(hits), sum(right), len(items)]
    groups = row["groups"].values()
    assert sum(group["asked"] for group in groups) == len(items)
    for name in ("exact", "difference"):
        whole = sum(group["asked"] * group[name] for group in groups) / len(items)
        assert whole == pytest.approx(row[name])
    assert row["difference"] == pytest.approx((sum(hits) - sum(right)) / len(items))


def test_a_paired_difference_is_of_the_same_questions():
    difference, spread = paired_difference([True, True, False, True], [True, False, False, False])
    assert difference == 0.5
    assert spread == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)


def test_all_rules_keep_as_many_tokens(embedded):
    items = make_exam(2, 1, minimal=True)
    full = answer(embedded, items, items, batch=2)
    rows = list(compare_rules(embedded, items, full, 2, shares=(0.5,)))
    assert [(row["kept"], row["rule"]) for row in rows] == [(0.5, rule) for rule in RULES]
    most = rows[0]["tokens"]
    assert rows[0]["rule"] == COUNTING
    assert 0.4 < most <= 0.5
    for row in rows:
        if "last row" in row["rule"]:
            assert 0.8 * most < row["tokens"] <= most
        else:
            assert row["tokens"] == most


def made_rows() -> list[dict]:
    changed = {"difference": -0.05, "interval": 0.01}
    row = {**changed, "tokens": 0.5, "groups": {"reading": {"difference": -0.2, "interval": 0.04}}}
    return [{**row, "rule": rule, "kept": kept} for rule in ("a", "b") for kept in (0.1, 0.5)]


def test_a_table_has_a_line_a_rule_and_a_column_a_share():
    lines = as_table(made_rows()).splitlines()
    assert lines[0] == "| rule | 50% | 10% |"
    assert lines[2:] == [f"| {rule} | -5.0 ± 1.0 | -5.0 ± 1.0 |" for rule in "ab"]
    assert "| a | -20.0 ± 4.0 |" in as_table(of_group(made_rows(), "reading"))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_curves_are_a_small_picture(tmp_path):
    plot_trimming(made_rows(), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (720, 450)
    assert (tmp_path / "curves.png").stat().st_size < 60_000


def test_the_command_asks_a_set(tmp_path, capsys):
    report = tmp_path / "sets.json"
    command = f"{EMBEDDED_MODEL} --set clutter --set-questions 2 --minimal --trim --json {report}"
    evaluate.main(command.split())
    tables = json.loads(report.read_text())
    assert tables["clutter"]["overall"][1] == 2
    assert len(tables["clutter, fewer visual tokens"]) == 3 * len(evaluate.FEW_RULES)
    assert "| max-min, merged |" in capsys.readouterr().out


def test_tally_and_guess():
    items = make_exam(20, minimal=True)
    right = [item.question.answer for item in items]
    assert tally(items, right)["overall"] == (len(items), len(items))
    assert tally(items, [""] * len(items))["overall"] == (0, len(items))
    assert guess(items[0].question, minimal=True)


def test_wilson_interval():
    """Against the values of R's prop.test(correct = FALSE), whose z has more digits."""
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-5)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-4)
