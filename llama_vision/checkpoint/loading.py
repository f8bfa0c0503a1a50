"""Official safetensors into modules: where they are, a name table, and a proof."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm, validate_repo_id
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llama_vision.config import (
    DTYPES,
    OFFICIAL_SIZES,
    Config,
    LlamaVisionError,
    SettingError,
    official_config,
)
from llama_vision.model.model import LlamaVisionModel, model_without_weights

NAME_TABLE = (
    # ours               published in 2024                  newer files
    ("vision.", "vision_model.", "model.vision_model."),
    ("projector.", "multi_modal_projector.", "model.multi_modal_projector."),
    ("text.lm_head.", "language_model.lm_head.", "lm_head."),
    ("text.", "language_model.model.", "model.language_model."),
)
"""Prefixes of one module in our tree and in both generations of files; below it names are equal."""

EXAMPLE_REPO = "meta-llama/Llama-3.2-11B-Vision-Instruct"
NEEDED_FILES = ("*.json", "tokenizer.model", "*.safetensors")
UNNEEDED_FILES = ("original/*",)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
BUFFER_BYTES = 16 * 2**20
"""Files are read in pieces of this size: all that loading needs beside the model itself."""


class CheckpointError(LlamaVisionError):
    """Files that are missing, damaged, or not those of the model that config.json describes."""


class Entry(NamedTuple):
    """One tensor as a shard's header declares it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    """Where in the file its bytes begin."""


def official_names(names: list[str], newer: bool = False) -> dict[str, str]:
    """What the tensors with our names are called in official files: {official: ours}."""
    table = {}
    for name in names:
        ours, *theirs = next(row for row in NAME_TABLE if name.startswith(row[0]))
        table[theirs[newer] + name[len(ours) :]] = name
    return table


def parse_device(name: str) -> torch.device:
    """The device for "auto" or for a torch device string, whether this machine has it or not.

    Raises:
        SettingError: no such kind of device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and torch.backends.mps.is_available():
            name = "mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise SettingError(f"device {name!r} is unknown; expected auto, cpu, cuda, cuda:N or mps")
    return device


def choose_device(name: str) -> torch.device:
    """The same, of those that this machine has.

    Raises:
        SettingError: no such kind of device, or none of it on this machine.
    """
    device = parse_device(name)
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps}.get(device.type)
    if backend is not None and not backend.is_available():
        raise SettingError(
            f"device {name!r} was asked for and this machine (or this build of torch "
            f"{torch.__version__}) has none; use --device cpu, or auto"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device {name!r} was asked for and there are {torch.cuda.device_count()} CUDA devices"
        )
    return device


def choose_dtype(dtype: str | torch.dtype, published: torch.dtype) -> torch.dtype:
    """The type for "auto" (as published), a name, or a torch type.

    Raises:
        SettingError: another type.
    """
    chosen = published if dtype == "auto" else DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise SettingError(f"dtype {dtype!r} is unknown; expected auto, {', '.join(DTYPES)}")
    return chosen


def find_checkpoint(source: str | Path) -> Path:
    """The directory of a checkpoint.

    Args:
        source: a directory, or the id of a Hugging Face repository, which is looked for in the
            local cache first and then downloaded (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and
            HF_TOKEN are respected; of the files only those needed are fetched).

    Raises:
        CheckpointError: neither, or the repository cannot be had; says what to do.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if directory.exists() or not _is_repo_id(str(source)):
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"model {source} {what}; expected a directory with config.json and *.safetensors, "
            f"or a repository id such as {EXAMPLE_REPO}"
        )
    try:
        cached = _snapshot(str(source), local_files_only=True)
        if _is_complete(cached):
            return cached
    except hub_errors.LocalEntryNotFoundError:
        pass
    return download(str(source))


def load_config(source: str | Path) -> Config:
    """The configuration of a directory, a repository (no other file is fetched), "11b" or "90b".

    Raises:
        CheckpointError: there is no such thing, or it cannot be had.
        ConfigError: it describes another architecture.
    """
    if str(source) in OFFICIAL_SIZES:
        return official_config(str(source))
    directory = Path(source).expanduser()
    if directory.exists() or not _is_repo_id(str(source)):
        return Config.from_directory(find_checkpoint(source))
    repo, files = str(source), ["config.json"]
    try:
        cached = _snapshot(repo, files, local_files_only=True)
        if (cached / "config.json").is_file():
            return Config.from_directory(cached)
    except hub_errors.LocalEntryNotFoundError:
        pass
    try:
        return Config.from_directory(_snapshot(repo, files))
    except LlamaVisionError:
        raise
    except Exception as error:
        raise CheckpointError(_explain(repo, error)) from None


def _is_repo_id(source: str) -> bool:
    try:
        validate_repo_id(source)
    except hub_errors.HFValidationError:
        return False
    return source.count("/") == 1


