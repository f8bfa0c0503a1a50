"""What official files call the tensors of the model, and the proof that all of them are used."""

from collections.abc import Mapping

from torch import nn

from llama_vision.checkpoint.files import FLOATS, CheckpointError, Entry
from llama_vision.errors import some

NAME_TABLE = (
    # ours               published in 2024                  newer files
    ("vision.", "vision_model.", "model.vision_model."),
    ("projector.", "multi_modal_projector.", "model.multi_modal_projector."),
    ("text.lm_head.", "language_model.lm_head.", "lm_head."),
    ("text.", "language_model.model.", "model.language_model."),
)
"""Prefixes of one module in our tree and in both generations of files; below it names are equal."""

DERIVED = tuple(
    f".rotary_emb.{buffer}"
    for buffer in ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
)
"""Ends of names that are not read: old savers wrote these buffers, and config.json gives them."""


def official_names(names: list[str], newer: bool = False) -> dict[str, str]:
    """What the tensors with our names are called in official files: {official: ours}."""
    table = {}
    for name in names:
        ours, *theirs = next(row for row in NAME_TABLE if name.startswith(row[0]))
        table[theirs[newer] + name[len(ours) :]] = name
    return table


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
        "unexpected": [
            name for name in entries if name not in names and not name.endswith(DERIVED)
        ],
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
    found = [f"{len(what)} {kind}: {some(what)}" for kind, what in problems.items() if what]
    if found:
        raise CheckpointError(
            "the weights are not those of the model in config.json: " + "; ".join(found)
        )
    return names
