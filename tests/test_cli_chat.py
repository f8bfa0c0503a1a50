"""The conversation on the terminal: what is answered, told and kept."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import GOLDEN, TINY
from PIL import Image

from llama_vision import LlamaVision
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.main import main

ROOT = Path(__file__).parent.parent
PICTURE = GOLDEN / "images" / "rgb_120x30.png"
SIGN, SCENE = (EMBEDDED_MODEL / "examples" / f"{name}.png" for name in ("sign", "scene"))
TALK = ("--chat", "--device", "cpu", "--temperature", "0")
SHORT = (*TALK, "--model", str(TINY), "--ignore-stop", "--max-new-tokens", "3")


def talk(capsys, monkeypatch, lines, *arguments):
    """Run the command on some lines: exit code, lines of stdout, and of stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    code = main(arguments)
    out, err = capsys.readouterr()
    told = [line.removeprefix("llama-vision: ") for line in err.splitlines()]
    return code, out.splitlines(), [line for line in told if "no tokenizer; text is" not in line]


def test_a_conversation_about_pictures(capsys, monkeypatch, tmp_path):
    """What is said is what `Chat` says; pictures go with the next question."""
    chat = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu").chat(temperature=0)
    first = chat.ask([Image.open(SIGN), "What does the text say?"]).text
    chat.ask("Which shapes are there?")
    shapes = chat.undo().completion.text
    second = chat.ask([Image.open(SCENE), "Describe the image."]).text
    lines = [
        "What does the text say?",
        "",
        "Which shapes are there?",
        "/undo",
        f"/image {SCENE}",
        "Describe the image.",
        "/retry",
        f"/save {tmp_path}/my talk.json",
        "/undo",
        "/undo",
        "/undo",
        f"/load '{tmp_path}/my talk.json'",
        "/stats",
        "/quit",
        "not read any more",
    ]
    code, out, told = talk(capsys, monkeypatch, lines, *TALK, "--image", str(SIGN))
    assert code == 0
    assert out == [first, shapes, second, second, second]
    assert told[:4] == [
        "taken back: 'Which shapes are there?'",
        "taken back: 'Describe the image.', with 1 picture",
        "taken back: 'What does the text say?', with 1 picture",
        "nothing has been asked yet; ask first",
    ]
    assert told[4] == "2 questions were asked; the last answer was:"
    assert told[5].startswith("turns    2, ")


def test_the_first_question_may_be_given_with_the_command(capsys, monkeypatch):
    how = ("--image", str(SIGN), "--prompt", "What does the text say?", "--stats")
    code, out, told = talk(capsys, monkeypatch, [], *TALK, *how)
    assert (code, out) == (0, ["Undone"])
    assert told[1] == "images   1 encoded, 65 visual tokens held"


MISTAKES = {
    "/nope": "there is no command /nope",
    "/image": "/image needs a path",
    "/image none.png": "image none.png does not exist",
    "/image generate.py": "is not a picture",
    "/save": "/save needs a path",
    "/save /nowhere/talk.json": "cannot be written to /nowhere/talk.json",
    "/load": "/load needs a path",
    "/load nothing.json": "nothing.json cannot be read",
    "/load README.md": "README.md cannot be read as JSON",
    "/undo": "nothing has been asked yet",
    "/retry": "nothing has been asked yet",
    "x" * 9000: "expected at least",
    "broken \udcff": "valid Unicode",
}


def test_a_mistake_is_one_line_and_the_conversation_goes_on(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [*MISTAKES, "Hello", "//Hello"]
    code, out, told = talk(capsys, monkeypatch, lines, *SHORT)
    assert (code, len(out)) == (0, 2)
    ended = "the answer ends after 3 tokens: --max-new-tokens"
    assert len(told) == len(MISTAKES) + 2
    assert told[-2:] == [ended, ended]
    for line, words in zip(told, MISTAKES.values(), strict=False):
        assert words in line, line


def test_help_lists_every_command(capsys, monkeypatch):
    _, _, told = talk(capsys, monkeypatch, ["/help"], *SHORT)
    for name in ("image", "retry", "undo", "stats", "save", "load", "help", "quit"):
        assert f"  /{name}" in "\n".join(told)


def test_an_answer_anew_is_drawn_anew(capsys, monkeypatch):
    """With a seed too, from which the tries count."""
    how = [*SHORT, "--temperature", "1", "--seed", "3", "--max-new-tokens", "9"]
    _, out, _ = talk(capsys, monkeypatch, ["Hello", "/retry", "/retry"], *how)
    _, again, _ = talk(capsys, monkeypatch, ["Hello", "/retry", "/retry"], *how)
    assert out == again
    assert len(set(out)) == 3


@pytest.mark.parametrize(
    "flags",
    [
        ("--raw",),
        ("--guard",),
        ("--parse-special",),
        ("--json",),
        ("--show-kept", "kept.png", "--image", str(PICTURE)),
        ("--batch", "x.jsonl", "--out", "y.jsonl"),
    ],
)
def test_what_is_of_a_single_prompt_is_refused(capsys, flags):
    assert main([*SHORT, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llama-vision: --")


def test_ranges_and_room_are_checked_before_the_weights_are_read(capsys):
    for flags in (("--max-seq-len", "0"), ("--temperature", "-1"), ("--image-cache", "much")):
        assert main([*SHORT, *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


class Terminal:
    """generate.py --chat on a terminal of its own."""

    def __init__(self, *arguments):
        self.main, side = pty.openpty()
        command = [sys.executable, "generate.py", *SHORT, *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=side, stdout=side, stderr=side, start_new_session=True
        )
        os.close(side)
        self.seen = ""

    def until(self, words, seconds=60):
        """Read until some words come; what came before them."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.main], [], [], 0.2)[0]:
                self.seen += os.read(self.main, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(words)
        return before

    def begun(self):
        """Wait for the first characters of an answer, behind the line that was typed."""
        self.until("\n")
        while len(self.seen) < 5:
            self.seen += os.read(self.main, 4096).decode(errors="replace")

    def type(self, text):
        os.write(self.main, text.encode())


def test_ctrl_c_stops_an_answer_and_not_the_chat():
    terminal = Terminal("--max-new-tokens", "1500")
    try:
        terminal.until("Ctrl-D ends")
        terminal.until("> ")
        terminal.type("Go on\n")
        terminal.begun()
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("stopped; the conversation goes on")
        terminal.until("> ")
        terminal.process.send_signal(signal.SIGINT)  # at the prompt it gives another one
        terminal.type("\n")  # where Python was just about to wait for a key, it notices now
        terminal.until("> ")
        terminal.type("/stats\n")
        terminal.until("turns    1, ")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.main)


def test_a_full_disk_ends_it_with_one_line():
    command = [sys.executable, "generate.py", *SHORT, "--prompt", "Hello"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1] == (
        "llama-vision: cannot write the answer: No space left on device"
    )
