"""The evaluator: scores made by hand, statistics, odd rows, a run that is killed and goes on."""

import base64
import csv
import io
import json
import os
import random
import signal
import string
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from evaluation.answering import Answer, Answerer, ask_in_words
from evaluation.arms import NAMES, Arm, make_arms
from evaluation.command import main
from evaluation.datasets import BadRow, DataError, Row, read_rows
from evaluation.records import Records, RecordsError
from evaluation.report import compare, write_files
from evaluation.run import Progress, ask_all, clock
from evaluation.scoring import METRICS, checked, edits, metric_of
from evaluation.statistics import bootstrap, mcnemar, paired, wilson

from llama_vision import LlamaVision, LlamaVisionError
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.memory.fit import MemoryLimitError

SIGN = Path(EMBEDDED_MODEL) / "examples" / "sign.png"
ROWS = 200


def row_of(answers, options=(), category="", number=0):
    options = dict(zip("ABCD", options, strict=False))
    return Row(number, str(number), "?", tuple(answers), ("x.png",), options, "", category)


def word(rng, length=8):
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def off_by_one(rng, text):
    """A text with one character replaced, left out or put in; digits are in none of ours."""
    at = rng.randrange(len(text))
    return text[:at] + rng.choice(("7", "7" + text[at], "")) + text[at + 1 :]


def choice(rng):
    texts = [f"{word(rng)} {word(rng)}" for _ in "ABCD"]
    right, other = rng.sample("ABCD", 2)
    letter = rng.choice((right, right, other))
    text = texts["ABCD".index(letter)]
    said, sure = rng.choice(
        [
            (letter, True),
            (f"({letter})", True),
            (f"{letter}. {text}", True),
            (f"The answer is {letter}.", True),
            (f"Answer: {letter}, so it is", True),
            (f"Answer: {letter}, so I think", True),
            (f"{letter} it is, or so", False),
            (f"It shows the {text.upper()}.", True),
            (f"{right} or {other}", False),
            (letter.lower(), False),
            (letter * 2, False),
            (f"{texts[0]} or {texts[1]}", False),
            ("", False),
            (text + 60 * " and", False),
        ]
    )
    return row_of([right], texts), said, float(sure and letter == right)


def open_text(rng):
    answers = [f"{word(rng)} {word(rng)}" for _ in range(rng.choice((1, 3)))]
    text = rng.choice(answers)
    right = rng.choice((text, text.upper(), f" {text}\n"))
    wrong = rng.choice((off_by_one(rng, text), text + ".", "", text.split()[0]))
    hit = rng.random() < 0.5
    return row_of(answers), right if hit else wrong, float(hit)


def contained(rng):
    formula = rng.random() < 0.3
    answers = [f"{word(rng)} {word(rng)}" for _ in range(2)]
    text = rng.choice(answers)
    right = text.replace(" ", "") if formula else text.upper().replace(" ", "\n")
    wrong = text.upper() if formula else rng.choice((off_by_one(rng, text[1:-1]), text[1:]))
    hit = rng.random() < 0.5
    category = "Handwritten Mathematical Expression Recognition" if formula else "Text"
    return row_of(answers, (), category), f"it says {right if hit else wrong}!", float(hit)


def yes_or_no(rng):
    right, wrong = rng.sample(("yes", "no"), 2)
    good = (right, right.upper() + ".", f"{right}, there is one", f"I think {right}")
    bad = (wrong, f"{right} and {wrong}", "maybe", "", f"{right}t", "not", "yesterday", "no-one")
    hit = rng.random() < 0.5
    return row_of([right.title()]), rng.choice(good if hit else bad), float(hit)


def near(rng):
    """So many digits in place of letters, or behind them: as many edits."""
    length = rng.randrange(4, 13)
    text, wrong = word(rng, length), rng.randrange(length + 1)
    if rng.random() < 0.5:
        places = rng.sample(range(length), wrong)
        said = "".join("7" if i in places else c for i, c in enumerate(text))
        score = (length - wrong) / length
    else:
        said, score = text + "7" * wrong, length / (length + wrong)
    return row_of(["0" * 30, text.upper()]), f" {said} ", score if score >= 0.5 else 0.0


