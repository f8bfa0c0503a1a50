"""Odd words after the command's flags: all combinations, and mixtures by chance."""

import io
import json
import os
import re
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from fuzzing.common import TINY, picture, tiny
from fuzzing.judge import Case, Kind, Refused, WrongResult, draw_for, faults_of_message
from llama_vision.cli.main import main

MIXTURES = 500
"""Cases with several odd words at once."""

BASE = ["--model", str(TINY), "--device", "cpu", "--temperature", "0", "--max-seq-len", "120"]
ASK = [*BASE, "--max-new-tokens", "1", "--prompt", "hi"]
NAME = "llama-vision: "
LONGEST_LINE = 600 + len(NAME)

WORDS = (
    *("", "-", "--", "---", "-1", "0", "1", "2", "1.0", "0.5", "1e309", "nan", "inf", "-inf"),
    *(
        "1" * 5000,
        "99999999999999999999",
        "0x10",
        "1_0",
        " 5 ",
        "²",
        "\uff11",
        "1j",
        "None",
        "True",
    ),
    *("x", "x" * 100_000, "a b", "a\nb", "\t", "\x1b[31mred", "\x1b]0;t\x07", "\x9b31m", "\u202ex"),
    *("\ud800", "a\udcffb", "%s%n", "%(prog)s", "{}", "{0}", "@x", "~", "~/x.png", "~nobody/x"),
    *("../..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "http://x/y.png", "data:,x"),
    *("<|image|>", "<|image|><|begin_of_text|>Hi", "auto", "cuda:99", "cuda:-1", "meta", "float64"),
    *("int8", "24GiB", "-1GiB", "1e30GiB", "GiB", "free", "top-k", "=", "==1", "=--", "--help=1"),
)


@cache
def flags() -> dict[str, bool]:
    """The command's own flags, and whether each takes a value; asked of `--help`."""
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        main(["--help"])
    options = out.getvalue().partition("options:")[2]
    found = re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)$", options, re.MULTILINE)
    return {flag: bool(re.match(r"[ ,]\S", rest)) for flag, rest in found if flag != "--help"}


@cache
def _pairs() -> list[list[str]]:
    """A flag and a word, in both spellings."""
    joined = [[f"{flag}={word}"] for flag in flags() for word in WORDS]
    # The first flag alone would compile, which takes longer than a case may.
    apart = [[flag, word] for flag in flags() if flag != "--compile" for word in WORDS]
    bare = [[flag] for flag in flags() if flag != "--compile"]
    spellings = [[word] for word in WORDS]
    return joined + apart + bare + spellings


class _Stream(io.TextIOWrapper):
    """A stream that is no terminal, and keeps what was written when it is closed."""

    def __init__(self, raw: io.RawIOBase | None = None, **how: Any):
        self.kept = io.BytesIO()
        self.kept.close = lambda: None
        super().__init__(raw or self.kept, **{"encoding": "utf-8", **how})

    def text(self) -> str:
        if not self.closed:
            with suppress(OSError):
                self.flush()
        return self.kept.getvalue().decode("utf-8", errors="replace")


def run_command(arguments: list[str], out: _Stream | None = None) -> None:
    """Run the command as a shell would, and see that it ends as a command should.

    Raises:
        Refused: with exit code 2 and a message.
        WrongResult: another exit code than 0 or 2, or lines on stderr that are none of its own.
    """
    out = out or _Stream()
    code, error = _main(arguments, out)
    lines = error.text().split("\n")
    for line in lines:
        faults = faults_of_message(line) if line else []
        faults = [fault for fault in faults if "characters" not in fault or "raw" in fault]
        if faults or len(line) > LONGEST_LINE:
            raise WrongResult(f"stderr: {'; '.join(faults) or f'{len(line)} characters'}")
    if code not in (0, 2):
        raise WrongResult(f"exit code {code!r}: {ascii(error.text())[:200]}")
    if code == 2:
        strange = [line for line in lines if line and not line.startswith(NAME)]
        if strange or not any(lines):
            raise WrongResult(f"exit code 2 with {len(lines) - 1} lines: {ascii(lines)[:200]}")
        raise Refused
    if "--json" in arguments:
        json.loads(out.text().rstrip("\n").rpartition("\n")[2], parse_constant=_no_constant)


