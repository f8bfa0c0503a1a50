"""The command: what it prints, and that a mistake is one message and exit code 2."""

import errno
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from base64 import b64encode
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from stub_hub import REPO, StubHub

from llama_vision import Engine, LlamaVisionError, Prompt
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.cli.main import EXIT_INTERRUPTED, main
from llama_vision.cli.terminal import run_command
from llama_vision.errors import LONGEST_MESSAGE
from llama_vision.inputs.chat import chat_prompt
from llama_vision.inputs.guard import llama_guard_prompt
from llama_vision.inputs.image import open_image
from llama_vision.inputs.special import encode_with_special, special_names
from llama_vision.inputs.tokenizer import AddedToken, Tokenizer
from llama_vision.inputs.vocabulary import PlainBytes

ROOT = Path(__file__).parent.parent
PICTURE = GOLDEN / "images" / "rgb_120x30.png"
TALL = GOLDEN / "images" / "rgb_57x200.png"
BASE = ("--model", str(TINY), "--device", "cpu", "--temperature", "0", "--ignore-stop")
SHORT = (*BASE, "--max-new-tokens", "3")
ASK = (*SHORT, "--prompt", "What is this?")
SHOW = (*ASK, "--image", str(PICTURE))


def answer(capsys, *arguments: str) -> dict:
    """Run the command in this process with --json: its object."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys, *arguments: str) -> str:
    """Run the command, which must fail as a user's mistake does: its one message."""
    assert main(arguments) == 2
    (message,) = told(capsys)
    return message


def told(capsys) -> list[str]:
    """The lines on stderr, each short and harmless, but for the one that every run here has."""
    captured = capsys.readouterr()
    lines = captured.err.split("\n")
    assert captured.out == ""
    assert lines.pop() == ""
    for line in lines:
        assert line.startswith("llama-vision: ")
        assert line.isprintable()
        assert len(line) <= LONGEST_MESSAGE + len("llama-vision: ")
    return [line for line in lines if "no tokenizer; text is" not in line]


def run(*arguments: str, **how) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, check=False, **how)


