"""What official files call the tensors of the model, and the proof that all of them are used."""

from collections.abc import Mapping
from typing import Any

from llama_vision.checkpoint.files import CheckpointError, Entry, Reader
from llama_vision.checkpoint.layouts import (
    DAMAGED,
    MISSHAPEN,
    MISSING,
    STRANGE,
    Misfit,
    belonging,
    find_stored,
)
from llama_vision.checkpoint.stored import Stored
from llama_vision.errors import printable, some
from llama_vision.reading import LONGEST_PATH

KINDS = (MISSING, "unexpected", MISSHAPEN, STRANGE, DAMAGED)
"""What may be wrong with tensors, in the order that it is told in."""

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


def match_names(expected: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Stored]:
    """The proof: every tensor is used once, every parameter filled once, all shapes are equal.

    Args:
        expected: a parameter, or its shape, by its name in the model.
        entries: all tensors of the files.

    Returns:
        How each parameter is stored, by its name in the model.

    Raises:
        CheckpointError: lists all that is missing, unexpected, misshapen, of a strange type or
            damaged.
    """
    newer = any(name.startswith("model.") for name in entries)
    problems: dict[str, list[str]] = {kind: [] for kind in KINDS}
    reader, found, used = Reader(), {}, set()
    for name, ours in official_names(list(expected), newer).items():
        shape = getattr(expected[ours], "shape", expected[ours])
        try:
            found[ours] = find_stored(name, tuple(shape), entries, reader)
            used.update(found[ours].names)
        except Misfit as misfit:
            problems[misfit.kind].append(misfit.text)
            used.update(belonging(name, entries))
    problems["unexpected"] = [
        name for name in entries if name not in used and not name.endswith(DERIVED)
    ]
    said = [f"{len(what)} {kind}: {_some(what)}" for kind, what in problems.items() if what]
    if said:
        raise CheckpointError(
            "the weights are not those of the model in config.json: " + "; ".join(said)
        )
    return found


def _some(what: list[str]) -> str:
    """The first of them; one alone at length."""
    return printable(what[0], LONGEST_PATH) if len(what) == 1 else some(what)