def _main(arguments: list[str], out: io.TextIOBase) -> tuple[Any, "_Stream"]:
    """The exit code of the command, and what it wrote to stderr."""
    error = _Stream(errors="backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(error):
        try:
            return main(arguments), error
        except SystemExit as stop:
            return stop.code, error


def _no_constant(name: str) -> None:
    raise WrongResult(f"{name} in JSON")


def _with_picture_at_home(scratch: Path) -> None:
    """`--image=~/x.png`, which no shell expands."""
    home, before = scratch / "home", os.environ.get("HOME")
    home.mkdir(exist_ok=True)
    picture().save(home / "x.png")
    os.environ["HOME"] = str(home)
    try:
        run_command([*ASK, "--image=~/x.png"])
    finally:
        os.environ.pop("HOME") if before is None else os.environ.update(HOME=before)


class _Broken(io.RawIOBase):
    """A pipe whose reader has gone, or a disk that is full."""

    def __init__(self, error: OSError):
        self.error = error

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise self.error


def _to(error: OSError) -> None:
    out = _Stream(_Broken(error), write_through=True)
    code, stream = _main(ASK, out)
    with suppress(OSError, ValueError):
        out.detach()
    lines = [line for line in stream.text().split("\n") if line]
    if code not in (0, 1, 2) or any(not line.startswith(NAME) for line in lines):
        raise WrongResult(f"exit code {code!r}: {ascii(lines)[:200]}")


class _Terminal(_Stream):
    """A stream that acts on control characters."""

    def isatty(self) -> bool:
        return True


def _on_a_terminal(seed: int) -> None:
    """An answer of random bytes."""
    out = _Terminal(errors="replace")
    draw = ["--temperature", "50", "--seed", str(seed), "--ignore-stop", "--max-new-tokens", "60"]
    run_command([*ASK, *draw], out)
    strange = {c for c in out.text() if not c.isprintable()} - {"\n", "\t"}
    if strange:
        raise WrongResult(f"stdout: raw control characters {sorted(strange)[:3]!a}")


def _special(scratch: Path) -> list[Case]:
    """Cases with something odd beside the words."""
    names = ("\x1b[31m.png", "a\nb.png", "\udcff.png", "x" * 200 + ".png")
    files = [scratch / name for name in names]
    for path in files:
        path.write_bytes(b"no picture")
    return [
        Case("stdout is full", lambda: _to(OSError(28, "No space left on device"))),
        Case("stdout has no reader", lambda: _to(BrokenPipeError(32, "Broken pipe"))),
        Case("stdout fails", lambda: _to(OSError(5, "Input/output error"))),
        Case("stdout is ASCII", lambda: run_command([*ASK, "--json"], _Stream(encoding="ascii"))),
        *(
            Case(f"a terminal, seed {seed}", partial(_on_a_terminal, seed), "taken")
            for seed in range(5)
        ),
        Case("a picture at home", lambda: _with_picture_at_home(scratch), "taken"),
        *(
            Case(ascii(path.name), partial(run_command, [*ASK, "--image", str(path)]), "refused")
            for path in files
        ),
        Case("a plain question", lambda: run_command([*ASK, "--json"]), "taken"),
        Case("nothing", lambda: run_command([]), "refused"),
    ]


def kind(seed: int, scratch: Path) -> Kind:
    """See `fuzzing.kinds`; the mixtures are drawn."""
    tiny()
    with redirect_stdout(_Stream()), redirect_stderr(_Stream()):
        main([*ASK, "--json"])  # the first time takes longer
    special, pairs = _special(scratch), _pairs()

    def case(i: int) -> Case:
        if i < len(special):
            return special[i]
        if i < len(special) + len(pairs):
            odd = pairs[i - len(special)]
        else:
            draw = draw_for("commands", seed, i)
            odd = [word for _ in range(draw.randint(2, 4)) for word in draw.choice(pairs)]
        arguments = [*ASK, *odd]
        return Case(ascii(odd)[:150], lambda: run_command(arguments))

    return Kind("commands", len(special) + len(pairs) + MIXTURES, case)