def _snapshot(repo: str, files: Sequence[str] = NEEDED_FILES, **how: Any) -> Path:
    return Path(
        snapshot_download(
            repo, allow_patterns=list(files), ignore_patterns=list(UNNEEDED_FILES), **how
        )
    )


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
    """
    try:
        if to is None:
            return _snapshot(repo, token=token)
        # Out of reach, snapshot_download would be content with whatever is in `to`: ask first.
        commit = HfApi(token=token).model_info(repo).sha
        return _snapshot(repo, token=token, local_dir=to, revision=commit)
    except Exception as error:  # the HTTP client's own errors among them, which differ by version
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
        return f"{repo!r} is no repository id; expected one such as {EXAMPLE_REPO}"
    first_line = (str(error).splitlines() or [""])[0]
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


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or the only one.

    Raises:
        CheckpointError: there are none, or one that the index lists is missing.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(Path(name)) for name in weight_map.values()})
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); fetch it again") from None
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(names)} shards: {_some(missing)}; "
                "fetch them again"
            )
        return [directory / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(
        p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in directory.glob(pattern)
    )
    hint = (
        f"; {_some(pickles)} may run code when opened and is never loaded: convert it, "
        "for Meta's files with weights/convert_meta.py"
        if pickles
        else ""
    )
    raise CheckpointError(f"{directory} has no model.safetensors and no index of shards{hint}")


def read_headers(shards: list[Path]) -> dict[str, Entry]:
    """Every tensor that the shards declare, without reading its data.

    Raises:
        CheckpointError: a shard is cut short or damaged, or a tensor is there twice.
    """
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _read_header(shard).items():
            if name in entries:
                raise CheckpointError(
                    f"{name} is in both {entries[name].shard.name} and {shard.name}"
                )
            entries[name] = entry
    return entries


def _read_header(shard: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: a length in 8 bytes, so much JSON, then their bytes."""
    try:
        with safe_open(shard, framework="pt"):
            pass  # it proves that the header is sound and the file as long as it says
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shard} is damaged or cut short ({error}; {shard.stat().st_size:,} bytes); "
            "fetch it again"
        ) from None
    header.pop("__metadata__", None)
    return {
        name: Entry(
            shard, tuple(about["shape"]), about["dtype"], 8 + length + about["data_offsets"][0]
        )
        for name, about in header.items()
    }


def match_names(
    expected: Mapping[str, nn.Parameter], entries: Mapping[str, Entry]
) -> dict[str, str]:
    """The proof: every tensor is used once, every parameter filled once, all shapes are equal.

    Returns:
        {name in the files: name in the model}.

    Raises:
        CheckpointError: lists all that is missing, unexpected, misshapen or of a strange type.
    """
    newer = any(name.startswith("model.") for name in entries)
    names = official_names(list(expected), newer)
    problems = {
        "missing": [name for name in names if name not in entries],
        "unexpected": [name for name in entries if name not in names],
        "misshapen": [
            f"{name} {list(entries[name].shape)} instead of {list(expected[ours].shape)}"
            for name, ours in names.items()
            if name in entries and entries[name].shape != tuple(expected[ours].shape)
        ],
        "of an unsupported type": [
            f"{name} ({entry.dtype})"
            for name, entry in entries.items()
            if name in names and entry.dtype not in FLOATS
        ],
    }
    found = [f"{len(what)} {kind}: {_some(what)}" for kind, what in problems.items() if what]
    if found:
        raise CheckpointError(
            "the weights are not those of the model in config.json: " + "; ".join(found)
        )
    return names


def _some(names: list[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"


def load_model(
    directory: Path, config: Config, *, device: torch.device, dtype: torch.dtype
) -> LlamaVisionModel:
    """Build the model on the meta device and fill it shard by shard on the target device.

    The files are read, not mapped: afterwards the model does not depend on them.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`, `match_names`.
    """
    model = model_without_weights(config)
    entries = read_headers(find_shards(directory))
    names = match_names(dict(model.named_parameters()), entries)
    in_file_order = sorted(names, key=lambda name: (entries[name].shard, entries[name].offset))
    buffer = bytearray(BUFFER_BYTES)
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=None, leave=False) as bar:
        for name in in_file_order:
            _fill(model, names[name], _read(entries[name], buffer, device, dtype))
            bar.update()
    model.vision.compare_absent_tiles()
    return model.eval()


def _read(entry: Entry, buffer: bytearray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """One tensor, through the buffer, to its place and type."""
    stored = FLOATS[entry.dtype]
    tensor = torch.empty(entry.shape, dtype=dtype, device=device)
    with entry.shard.open("rb") as file:
        file.seek(entry.offset)
        for part in tensor.view(-1).split(len(buffer) // stored.itemsize):
            size = part.numel() * stored.itemsize
            if file.readinto(memoryview(buffer)[:size]) != size:
                raise CheckpointError(f"{entry.shard} became shorter while it was read")
            part.copy_(torch.frombuffer(buffer, dtype=stored, count=part.numel()))
    return tensor


def _fill(model: nn.Module, name: str, tensor: Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(module_name), leaf, parameter)