def test_a_picture_and_a_question_end_to_end(tmp_path, tiny):
    """From another directory: text on stdout, then one object, and nothing of it on stderr."""
    done = run(*SHOW, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *text, report = done.stdout.decode().rsplit("\n", 2)[:2]
    report = json.loads(report)
    assert text == [report["text"]]
    prompt = Prompt(report["prompt_token_ids"], [open_image(PICTURE)])
    expected = tiny.generate(prompt, max_new_tokens=3, temperature=0, ignore_stop=True)
    assert report["token_ids"] == expected.token_ids
    assert b"Traceback" not in done.stderr


def talking(*arguments: str, **how) -> subprocess.Popen:
    """generate.py in a process of its own, in the middle of a long answer."""
    command = [sys.executable, "generate.py", *BASE, "--prompt", "Go on", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, **pipes, **how)
    process.begun = process.stdout.read(20)
    return process


def test_ctrl_c_keeps_what_was_generated_so_far():
    process = talking(
        *("--max-new-tokens", "100000", "--temperature", "1", "--seed", "1", "--json"),
        # A shell's background jobs ignore the signal; this one must not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.send_signal(signal.SIGINT)
    rest, problems = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    assert b"Traceback" not in problems
    text, _, report = (process.begun + rest).decode().rstrip("\n").rpartition("\n")
    report = json.loads(report)
    assert report["finish_reason"] == "interrupted"
    assert 0 < len(report["token_ids"]) == len(report["logprobs"]) < 100_000
    assert report["text"].startswith(text.rstrip("\ufffd"))


def test_a_reader_that_has_gone_is_no_complaint():
    with talking("--max-new-tokens", "2000") as process:
        process.stdout.close()
        problems = process.stderr.read()
    assert b"Traceback" not in problems
    assert b"BrokenPipe" not in problems


def test_a_mistake_ends_a_process_with_2_and_one_line():
    done = run(*ASK, "--image", "nowhere.png")
    assert (done.returncode, done.stdout) == (2, b"")
    (message,) = done.stderr.decode().splitlines()
    assert message.startswith("llama-vision: image nowhere.png does not exist; expected a picture")


FIELDS = {
    str: ("text", "finish_reason", "model", "device", "dtype"),
    list: ("token_ids", "prompt_token_ids", "logprobs"),
    float: ("tokens_per_second",),
}
SECTIONS = {
    "visual_tokens": {"encoded": int, "valid": int, "kept": int},
    "memory": {"weights": int, "text_cache": int, "visual_cache": int, "peak": int},
    "seconds": {"load": float, "vision": float, "prefill": float, "decode": float},
}


def test_json_is_the_last_line_and_says_what_was_done(capsys, tiny):
    report = answer(capsys, *SHOW)
    for kind, fields in FIELDS.items():
        for field in fields:
            assert isinstance(report[field], kind), field
    for section, kinds in SECTIONS.items():
        assert {key: type(value) for key, value in report[section].items()} == kinds
    assert (report["model"], report["device"], report["dtype"]) == (str(TINY), "cpu", "float32")
    assert report["finish_reason"] == "length"
    assert len(report["token_ids"]) == len(report["logprobs"]) == 3
    assert all(logprob <= 0 for logprob in report["logprobs"])
    assert report["memory"]["weights"] == sum(p.nbytes for p in tiny.model.parameters())
    tiles = len(tiny.tile(Prompt([0], [open_image(PICTURE)]))[0].pixels)
    assert report["visual_tokens"] == {"encoded": 68, "valid": 17 * tiles, "kept": 17 * tiles}


def test_a_chat_is_the_models_own(capsys, tiny):
    words = ("--prompt", "Compare.", "--system", "Be brief.")
    report = answer(capsys, *SHORT, *words, "--image", str(PICTURE), "--image", str(TALL))
    pictures = [open_image(path) for path in (PICTURE, TALL)]
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": [*pictures, "Compare."]}
    prompt = chat_prompt([system, question], tiny.tokenizer)
    expected = tiny.generate(prompt, max_new_tokens=3, temperature=0, ignore_stop=True)
    assert report["prompt_token_ids"] == list(prompt.token_ids)
    assert report["token_ids"] == expected.token_ids
    assert report["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert report["text"] == expected.text
    assert report["visual_tokens"] == expected.visual_tokens._asdict()


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [("a<|image|>b<|image|>c", [500, 97, 512, 98, 512, 99]), ("abc", [500, 512, 512, 97, 98, 99])],
)
def test_raw_places_images_where_it_says_else_in_front(capsys, prompt, ids):
    pictures = ("--image", str(PICTURE), "--image", str(TALL))
    report = answer(capsys, *SHORT, "--raw", "--prompt", prompt, *pictures)
    assert report["prompt_token_ids"] == ids


def test_a_place_for_an_image_is_mere_text_in_a_chat(capsys):
    report = answer(capsys, *SHORT, "--prompt", "a<|image|>b", "--image", str(PICTURE))
    assert report["prompt_token_ids"].count(512) == 1


def test_text_alone_needs_no_image(capsys):
    report = answer(capsys, *ASK)
    assert report["visual_tokens"] == {"encoded": 0, "valid": 0, "kept": 0}
    assert report["memory"]["visual_cache"] == 0
    assert len(report["token_ids"]) == 3


@pytest.mark.parametrize(
    "name", ["max-new-tokens ", "max-tokens ", "max_new_tokens ", "max_tokens=", "max-new-tokens="]
)
def test_spellings_of_the_most_new_tokens(capsys, name):
    report = answer(capsys, *BASE, "--prompt", "a_b --c_d", *f"--{name}5".split())
    assert len(report["token_ids"]) == 5
    text = bytes(i for i in report["prompt_token_ids"] if i < 256)
    assert text.endswith(b"a_b --c_dassistant\n\n")


def test_the_longest_sequence_ends_the_answer(capsys):
    prompt = answer(capsys, *ASK)["prompt_token_ids"]
    most = str(len(prompt) + 2)
    report = answer(capsys, *BASE, "--prompt", "What is this?", "--max_seq_len", most)
    assert len(report["token_ids"]) == 2
    assert report["finish_reason"] == "length"


def test_fewer_tiles_on_request(capsys):
    one, four = (answer(capsys, *SHOW, "--max-tiles", n)["visual_tokens"] for n in ("1", "4"))
    assert one == {"encoded": 68, "valid": 17, "kept": 17}
    assert four["valid"] > 17


def test_a_seed_repeats_and_another_differs(capsys):
    def ids(seed):
        draw = ("--temperature", "1", "--top-p", "0.9", "--top-k", "100", "--seed", seed)
        return answer(capsys, *BASE, *draw, "--max-tokens", "12", "--prompt", "Go on")["token_ids"]

    assert ids("1") == ids("1") != ids("2")


def test_another_type_is_computed_in(capsys):
    full, half = (answer(capsys, *ASK, "--dtype", name) for name in ("float32", "bfloat16"))
    assert half["dtype"] == "bfloat16"
    assert half["memory"]["weights"] == full["memory"]["weights"] / 2


def test_a_stop_token_ends_the_answer_and_is_not_printed(capsys, tiny, tmp_path):
    """Whatever the model would say first is declared a stop token."""
    first = answer(capsys, *ASK)["token_ids"][0]
    directory = Path(shutil.copytree(TINY, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": first}))
    model = ("--model", str(directory), "--device", "cpu")
    report = answer(capsys, *model, "--prompt", "What is this?")
    assert report["token_ids"] == [first]
    assert report["finish_reason"] == "stop"
    assert report["text"] == ""


@pytest.mark.parametrize("option", ["--no-graphs", "--prefill-chunk 3", "--force"])
def test_an_option_that_changes_no_answer(capsys, option):
    with_it, without = (answer(capsys, *SHOW, *options) for options in (option.split(), ()))
    assert with_it["token_ids"] == without["token_ids"]


@pytest.mark.parametrize(
    "rule",
    [
        *("--k-ratio 0.1", "--k-ratio 1 --visual-budget 7", "--pruner random --keep 9 --seed 3"),
        *(f"--pruner {name} --keep 0.5" for name in COUNTED_RULES),
        *("--keep 0.5", "--keep 9", "--pruner uniform --keep 0.3 --merge", "--k-ratio 0.2 --merge"),
    ],
)
def test_a_rule_of_pruning_on_request(capsys, rule):
    tokens = answer(capsys, *SHOW, *rule.split())["visual_tokens"]
    assert 0 < tokens["kept"] < tokens["valid"]


def test_text_streams_to_stdout_alone_and_statistics_to_stderr(capsys):
    assert main([*SHOW, "--stats"]) == 0
    printed = capsys.readouterr()
    assert printed.out == answer(capsys, *SHOW)["text"] + "\n"
    for words in ("generated 3 (length)", "encoded 68", "planned", "prefill", "cpu, float32"):
        assert words in printed.err
        assert words not in printed.out


def gradient(mode: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB").convert(mode)


def save(mode: str, size: tuple[int, int] = (40, 30), **how):
    return lambda path: gradient(mode, size).save(path, **how)


def save_16_bit(path: Path) -> None:
    gradient("L").convert("I").point(lambda level: level * 257).convert("I;16").save(path)


ROTATED = Image.Exif()
ROTATED[0x0112] = 6

PICTURES = {
    "1x1": ("a.png", save("RGB", (1, 1))),
    "1x5000": ("a.png", save("RGB", (1, 5000))),
    "20000x20": ("a.png", save("RGB", (20000, 20))),
    "16-bit PNG": ("a.png", save_16_bit),
    "CMYK JPEG": ("a.jpg", save("CMYK")),
    "palette with transparency": ("a.png", save("P", transparency=3)),
    "grey with alpha": ("a.png", save("LA")),
    "1-bit": ("a.png", save("1")),
    "float TIFF": ("a.tif", save("F")),
    "animated GIF": ("a.gif", save("RGB", save_all=True, append_images=[gradient("1")])),
    "rotated by EXIF": ("a.jpg", save("RGB", exif=ROTATED)),
}


@pytest.mark.parametrize(("name", "write"), PICTURES.values(), ids=PICTURES)
def test_a_picture_of_any_kind_is_answered(capsys, name, write, tmp_path):
    write(tmp_path / name)
    report = answer(capsys, *ASK, "--image", str(tmp_path / name))
    assert report["visual_tokens"]["valid"] >= 17
    assert len(report["token_ids"]) == 3


def levels(image: Image.Image) -> list[int]:
    return list(image.getchannel("R").tobytes())


def test_16_bit_levels_are_divided_by_257(tmp_path):
    every = b"".join(level.to_bytes(2, "little") for level in range(65536))
    Image.frombytes("I;16", (256, 256), every).save(tmp_path / "ramp.png")
    assert levels(open_image(tmp_path / "ramp.png")) == [round(n / 257) for n in range(65536)]


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        ([0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),
        ([0.2, 0.4, 0.4, 0.6], [51, 102, 102, 153]),
        ([0.0, 10.0, 200.0, 255.0], [0, 10, 200, 255]),
        ([0.0, 257.0, 514.0, 65535.0], [0, 1, 2, 255]),
        ([-1.0, 0.0, 0.0, 1.0], [0, 128, 128, 255]),
        ([5.0, 5.0, 5.0, 5.0], [5, 5, 5, 5]),
        ([250, 250, 250, 250], [1, 1, 1, 1]),
    ],
    ids=["to 1", "within 1", "to 255", "to 65535", "negative", "flat", "dark 16-bit"],
)
def test_levels_are_scaled_by_the_range_that_they_fit_or_have(stored, seen, tmp_path):
    image = Image.new("F" if isinstance(stored[0], float) else "I;16", (4, 1))
    image.putdata(stored)
    image.save(tmp_path / "levels.tif")
    assert levels(open_image(tmp_path / "levels.tif")) == seen


def text(words: str):
    return lambda path: path.write_text(words)


BAD_PICTURES = {
    "missing": (lambda path: None, "does not exist; expected a picture file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty (0 bytes)"),
    "cut": (lambda path: path.write_bytes(PICTURE.read_bytes()[:-200]), "is damaged or cut short"),
    "a text": (text("hello"), "is not a picture"),
    "a directory": (lambda path: path.mkdir(), "is a directory"),
    "a bomb": (save("1", (400, 300)), "is too large: Image size (120000 pixels)"),
}


@pytest.mark.parametrize(("write", "says"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_a_picture_that_cannot_be_read_is_named(capsys, monkeypatch, write, says, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    monkeypatch.chdir(tmp_path)  # a long name would be cut
    path = Path("picture.png")
    write(path)
    message = refused(capsys, *ASK, "--image", str(path))
    assert str(path) in message
    assert says in message


@pytest.mark.parametrize(("places", "images"), [(1, 0), (1, 2), (2, 1)])
def test_places_and_images_must_be_as_many(capsys, places, images):
    prompt = "x" + "<|image|>" * places
    message = refused(capsys, *SHORT, "--raw", "--prompt", prompt, *["--image", str(TALL)] * images)
    assert f"the prompt has {places} <|image|> and {images} images were given" in message


SETTINGS = {
    "no new tokens": ("--max-new-tokens 0", "max_new_tokens is 0; expected 1 or more"),
    "fewer than none": ("--max-new-tokens=-3", "max_new_tokens is -3; expected 1 or more"),
    "tokens no number": ("--max-new-tokens many", "'many' is not a whole number"),
    "temperature": ("--temperature -1", "temperature is -1.0; expected 0 or more (0 is greedy)"),
    "temperature infinite": ("--temperature inf", "temperature is inf"),
    "temperature nan": ("--temperature nan", "temperature is nan"),
    "top-p of 0": ("--top-p 0", "top_p is 0.0; expected more than 0 and at most 1"),
    "top-p of 2": ("--top-p 2", "top_p is 2.0; expected more than 0 and at most 1"),
    "top-k negative": ("--top-k -1", "top_k is -1; expected 0 or more (0 is no limit)"),
    "no tiles": ("--max-tiles 0", "max_tiles is 0; expected 1 or more"),
    "too many tiles": ("--max-tiles 9", "max_tiles is 9; expected 1 to 4"),
    "no length": ("--max-seq-len 0", "max_seq_len is 0; expected 1 or more"),
    "longer than the model": ("--max-seq-len 200000", "is 200000; expected 1 to 131072"),
    "unknown device": ("--device gpu", "device 'gpu' is unknown; expected auto, cpu, cuda"),
    "unknown dtype": ("--dtype int4", "dtype 'int4' is unknown; expected auto, float32"),
    "unknown option": ("--colour red", "unrecognized arguments: --colour red"),
    "chunks of nothing": ("--prefill-chunk 0", "prefill_chunk is 0; expected 1 or more"),
    "no budget": ("--visual-budget 0", "visual_budget is 0; expected a fraction above 0"),
    "k-ratio of 0": ("--k-ratio 0", "k_ratio is 0.0; expected more than 0 and at most 1"),
    "rule without keep": ("--pruner top-k", "give --keep R|N too"),
    "merge without rule": ("--keep 9 --merge", "--keep alone merges anyway"),
    "keep and ratio": ("--k-ratio 1 --keep 9", "leave out --k-ratio or --keep"),
    "two rules": ("--k-ratio 1 --pruner top-k --keep 9", "leave out --k-ratio or --keep"),
    "unknown rule": ("--pruner best --keep 9", "invalid choice: 'best'"),
    "min-p of 2": ("--min-p 2", "min_p is 2.0; expected 0 or more and at most 1"),
    "no penalty": ("--repetition-penalty 0", "repetition_penalty is 0.0; expected more than 0"),
    "stop at nothing": ("--stop=", "stop is ['']; expected a list, each of it a text"),
    "fewer logprobs than none": ("--top-logprobs -1", "top_logprobs is -1; expected 0 to 1000"),
    "system without chat": ("--raw --system x", "--system needs the chat format"),
    "an answer without a judge": ("--response x", "--response is an answer that --guard judges"),
    "guard of a completion": ("--guard --raw", "leave out --guard or --raw"),
    "guard of a system message": ("--guard --system x", "leave out --guard or --system"),
    "guard with tokens": ("--guard --parse-special", "leave out --guard or --parse-special"),
}


@pytest.mark.parametrize(("arguments", "says"), SETTINGS.values(), ids=SETTINGS)
def test_a_setting_out_of_range_is_named_with_what_is_expected(capsys, arguments, says):
    assert says in refused(capsys, *ASK, *arguments.split())


def test_a_prompt_is_needed(capsys):
    assert "--prompt" in refused(capsys, "--model", str(TINY))


def test_cuda_where_there_is_none_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused(capsys, *ASK, "--device", "cuda")
    assert "device 'cuda' was asked for and this machine" in message
    assert "use --device cpu" in message


def test_a_prompt_that_is_too_long_is_told_with_both_numbers(capsys):
    length = len(answer(capsys, *ASK)["prompt_token_ids"])
    message = refused(capsys, *ASK, "--max-seq-len", "10")
    assert f"the prompt is {length} tokens long and --max-seq-len" in message
    assert "is 10;" in message


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def damaged(name: str, damage=Path.unlink):
    """A copy of the tiny checkpoint, with `damage` done to one of its files."""
    return lambda path: damage(Path(shutil.copytree(TINY, path)) / name)


def misshape(shard: Path) -> None:
    tensors = load_file(shard)
    save_file({**tensors, sorted(tensors)[0]: torch.ones(3)}, shard)


BYTE_TOKENS = "".join(f"{b64encode(bytes([i])).decode()} {i}\n" for i in range(256))

MODELS = {
    "missing": (lambda path: None, "does not exist; expected a directory"),
    "a file": (text("x"), "is a file; expected a directory"),
    "empty": (lambda path: path.mkdir(), "has no config.json"),
    "without config": (damaged("config.json"), "has no config.json"),
    "without a shard": (damaged(FIRST), f"lacks 1 of 2 shards: {FIRST}"),
    "with a cut shard": (
        damaged(SECOND, lambda p: os.truncate(p, 1000)),
        "is damaged or cut short",
    ),
    "with a misshapen tensor": (damaged(FIRST, misshape), "1 misshapen: "),
    "with a damaged tokenizer": (
        damaged("tokenizer.model", text("\0\x01damaged")),
        "tokenizer.model is not a tokenizer that can be read",
    ),
    "with another tokenizer": (
        damaged("tokenizer.model", text(BYTE_TOKENS)),
        "has 256 tokens and config.json puts the first special token, bos_token_id, at 500",
    ),
    "with damaged defaults": (
        damaged("generation_config.json", text("{")),
        "generation_config.json cannot be read",
    ),
}


def refused_model(capsys, model: str | Path) -> str:
    return refused(capsys, "--model", str(model), "--device", "cpu", "--prompt", "x")


@pytest.mark.parametrize(("write", "says"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_loaded_is_told(capsys, write, says, tmp_path):
    write(tmp_path / "model")
    message = refused_model(capsys, tmp_path / "model")
    assert says in message
    assert re.search(rf"{tmp_path}|in config\.json", message)


def test_a_repository_without_network_says_what_to_do(capsys, tmp_path, monkeypatch):
    with StubHub(TINY) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
    message = refused_model(capsys, REPO)
    assert f"{REPO} is not complete in the local cache and cannot be downloaded" in message
    assert "pass a directory" in message


def test_a_gated_repository_says_what_to_do(capsys, hub):
    hub.refuse = (403, "GatedRepo")
    message = refused_model(capsys, REPO)
    assert "accept the licence" in message
    assert "HF_TOKEN" in message


WHOLE = ("max-new-tokens", "top-k", "seed", "max-tiles", "max-seq-len", "prefill-chunk")
REAL = ("temperature", "top-p", "min-p", "repetition-penalty", "k-ratio")
EITHER = ("keep", "visual-budget")
NO_NUMBERS = ("", "-", "--", "x", "²", "٣", "1_0", "0x10", "\udcff", "\x1b[31m" * 500, "9" * 5000)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize("flag", [*WHOLE, "top-logprobs", *REAL, *EITHER])
def test_what_is_no_number_is_told_with_its_flag(capsys, flag, value):
    rule = ("--pruner", "top-k") if flag == "keep" else ()
    message = refused(capsys, *ASK, *rule, f"--{flag}={value}")
    assert flag in message.replace("_", "-")


@pytest.mark.parametrize("value", ["1e3", "1.0", "nan", "inf", "True"])
@pytest.mark.parametrize("flag", WHOLE)
def test_a_count_is_a_whole_number(capsys, flag, value):
    assert f"'{value}' is not a whole number" in refused(capsys, *ASK, f"--{flag}={value}")


@pytest.mark.parametrize("value", ["a\udcffb", "\ud800"], ids=["byte", "half"])
@pytest.mark.parametrize("flag", ["prompt", "system", "response", "stop"])
def test_a_text_that_is_not_utf_8_is_told_with_its_flag(capsys, flag, value):
    message = refused(capsys, *ASK, f"--{flag}", value)
    assert f"argument --{flag}: {value!a} is not a text in UTF-8" in message


def test_two_dashes_are_a_text_as_any_other(capsys):
    prompt = answer(capsys, *SHORT, "--raw", "--prompt=--", "--stop=--")["prompt_token_ids"]
    assert prompt == [500, *b"--"]


class Unwritable(Exception):
    def __str__(self):
        raise ZeroDivisionError


ENDS = {
    "a mistake": (LlamaVisionError("no\x1b"), 2, "no\\x1b"),
    "a fault": (KeyError("k"), 1, "fault: KeyError: 'k'; please report it; LLAMA_VISION_DEBUG=1"),
    "a long fault": (ValueError("a\nb\x1b[31m" * 999), 1, "fault: ValueError: a\\nb\\x1b[31m"),
    "an unwritable fault": (Unwritable(), 1, "Unwritable"),
    "a file's fault": (OSError(errno.EIO, "broken", "\udcff\x07"), 1, "fault: OSError"),
    "recursion": (RecursionError("deep"), 1, "fault: RecursionError: deep"),
    "memory": (MemoryError(), 2, "memory does not suffice (MemoryError); use smaller settings"),
    "of a card": (torch.OutOfMemoryError("CUDA out of memory. \n"), 2, "memory does not suffice"),
    "of a CPU": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--plan says"),
    "Ctrl-C": (KeyboardInterrupt(), EXIT_INTERRUPTED, "interrupted"),
}


def ending(error: BaseException):
    def run():
        raise error

    return run


@pytest.mark.parametrize(("error", "code", "says"), ENDS.values(), ids=ENDS)
def test_whatever_ends_a_run_is_one_line_and_a_code(capsys, error, code, says):
    assert run_command("llama-vision", ending(error)) == code
    (line,) = told(capsys)
    assert says in line


@pytest.mark.parametrize("error", [KeyError("x\x1b"), LlamaVisionError("y")], ids=repr)
def test_where_it_was_can_be_seen(capsys, monkeypatch, error):
    monkeypatch.setenv("LLAMA_VISION_DEBUG", "1")
    run_command("llama-vision", ending(error))
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):\n")
    assert "raise error" in shown
    assert "\x1b" not in shown
    assert "LLAMA_VISION_DEBUG" not in shown


def test_a_reader_that_has_gone_is_not_told(capsys):
    assert run_command("llama-vision", ending(BrokenPipeError())) == 0
    assert told(capsys) == []


@pytest.mark.parametrize("job", ["", "--json", "--plan", "--help"])
def test_a_full_disk_is_told(capsys, monkeypatch, job):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        message = refused(capsys, *ASK, *job.split())
    assert message == "llama-vision: cannot write the answer: No space left on device"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_stream_that_is_closed_is_no_matter(capsys, monkeypatch, closed):
    monkeypatch.setattr(sys, closed, None)
    assert main([*ASK, "--stats"]) == 0
    shown = capsys.readouterr()
    assert not getattr(shown, closed.removeprefix("std"))
    assert shown.out or shown.err


@pytest.mark.parametrize(
    ("streams", "code", "says"),
    [(">/dev/full", 2, [b"cannot write the answer"]), (">&- 2>&- <&-", 0, [])],
)
def test_nothing_is_said_after_the_end(streams, code, says):
    """What Python would say of a stream that it cannot flush when it ends."""
    command = f'exec "$0" generate.py "$@" {streams}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, *ASK], cwd=ROOT, capture_output=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if b"no tokenizer" not in line]
    assert (done.returncode, done.stdout, len(lines)) == (code, b"", len(says))
    assert all(words in line for words, line in zip(says, lines, strict=True))


PIECES = ("a\x1b[31m\r", "\x9b\x7f\x00é\t", "\U0001f408\u200d⬛\n", "]0;x\x07")
SHOWN = "a\\x1b[31m\\r\\x9b\\x7f\\x00é\t\U0001f408\u200d⬛\n]0;x\\x07\n"


def say(monkeypatch, *pieces: str) -> None:
    """Have the model answer so."""
    monkeypatch.setattr(Engine, "stream", lambda engine, request: iter(pieces))


@pytest.mark.parametrize(("terminal", "out"), [(True, SHOWN), (False, "".join(PIECES) + "\n")])
def test_a_terminal_gets_no_control_characters_of_an_answer(capsys, monkeypatch, terminal, out):
    say(monkeypatch, *PIECES)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main(ASK) == 0
    assert capsys.readouterr().out == out


def test_a_character_that_stdout_does_not_know_is_escaped(monkeypatch):
    out = io.BytesIO()
    say(monkeypatch, "é\U0001f408\n")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(ASK) == 0
    assert out.getvalue() == b"\\xe9\\U0001f408\n\n"


ODD_NAME = "\udcff \x1b[31m\n.png"  # a byte that is no UTF-8, and what a terminal acts on
ODD_NAME_SHOWN = ODD_NAME.encode("unicode_escape").decode()


def test_a_picture_of_any_name_is_opened(capsys, tmp_path):
    shutil.copyfile(PICTURE, tmp_path / ODD_NAME)
    report = answer(capsys, *ASK, "--image", str(tmp_path / ODD_NAME))
    assert report["visual_tokens"] == answer(capsys, *SHOW)["visual_tokens"]


@pytest.mark.parametrize("flag", ["--image", "--model"])
def test_a_name_is_shown_escaped(capsys, flag):
    assert ODD_NAME_SHOWN in refused(capsys, *ASK, flag, ODD_NAME)


def test_a_plan_shows_a_name_escaped(capsys, tmp_path):
    shutil.copytree(TINY, tmp_path / ODD_NAME)
    assert main(["--model", str(tmp_path / ODD_NAME), "--device", "cpu", "--plan"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/{ODD_NAME_SHOWN}, float32, cpu: ")


def test_a_picture_in_the_home_directory(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(PICTURE, tmp_path / "x.png")
    assert answer(capsys, *ASK, "--image=~/x.png")["visual_tokens"]["valid"] > 0


# The tiny checkpoint reads bytes as they are, and numbers special tokens from 500.
SPECIAL = {
    "a completion": ("--raw", "<|begin_of_text|>a<|eot_id|>", 0, [500, 97, 509]),
    "not at its beginning": ("--raw", "a<|begin_of_text|>", 0, [500, 97, 500]),
    "a picture's place": ("--raw", "<|begin_of_text|>a<|image|>b", 1, [500, 97, 512, 98]),
    "a picture without": ("--raw", "<|begin_of_text|>a", 1, [500, 512, 97]),
    "names alike": ("--raw", "<|eot_id |><|eot_id|", 0, [500, *b"<|eot_id |><|eot_id|"]),
    "a chat": (
        "--system <|python_tag|>",
        "a<|image|><|eom_id|>",
        1,
        [
            *(500, 506, *b"system", 507, *b"\n\n", 510, 509),
            *(506, *b"user", 507, *b"\n\n", 97, 512, 508, 509),
            *(506, *b"assistant", 507, *b"\n\n"),
        ],
    ),
}


@pytest.mark.parametrize(("how", "prompt", "images", "ids"), SPECIAL.values(), ids=SPECIAL)
def test_special_tokens_are_read_on_request(capsys, how, prompt, images, ids):
    words = (*how.split(), "--prompt", prompt, *["--image", str(PICTURE)] * images)
    assert answer(capsys, *SHORT, "--parse-special", *words)["prompt_token_ids"] == ids


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("--prompt <|eot_id|>", ["--prompt has <|eot_id|>, taken as text; --parse-special"]),
        ("--prompt <|image|>", ["--prompt has <|image|>, taken as text; --parse-special"]),
        ("--raw --prompt <|eot_id|><|eom_id|><|eot_id|>", ["has <|eot_id|>, <|eom_id|>, taken"]),
        ("--prompt x<|eot_id|> --system <|eom_id|>", ["--system has", "--prompt has"]),
        ("--guard --prompt x --response <|eot_id|>", ["has <|eot_id|>, taken as text"]),
        (f"--raw --prompt <|image|> --image {PICTURE}", []),
        ("--parse-special --prompt <|eot_id|>", []),
        ("--prompt <|eot_id|", []),
    ],
)
def test_special_tokens_that_are_taken_as_text_are_told(capsys, how, says):
    assert main([*SHORT, *how.split()]) == 0
    lines = capsys.readouterr().err.splitlines()[1:]
    assert len(lines) == len(says)
    assert all(words in line for words, line in zip(says, lines, strict=True))


@pytest.mark.parametrize(
    "how",
    [
        *("--prompt <|image|><|image|>", "--raw --prompt <|image|><|image|>"),
        *("--prompt x --system <|image|>", "--prompt <|image|> --system <|image|>"),
    ],
)
def test_places_that_are_read_and_images_must_be_as_many(capsys, how):
    words = ("--parse-special", *how.split(), "--image", str(TALL))
    assert "expected as many" in refused(capsys, *SHORT, *words)


def test_every_special_token_has_a_name_that_is_read(llama_3):
    ids = [*range(128_000, 128_011), *range(128_012, 128_257)]  # 128011 stands for the image
    text = llama_3.decode(ids, special=True)
    assert encode_with_special(f"a{text} b", llama_3) == [
        *llama_3.encode("a"),
        *ids,
        *llama_3.encode(" b"),
    ]
    assert len(special_names(text + text, llama_3)) == len(ids)


def test_tokens_of_fine_tuning_are_special_as_their_file_says():
    added = {513: AddedToken("<|mine|>", True, True), 514: AddedToken("word", False, True)}
    tokenizer = Tokenizer(PlainBytes(), 500, 512, added)
    text = "a<|mine|>word<|image|>"
    assert encode_with_special(text, tokenizer) == [97, 513, 514, 512]
    assert special_names(text, tokenizer) == ["<|mine|>", "<|image|>"]


def test_guard_asks_for_a_verdict(capsys, tiny):
    words = ("--guard", "--prompt", "What?", "--response", "A square.", "--image", str(PICTURE))
    report = answer(capsys, "--model", str(TINY), "--device", "cpu", *words, "--max-tokens", "3")
    question = {"role": "user", "content": [open_image(PICTURE), "What?"]}
    messages = [question, {"role": "assistant", "content": "A square."}]
    prompt = llama_guard_prompt(messages, tiny.tokenizer)
    assert report["prompt_token_ids"] == list(prompt.token_ids)
    assert report["token_ids"] == tiny.generate(prompt, max_new_tokens=3, temperature=0).token_ids


def test_a_verdict_begins_at_once(capsys, monkeypatch):
    say(monkeypatch, "\n", "\n", "unsafe", "\nS1")
    assert main([*ASK, "--guard"]) == 0
    assert capsys.readouterr().out == "unsafe\nS1\n"


def test_settings_of_the_answer_reach_it(capsys, tiny):
    draw = ("--temperature", "1", "--min-p", "0.01", "--repetition-penalty", "1.5", "--seed", "1")
    report = answer(capsys, *BASE, *draw, "--top-logprobs", "2", "--max-tokens", "9", *ASK[-2:])
    expected = tiny.generate(
        Prompt(report["prompt_token_ids"]),
        **{"temperature": 1, "min_p": 0.01, "repetition_penalty": 1.5, "seed": 1},
        **{"top_logprobs": 2, "max_new_tokens": 9, "ignore_stop": True},
    )
    assert report["token_ids"] == expected.token_ids
    assert report["top_logprobs"] == [
        [{"id": token, "logprob": pytest.approx(logprob, abs=1e-5)} for token, logprob in step]
        for step in expected.top_logprobs
    ]
    assert {len(step) for step in report["top_logprobs"]} == {2}


def test_a_text_to_stop_at_is_not_shown(capsys, tiny):
    say_much = (*BASE, "--max-tokens", "40", "--prompt", "Go on")
    text = answer(capsys, *say_much)["text"]
    stop = next(c for c in text if c.isascii() and c.isprintable())
    report = answer(capsys, *say_much, "--stop", "never so", "--stop", stop)
    assert report["text"] == text[: text.index(stop)]
    assert report["finish_reason"] == "stop"


def test_settings_of_a_checkpoint_that_are_ignored_are_told(capsys, tmp_path):
    directory = Path(shutil.copytree(TINY, tmp_path / "model"))
    asked = {"no_repeat_ngram_size": 3, "num_beams": 4}
    (directory / "generation_config.json").write_text(json.dumps(asked))
    assert main([*ASK, "--model", str(directory)]) == 0
    (line,) = capsys.readouterr().err.splitlines()[1:]
    assert line.startswith("llama-vision: generation_config.json asks for ")
    assert line.endswith(", which is not supported and ignored")
    assert all(name in line for name in asked)


def test_the_planning_tool_tells_mistakes_as_the_command_does(capsys):
    spec = importlib.util.spec_from_file_location("plan_memory", ROOT / "tools/plan_memory.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.main(["11b", "--images=--"]) == 2
    assert tool.main(["11b", "--batch=-5"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == "plan_memory: argument --images: '--' is not a whole number; see --help"
    assert second == "plan_memory: batch is -5; expected 1 to 1048576"


ALONE = """
import sys

def forbid(event, arguments):
    first = event.split(".")[0]
    if first == "socket" or event in {events}:
        raise SystemExit(f"forbidden: {{event}} {{arguments}}")

sys.addaudithook(forbid)
from llama_vision.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn")


def test_no_program_is_started_and_no_network_used():
    command = [sys.executable, "-c", ALONE.format(events=STARTS), *SHOW, "--stats", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["token_ids"]) == 3