@pytest.mark.parametrize(
    ("metric", "make"),
    [
        ("exact", choice),
        ("exact", open_text),
        ("contains", contained),
        ("yes-no", yes_or_no),
        ("anls", near),
    ],
)
def test_scores_are_those_made_by_hand(metric, make):
    rng = random.Random(make.__name__)
    expected = []
    for _ in range(ROWS):
        row, said, score = make(rng)
        assert METRICS[metric](row, said) == pytest.approx(score), (row, said)
        expected.append(score)
    assert 0.2 < sum(expected) / ROWS < 0.8  # both kinds are among them


def test_answers_that_are_nearly_right():
    assert METRICS["exact"](row_of(["B"], ("a cat", "a dog")), "C") == 0
    assert METRICS["exact"](row_of(["A"], ("a cat", "a dog")), "A dog lies in the sun") == 0
    assert METRICS["anls"](row_of(["ab"]), "a7") == 0.5  # what is just half right counts
    assert METRICS["anls"](row_of(["abc"]), "a77") == 0
    assert METRICS["anls"](row_of(["Two  words"]), "two words") == 1
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("ab", "ba"))] == [
        3,
        3,
        2,
    ]


def test_the_columns_suggest_a_metric():
    assert metric_of([row_of(["A"], ("x", "y"))]) == "exact"
    assert metric_of([row_of(["Yes"]), row_of(["no."])]) == "yes-no"
    assert metric_of([row_of(["Yes"]), row_of(["maybe"])]) == "exact"
    assert metric_of([row_of(["1", "one"])]) == "anls"


@pytest.mark.parametrize(
    ("metric", "row", "answer"),
    [
        ("exact", row_of(["y"], ("x", "y")), "B"),
        ("exact", row_of(["C"], ("x", "y")), None),
        ("exact", row_of(["x"], ("x", "x")), None),
        ("yes-no", row_of(["maybe"]), None),
        ("yes-no", row_of(["No"]), "No"),
    ],
)
def test_an_answer_that_the_metric_cannot_compare_is_a_bad_row(metric, row, answer):
    found = checked(row, metric)
    assert isinstance(found, BadRow) if answer is None else found.answers == (answer,)


def test_statistics_are_those_of_scipy():
    """binomtest(…).pvalue, its Wilson interval, and norm.interval, of SciPy 1.17."""
    for gained, lost, p in (
        (0, 0, 1),
        (1, 0, 1),
        (5, 25, 0.0003249142318964005),
        (31, 30, 1),
        (2, 10, 0.03857421875),
        (0, 20, 1.9073486328125e-06),
    ):
        assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p)
    assert wilson(8, 10) == pytest.approx((0.4901624715, 0.9433178485), abs=1e-7)
    assert wilson(0, 10) == pytest.approx((0, 0.2775327999), abs=1e-7)
    assert wilson(10, 10) == pytest.approx((0.7224672001, 1), abs=1e-7)
    scores, others = [1, 1, 0, 0, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0, 1]
    assert paired(scores, others) == pytest.approx((0.25, -0.239991, 0.739991), abs=1e-5)
    assert paired([1], [0]) == (1, 1, 1)


def test_a_bootstrap_interval_is_near_the_normal_one():
    rng = random.Random(0)
    values = [rng.random() for _ in range(400)]
    mean, spread = sum(values) / 400, 1.96 * (1 / 12 / 400) ** 0.5
    assert bootstrap(values) == pytest.approx((mean - spread, mean + spread), abs=0.1 * spread)
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([0.5] * 9) == (0.5, 0.5)


