"""weights/download.py, the command that fetches a checkpoint."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from stub_hub import REPO, StubHub

from llama_vision.checkpoint.files import find_shards

SCRIPT = Path(__file__).parent.parent / "weights" / "download.py"
NEEDED = {path.name for path in TINY.iterdir()}
SIZE = sum(path.stat().st_size for path in TINY.iterdir())
main = runpy.run_path(str(SCRIPT))["main"]


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def test_it_prints_the_size_and_what_to_pass_to_model(hub, tmp_path, capsys):
    assert main([REPO]) == 0
    *_, size, model = capsys.readouterr().out.splitlines()
    assert size == f"{len(NEEDED)} files, {SIZE / 2**20:.1f} MiB"
    directory = Path(model.removeprefix("--model "))
    assert directory.is_relative_to(tmp_path / "cache")
    assert files_in(directory) == set(hub.fetched) == NEEDED


def test_a_directory_of_ones_own_gets_the_needed_files_alone(hub, tmp_path, capsys):
    target = tmp_path / "here"
    assert main([REPO, "--to", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"--model {target}"
    assert files_in(target) == NEEDED
    assert not (target / "original").exists()
    for name in NEEDED:
        assert (target / name).read_bytes() == (TINY / name).read_bytes()


@pytest.mark.parametrize("own", [False, True], ids=["in the cache", "in a directory"])
def test_run_again_it_fetches_only_what_is_not_there(hub, own, tmp_path, capsys):
    arguments = [REPO, "--to", str(tmp_path / "here")] if own else [REPO]
    assert main(arguments) == 0
    directory = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("--model "))
    gone = find_shards(directory)[1]
    gone.resolve().unlink()
    hub.fetched.clear()
    assert main(arguments) == 0
    assert hub.fetched == [gone.name]
    assert files_in(directory) == NEEDED


def test_the_token_of_the_command_is_sent(hub):
    assert main([REPO, "--token", "hf_mine"]) == 0
    assert hub.tokens == {"Bearer hf_mine"}


@pytest.mark.parametrize(
    ("arguments", "refuse", "says"),
    [
        ([REPO], (403, "GatedRepo"), "accept the licence"),
        ([REPO], (401, "RepoNotFound"), "no repository"),
        (["someone/unknown"], None, "no repository someone/unknown"),
        (["not a name"], None, "'not a name' is no repository id"),
        (["a/b/c"], None, "'a/b/c' is no repository id"),
    ],
    ids=["gated", "private", "unknown", "no name", "a path"],
)
def test_what_cannot_be_had_is_one_message(hub, arguments, refuse, says, capsys):
    hub.refuse = refuse
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    message = captured.err.splitlines()[-1]
    assert message.startswith("download.py: ")
    assert says in message
    assert "Traceback" not in captured.err


def test_a_repository_without_safetensors_is_told(hub, capsys):
    for path in hub.directory.glob("model*"):
        path.unlink()
    assert main([REPO]) == 2
    assert "has no model.safetensors" in capsys.readouterr().err


def test_it_runs_from_anywhere_without_being_installed(repository, tmp_path):
    with StubHub(repository) as hub:
        home = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), REPO, "--to", "here"],
            cwd=tmp_path,
            env={**home, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"--model {tmp_path / 'here'}"
    assert files_in(tmp_path / "here") == NEEDED
    assert "Fetching" in done.stderr, "no progress was shown"
