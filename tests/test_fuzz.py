"""Odd input at every door ends as it should, and what looks for that sees where it does not."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fuzz
from fuzzing import bombs, checkpoints, commands, judge, messages, pictures, runner, settings
from fuzzing.judge import Case, Kind, Outcome
from fuzzing.kinds import KINDS

from llama_vision import LlamaVision, LlamaVisionError

SPREAD = {
    "pictures": 130,
    "checkpoints": 40,
    "settings": 90,
    "messages": 80,
    "pruners": 50,
    "commands": 50,
    "json": 60,
}
"""Cases of each kind: 500."""


@pytest.mark.parametrize("name", KINDS)
def test_odd_input_ends_as_it_should(name, tmp_path):
    kind = KINDS[name](0, tmp_path)
    step = kind.cases // SPREAD[name]
    outcomes = list(runner.run(kind, range(step // 2, kind.cases, step)[: SPREAD[name]], workers=1))
    assert len(outcomes) == SPREAD[name]
    assert [outcome for outcome in outcomes if outcome.faults] == []
    assert len({outcome.ended for outcome in outcomes}) > 1  # not all are refused, nor all taken


def test_500_are_tried():
    assert SPREAD.keys() == KINDS.keys()
    assert sum(SPREAD.values()) == 500


class LoudError(LlamaVisionError):
    """Says what it is given as it is."""

    def __init__(self, message: str):
        self.message = message

    def __str__(self):
        return self.message


def raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


PLANTED = {
    "TypeError": (raising(TypeError("x")), "foreign exception: TypeError: x"),
    "SystemExit": (raising(SystemExit(3)), "foreign exception: SystemExit"),
    "escape": (raising(LoudError("a\x1b[31mb")), "message: raw control characters ['\\x1b']"),
    "surrogate": (raising(LoudError("a\udcff")), "message: raw control characters ['\\udcff']"),
    "two lines": (raising(LoudError("a\nb")), "message: 2 lines"),
    "long": (raising(LoudError("a" * 601)), "message: 601 characters"),
    "empty": (raising(LoudError("")), "message: none"),
    "print": (lambda: print("hello", file=sys.stderr), "stderr: hello"),
    "C library": (lambda: os.write(2, b"TIFF: hello"), "stderr: TIFF: hello"),
    "warning": (lambda: warnings.warn("careful", stacklevel=1), "stderr: UserWarning: careful"),
    "program": (lambda: subprocess.run(["true"], check=False), "program started: ('true'"),
    "wrong": (raising(judge.WrongResult("other tensors")), "wrong result: other tensors"),
    "memory": (lambda: bytearray(2**26), "memory: 0.1 GiB more"),
    "slow": (lambda: time.sleep(0.3), "hang: 0.3 s"),
}


@pytest.mark.parametrize(("run", "says"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_seen(run, says, monkeypatch):
    monkeypatch.setattr(judge, "MOST_GROWTH", 2**25)
    outcome = judge.judge(Case("planted", run), limit=0.2)
    assert any(fault.startswith(says) for fault in outcome.faults), outcome


ENDS = {"taken": lambda: None, "refused": raising(LlamaVisionError("no"))}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("expected", ["taken", "refused", "either"])
def test_what_ends_otherwise_than_expected_is_a_fault(ends, expected):
    outcome = judge.judge(Case("x", ENDS[ends], expected))
    assert outcome.ended == ends
    assert bool(outcome.faults) == (expected not in (ends, "either"))


def slow_once(been: Path) -> None:
    """As on a busy machine."""
    if not been.exists():
        been.touch()
        time.sleep(60)


def test_a_worker_that_hangs_or_dies_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "GRACE", 0.1)
    runs = {
        1: lambda: time.sleep(60),
        3: lambda: os._exit(7),
        5: lambda: slow_once(tmp_path / "been"),
    }
    kind = Kind("planted", 6, lambda i: Case(str(i), runs.get(i, lambda: None)))
    outcomes = sorted(runner.run(kind, range(6), limit=0.3), key=lambda o: o.number)
    assert [o.number for o in outcomes] == list(range(6))
    assert {o.number: o.faults[0] for o in outcomes if o.faults} == {
        1: "hang: more than 0.3 s",
        3: "crash: exit code 7",
    }
    assert [outcome.words for outcome in outcomes] == list("012345")


@pytest.mark.parametrize("module", [settings, messages], ids=["settings", "messages"])
def test_a_door_that_takes_everything_is_seen(module, monkeypatch, tmp_path):
    shapes = {name: door[0] if module is messages else None for name, door in module.DOORS.items()}
    for name, shape in shapes.items():
        blind = (lambda *_: None) if shape is None else (shape, lambda given: None)
        monkeypatch.setitem(module.DOORS, name, blind)
    kind = module.kind(0, tmp_path)
    outcomes = [judge.judge(kind.case(i), i) for i in range(0, kind.cases, kind.cases // 60)]
    wrong = [o for o in outcomes if o.faults == ("wrongly taken: expected to be refused",)]
    assert len(wrong) > len(outcomes) / 3


def test_a_wrong_tensor_is_seen(monkeypatch):
    whole = LlamaVision.from_pretrained(TINY, device="cpu")
    parameter = next(whole.model.vision.parameters())
    monkeypatch.setattr(LlamaVision, "from_pretrained", lambda *_, **__: whole)
    checkpoints.load_and_compare(TINY)
    with torch.no_grad():
        parameter.view(-1)[-1] += 1
    with pytest.raises(judge.WrongResult, match="is not what the file holds"):
        checkpoints.load_and_compare(TINY)


COMMANDS = {
    "fault": (lambda _: 1, "exit code 1"),
    "silent": (lambda _: 2, "exit code 2 with 0 lines"),
    "escape": (lambda _: print("\x1b[31m", file=sys.stderr) or 0, "raw control characters"),
    "two lines": (lambda _: print("llama-vision: a\nb", file=sys.stderr) or 2, "with 2 lines"),
    "long": (lambda _: print("llama-vision:" + "a" * 999, file=sys.stderr) or 2, "characters"),
    "NaN": (lambda _: print('{"x": NaN}') or 0, "NaN in JSON"),
}


@pytest.mark.parametrize(("main", "says"), COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_ends_wrongly_is_seen(main, says, monkeypatch):
    monkeypatch.setattr(commands, "main", main)
    with pytest.raises(judge.WrongResult, match=says):
        commands.run_command(["--json"])


def test_the_commands_own_flags_are_found():
    found = commands.flags()
    assert found["--top-k"]
    assert found["--image"]
    assert not found["--json"]
    assert len(found) > 20


@pytest.mark.parametrize("name", ["pictures", "checkpoints", "commands"])
def test_a_case_follows_from_seed_and_number(name, tmp_path):
    def words(seed: int) -> list[str]:
        (tmp_path / str(seed)).mkdir(exist_ok=True)
        kind = KINDS[name](seed, tmp_path / str(seed))
        return [kind.case(kind.cases - n).words for n in range(1, 6)]

    assert words(0) == words(0) != words(1)


def test_sums_of_edited_chunks_are_made_right():
    whole = bombs.saved("PNG")
    edited = bytearray(whole)
    edited[20] ^= 1  # the width, whose sum now is wrong
    assert bombs.with_right_sums(whole) == whole
    assert bombs.with_right_sums(bytes(edited)) not in (whole, bytes(edited))
    assert len({kind for kind, _, _ in pictures.whole_files()}) > 15


def planted_kind(seed: int, scratch: Path) -> Kind:
    """Case 2 fails."""
    runs = {2: raising(TypeError("\x1b"))}
    return Kind("planted", 4, lambda i: Case(f"case {i}", runs.get(i, lambda: None)))


def test_the_table_names_what_failed_and_how_to_repeat_it(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "KINDS", {"planted": planted_kind})
    assert fuzz.main(["--kinds", "planted", "--json"]) == 1
    *lines, report = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["planted", "4", "1", "3", "0"]
    (group,) = json.loads(report)["kinds"]["planted"]["groups"]
    assert group["first"][0]["number"] == 2
    assert fuzz.main(["--kinds", "planted", "--only", "2"]) == 1
    printed = capsys.readouterr()
    assert "TypeError" in printed.out
    assert "\x1b" not in printed.out
    assert fuzz.main(["--kinds", "planted", "--only", "1"]) == 0


def test_an_outcome_without_fault_is_none():
    assert judge.judge(Case("x", lambda: None), 5) == Outcome(5, "x", "taken")
