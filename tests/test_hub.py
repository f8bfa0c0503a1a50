"""Where checkpoints come from: directories, the local cache, a hub; `weights/download.py`."""

import fcntl
import os
import pty
import runpy
import shutil
import struct
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import TINY
from stub_hub import REPO, StubHub

from llama_vision.checkpoint.files import CheckpointError, find_shards
from llama_vision.checkpoint.hub import download, find_checkpoint

ROOT = Path(__file__).parent.parent
SECOND = "model-00002-of-00002.safetensors"
NEEDED = {path.name for path in TINY.iterdir()}
SIZE = sum(path.stat().st_size for path in TINY.iterdir())
SCRIPT = ROOT / "weights" / "download.py"
main = runpy.run_path(str(SCRIPT))["main"]


def assert_copied(directory: Path) -> None:
    """The needed files and no others."""
    assert {path.name for path in directory.iterdir()} - {".cache"} == NEEDED
    for name in NEEDED:
        assert (directory / name).read_bytes() == (TINY / name).read_bytes()


def environment(**variables: str | Path) -> dict[str, str]:
    """This process's environment with `HF_` variables of ours alone."""
    others = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return others | {f"HF_{name}": str(value) for name, value in variables.items()}


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert find_checkpoint(tmp_path) == tmp_path
    assert find_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "source", ["no/such/directory", "./here", "../there/x", "alone", "a--b/c", "a/b/", "~/nowhere"]
)
def test_what_is_neither_directory_nor_repository_is_told(source):
    with pytest.raises(CheckpointError, match=r"does not exist; expected a directory .* or a repo"):
        find_checkpoint(source)


def test_a_file_is_no_checkpoint():
    with pytest.raises(CheckpointError, match="is a file; expected a directory"):
        find_checkpoint(TINY / "config.json")


def test_only_the_needed_files_are_fetched(hub):
    directory = find_checkpoint(REPO)
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert {path.name for path in directory.rglob("*")} == NEEDED
    assert_copied(directory)


def test_the_cache_is_used_and_the_hub_not_asked_again(hub, monkeypatch):
    directory = find_checkpoint(REPO)
    hub.fetched.clear()
    hub.tokens.clear()
    assert find_checkpoint(REPO) == directory
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint(REPO) == directory
    assert not hub.fetched
    assert not hub.tokens, "the hub was asked"


def test_an_incomplete_snapshot_is_completed(hub):
    directory = find_checkpoint(REPO)
    (directory / SECOND).resolve().unlink()
    hub.fetched.clear()
    assert find_checkpoint(REPO) == directory
    assert hub.fetched == [SECOND]


@pytest.mark.parametrize(("variable", "sent"), [("hf_secret", {"Bearer hf_secret"}), ("", {None})])
def test_the_token_of_the_environment_is_sent(hub, monkeypatch, variable, sent):
    monkeypatch.setenv("HF_TOKEN", variable)
    find_checkpoint(REPO)
    assert hub.tokens == sent


REFUSALS = {
    "gated": ((403, "GatedRepo"), "gated.*accept the licence.*HF_TOKEN.*pass a directory"),
    "unknown, without a token": ((401, "RepoNotFound"), "no repository.*check the name.*HF_TOKEN"),
    "unknown, with a token": ((404, "RepoNotFound"), "no repository.*check the name.*HF_TOKEN"),
    "a bad token": ((401, ""), "refused.*check HF_TOKEN.*pass a directory"),
    "a token without the right": ((403, ""), "refused.*check HF_TOKEN.*pass a directory"),
    "out of order": ((500, ""), "cannot be downloaded.*500.*check the network.*pass a directory"),
}