def picture(side=60):
    data = io.BytesIO()
    noise = random.Random(side).randbytes(3 * side * side)
    Image.frombytes("RGB", (side, side), noise).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def write_table(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return path


def test_tables_of_vlmevalkit_are_read(tmp_path):
    image = picture()
    rows = [
        {"index": 7, "question": 'of "two"\nlines', "answer": "B", "image": image, "A": "x"},
        {"index": 8, "question": "same", "answer": 0, "image": "7", "category": "c", "hint": "h"},
        {"index": 9, "question": "several", "answer": "['1', 'one']", "image": str([image] * 2)},
        {"index": 10, "question": "there", "answer": "1", "image_path": "a.png"},
    ]
    first, second, third, fourth = read_rows(write_table(tmp_path / "t.tsv", rows))
    uri = f"data:;base64,{image}"
    assert (first.question, first.options, first.images) == ('of "two"\nlines', {"A": "x"}, (uri,))
    assert (second.answers, second.images) == (("0",), (uri,))
    assert (second.category, second.hint) == ("c", "h")
    assert (third.answers, third.images) == (("1", "one"), (uri, uri))
    assert fourth.images == (tmp_path / "a.png",)
    assert len(read_rows(tmp_path / "t.tsv", 2)) == 2
    lines = "\n".join(json.dumps(row) for row in rows[:2]) + "\n\n"
    (tmp_path / "t.jsonl").write_text(lines, encoding="utf-8-sig")
    assert read_rows(tmp_path / "t.jsonl") == [first, second]


BAD = {
    '{"question": "q", "answer": "a"}': "no image",
    '{"question": "q", "answer": "", "image": "a.png"}': "no answer",
    '{"question": "q", "answer": [], "image": "a.png"}': "no answer",
    '{"question": "q", "answer": {}, "image": "a.png"}': "no answer",
    '{"question": " ", "answer": "a", "image": "a.png"}': "no question",
    '{"question": null, "answer": "a", "image": "a.png"}': "no question",
    "[1]": "no JSON object",
    '{"question": ': "no JSON object",
    "[" * 100_000: "no JSON object",
    "\udcff": "no JSON object",
}
"""Lines that cannot be asked, and why."""

UNREADABLE = {
    '{"question": "q", "answer": "a", "image": "nowhere.png"}': "does not exist",
    '{"question": "q", "answer": "a", "image": "%%%"}': "base64",
    '{"question": "q", "answer": "a", "image": "AAAA"}': "not a picture",
    '{"question": "q", "answer": "a", "image": "https://x.y/z.png"}': "not",
    f'{{"question": "{"long " * 220_000}", "answer": "a", "image": "s.png"}}': "characters",
    '{"question": "\\ud800", "answer": "a", "image": "s.png"}': "Unicode",
}
"""Those that show it when they are asked."""


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_one_bad_row(line, tmp_path):
    good = json.dumps({"question": "q", "answer": "a", "image": "s.png"})
    text = f"{good}\n{line}\n{good}\n"
    (tmp_path / "t.jsonl").write_text(text, encoding="utf-8", errors="surrogateescape")
    before, bad, after = read_rows(tmp_path / "t.jsonl")
    assert BAD[line] in bad.why
    assert (before.number, bad.number, after.number) == (0, 1, 2)


def test_a_line_of_a_table_with_too_many_fields_is_bad(tmp_path):
    (tmp_path / "t.tsv").write_text(
        "question\tanswer\timage\nq\ta\ti.png\tx\nq\ta\n\nq\ta\ti.png\n"
    )
    kinds = [type(row) for row in read_rows(tmp_path / "t.tsv")]
    assert kinds == [BadRow, BadRow, Row]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.tsv", "question\timage\n", "no column answer"),
        ("t.tsv", "question\tanswer\n", "image or image_path"),
        ("t.tsv", "question\tanswer\timage\n", "holds no rows"),
        ("t.jsonl", "", "holds no rows"),
        ("t.csv", "", "expected a .tsv or .jsonl"),
        ("t.tsv", None, "No such file"),
    ],
)
def test_a_file_that_is_no_benchmark_is_refused(name, text, says, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says):
        read_rows(tmp_path / name)


def test_what_is_asked_in_words():
    row = Row(0, "0", "{hint}?", ("A",), ("x",), {"A": "x", "B": "y"}, "look")
    assert ask_in_words(row).splitlines()[:5] == [
        "Hint: look",
        "Question: {hint}?",
        "Options:",
        "A. x",
        "B. y",
    ]
    assert ask_in_words(row, "{question} ({hint})") == "{hint}? (look)"
    assert ask_in_words(row_of(["a"])) == "?"


