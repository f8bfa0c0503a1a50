"""The README's own examples run as they stand, and the files that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = dict(enumerate(re.findall(r"```python\n(.*?)```", README, re.DOTALL)))
ROWS = [re.findall(r"`([\w/.]+(?:\.py|/))`", row) for row in README.splitlines()]


def test_there_are_examples_and_files():
    assert len(EXAMPLES) >= 2
    assert sum(map(len, ROWS)) >= 20


@pytest.mark.parametrize("number", EXAMPLES)
def test_an_example_runs(number, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(EXAMPLES[number], "README.md", "exec"), {})
    assert capsys.readouterr().out


def is_there(name, folder):
    return any((ROOT / place / name).exists() for place in ("", "llama_vision", folder))


def test_every_file_that_it_names_is_there():
    """From the root, in the package, or in the folder that its row begins with."""
    assert [name for row in ROWS for name in row if not is_there(name, row[0])] == []
