"""Where checkpoints come from: directories, the local cache, and a hub on loopback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
from conftest import TINY
from stub_hub import REPO, StubHub

from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.hub import download, find_checkpoint

ROOT = Path(__file__).parent.parent
SECOND = "model-00002-of-00002.safetensors"
NEEDED = {path.name for path in TINY.iterdir()}


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
    for name in NEEDED:
        assert (directory / name).read_bytes() == (TINY / name).read_bytes()


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
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_says_what_to_do(hub, refusal, place, tmp_path):
    hub.refuse, says = REFUSALS[refusal]
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
    with pytest.raises(
        CheckpointError, match=r"not .* in the local cache.*refused.*check the network"
    ):
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
    code = f"{imports}; print(find_checkpoint({REPO!r}))"
    run = [sys.executable, "-c", code]
    home = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    home["HF_HOME"] = str(tmp_path / "home")
    with StubHub(repository) as hub:
        online = {**home, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
        first = subprocess.run(run, cwd=ROOT, env=online, check=True, stdout=subprocess.PIPE)
    assert sorted(hub.fetched) == sorted(NEEDED)
    assert hub.tokens == {"Bearer hf_secret"}
    offline = {**home, "HF_HUB_OFFLINE": "1"}
    second = subprocess.run(run, cwd=ROOT, env=offline, check=True, stdout=subprocess.PIPE)
    assert first.stdout == second.stdout
    assert first.stdout.decode().startswith(str(tmp_path / "home" / "hub"))
