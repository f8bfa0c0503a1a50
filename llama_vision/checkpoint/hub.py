"""Where a checkpoint is: a directory, a repository of the Hugging Face hub, or beside the code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm, validate_repo_id

from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.files import CheckpointError, find_shards
from llama_vision.config import OFFICIAL_SIZES, Config, official_config
from llama_vision.errors import LlamaVisionError, printable, quote
from llama_vision.reading import shown

EXAMPLE_REPO = "meta-llama/Llama-3.2-11B-Vision-Instruct"
EXPECTED = (
    f"a directory with config.json and *.safetensors, or a repository id such as {EXAMPLE_REPO}"
)
NEEDED_FILES = ("*.json", "tokenizer.model", "*.safetensors")
UNNEEDED_FILES = ("original/*",)
FIRST_FILES = ("config.json", "adapter_config.json", "params.json")
"""They tell whether the others can be loaded, and are fetched and read before them."""

_PACKAGE = Path(__file__).resolve().parents[1]
_HOME = _PACKAGE if (_PACKAGE / "weights").is_dir() else _PACKAGE.parent
EMBEDDED_MODEL = _HOME / "weights" / "pico"
"""The small trained model: inside the package where it is installed, beside it in a checkout."""


def source_path(source: object) -> Path:
    """The path that a source would be, whether it is there or not.

    Raises:
        CheckpointError: it is no path and no repository id: another kind of value, or a path that
            cannot be.
    """
    if isinstance(source, (str, Path)) and str(source):
        try:
            path = Path(source).expanduser()
            path.exists()
            return path
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
            pass
    raise CheckpointError(f"model is {quote(source)}; expected {EXPECTED}")


def find_checkpoint(source: str | Path) -> Path:
    """The directory of a checkpoint.

    Args:
        source: a directory, or the id of a Hugging Face repository, which is looked for in the
            local cache first and then downloaded (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and
            HF_TOKEN are respected; of the files only those needed are fetched).

    Raises:
        CheckpointError: neither, or the repository cannot be had; says what to do.
        ConfigError: the repository's config.json tells that it cannot be loaded.
    """
    directory = source_path(source)
    if directory.is_dir():
        return directory
    if directory.exists() or not is_repo_id(str(source)):
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"model {shown(source)} {what}; expected {EXPECTED}")
    try:
        cached = snapshot(str(source), local_files_only=True)
        if _is_complete(cached):
            return cached
    except hub_errors.LocalEntryNotFoundError:
        pass
    return download(str(source))


def load_config(source: str | Path) -> Config:
    """The configuration of a directory, a repository (no weights are fetched), "11b" or "90b".

    Raises:
        CheckpointError: there is no such thing, or it cannot be had.
        ConfigError: it describes another architecture, or weights that cannot be loaded.
    """
    directory = source_path(source)
    if str(source) in OFFICIAL_SIZES:
        return official_config(str(source))
    if directory.exists() or not is_repo_id(str(source)):
        return read_config(find_checkpoint(source))
    repo = str(source)
    try:
        cached = snapshot(repo, FIRST_FILES, local_files_only=True)
        if (cached / "config.json").is_file():
            return read_config(cached)
    except hub_errors.LocalEntryNotFoundError:
        pass
    with explained(repo):
        return read_config(snapshot(repo, FIRST_FILES))


def is_repo_id(source: str) -> bool:
    """Whether a text has the form of a repository's id."""
    try:
        validate_repo_id(source)
    except hub_errors.HFValidationError:
        return False
    return source.count("/") == 1


class Progress(tqdm):
    """The hub's own bar, on a terminal or in a notebook; elsewhere none, which it would draw."""

    def __init__(self, *args: Any, **how: Any):
        super().__init__(*args, **{"disable": None, **how})


def snapshot(repo: str, files: Sequence[str] = NEEDED_FILES, **how: Any) -> Path:
    """Some files of a repository, from the local cache or the hub; the directory they are in."""
    how |= {"allow_patterns": list(files), "ignore_patterns": list(UNNEEDED_FILES)}
    return Path(snapshot_download(repo, tqdm_class=Progress, **how))


def _is_complete(directory: Path) -> bool:
    try:
        return (directory / "config.json").is_file() and bool(find_shards(directory))
    except CheckpointError:
        return False


def download(repo: str, *, to: Path | None = None, token: str | None = None) -> Path:
    """Fetch the needed files of a Hugging Face repository; those already here are left alone.

    Args:
        to: a directory for them; None for the local cache.
        token: None for HF_TOKEN, or the one that `hf auth login` stored.

    Raises:
        CheckpointError: gated, unknown or out of reach; says what to do.
        ConfigError: config.json tells that the weights cannot be loaded; they are not fetched.
    """
    with explained(repo):
        if to is None:
            how = {"token": token}
        else:
            # Out of reach, snapshot_download would be content with whatever is in `to`: ask first.
            commit = HfApi(token=token).model_info(repo).sha
            how = {"token": token, "local_dir": to, "revision": commit}
        read_config(snapshot(repo, FIRST_FILES, **how))
        return snapshot(repo, **how)


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one message, that of its HTTP client included."""
    try:
        yield
    except LlamaVisionError:
        raise
    except Exception as error:
        raise CheckpointError(_explain(repo, error)) from None


def _explain(repo: str, error: Exception) -> str:
    """Why a repository could not be had, and what to do."""
    if isinstance(error, hub_errors.GatedRepoError):
        return (
            f"{repo} is gated and this account may not read it; accept the licence on its page, "
            "then set HF_TOKEN (or run `hf auth login`), or pass a directory with the files"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"no repository {repo}, or no right to see it; check the name, set HF_TOKEN if it is "
            "private, or pass a directory"
        )
    if isinstance(error, hub_errors.HFValidationError):
        return f"{quote(repo)} is no repository id; expected one such as {EXAMPLE_REPO}"
    first_line = printable((str(error).splitlines() or [""])[0], 200)
    answer = getattr(error.__cause__ or error, "response", None)
    if getattr(answer, "status_code", None) in (401, 403):
        return (
            f"{repo} was refused ({first_line}); check HF_TOKEN (or run `hf auth login` again), "
            "or pass a directory with the files"
        )
    return (
        f"{repo} is not complete in the local cache and cannot be downloaded "
        f"({type(error).__name__}: {first_line}); "
        "check the network and HF_HUB_OFFLINE, or pass a directory with the files"
    )
