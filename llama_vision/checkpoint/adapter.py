"""LoRA adapters, as peft writes them: what they add to the weights of a model while it is loaded.

A matrix W becomes W + s·BA, with s = alpha / r (or alpha / √r); other tensors of the file replace
those of the model. Every tensor of an adapter is used, or the adapter is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors
from torch import Tensor

from llama_vision.checkpoint.adapter_json import EXPECTED, WEIGHTS, Settings, read_settings
from llama_vision.checkpoint.adapter_names import find_parts, module_of, weight_beside
from llama_vision.checkpoint.files import CheckpointError, Entry, Reader, read_headers
from llama_vision.checkpoint.hub import explained, is_repo_id, snapshot, source_path
from llama_vision.checkpoint.unsupported import ADAPTER
from llama_vision.errors import printable, quote
from llama_vision.reading import is_there, shown


@dataclass
class Delta:
    """What an adapter makes of one parameter: replaced, added to, scaled, in this order."""

    name: str
    reader: Reader
    replacement: Entry | None = None
    left: Tensor | None = None
    """[N, r], and `right` [r, K], as stored; their product times `scaling` is added."""
    right: Tensor | None = None
    scaling: float = 1.0
    added: Tensor | None = None
    """[N], times `scaling`, of a bias."""
    magnitude: Tensor | None = None
    """[N]: the norms that the rows get at last (DoRA)."""

    def apply(
        self, rows: Tensor, start: int, stop: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Some rows [stop - start, …] of the model's parameter, float32, as they are to be.

        Args:
            columns: first and last but one of a matrix, where `rows` are those alone.

        Raises:
            CheckpointError: what replaces them is not finite or cannot be read; or DoRA is asked
                for some columns, while its norms are over all of them.
        """
        if self.replacement is not None:
            stored = self.reader.rows(self.replacement, start, stop, columns)
            rows = _finite(self.name, stored).to(rows, copy=True)
        if self.left is not None:
            right = self.right if columns is None else self.right[:, slice(*columns)]
            left, flat = self.left[start:stop].to(rows), rows.flatten(1)
            rows = torch.addmm(flat, left, right.to(rows), alpha=self.scaling).view(rows.shape)
        if self.added is not None:
            rows = rows + self.scaling * self.added[start:stop].to(rows)
        if self.magnitude is not None:
            if columns is not None:
                raise CheckpointError(
                    f"the adapter's {printable(self.name)} is of DoRA, which is not supported on "
                    "several devices; merge it with peft (merge_and_unload) and load what that "
                    "writes"
                )
            norms = rows.norm(dim=1, keepdim=True)
            rows = rows * (self.magnitude[start:stop].to(rows)[:, None] / norms)
        return rows


@dataclass(frozen=True)
class Adapter:
    """What to make of a model's parameters."""

    deltas: dict[str, Delta]
    """By the names of our parameters."""
    base: str = ""
    """The model that it was trained on, to show; nothing where it is not told."""

    def __str__(self) -> str:
        """As a phrase, such as `LoRA of rank 16 on 160 matrices, 32 tensors replaced`."""
        low_rank = [delta for delta in self.deltas.values() if delta.left is not None]
        replaced = sum(delta.replacement is not None for delta in self.deltas.values())
        ranks = ", ".join(str(rank) for rank in sorted({d.left.shape[1] for d in low_rank}))
        kind = "DoRA" if any(delta.magnitude is not None for delta in low_rank) else "LoRA"
        changed = f"{kind} of rank {ranks} on {len(low_rank)} matri{_end(low_rank)}"
        others = f"{replaced} tensor{'' if replaced == 1 else 's'} replaced"
        return ", ".join([changed] * bool(low_rank) + [others] * bool(replaced))


def _end(matrices: list) -> str:
    return "x" if len(matrices) == 1 else "ces"


def find_adapter(source: str | Path) -> Path:
    """The directory of an adapter.

    Args:
        source: a directory, or the id of a Hugging Face repository; see `find_checkpoint`. Of that
            `adapter_config.json` is fetched first, and the weights only if they can be used.

    Raises:
        CheckpointError: it is neither, cannot be had, or is not supported; says what to do.
    """
    try:
        directory = source_path(source)
    except CheckpointError:
        raise CheckpointError(f"adapter is {quote(source)}; expected {EXPECTED}") from None
    if not directory.is_dir():
        if directory.exists() or not is_repo_id(str(source)):
            what = "is a file" if directory.exists() else "does not exist"
            raise CheckpointError(f"adapter {shown(directory)} {what}; expected {EXPECTED}")
        directory = _fetch(str(source))
    read_settings(directory)
    _weights(directory)
    return directory


def _fetch(repo: str) -> Path:
    """The needed files of a repository, from the local cache or the hub."""
    try:
        cached = snapshot(repo, (ADAPTER, WEIGHTS), local_files_only=True)
        if is_there(cached / ADAPTER) and is_there(cached / WEIGHTS):
            return cached
    except hub_errors.LocalEntryNotFoundError:
        pass
    with explained(repo):
        read_settings(snapshot(repo, (ADAPTER,)))
        return snapshot(repo, (ADAPTER, WEIGHTS))


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS
    if not is_there(path):
        raise CheckpointError(
            f"{shown(directory)} has no {WEIGHTS}; an adapter_model.bin may run code when opened "
            "and is never loaded: save it as safetensors (peft: save_pretrained)"
        )
    return path


def read_adapter(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """What an adapter makes of a model.

    Args:
        directory: see `find_adapter`.
        shapes: of all parameters of the model, by our names, in full precision.

    Raises:
        CheckpointError: see `read_settings`; or a tensor of it is not used, does not fit the model
            or lacks its other half, holds what is not finite, or nothing is changed.
    """
    settings = read_settings(directory)
    path = _weights(directory)
    entries = read_headers([path])
    found = find_parts(entries, shapes, settings)
    if not found:
        raise CheckpointError(f"{shown(path)} holds no tensors: the adapter changes nothing")
    reader = Reader()
    deltas = {target: _delta(target, found, entries, reader, settings) for target in found}
    return Adapter(deltas, settings.base)


def _delta(
    target: str,
    found: Mapping[str, Mapping[str, str]],
    entries: Mapping[str, Entry],
    reader: Reader,
    settings: Settings,
) -> Delta:
    """Read the parts of one parameter; what replaces it is left in the file."""
    names = found[target]
    parts = {
        part: _finite(name, reader.whole(entries[name]))
        for part, name in names.items()
        if part != "replacement"
    }
    delta = Delta(target, reader, entries.get(names.get("replacement", "")))
    delta.added, delta.magnitude = parts.get("added"), parts.get("magnitude")
    if "A" in parts:
        delta.left, delta.right = parts["B"].flatten(1), parts["A"].flatten(1)
    if "embedding A" in parts:
        delta.left, delta.right = parts["embedding A"].T, parts["embedding B"].T
    if "added" in names:
        names = found[weight_beside(target)]
    if half := names.get("A") or names.get("embedding A"):
        delta.scaling = settings.scaling_of(module_of(half), entries[half].shape[0])
    return delta


def _finite(name: str, tensor: Tensor) -> Tensor:
    """The same tensor; raises CheckpointError where it holds what is no finite number."""
    if not tensor.isfinite().all():
        raise CheckpointError(
            f"{printable(name, 200)} of the adapter is not finite: the file is damaged, or its "
            "training failed; take another"
        )
    return tensor
