"""Files of prompts: what is answered, in which order, and that no answer is lost or made twice."""

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GOLDEN, TINY

from llama_vision import Engine, MaxMin, Settings
from llama_vision.batch import answers as answers_module
from llama_vision.batch.answers import Answers, AnswersError
from llama_vision.batch.run import Batch
from llama_vision.batch.task import MOST_BYTES
from llama_vision.batch.tasks import open_tasks
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli import batch as command
from llama_vision.cli.arguments import read_arguments
from llama_vision.cli.main import EXIT_INTERRUPTED, main
from llama_vision.errors import SettingError

PICTURES = ("rgb_120x30.png", "rgb_57x200.png", "big_320x200.png")
ASK = {"max_new_tokens": 4, "temperature": 0, "ignore_stop": True}
HOW = ("--model", str(TINY), "--device", "cpu", "--temperature", "0", "--ignore-stop")
HOW += ("--max-new-tokens", "4")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with three pictures in it."""
    for name in PICTURES:
        shutil.copy(GOLDEN / "images" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*lines: object, path: str = "prompts.jsonl") -> None:
    """A file of prompts; bytes go into it as they are."""
    raws = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    Path(path).write_bytes(b"".join(raw + b"\n" for raw in raws))


def questions(*numbers: int) -> list[dict]:
    """Some that can be told apart, every other one with a picture."""
    of = [[PICTURES[n % 3]] if n % 2 else [] for n in numbers]
    pairs = zip(numbers, of, strict=True)
    return [{"id": f"q{n}", "prompt": f"Number {n}?", "images": images} for n, images in pairs]


def run(*more: str, how: tuple[str, ...] = HOW) -> int:
    return main([*how, "--batch", "prompts.jsonl", "--out", "answers.jsonl", *more])


def read(path: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def told(capsys) -> list[str]:
    """The lines on stderr, without the one that every run of the tiny checkpoint has."""
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line.removeprefix("llama-vision: ") for line in err.splitlines()]
    return [line for line in lines if "no tokenizer; text is" not in line]


def refused(capsys, *arguments: str) -> str:
    assert main([*HOW, *arguments]) == 2
    (line,) = told(capsys)
    return line


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """The ids of the questions that are answered, in order."""
    ids, add = [], Answers.add
    monkeypatch.setattr(Answers, "add", lambda *a: (add(*a), ids.append(a[2]["id"])))
    return ids


def facts(answer: dict) -> tuple:
    return answer["text"], answer["token_ids"], answer["finish_reason"], answer["visual_tokens"]


def test_answers_are_those_of_generate_in_order(folder, tiny, capsys):
    picture = (folder / PICTURES[0]).read_bytes()
    uri = f"data:image/png;base64,{b64encode(picture).decode()}"
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes"}]
    third = {"type": "image_url", "image_url": {"url": PICTURES[1]}}
    write(
        {"id": "first", "prompt": "What?", "images": [PICTURES[0]], "max_new_tokens": 9},
        b" \r",
        {"messages": [*turns, {"role": "user", "content": [third, "And now?"]}], "keep": 0.5},
        {"prompt": "Alike?", "images": [uri, PICTURES[2]], "system": "Be brief.", "seed": 7},
        {"id": -5, "prompt": "No picture", "stop": None, "max_tokens": 2},
    )
    assert run("--json", "--slots", "2", "--system", "Be kind.", "--top-logprobs", "1") == 0

    def chat(system: str, *content: object, before: tuple | list = ()) -> Any:
        system = {"role": "system", "content": system}
        return tiny.prompt([system, *before, {"role": "user", "content": list(content)}])

    expected = [
        (chat("Be kind.", picture, "What?"), {"max_new_tokens": 9}),
        (
            chat("Be kind.", folder / PICTURES[1], "And now?", before=turns),
            {"pruner": MaxMin(0.5, merge=True)},
        ),
        (chat("Be brief.", picture, folder / PICTURES[2], "Alike?"), {"seed": 7}),
        (chat("Be kind.", "No picture"), {"max_new_tokens": 2}),
    ]
    answers = read()
    assert [answer["id"] for answer in answers] == ["first", 3, 4, -5]
    for answer, (prompt, settings) in zip(answers, expected, strict=True):
        alone = tiny.generate(prompt, **ASK | settings)
        assert facts(answer) == facts(
            vars(alone) | {"visual_tokens": alone.visual_tokens._asdict()}
        )
        assert answer["prompt_tokens"] == len(prompt.token_ids)
        assert answer["generated_tokens"] == len(alone.token_ids)
        assert [step[0]["id"] for step in answer["top_logprobs"]] == alone.token_ids
        torch.testing.assert_close(answer["logprobs"], alone.logprobs, rtol=0, atol=1e-4)
    assert told(capsys)[-1].startswith("4 of 4 are answered: 19 tokens in ")
    assert sorted(os.listdir()) == sorted([*PICTURES, "prompts.jsonl", "answers.jsonl"])


def test_line_i_draws_with_seed_plus_i(folder, tiny):
    write(
        b"\xef\xbb\xbf" + b'{"prompt": "Go"}', {"prompt": "Go", "seed": 90}, b"", {"prompt": "Go"}
    )
    assert run("--temperature", "3", "--seed", str(2**63 - 1), "--json") == 0
    prompt = tiny.prompt([{"role": "user", "content": "Go"}])
    for answer, seed in zip(read(), [2**63 - 1, 90, 1], strict=True):
        alone = tiny.generate(prompt, **ASK | {"temperature": 3, "seed": seed})
        assert answer["token_ids"] == alone.token_ids


def test_a_folder_of_pictures(folder, tiny):
    below = folder / "shown" / "below" / "data:x"
    below.mkdir(parents=True)
    for place, name in zip(("shown/b.PNG", "shown/below/a.png"), PICTURES, strict=False):
        (folder / name).rename(place)
    (folder / PICTURES[2]).rename(below / "ä.png")
    (folder / "shown" / "notes.txt").write_text("no picture")
    ask = ["--batch", "shown", "--prompt", "Describe.", "--out", "answers.jsonl", "--json"]
    assert main([*HOW, *ask]) == 0
    answers = read()
    ids = ["b.PNG", "below/a.png", "below/data:x/ä.png"]
    assert [answer["id"] for answer in answers] == ids
    for name, answer in zip(ids, answers, strict=True):
        content = [folder / "shown" / name, "Describe."]
        alone = tiny.generate([{"role": "user", "content": content}], **ASK)
        assert answer["token_ids"] == alone.token_ids


MALFORMED = {
    b"{nojson": "the line cannot be read as JSON: Expecting property name",
    b'{"prompt": "a", "prompt": "b"}': "'prompt' stands twice in one object",
    b"\xff\xfe": "the line cannot be read as JSON: byte 0 is not UTF-8",
    b"[" * 200_000: "the line cannot be read as JSON: it is nested too deeply",
    b"[" * 1_100_000: "the line holds more than 1,048,576 lists",
    b'{"prompt": ' + b"9" * 5000 + b"}": "the line cannot be read as JSON: Exceeds the limit",
    b'"text"': "the line holds a str, expected a JSON object",
    b'{"messages": ' + b"[" * 3000 + b"]" * 3000 + b"}": "nested too deeply",
    b'{"prompt": "' + b"x" * MOST_BYTES + b'"}': "the line has more than 33,554,432 bytes",
    b"{}": 'by "messages" or by "prompt"',
    b'{"prompt": "x", "messages": []}': 'by "messages" or by "prompt"',
    b'{"prompt": "x", "imges": []}': "there is no key imges; expected images",
    b'{"prompt": "x", "logits_processors": []}': "there is no key logits_processors; expected",
    b'{"prompt": ""}': "prompt is ''; expected a text",
    b'{"prompt": 5}': "prompt is 5; expected a text",
    b'{"prompt": "\\ud800"}': "a text has '\\ud800' at character 0",
    b'{"prompt": "x", "system": 5}': "system is 5; expected a text",
    b'{"prompt": "x", "id": 1.5}': "id is 1.5; expected a text or a whole number",
    b'{"prompt": "x", "id": true}': "id is True; expected a text or a whole number",
    b'{"prompt": "x", "id": "good"}': "line 1 has the same id; expected another",
    b'{"prompt": "x", "images": "a.png"}': "images is 'a.png'; expected a list, each of it a text",
    b'{"prompt": "x", "images": [[]]}': "images is [[]]; expected a list, each of it a text",
    b'{"prompt": "x", "images": ["none.png"]}': "none.png does not exist",
    b'{"prompt": "x", "images": ["prompts.jsonl"]}': "is not a picture that can be read",
    b'{"prompt": "x", "images": ["http://x/a.png"]}': "is not on this machine; fetch it first",
    b'{"prompt": "x", "images": ["data:;base64,!"]}': "is no valid base64",
    b'{"messages": []}': "the conversation is empty",
    b'{"messages": "x"}': "messages is 'x'; expected a list",
    b'{"messages": [{"role": "me", "content": "x"}]}': "role 'me' is unknown",
    b'{"messages": [{}], "images": []}': '"images" is of "prompt"; put it into "messages"',
    b'{"messages": [{}], "system": "x"}': '"system" is of "prompt"; put it into "messages"',
    b'{"prompt": "x", "temperature": NaN}': "temperature is nan; expected",
    b'{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens is 0; expected 1 or more",
    b'{"prompt": "x", "pruner": "uniform"}': "give --keep R|N too",
    b'{"prompt": "x", "images": ["big_320x200.png"], "visual_budget": 1}': "visual budget is 1",
    b'{"prompt": "x", "max_seq_len": 4000}': "max_seq_len is 4000; expected 1 to",
    b'{"prompt": "' + b"x" * 70 + b'", "max_seq_len": 64}': "tokens long and --max-seq-len",
}


def test_what_is_malformed_is_named_and_the_rest_is_answered(folder, capsys):
    good = {"id": "good", "prompt": "Good?"}
    write(good, *MALFORMED, b"", {"id": "last", "prompt": "x"})
    assert run("--slots", "2") == 2
    first, *failed, last = read()
    assert (first["id"], last["id"]) == ("good", "last")
    assert first["generated_tokens"] == last["generated_tokens"] == 4
    *lines, summary, count = told(capsys)
    assert summary.startswith(f"2 of {len(MALFORMED) + 2} are answered: 8 tokens in ")
    assert count.startswith(f"{len(MALFORMED)} of {len(MALFORMED) + 2} failed; the same command")
    for number, (answer, part) in enumerate(zip(failed, MALFORMED.values(), strict=True), 2):
        assert part in answer["error"], answer
        assert answer.keys() == {"id", "line", "error"}
        assert answer["line"] == number
        assert f"prompts.jsonl:{number}: {answer['error']}"[:550] == lines[number - 2][:550]
    assert [answer["id"] for answer in failed if answer["id"] != answer["line"]] == ["good"]


def test_failures_are_tried_again_and_answers_are_not(folder, asked, capsys):
    missing = {"id": "late", "prompt": "x", "images": ["late.png"]}
    write(*questions(1, 2), missing)
    assert run() == 2
    before = Path("answers.jsonl").read_bytes()
    shutil.copy(PICTURES[0], "late.png")
    asked.clear()
    write(*questions(1, 2), missing, *questions(3))
    assert run() == 0
    assert asked == ["late", "q3"]
    assert Path("answers.jsonl").read_bytes().splitlines()[:2] == before.splitlines()[:2]
    assert [answer["id"] for answer in read()] == ["q1", "q2", "late", "q3"]
    assert told(capsys)[-1].startswith("4 of 4 are answered, 2 of them before: 8 tokens in ")


def test_when_all_is_answered_no_weights_are_loaded(folder, capsys, monkeypatch):
    write(*questions(1, 2))
    assert run() == 0
    before = Path("answers.jsonl").read_bytes()
    told(capsys)
    monkeypatch.setattr("llama_vision.api.LlamaVision.load_weights", None)
    write(*questions(2, 1))  # in another order
    assert run() == 0
    assert Path("answers.jsonl").read_bytes().splitlines() == before.splitlines()[::-1]
    assert told(capsys) == ["2 of 2 are answered, 2 of them before"]


def test_a_changed_line_is_asked_again(folder, asked):
    write(*questions(1, 2), {"prompt": "x"})
    assert run() == 0
    asked.clear()
    one, two = questions(1, 2)
    write(one, two | {"max_new_tokens": 5}, b"", {"prompt": "x"})  # x has the number of its line
    assert run() == 0
    assert asked == ["q2", 4] or asked == [4, "q2"]
    assert [answer["generated_tokens"] for answer in read()] == [4, 5, 4]


def test_a_seed_goes_by_the_place_of_a_line(folder, asked):
    write(*questions(1, 2))
    assert run("--seed", "3") == 0
    asked.clear()
    write(*questions(1, 3, 2))
    assert run("--seed", "3") == 0
    assert sorted(asked) == ["q2", "q3"]


def stop_after(monkeypatch, count: int, how: Any) -> None:
    """Do something after so many answers have been written."""
    seen, add = [], Answers.add

    def added(*arguments: object) -> None:
        add(*arguments)
        seen.append(1)
        if len(seen) == count:
            how()

    monkeypatch.setattr(Answers, "add", added)


def test_ctrl_c_keeps_what_is_answered(folder, capsys, monkeypatch):
    write(*questions(*range(12)))
    assert run() == 0
    expected = Path("answers.jsonl").read_bytes()
    os.remove("answers.jsonl")
    told(capsys)
    with monkeypatch.context() as patch:
        stop_after(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert run("--slots", "2") == EXIT_INTERRUPTED
    assert told(capsys) == ["interrupted; 5 of 12 are answered; the same command goes on"]
    assert not os.path.exists("answers.jsonl")
    assert len(read("answers.jsonl.part")) == 5
    assert run("--slots", "2") == 0
    assert Path("answers.jsonl").read_bytes() == expected
    assert told(capsys)[-1].startswith("12 of 12 are answered, 5 of them before: 28 tokens in ")


@pytest.fixture
def five_of_nine(folder, capsys, monkeypatch) -> bytes:
    """A run that was interrupted; what the answers would have been."""
    write(*questions(*range(9)))
    assert run() == 0
    expected = Path("answers.jsonl").read_bytes()
    os.remove("answers.jsonl")
    with monkeypatch.context() as patch:
        stop_after(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        assert run("--slots", "1") == EXIT_INTERRUPTED
    told(capsys)
    return expected


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_a_line_cut_short_is_answered_again(five_of_nine, cut, asked):
    """But where only its end is missing, which says nothing."""
    part = Path("answers.jsonl.part")
    part.write_bytes(part.read_bytes()[:-cut])
    assert run() == 0
    assert len(asked) == (4 if cut == 1 else 5)
    assert Path("answers.jsonl").read_bytes() == five_of_nine
    assert not part.exists()


def test_what_power_loss_leaves_of_a_line_is_passed_over(five_of_nine):
    part = Path("answers.jsonl.part")
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"\0" * 40 + b"\n" + lines[0] + b"[]\n{}\n" + b"".join(lines[2:]) + b"\0" * 9)
    assert run() == 0
    assert Path("answers.jsonl").read_bytes() == five_of_nine


@pytest.mark.parametrize(
    "other",
    [
        ("--max-new-tokens", "5"),
        ("--seed", "1"),
        ("--keep", "0.5"),
        ("--system", "x"),
        ("--json",),
        ("--dtype", "bfloat16"),
        ("--model", str(EMBEDDED_MODEL)),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_answers_of_another_run_are_not_mixed_in(five_of_nine, other, finished, capsys):
    assert not finished or run() == 0
    told(capsys)
    path = Path("answers.jsonl" if finished else "answers.jsonl.part")
    before = path.read_bytes()
    message = refused(capsys, "--batch", "prompts.jsonl", "--out", "answers.jsonl", *other)
    assert message == (
        f"{path.absolute()} holds answers of another model or of other settings; give another "
        "--out, or delete it"
    )
    assert path.read_bytes() == before
    assert len(list(Path().glob("answers*"))) == 1


@pytest.mark.parametrize(
    "rule",
    [
        ("--keep", "0.5"),
        ("--k-ratio", "0.5"),
        *(("--pruner", name, "--keep", "3") for name in COUNTED_RULES),
    ],
    ids=" ".join,
)
def test_a_rule_is_the_same_in_the_next_run(folder, rule, monkeypatch):
    write(*questions(1))
    assert run(*rule) == 0
    monkeypatch.setattr("llama_vision.api.LlamaVision.load_weights", None)
    assert run(*rule) == 0


def test_what_changes_no_answer_does_not_matter(five_of_nine, asked):
    assert run("--slots", "3", "--prefill-chunk", "7", "--force", "--no-graphs") == 0
    assert len(asked) == 4
    assert Path("answers.jsonl").read_bytes() == five_of_nine


def test_answers_to_other_prompts_are_not_replaced(five_of_nine, capsys):
    before = Path("answers.jsonl.part").read_bytes()
    write(*questions(20, 21))
    message = refused(capsys, "--batch", "prompts.jsonl", "--out", "answers.jsonl")
    assert "holds answers to other prompts; give another --out" in message
    assert Path("answers.jsonl.part").read_bytes() == before


def test_a_second_run_at_the_same_time_is_refused(five_of_nine, capsys, monkeypatch):
    arguments = ("--batch", "prompts.jsonl", "--out", "answers.jsonl")
    part = Path("answers.jsonl.part")
    before = part.read_bytes()
    with part.open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        assert f"another run writes {part.absolute()} now" in refused(capsys, *arguments)
        monkeypatch.setattr(answers_module, "fcntl", None)  # a system without locks goes on
        assert run() == 0
    assert Path("answers.jsonl").read_bytes() == five_of_nine
    assert before


def test_a_run_that_began_as_another_one_ended_is_refused(folder, monkeypatch):
    """It has the lock of a file that is not there any more."""
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *a: (flock(*a), os.remove("a.jsonl.part")))
    with pytest.raises(AnswersError, match="another run writes"):
        Answers(folder / "a.jsonl", "run", [b""])


def test_a_full_disk_loses_nothing(folder, capsys):
    """A limit to the size of files stands for it: writes end in the middle of a line."""
    write(*questions(*range(9)))
    assert run() == 0
    expected = Path("answers.jsonl").read_bytes()
    os.remove("answers.jsonl")
    told(capsys)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = 0
    for share in (0.4, 0.7, 0.9):  # at 0.9 there is room for most answers
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(expected)), before[1]))
        try:
            message = refused(capsys, "--batch", "prompts.jsonl", "--out", "answers.jsonl")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        part = Path("answers.jsonl.part")
        assert message == (
            f"{part.absolute()} cannot be written: File too large; the answers so far are kept, "
            "and the same command goes on"
        )
        lines = part.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line in expected.splitlines(keepends=True)]
        assert len(whole) >= max(kept, 1)
        kept = len(whole)
    assert run() == 0
    assert Path("answers.jsonl").read_bytes() == expected
    assert told(capsys)[-1].startswith(f"9 of 9 are answered, {kept} of them before")


def test_no_room_for_the_ordered_answers_loses_nothing(folder, capsys, monkeypatch):
    write(*questions(*range(3)))
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(full))
        message = refused(capsys, "--batch", "prompts.jsonl", "--out", "answers.jsonl")
    assert "answers.jsonl.ordered cannot be written: No space left on device; the" in message
    assert not Path("answers.jsonl.ordered").exists()
    assert run() == 0
    assert told(capsys) == ["3 of 3 are answered, 3 of them before"]
    assert [answer["id"] for answer in read()] == ["q0", "q1", "q2"]


def test_killed_at_any_moment_every_line_is_answered_once(folder):
    """Ten times, and once more where the ordered answers take their place."""
    sign = {"images": [str(EMBEDDED_MODEL / "examples" / "sign.png")]}
    texts = [f"What is {n} times {n}?" for n in range(70)]
    write(*({"prompt": text} | (sign if n % 3 else {}) for n, text in enumerate(texts)))
    how = ("--device", "cpu", "--dtype", "float32", "--temperature", "0", "--ignore-stop")
    how += ("--max-new-tokens", "12", "--slots", "4")
    assert run(how=how) == 0
    expected = Path("answers.jsonl").read_bytes()
    assert [answer["id"] for answer in read()] == list(range(1, 71))
    arguments = [*how, "--batch", "prompts.jsonl", "--out", "again.jsonl"]
    script = Path(__file__).with_name("killed_batch.py")
    facts = [sys.executable, script, "0", "10", str(len(expected)), *arguments]
    done = subprocess.run(facts, stdout=subprocess.PIPE, text=True, check=True)
    *ends, answered, different = map(int, done.stdout.split())
    assert ends == [-9] * 11 + [0]
    assert answered == different == 70
    assert Path("again.jsonl").read_bytes() == expected
    assert sorted(path.name for path in Path().glob("again*")) == ["again.jsonl"]


def batch_of(tiny, base: Settings, slots: int = 2) -> Batch:
    """One in this process, as the command makes it."""
    tasks = open_tasks(Path("prompts.jsonl"), None, numbered=False)
    answers = Answers(Path("answers.jsonl").absolute(), "run", tasks.digests)
    engine = Engine(tiny, slots=slots, max_seq_len=128)
    return Batch(engine, tasks, answers, base, with_tokens=True)


def unlucky(at: int, error: Exception, otherwise: Any) -> Any:
    """A function that fails when it is called for the time `at`, and else does what another one
    does."""
    calls = []

    def function(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise error
        return otherwise(*arguments, **named)

    return function


@pytest.mark.parametrize("at", [1, 4, 17])
@pytest.mark.parametrize("what", ["pruner", "logits", "memory"])
def test_what_fails_in_a_step_fails_alone(folder, tiny, monkeypatch, what, at):
    lines = questions(*range(1, 60, 2))
    write(*lines)
    error = torch.OutOfMemoryError("no luck\nat all")
    more = {}
    if what == "pruner":
        more["pruner"] = unlucky(
            at, error, lambda saliency, visual: torch.ones_like(visual.is_class)
        )
    elif what == "logits":
        more["logits_processors"] = [unlucky(at, error, lambda logits: logits)]
    else:
        prefill = unlucky(at, error, Engine._prefill)
        monkeypatch.setattr(Engine, "_prefill", lambda *a: prefill(*a))
    batch = batch_of(tiny, Settings(**ASK, **more))
    ended = [one for one in batch.run() if one is not None]
    (failed,) = [one for one in ended if one.error is not None]
    assert "OutOfMemoryError: no luck\\nat all" in failed.error
    batch.answers.finish()
    assert len(ended) == len(lines)
    for line, answer in zip(lines, read(), strict=True):
        assert answer["id"] == line["id"]
        if answer["id"] == failed.task.id:
            assert answer["error"] == failed.error
        else:
            content = [folder / line["images"][0], line["prompt"]]
            alone = tiny.generate([{"role": "user", "content": content}], **ASK)
            assert answer["token_ids"] == alone.token_ids


def test_a_fault_that_is_of_no_question_ends_the_run(folder, tiny, monkeypatch):
    write(*questions(1, 2))
    batch = batch_of(tiny, Settings(**ASK))
    monkeypatch.setattr(batch.engine.decoder, "step", unlucky(2, RuntimeError("no luck"), None))
    batch.engine.decoder.step = unlucky(1, RuntimeError("no luck"), None)
    with pytest.raises(RuntimeError, match="no luck"):
        list(batch.run())


def test_a_picture_of_many_questions_is_encoded_once(folder, tiny):
    name = PICTURES[0]
    write(*({"prompt": f"Question {n}?", "images": [name]} for n in range(12)))
    batch = batch_of(tiny, Settings(**ASK))
    assert len([one for one in batch.run() if one is not None]) == 12
    assert batch.engine.counts.images == 1


def test_few_lines_are_held(folder, tiny, monkeypatch):
    """No more pictures are open than twice the slots."""
    write(*questions(*range(1, 40, 2)))
    batch = batch_of(tiny, Settings(**ASK))
    most = []
    step = batch.engine.step
    monkeypatch.setattr(batch.engine, "step", lambda: (most.append(len(batch._running)), step()))
    list(batch.run())
    assert max(most) == 4


REFUSED = {
    ("--out", "a.jsonl"): "--out is of --batch FILE; give both, or neither",
    ("--slots", "2"): "--slots is of --batch FILE; give both, or neither",
    ("--batch", "prompts.jsonl"): "--batch needs a file for the answers; give --out FILE",
    ("--batch", "none.jsonl", "--out", "a"): "--batch none.jsonl does not exist; expected a file",
    ("--batch", "prompts.jsonl", "--out", "a", "--prompt", "x"): "--prompt is the question about",
    ("--batch", "pictures", "--out", "a"): "--prompt is the question about each picture of",
    ("--batch", "pictures", "--out", "a", "--prompt", "x"): "pictures has no picture in it",
    ("--batch", "empty.jsonl", "--out", "a"): "empty.jsonl has no prompt in it; there is nothing",
    ("--batch", "pipe", "--out", "a"): "pipe is no file; expected a line of JSON for each prompt",
    ("--batch", "prompts.jsonl", "--out", "pictures"): "--out pictures is not a file; expected one",
    ("--batch", "prompts.jsonl", "--out", "pipe"): "--out pipe is not a file",
    ("--batch", "prompts.jsonl", "--out", "prompts.jsonl"): "would overwrite the prompts",
    ("--batch", "prompts.jsonl", "--out", "link"): "--out link would overwrite the prompts",
    ("--batch", "a.part", "--out", "a"): "--out a would overwrite the prompts",
    ("--batch", "x" * 300, "--out", "a"): "x… does not exist; expected a file of prompts",
    ("--batch", "prompts.jsonl", "--out", "x" * 300): "cannot be written: File name too long",
    ("--batch", "prompts.jsonl", "--out", "no/a"): "cannot be written: No such file or directory",
    ("--batch", "prompts.jsonl", "--out", "notes.txt"): "notes.txt is no file of answers; give",
    ("--batch", "prompts.jsonl", "--out", "other.jsonl"): "other.jsonl is no file of answers; give",
    ("--batch", "prompts.jsonl", "--out", "errors.log"): "errors.log is no file of answers; give",
    ("--batch", "prompts.jsonl", "--out", "a", "--slots", "0"): "slots is 0; expected 1 to",
    (
        "--batch",
        "prompts.jsonl",
        "--out",
        "a",
        "--max-seq-len",
        "1",
    ): "max_seq_len is 1; expected 2",
    **{
        ("--batch", "prompts.jsonl", "--out", "a", *more): f"{more[0]} is of a single prompt; leave"
        for more in (
            ("--image", PICTURES[0]),
            ("--raw",),
            ("--parse-special",),
            ("--guard",),
            ("--chat",),
            ("--show-kept", "a.png"),
            ("--stats",),
            ("--plan",),
            ("--fit",),
        )
    },
}


@pytest.mark.parametrize(("arguments", "expected"), REFUSED.items())
def test_what_cannot_be_asked_is_refused_before_the_weights_are_read(
    folder, capsys, monkeypatch, arguments, expected
):
    monkeypatch.setattr("llama_vision.api.LlamaVision.load_weights", None)
    write(*questions(1))
    write(path="empty.jsonl")
    shutil.copy("prompts.jsonl", "a.part")
    shutil.copy("prompts.jsonl", "other.jsonl")
    Path("notes.txt").write_text("Buy milk\n")
    write({"error": "of something else"}, path="errors.log")
    Path("link").symlink_to("prompts.jsonl")
    Path("pictures").mkdir()
    os.mkfifo("pipe")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert expected in refused(capsys, *arguments)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def test_one_process_answers(monkeypatch):
    monkeypatch.setattr("llama_vision.model.parallel.is_shared", lambda: True)
    options = read_arguments(["--batch", "prompts.jsonl", "--out", "a"])
    with pytest.raises(SettingError, match="--batch runs in one process; leave out torchrun"):
        command.check_batch(options)


def test_too_many_slots_are_refused_and_as_many_as_fit_are_taken(folder, capsys, monkeypatch):
    write(*questions(*range(4)))
    monkeypatch.setattr("llama_vision.memory.fit.free_memory", lambda _: 12 * 2**20)
    arguments = ("--batch", "prompts.jsonl", "--out", "answers.jsonl")
    assert "slots=" in refused(capsys, *arguments, "--slots", "50")
    assert run() == 0


class Terminal(io.StringIO):
    """A stderr that is one."""

    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_that_is_redrawn(folder, monkeypatch):
    monkeypatch.setattr(command, "REDRAWN", 0.0)
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    write(*questions(1), b"{", *questions(2))
    assert run("--slots", "1") == 2
    told = [line.rpartition("\r")[2] for line in shown.getvalue().split("\n")]
    assert [line[14:40] for line in told if line.startswith("llama-vision: ")][1:] == [
        "prompts.jsonl:2: the line ",
        "2 of 3 are answered: 8 tok",
        "1 of 3 failed; the same co",
    ]
    drawn = [part for part in shown.getvalue().split("\r") if "per second" in part]
    heads = [line.partition(",")[0] for line in drawn if not line.startswith("llama-vision")]
    assert list(dict.fromkeys(heads)) == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(" tokens per second, 0:0" in line for line in drawn[:-1])


def test_progress_elsewhere_is_a_line_now_and_then(folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "TOLD", 0.0)
    write(*questions(1, 2))
    assert run("--slots", "1") == 0
    *lines, _ = told(capsys)
    heads = [line.partition(" tokens per second")[0].rpartition(",")[0] for line in lines]
    assert list(dict.fromkeys(heads)) == ["0 of 2", "1 of 2", "2 of 2"]
