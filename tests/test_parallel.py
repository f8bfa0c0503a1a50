"""Several devices, here processes on the CPU: the same answers as on one."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CASES, assert_close, golden_tensors
from parallel_worker import PRUNED, RULES, checkpoint_for, part_of, results

from llama_vision import LlamaVision
from llama_vision.cache.kv import Cache
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.config import Config, divided, official_config
from llama_vision.engine.workload import workload_alike
from llama_vision.errors import SettingError
from llama_vision.memory.plan import plan_run, weight_bytes, weight_parts
from llama_vision.model.parallel import ParallelError, agree, gather, least, start, total

WORKER = str(Path(__file__).with_name("parallel_worker.py"))
COUNTS = (2, 4)
every_count = pytest.mark.parametrize("devices", COUNTS)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """What each process of two, and of four, found; once for all of pytest's own processes."""
    directory = tmp_path_factory.getbasetemp()
    directory = directory.parent if "PYTEST_XDIST_WORKER" in os.environ else directory
    with (directory / "parallel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return {devices: found_by(devices, directory / f"ranks{devices}") for devices in COUNTS}


def found_by(devices: int, directory: Path) -> list[dict]:
    """What each of so many processes found, in a directory that is made by running them."""
    if not directory.exists():
        directory.mkdir()
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*torchrun, "--nproc-per-node", str(devices), WORKER, str(directory), "all"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    files = [directory / f"{rank}.pt" for rank in range(devices)]
    return [torch.load(file, weights_only=False) for file in files]


@pytest.fixture(scope="module")
def of_one() -> dict[int, dict]:
    """What one process finds of the same checkpoints."""
    return {devices: results(devices, 1, 0) for devices in COUNTS}


@every_count
@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_reference_s(of_ranks, devices, case):
    expected = golden_tensors(f"cases/{case}")["logits"]
    for rank, found in enumerate(of_ranks[devices]):
        for number, logits in enumerate(found["logits", case]):
            rows, vocabulary = logits.shape
            assert vocabulary == (512 if devices == 2 else 509)
            assert_close(f"{rank}", logits, expected[number, :rows, :vocabulary], 2e-4)


@every_count
@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_one_device(of_ranks, of_one, devices, case):
    for found in of_ranks[devices]:
        assert found["greedy", case] == of_one[devices]["greedy", case]


@pytest.mark.parametrize(("devices", "case"), [(n, case) for n in COUNTS for case in PRUNED[n]])
@pytest.mark.parametrize("rule", RULES)
def test_all_prune_as_one_device_does(of_ranks, of_one, devices, rule, case):
    for found in of_ranks[devices]:
        pairs = zip(found[rule, case], of_one[devices][rule, case], strict=True)
        for (got_ids, got), (want_ids, want) in pairs:
            assert got_ids == want_ids
            assert all(map(torch.equal, got, want))
            assert not all(mask.all() for mask in got)


@every_count
def test_all_draw_the_same_tokens(of_ranks, of_one, devices):
    for found in of_ranks[devices]:
        assert found["sampled", 7] == of_one[devices]["sampled", 7]
        assert found["sampled", None] == of_ranks[devices][0]["sampled", None]
        assert found["sampled", None] != found["sampled", 7]


@every_count
def test_all_are_told_what_the_first_one_was(of_ranks, of_one, devices):
    """What a rule raises that only one process asks; and the least of 5, 6, …"""
    for found in of_ranks[devices]:
        assert found["fails"] == of_one[devices]["fails"] != ""
        assert found["least"] == 5


@every_count
def test_each_holds_the_bytes_that_are_planned(of_ranks, devices):
    config = checkpoint_for(devices, devices, 0).config
    for found in of_ranks[devices]:
        assert found["bytes"] == weight_bytes(config, torch.float32)


def test_one_that_dies_ends_the_other(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, WORKER, str(tmp_path), "dies"]
        processes.append(subprocess.Popen(command, env=environment, **pipes))
    assert processes[1].wait(timeout=60) == 7
    died = time.monotonic()
    out, error = processes[0].communicate(timeout=30)
    processes[1].communicate()
    assert time.monotonic() - died < 30
    assert processes[0].returncode == 2
    assert out == ""
    (line,) = [line for line in error.splitlines() if not line.startswith("[W")]
    assert "another process of this run has ended" in line


ENVIRONMENT = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
WRONG = {
    "no rank": ({"RANK": ""}, "there is no RANK"),
    "no local rank": ({"LOCAL_RANK": ""}, "there is no LOCAL_RANK"),
    "no address": ({"MASTER_ADDR": ""}, "there is no MASTER_ADDR"),
    "not a number": ({"RANK": "one"}, "RANK is 'one'"),
    "no count": ({"WORLD_SIZE": "x\ny"}, r"WORLD_SIZE is 'x\ny'"),
    "none": ({"WORLD_SIZE": "0"}, "RANK is '1'"),
    "too many": ({"RANK": "2"}, "RANK is '2'"),
    "port": ({"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
}


@pytest.mark.parametrize(("changed", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_environment_is_one_line(changed, words):
    with pytest.raises(ParallelError) as caught:
        start({**ENVIRONMENT, **changed})
    assert words in str(caught.value)
    assert "torchrun" in str(caught.value)


@pytest.mark.parametrize(
    "environment", [{}, {"WORLD_SIZE": "1"}, {**ENVIRONMENT, "WORLD_SIZE": "1"}]
)
def test_one_process_needs_no_other(environment):
    assert start(environment) == 1
    x = torch.ones(2)
    assert total(x, 1) is x
    assert agree(lambda: 3, 1) == least(3, 1) == 3
    assert gather(x, 1).shape == (1, 2)


# Plans: one process, without any other

GIB = 2**30


@pytest.mark.parametrize("size", ["11b", "90b"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_the_plan_is_of_one_device(size, devices):
    whole = official_config(size)
    config = divided(whole, devices)
    sizes = {"slots": 1, "max_text_tokens": 2048, "visual_capacity": 6404, "dtype": whole.dtype}
    of_all, of_each = Cache.plan(whole.text, **sizes), Cache.plan(config.text, **sizes)
    assert of_each.text * devices == of_all.text
    assert of_each.visual * devices == of_all.visual
    weights, all_weights = (weight_bytes(c, whole.dtype) for c in (config, whole))
    # Position tables, norms, patches, and the projector are whole everywhere.
    everywhere = (devices * weights - all_weights) / (devices - 1)
    assert 0.1 * GIB < everywhere < 0.5 * GIB
    plan = plan_run(config, workload_alike(config), dtype=whole.dtype, device="cuda")
    assert plan.weights == weights
    assert (
        plan.working
        < plan_run(whole, workload_alike(whole), dtype=whole.dtype, device="cuda").working
    )


def odd(config: Config, part: str, name: str, size: int) -> Config:
    return replace(config, **{part: replace(getattr(config, part), **{name: size})})


@pytest.mark.parametrize(
    ("part", "name", "size", "words"),
    [
        ("text", "num_attention_heads", 36, "36 query heads"),
        ("text", "num_key_value_heads", 4, "4 key/value heads"),
        ("text", "intermediate_size", 14340, "14340 intermediate_size"),
        ("vision", "attention_heads", 20, "20 vision heads"),
        ("vision", "intermediate_size", 5124, "5124 vision intermediate_size"),
    ],
)
def test_what_cannot_be_divided_is_named(part, name, size, words):
    config = odd(official_config("11b"), part, name, size)
    with pytest.raises(SettingError) as caught:
        divided(config, 8)
    assert f"8 devices cannot divide this model's {words}; expected 1 or 2 or 4" in str(
        caught.value
    )
    assert divided(config, 4).text.devices == divided(config, 4).vision.devices == 4


def test_a_checkpoint_that_so_many_devices_cannot_divide_is_not_read():
    with pytest.raises(SettingError, match="4 devices cannot divide this model's 2 key/value"):
        LlamaVision.without_weights(EMBEDDED_MODEL, device="cpu", devices=4)


def test_loading_gives_each_device_its_part(monkeypatch):
    """Of the files; pico's vocabulary is divided with a row to spare."""
    directory, devices = EMBEDDED_MODEL, 2
    whole = dict(LlamaVision.from_pretrained(directory, device="cpu").model.named_parameters())
    for rank in range(devices):
        monkeypatch.setattr("llama_vision.model.parallel.rank", lambda rank=rank: rank)
        model = LlamaVision.without_weights(directory, device="cpu", devices=devices)
        planned = sum(weight_parts(model.config, torch.bfloat16).values())
        model.load_weights()
        parameters = dict(model.model.named_parameters())
        assert sum(parameter.nbytes for parameter in parameters.values()) == planned
        for name, parameter in parameters.items():
            want = part_of(name, whole[name].float(), parameter.shape, rank)
            assert torch.equal(parameter.float(), want), name


def test_the_command_answers_as_one_device(tmp_path):
    picture = EMBEDDED_MODEL / "examples" / "sign.png"
    question = ["--image", str(picture), "--prompt", "What does the text say?", "--keep", "0.5"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*run, "-m", "llama_vision", *question, "--stats"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "Undone\n"
    assert done.stderr.count("memory        ") == 1