@pytest.fixture(scope="module")
def pico():
    return LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype="float32")


@pytest.mark.parametrize("amount", [{"share": 0.3}, {"k_ratio": 0.1}], ids=str)
def test_every_rule_keeps_as_many_tokens_as_trimmed_llama(pico, amount):
    answerer = Answerer(pico, max_new_tokens=1)
    prompts = [answerer.prompt(Row(0, "0", q, ("a",), (SIGN,), {})) for q in "ab"]
    arms = [Arm(None), Arm("trimmed", **amount)]
    arms += [Arm(name + end, **amount) for name in NAMES for end in ("", "+merge")][1:]
    counts, whole = [None, None], None
    for arm in arms:
        told = counts if arm.counter else [None, None]
        made = answerer.answer([0, 1], prompts, arm, told)
        kept = [answer.kept for answer in made]
        if arm.rule is None:
            whole = made
        elif arm.rule == "trimmed":
            counts = kept
        if arm.rule and arm.rule.startswith("trimmed-last"):  # a union of heads fits, or less
            assert all(n - 8 < own <= n for own, n in zip(kept, counts, strict=True)), arm
        elif arm.counter:
            assert kept == counts, arm
        for answer, all_tokens in zip(made, whole, strict=True):
            counted = 4 * answer.kept * arm.merge
            per_token = all_tokens.cache_bytes // all_tokens.tokens
            assert answer.cache_bytes == answer.kept * per_token + counted
    assert 0 < counts[0] < whole[0].tokens


class Stub:
    """Answers what its row and arm say, some of it right, without a model."""

    def __init__(self, seconds=0.0, fails=()):
        self.seconds, self.fails, self.asked = seconds, fails, 0

    def prompt(self, row):
        if row.number % 11 == 5:
            raise LlamaVisionError("is no picture")
        return row.number

    def warm_up(self, prompt):
        pass

    def answer(self, rows, prompts, arm, counts):
        time.sleep(self.seconds)
        self.asked += 1
        if (bad := set(self.fails) & set(rows)) and arm.merge:
            raise LlamaVisionError(f"not finite: {bad}")
        assert all(count == 40 for count in counts) if arm.counter else counts[0] is None
        said = [random.Random(f"{row}{arm.name}").choice("yyyn") for row in rows]
        kept = 40 if arm.rule else 100
        return [Answer(r, s, 100, kept, 10 * kept, random.random()) for r, s in zip(rows, said)]  # noqa: B905


STUB_ROWS = [row_of(["y"], category="even" * (n % 2 == 0), number=n) for n in range(80)]
STUB_ROWS[3] = BadRow(3, "three", "has no answer")
STUB_ARMS = make_arms(["max-min+merge", "uniform"], shares=[0.5, 0.25], k_ratios=[])


def go_on(folder, stub, metric="exact", rows=STUB_ROWS):
    records = Records(folder / "answers.jsonl", {"batch": 4})
    ask_all(stub, rows, STUB_ARMS, records, 4)
    records.close()
    return compare(rows, STUB_ARMS, records, metric, {"batch": 4})


def without_seconds(folder):
    """All files that a run leaves, but for the seconds in them."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    for result in found["results"]:
        assert result.pop("seconds") >= 0
    table = list(csv.DictReader((folder / "comparison.csv").open(encoding="utf-8")))
    for line in table:
        assert float(line.pop("seconds")) >= 0
    words = (folder / "comparison.md").read_text(encoding="utf-8")
    words = [line.rsplit("|", 2)[0] for line in words.splitlines()]
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    for line in answers[1:]:
        for answer in line["answers"]:
            answer.pop("seconds")
    png = folder / "comparison.png"
    return found, table, words, answers, png.read_bytes() if png.exists() else None


def test_ten_kills_lose_nothing(tmp_path):
    """Each of a process in the midst of it; what was whole before stays, byte for byte."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    write_files(go_on(whole, Stub()), whole)
    rng, before, path = random.Random(0), b"", killed / "answers.jsonl"
    for _ in range(10):
        child = os.fork()
        if child == 0:
            try:
                go_on(killed, Stub(0.005))
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.01, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it had ended before it was killed"
        now = path.read_bytes() if path.exists() else b""
        assert now.startswith(before)
        before = now[: now.rfind(b"\n") + 1]
    done = before.count(b"\n") - 1
    assert 0 < done < 140
    stub = Stub()
    write_files(go_on(killed, stub), killed)
    assert stub.asked < 140 - done + 1
    assert without_seconds(killed) == without_seconds(whole)
    if sys.modules.get("matplotlib"):
        assert (killed / "comparison.png").stat().st_size > 1000


