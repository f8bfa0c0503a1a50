"""Plans from a name alone, the largest settings that fit, and the command around both."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from stub_hub import REPO

from llama_vision import plan_memory
from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.files import CheckpointError
from llama_vision.cli.main import main
from llama_vision.config import official_config
from llama_vision.engine.workload import workload_alike
from llama_vision.errors import SettingError
from llama_vision.memory.largest import largest_settings
from llama_vision.memory.plan import plan_run

ROOT = Path(__file__).parent.parent
PICTURE = TINY.parent / "images" / "big_320x200.png"
MODEL = ("--model", str(TINY), "--device", "cpu")
CONFIG = read_config(TINY)
HOW = {"dtype": torch.float32, "device": torch.device("cuda")}
ASK = (*MODEL, "--image", str(PICTURE), "--prompt", "Why?")


def test_a_plan_needs_a_name_alone():
    by_name = plan_memory("11b", batch=2, images=3, max_seq_len=4096)
    by_config = plan_memory(official_config("11b"), batch=2, images=3, max_seq_len=4096)
    assert by_name == by_config
    assert by_name.weights == 21_340_441_670
    assert by_name.text_cache == 2 * 4096 * 128 * 2**10
    assert by_name.visual_cache == 2 * 3 * 6404 * 32 * 2**10
    caches = by_name.text_cache + by_name.visual_cache
    assert by_name.total == by_name.weights + caches + by_name.working
    assert all(type(size) is int for size in by_name.to_dict()["phases"].values())


def test_one_image_of_the_11b_takes_200_mib_and_half_of_it_half():
    whole, half = (plan_memory("11b", visual_budget=budget) for budget in (None, 0.5))
    assert whole.visual_cache == 8 * 2 * 6404 * 1024 * 2
    assert 2 * half.visual_cache == whole.visual_cache
    assert plan_memory("11b", tiles=1).visual_cache * 4 == whole.visual_cache
    assert plan_memory("11b", images=0).visual_cache == 0
    assert plan_memory("11b", dtype="float32").total > 2 * whole.weights


def test_a_directory_is_planned_without_its_weights(tmp_path):
    (tmp_path / "config.json").write_text((TINY / "config.json").read_text())
    assert plan_memory(tmp_path, max_seq_len=64) == plan_memory(TINY, max_seq_len=64)


def test_of_a_repository_only_the_configuration_is_fetched(hub):
    plan = plan_memory(REPO, max_seq_len=64)
    assert plan == plan_memory(TINY, max_seq_len=64)
    assert {Path(name).name for name in hub.fetched} == {"config.json"}
    hub.fetched.clear()
    assert plan_memory(REPO, max_seq_len=64) == plan
    assert hub.fetched == []


def test_a_repository_that_cannot_be_had_is_told(hub):
    hub.refuse = (403, "GatedRepo")
    with pytest.raises(CheckpointError, match="is gated and this account may not read it"):
        plan_memory(REPO)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("batch", 0), ("images", -1), ("images", 2048), ("tiles", 5), ("max_seq_len", 1)),
        *(("max_seq_len", 10**6), ("prompt_tokens", 3000), ("prefill_chunk", 0)),
    ],
)
def test_a_size_out_of_range_is_told(name, value):
    with pytest.raises(SettingError, match=f"{name} is {value}; expected"):
        plan_memory("11b", **{name: value})


@pytest.mark.parametrize("budget", [None, 0.25])
@pytest.mark.parametrize("extra", [1.2, 1.5, 4.0])
def test_the_largest_settings_fit_and_the_next_do_not(extra, budget):
    load = workload_alike(CONFIG, images=2, max_seq_len=200, visual_budget=budget)
    room = int(plan_run(CONFIG, load, **HOW).total * extra)
    found = largest_settings(CONFIG, load, room=room, **HOW)

    def fits(name, number):
        more = number - 2 if name == "images" else 0  # behind which the text stays as long
        sizes = {"images": 2, "max_seq_len": 200 + more, "visual_budget": budget, name: number}
        return plan_memory(CONFIG, **sizes, **HOW).total <= room

    for name in ("batch", "images", "max_seq_len", "visual_budget"):
        number = found[name]["largest"]
        assert fits(name, number), name
        assert found[name]["all"] or not fits(name, number + 1), name


def test_where_the_weights_do_not_fit_nothing_does():
    load = workload_alike(CONFIG, max_seq_len=100)
    found = largest_settings(CONFIG, load, room=2**21, **HOW)
    assert {found[name]["largest"] for name in ("batch", "images", "max_seq_len")} == {0}
    ways = "--dtype bfloat16 (1.8 MiB) or --quantize int8 (1.4 MiB) or a device with 3.6 MiB"
    assert found["instead"].startswith(ways)


def printed(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def printed_json(capsys, *arguments):
    return json.loads(printed(capsys, *arguments, "--json").splitlines()[-1])


def test_the_plan_of_a_run_is_what_its_statistics_confirm(capsys):
    ask = (*ASK, "--max-new-tokens", "5", "--k-ratio", "0.5", "--visual-budget", "20")
    plan, run = (printed_json(capsys, *ask, option) for option in ("--plan", "--ignore-stop"))
    for part in ("weights", "text_cache", "visual_cache"):
        assert plan[part] == run["memory"][part] == run["ledger"]["planned"][part]
    assert plan["total"] == run["ledger"]["planned"]["total"] == run["memory"]["peak"]
    assert run["memory"]["peak"] == max(run["ledger"]["peaks"].values())


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            "--model 11b",
            "11b, bfloat16, cuda: 1 prompt, each 1 image of 4 tiles, at most 2,048 tokens / "
            "weights 19.87 GiB 21,340,441,670 / visual cache 200.1 MiB 209,846,272 / "
            "a tile of one image 50.0 MiB 52,461,568 / an image of 4 200.1 MiB 209,846,272 / "
            "a token of one prompt 128.0 KiB 131,072 / libraries' workspaces",
        ),
        (
            "--model 90b --visual-budget 0.5",
            "visual cache 250.2 MiB 262,307,840 / without the budget 500.3 MiB 524,615,680",
        ),
        ("--model 11b --device cpu", "oneDNN's and MKL's scratch, which the processor decides"),
    ],
)
def test_a_plan_shows_exact_bytes_and_reads_no_weights(capsys, monkeypatch, arguments, lines):
    monkeypatch.setattr("llama_vision.api.load_model", lambda *_, **__: pytest.fail("read"))
    table = printed(capsys, "--device", "cuda", *arguments.split(), "--plan")
    assert [line for line in lines.split(" / ") if line not in " ".join(table.split())] == []
    assert re.search(r"vision .*\n.*prefill .*\n.*decode .*\n.*sampling ", table)


def test_what_fits_is_a_small_table(capsys):
    ask = (*MODEL, "--max-seq-len", "100", "--fit")
    table = printed(capsys, *ask, "5MB")
    assert "into 4.8 MiB fit, each with the rest as it is:" in table
    assert re.search(r"prompts at once +\d+\n +images a prompt +\d+ +--image, repeated\n", table)
    small = printed(capsys, *ask, "2MiB")
    assert "the weights alone, 3.6 MiB, do not fit into 2.0 MiB; use --dtype bfloat16" in small


def test_what_fits_into_what_is_free(capsys, monkeypatch):
    monkeypatch.setattr("llama_vision.cli.reports.known_free_memory", lambda _: 5 * 10**6)
    data = printed_json(capsys, *MODEL, "--max-seq-len", "100", "--fit")
    assert data["free"] == data["room"] == 5 * 10**6
    assert data["fit"]["batch"]["largest"] >= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--fit lots", "'lots' is no size; expected one such as 24GiB"),
        ("--fit --device cuda", "is unknown; give a size: --fit 24GiB"),
        ("--plan --max-tiles 9", "tiles is 9; expected 1 to 4"),
        ("--plan --model 12b", "12b does not exist"),
        ("--plan --visual-budget 2.0", "visual_budget is 2.0; expected a fraction"),
        ("--plan --device abacus", "device 'abacus' is unknown"),
    ],
)
def test_a_mistake_in_a_plan_is_one_line(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--model", "11b", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_run_that_does_not_fit_is_refused_before_its_weights_are_read(capsys, monkeypatch):
    monkeypatch.setattr("llama_vision.memory.fit.free_memory", lambda _: 6 * 10**6)
    monkeypatch.setattr("llama_vision.api.load_model", lambda *_, **__: pytest.fail("read"))
    assert main([*ASK, "--max-new-tokens", "9000"]) == 2
    message = capsys.readouterr().err
    assert "the run takes" in message
    (length,) = re.findall(r"--max-seq-len (\d+)", message)
    monkeypatch.undo()
    monkeypatch.setattr("llama_vision.memory.fit.free_memory", lambda _: 6 * 10**6)
    assert main([*ASK, "--max-new-tokens", "3", "--max-seq-len", length]) == 0


def test_force_runs_it_all_the_same(capsys, monkeypatch):
    monkeypatch.setattr("llama_vision.memory.fit.free_memory", lambda _: 1)
    ask = [*MODEL, "--prompt", "Why?", "--max-new-tokens", "2"]
    assert main(ask) == 2
    assert main([*ask, "--force"]) == 0


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "plan_memory.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_tool_plans_what_is_not_at_hand():
    done = run_tool("11b", "--batch", "8", "--images", "2", "--visual-budget", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout.splitlines()[-1])
    assert data["visual_cache"] == 8 * 2 * 3202 * 32 * 2**10
    assert data["batch"] == 8
    assert "8 prompts, each 2 images of 4 tiles" in done.stdout


def test_the_tool_names_a_mistake():
    done = run_tool("11b", "--tiles", "7")
    assert (done.returncode, done.stderr) == (2, "plan_memory: tiles is 7; expected 1 to 4\n")
