"""The README's own examples run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) == 2


@pytest.mark.parametrize("example", EXAMPLES, ids=["surface", "own pruner"])
def test_an_example_runs(example, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {})
    assert "VisualCounts(encoded=68, valid=68, kept=" in capsys.readouterr().out


def test_every_file_it_lists_is_there():
    table = README.split("### The files")[1].split("##")[0]
    names = re.findall(
        r"`([\w/.]+)`", " ".join(line.split("|")[1] for line in table.splitlines()[4:] if line)
    )
    folder = ""
    for name in names:
        folder = name.rpartition("/")[0] or folder
        path = ROOT / name if "/" in name or name == "generate.py" else ROOT / folder / name
        assert path.exists(), name