def test_an_unfinished_line_is_asked_again(tmp_path):
    """Cut at each byte of the last line, and of the first."""
    go_on(tmp_path, Stub())
    path = tmp_path / "answers.jsonl"
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for kept in (*range(len(data) - len(lines[-1]), len(data), 9), *range(0, len(lines[0]), 3)):
        path.write_bytes(data[:kept])
        records = Records(path, {"batch": 4})
        records.close()
        left = data[:kept].count(b"\n")
        assert len(records.done) == max(0, left - 1)
        assert path.read_bytes().splitlines()[0] == data.splitlines()[0]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"settings": {"batch": 8}}\n', "a run with batch 8, and this one has 4"),
        (b'{"settings": []}\n', "a run with batch None"),
        (b"[]\n", "damaged"),
        (b"\xff\n", "damaged"),
        (b'{"settings": {"batch": 4}}\n{"batch": 1}\n', "damaged"),
        (b'{"settings": {"batch": 4}}\nnonsense\n{}\n', "damaged"),
    ],
)
def test_answers_of_another_run_are_refused(data, says, tmp_path):
    (tmp_path / "answers.jsonl").write_bytes(data)
    with pytest.raises(RecordsError, match=says):
        Records(tmp_path / "answers.jsonl", {"batch": 4})
    assert (tmp_path / "answers.jsonl").read_bytes() == data


def test_two_runs_do_not_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl")
    first = Records(tmp_path / "a.jsonl", {})
    with pytest.raises(RecordsError, match="another run"):
        Records(tmp_path / "a.jsonl", {})
    first.close()
    Records(tmp_path / "a.jsonl", {}).close()
    with pytest.raises(RecordsError, match="cannot be written"):
        Records(tmp_path, {})


def test_bad_rows_are_counted_named_and_left_out_of_every_arm(tmp_path):
    """Bad in the file, when opened, and under one rule."""
    found = go_on(tmp_path, Stub(fails=[12, 13]))
    bad = {3, 12, 13} | {n for n in range(80) if n % 11 == 5}
    assert found["rows"]["bad"] == len(bad) == 10
    assert found["rows"]["first"] == [
        "three (has no answer)",
        "5 (is no picture)",
        found["rows"]["first"][2],
    ]
    assert found["rows"]["first"][2].startswith("12 (max-min+merge@share=0.5: not finite")
    good = [n for n in range(80) if n not in bad]
    for arm, result in zip(STUB_ARMS, found["results"], strict=True):
        said = [random.Random(f"{n}{arm.name}").choice("yyyn") for n in good]
        assert result["score"] == pytest.approx(said.count("y") / len(good))
        whole = [random.Random(f"{n}all").choice("yyyn") for n in good]
        pairs = list(zip(said, whole, strict=True))
        assert result["gained"] == pairs.count(("y", "n"))
        assert result["lost"] == pairs.count(("n", "y"))
        assert result["kept_share"] == (0.4 if arm.rule else 1)
        even = [s for n, s in zip(good, said, strict=True) if n % 2 == 0]
        assert result["categories"] == {
            "even": [pytest.approx(even.count("y") / len(even)), len(even)]
        }