@pytest.mark.parametrize("place", ["into the cache", "into a directory"])
@pytest.mark.parametrize(("refuse", "says"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_what_to_do(hub, refuse, says, place, tmp_path):
    hub.refuse = refuse
    to = None if place == "into the cache" else Path(shutil.copytree(TINY, tmp_path / "already"))
    with pytest.raises(CheckpointError, match=f"(?s){says}") as error:
        download(REPO, to=to)
    assert REPO in str(error.value)
    assert "\n" not in str(error.value)


def test_a_repository_whose_files_are_gated_says_what_to_do(hub):
    hub.refuse_files = (403, "GatedRepo")
    with pytest.raises(CheckpointError, match=r"is gated.*accept the licence.*HF_TOKEN"):
        find_checkpoint(REPO)


def test_no_network_says_what_to_do(repository, tmp_path, monkeypatch):
    with StubHub(repository) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
    says = r"not .* in the local cache.*refused.*check the network"
    with pytest.raises(CheckpointError, match=says):
        find_checkpoint(REPO)


def test_an_incomplete_snapshot_without_network_says_what_is_missing(hub, monkeypatch):
    directory = find_checkpoint(REPO)
    (directory / SECOND).resolve().unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"not complete.*{SECOND}.*HF_HUB_OFFLINE"):
        find_checkpoint(REPO)


def test_the_environment_is_respected(repository, tmp_path):
    """In fresh processes: HF_ENDPOINT, HF_HOME and HF_TOKEN; then HF_HUB_OFFLINE, without a hub."""
    imports = "from llama_vision.checkpoint.hub import find_checkpoint"
    command = [sys.executable, "-c", f"{imports}; print(find_checkpoint({REPO!r}))"]

    def found(**variables: str) -> str:
        how = {"cwd": ROOT, "env": environment(HOME=tmp_path / "home", **variables)}
        return subprocess.check_output(command, text=True, **how)

    with StubHub(repository) as hub:
        directory = found(ENDPOINT=hub.url, TOKEN="hf_secret")
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert hub.tokens == {"Bearer hf_secret"}
    assert found(HUB_OFFLINE="1") == directory
    assert directory.startswith(str(tmp_path / "home" / "hub"))


def test_the_command_prints_the_size_and_what_to_pass_to_model(hub, tmp_path, capsys):
    assert main([REPO]) == 0
    *_, size, model = capsys.readouterr().out.splitlines()
    assert size == f"{len(NEEDED)} files, {SIZE / 2**20:.1f} MiB"
    directory = Path(model.removeprefix("--model "))
    assert directory.is_relative_to(tmp_path / "cache")
    assert set(hub.fetched) == NEEDED
    assert_copied(directory)


def test_a_directory_of_ones_own_gets_the_needed_files_alone(hub, tmp_path, capsys):
    target = tmp_path / "here"
    assert main([REPO, "--to", str(target)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"--model {target}"
    assert_copied(target)


@pytest.mark.parametrize("to", [[], ["--to", "here"]])
def test_run_again_it_fetches_only_what_is_not_there(hub, to, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [REPO, *to]
    assert main(arguments) == 0
    directory = Path(capsys.readouterr().out.splitlines()[-1].removeprefix("--model "))
    gone = find_shards(directory)[1]
    gone.resolve().unlink()
    hub.fetched.clear()
    assert main(arguments) == 0
    assert hub.fetched == [gone.name]
    assert_copied(directory)


def test_the_token_of_the_command_is_sent(hub):
    assert main([REPO, "--token", "hf_mine"]) == 0
    assert hub.tokens == {"Bearer hf_mine"}


@pytest.mark.parametrize(
    ("repo", "refuse", "says"),
    [
        (REPO, (403, "GatedRepo"), "accept the licence"),
        (REPO, (401, "RepoNotFound"), "no repository"),
        ("someone/unknown", None, "no repository someone/unknown"),
        ("not a name", None, "'not a name' is no repository id"),
        ("a/b/c", None, "'a/b/c' is no repository id"),
    ],
)
def test_what_cannot_be_had_is_one_message(hub, repo, refuse, says, capsys):
    hub.refuse = refuse
    assert main([repo]) == 2
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


def run_from_anywhere(repository, tmp_path, stderr):
    """It, without being installed; the process, whose stderr may still be read."""
    command = [sys.executable, str(SCRIPT), REPO, "--to", "here"]
    with StubHub(repository) as hub:
        how = {"cwd": tmp_path, "env": environment(ENDPOINT=hub.url, HOME=tmp_path / "home")}
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, **how)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"--model {tmp_path / 'here'}"
    assert_copied(tmp_path / "here")
    return done


def test_into_a_pipe_no_progress_is_drawn(repository, tmp_path):
    assert run_from_anywhere(repository, tmp_path, subprocess.PIPE).stderr == ""


def test_on_a_terminal_progress_is_drawn(repository, tmp_path):
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    with ThreadPoolExecutor(1) as reader:
        told = reader.submit(read_to_the_end, screen)
        run_from_anywhere(repository, tmp_path, terminal)
        os.close(terminal)
        assert f"Fetching {len(NEEDED)} files: 100%" in told.result().decode()
    os.close(screen)


def read_to_the_end(screen: int) -> bytes:
    """What is written to a terminal until nobody holds it any more."""
    told = b""
    with suppress(OSError):  # how Linux says that
        while part := os.read(screen, 4096):
            told += part
    return told
