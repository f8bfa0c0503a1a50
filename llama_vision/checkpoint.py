"""Official safetensors into modules: where they are, a name table, and a proof."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError, safe_open
from torch import nn

from llama_vision.config import DTYPES, Config, LlamaVisionError, SettingError
from llama_vision.model import LlamaVisionModel

NAME_TABLE = (
    # ours               published in 2024                  newer files
    ("vision.", "vision_model.", "model.vision_model."),
    ("projector.", "multi_modal_projector.", "model.multi_modal_projector."),
    ("text.lm_head.", "language_model.lm_head.", "lm_head."),
    ("text.", "language_model.model.", "model.language_model."),
)
"""Prefixes of one module in our tree and in both generations of files; below it names are equal."""

NEEDED_FILES = ("*.json", "tokenizer.model", "*.safetensors")
UNNEEDED_FILES = ("original/*",)
FLOATS = ("F64", "F32", "F16", "BF16")


class CheckpointError(LlamaVisionError):
    """Files that are missing, damaged, or not those of the model that config.json describes."""


class Entry(NamedTuple):
    """One tensor as a shard's header declares it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str


def official_names(names: list[str], newer: bool = False) -> dict[str, str]:
    """What the tensors with our names are called in official files: {official: ours}."""
    table = {}
    for name in names:
        ours, *theirs = next(row for row in NAME_TABLE if name.startswith(row[0]))
        table[theirs[newer] + name[len(ours) :]] = name
    return table


def choose_device(name: str) -> torch.device:
    """The device for "auto" or for a torch device string.

    Raises:
        SettingError: no such kind of device, or none of it on this machine.
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
            local cache first and then downloaded (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN
            are respected; of the files only those needed are fetched).

    Raises:
        CheckpointError: neither, or the repository cannot be had; says what to do.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        return directory
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) or str(source).startswith("."):
        what = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(
            f"model {source} {what}; expected a directory with config.json and *.safetensors, "
            "or a repository id such as meta-llama/Llama-3.2-11B-Vision-Instruct"
        )
    try:
        cached = Path(_snapshot(str(source), local_files_only=True))
        if _is_complete(cached):
            return cached
    except hub_errors.LocalEntryNotFoundError:
        pass
    return _download(str(source))


def _snapshot(repo: str, local_files_only: bool = False) -> str:
    return snapshot_download(
        repo,
        allow_patterns=list(NEEDED_FILES),
        ignore_patterns=list(UNNEEDED_FILES),
        local_files_only=local_files_only,
    )


def _is_complete(directory: Path) -> bool:
    try:
        return (directory / "config.json").is_file() and bool(find_shards(directory))
    except CheckpointError:
        return False


def _download(repo: str) -> Path:
    try:
        return Path(_snapshot(repo))
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated and this account may not read it; accept the licence on its page, "
            "then set HF_TOKEN (or run `hf auth login`), or pass a directory with the files"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"no repository {repo}, or no right to see it; check the name, set HF_TOKEN if it is "
            "private, or pass a directory"
        ) from None
    except (OSError, hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError) as error:
        raise CheckpointError(
            f"{repo} is not in the local cache and cannot be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the network and HF_HUB_OFFLINE, or pass a directory with the files"
        ) from None


def find_shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or the only one.

    Raises:
        CheckpointError: there are none, or one that the index lists is missing.
    """
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, AttributeError, TypeError) as error:
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
        try:
            with safe_open(shard, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_slice(name)
                    if name in entries:
                        raise CheckpointError(
                            f"{name} is in both {entries[name].shard.name} and {shard.name}"
                        )
                    entries[name] = Entry(shard, tuple(tensor.get_shape()), tensor.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} is damaged or cut short ({error}; {shard.stat().st_size:,} bytes); "
                "fetch it again"
            ) from None
    return entries


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
        "not floating point": [
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

    On a CPU, tensors that need no conversion stay views of the mapped file: no copy at all.

    Raises:
        CheckpointError: see `find_shards`, `read_headers`, `match_names`.
    """
    with torch.device("meta"):
        model = LlamaVisionModel(config)
    entries = read_headers(find_shards(directory))
    names = match_names(dict(model.named_parameters()), entries)
    # Largest first would show progress best, but one shard after the other reads the disk in order.
    with tqdm(total=len(names), desc="loading", unit="tensor", disable=None, leave=False) as bar:
        for name in sorted(names, key=lambda name: entries[name].shard):
            # A file is opened anew for each tensor: closing it gives back the pages it had mapped.
            with safe_open(entries[name].shard, framework="pt", device=str(device)) as file:
                _fill(model, names[name], file.get_tensor(name).to(dtype))
            bar.update()
    return model.eval()


def _fill(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module_name, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    setattr(model.get_submodule(module_name), leaf, parameter)