@pytest.mark.parametrize("too_large", [lambda rows: 7 in rows, lambda rows: len(rows) > 1])
def test_a_row_too_large_is_bad_and_a_batch_too_large_an_error(too_large, tmp_path):
    class Full(Stub):
        def answer(self, rows, prompts, arm, counts):
            if too_large(rows):
                raise MemoryLimitError("needs more")
            return super().answer(rows, prompts, arm, counts)

    records = Records(tmp_path / "a.jsonl", {})
    if too_large([7]):
        ask_all(Full(), STUB_ROWS[6:8], [Arm(None)], records, 4)
        line = records.done[0, "all"]
        assert [[one["row"] for one in line[kind]] for kind in ("answers", "bad")] == [[6], [7]]
    else:
        with pytest.raises(MemoryLimitError):
            ask_all(Full(), STUB_ROWS[6:8], [Arm(None)], records, 4)


def test_scores_between_have_intervals_and_no_p(tmp_path):
    for result in go_on(tmp_path, Stub(), "anls")["results"]:
        assert result["low"] < result["score"] < result["high"]
        assert result["p"] is None
        assert result["difference_low"] <= result["difference"] <= result["difference_high"]


def test_where_no_row_can_be_asked_an_error_says_why(tmp_path):
    with pytest.raises(LlamaVisionError, match=r"none of the 2 rows .* three"):
        go_on(tmp_path, Stub(), rows=[BadRow(n, "three", "why") for n in (0, 1)])


def test_progress_is_one_line_where_there_is_no_terminal(capsys):
    progress = Progress(4, 1)
    for _ in range(3):
        progress.step()
    assert capsys.readouterr().err == "4 of 4 batches, 0:00 left\n"
    assert [clock(s) for s in (0, 61, 3723)] == ["0:00", "1:01", "1:02:03"]


def test_the_command_from_a_table_to_its_files(tmp_path, capsys):
    image = base64.b64encode(SIGN.read_bytes()).decode()
    rows = [{"index": "sign", "question": "What does the text say?", "answer": "Undone"}]
    rows += [{"index": "color", "question": "What color is the text?", "answer": "Undone"}]
    lines = [json.dumps({**row, "image": image}) for row in rows] + list(UNREADABLE)
    data = tmp_path / "t.jsonl"
    data.write_text("\n".join(lines), encoding="utf-8")
    Image.new("RGB", (20, 20)).save(tmp_path / "s.png")
    asked = ["--data", str(data), "--out", str(tmp_path / "out"), "--batch", "3"]
    asked += ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "8"]
    assert main([*asked, "--rules", "max-min+merge", "--shares", "0.5"]) == 0
    table = capsys.readouterr().out
    assert "| 50 % | max-min+merge | 50.0 (9.5 – 90.5) | +0.0 (0.0 – 0.0) | 1 |" in table
    found = json.loads((tmp_path / "out/comparison.json").read_text(encoding="utf-8"))
    assert (found["rows"]["asked"], found["rows"]["bad"]) == (2, len(UNREADABLE))
    for why in UNREADABLE.values():
        assert any(
            why in line for line in (tmp_path / "out/answers.jsonl").read_text().splitlines()
        )
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main([*asked, "--rules", "max-min+merge", "--shares", "0.5"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    capsys.readouterr()
    assert main([*asked, "--paper", "0.25"]) == 0
    kept = {path: path.read_bytes() for path in files if path.stem == "comparison"}
    assert kept == {path: files[path] for path in kept}
    header, _, whole, trimmed = capsys.readouterr().out.splitlines()
    assert "| t (exact) |" in header
    assert whole.startswith("| pico | – | 100.0% | 50.0")
    assert trimmed.startswith("| pico | 0.25 | ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rules", "best"], "no rule 'best'"),
        (["--shares", "1.5"], "--shares"),
        (["--shares", "half"], "not a number"),
        (["--batch", "0"], "--batch is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["--paper", "0"], "--paper is 0"),
        (["--metric", "best"], "invalid choice"),
        (["--prompt-template", "what?"], "{question}"),
        (["--prompt-template", "{question} {answer}"], "{question}"),
        (["--data", "nowhere.tsv"], "No such file"),
        (["--out", "/dev/null/x"], "cannot be made"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, says, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"question": "q", "answer": "a", "image": "s.png"}\n')
    asked = ["--data", str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*asked, "--metric", "exact", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("evaluate: ")
    assert err.count("\n") == 1
    assert says in err
