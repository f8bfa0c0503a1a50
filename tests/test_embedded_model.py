"""The small trained model that comes with the code: it loads like any other, and it sees."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "pico"))

from recipe.answers import answer
from recipe.exam import make_exam

from llama_vision import LlamaVision
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.main import main
from llama_vision.inputs.image import open_image

MEASURED = 0.905
"""Its exact answers to the first 200 questions of its exam."""

EXAMPLES = json.loads((EMBEDDED_MODEL / "examples" / "questions.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def embedded() -> LlamaVision:
    return LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu")


def test_there_are_six_examples():
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("example", EXAMPLES, ids=[e["picture"] for e in EXAMPLES])
def test_it_answers_an_example(embedded, example):
    picture = open_image(EMBEDDED_MODEL / "examples" / example["picture"])
    prompt = embedded.prompt([{"role": "user", "content": [picture, example["question"]]}])
    completion = embedded.generate(prompt, max_new_tokens=64)
    assert (completion.text, completion.finish_reason) == (example["answer"], "stop")


def test_without_a_picture_it_cannot_know(embedded):
    prompt = embedded.prompt([{"role": "user", "content": EXAMPLES[0]["question"]}])
    assert embedded.generate(prompt, max_new_tokens=64).text != EXAMPLES[0]["answer"]


def test_the_command_runs_it_by_default(capsys):
    picture = EMBEDDED_MODEL / "examples" / EXAMPLES[0]["picture"]
    assert main(["--image", str(picture), "--prompt", EXAMPLES[0]["question"]]) == 0
    assert capsys.readouterr().out.strip() == EXAMPLES[0]["answer"]


@pytest.mark.skipif(
    importlib.util.find_spec("fontpkg") is None,
    reason="its pictures need the fonts of tools/pico/requirements.txt",
)
def test_it_passes_its_exam(embedded):
    """The first 200 questions, at most two points under what was measured."""
    items = make_exam(67)[:200]
    answers = answer(embedded, items, items, batch=32)
    right = sum(a == item.question.answer for item, a in zip(items, answers, strict=True))
    assert right / len(items) >= MEASURED - 0.02


def test_it_stays_small():
    assert sum(file.stat().st_size for file in EMBEDDED_MODEL.rglob("*")) < 10_000_000
