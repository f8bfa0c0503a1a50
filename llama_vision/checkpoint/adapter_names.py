"""What peft calls the tensors of an adapter, and the proof that all of them are used."""

import re
from collections.abc import Iterator, Mapping

from llama_vision.checkpoint.adapter_json import Settings
from llama_vision.checkpoint.files import FLOATS, CheckpointError, Entry
from llama_vision.checkpoint.names import NAME_TABLE
from llama_vision.errors import printable

PEFT_PREFIX = "base_model.model."
LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?"  # the adapter's own name, which peft leaves out
    r"(?:\.(?P<leaf>weight|bias))?"
)
WRAPPED = re.compile(r"\.base_layer(?=\.)|\.modules_to_save(\.[^.]+)?(?=\.[^.]+$)")
PARTS = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "added",
    ("lora_embedding_A", None): "embedding A",
    ("lora_embedding_B", None): "embedding B",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
"""What the ends of names in the file mean."""


def find_parts(
    entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]], settings: Settings
) -> dict[str, dict[str, str]]:
    """The proof that all is used, and fits.

    Args:
        entries: what the adapter's file declares.
        shapes: of all parameters of the model, by our names.

    Returns:
        {our parameter: {part, of those in PARTS or "replacement": name in the file}}.

    Raises:
        CheckpointError: lists all that is of no use, does not fit, or lacks its other half.
    """
    found: dict[str, dict[str, str]] = {}
    problems: list[tuple[str, str]] = []
    for name, entry in entries.items():
        target, part = _meaning(name, settings)
        if target not in shapes:
            problems.append(("not of this model", name))
        elif part in found.get(target, {}):
            problems.append(("there twice", name))
        elif entry.dtype not in FLOATS:
            problems.append(("of an unsupported type", f"{name} ({entry.dtype})"))
        else:
            found.setdefault(target, {})[part] = name
            if not _fits(part, entry.shape, shapes[target]):
                has = f"{name} {list(entry.shape)} for {list(shapes[target])}"
                problems.append(("of another shape", has))
    for target in found:
        problems += _flaws(target, found, entries, settings)
    kinds: dict[str, list[str]] = {}
    for kind, what in problems:
        kinds.setdefault(kind, []).append(what)
    if kinds:
        told = "; ".join(f"{len(what)} {kind}: {_some(what)}" for kind, what in kinds.items())
        made_for = settings.base and f", made for {settings.base},"
        raise CheckpointError(f"the adapter{made_for} does not fit the model: {told}")
    return found


def _some(names: list[str]) -> str:
    """As `errors.some`, of names as long as peft's."""
    first, more = ", ".join(printable(name, 160) for name in names[:2]), len(names) - 2
    return first if more <= 0 else f"{first}, and {more} more"


def _meaning(name: str, settings: Settings) -> tuple[str, str]:
    """Our parameter that a tensor is for, and its part; of what peft would not read, neither."""
    plain = name.removeprefix(PEFT_PREFIX)
    lora = LORA_NAME.fullmatch(plain)
    if lora is None:
        return _our_name(WRAPPED.sub("", plain)), "replacement"
    part = PARTS.get((lora["part"], lora["leaf"]))
    if part is None or not {"added": settings.bias, "magnitude": settings.dora}.get(part, True):
        return "", ""
    leaf = "bias" if part == "added" else "weight"
    return _our_name(f"{lora['module']}.{leaf}"), part


def _our_name(name: str) -> str:
    """A name of either generation of official files, or ours, as our tree has it."""
    for ours, *theirs in NAME_TABLE:
        for prefix in theirs:
            if name.startswith(prefix):
                return ours + name[len(prefix) :]
    return name


def _fits(part: str, shape: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether a part has the right shape, but for the rank, for a parameter of the shape `base`."""
    rank_first, rank_last = shape[:1], shape[1:2]
    expected = {
        "replacement": base,
        "added": base,
        "magnitude": base[:1],
        "A": (*rank_first, *base[1:]),
        "B": (*base[:1], *rank_last, *(1 for _ in base[2:])),
        "embedding A": (*rank_first, *base[:1]),
        "embedding B": (*base[1:], *rank_last),
    }
    is_matrix = len(base) == 2 or (len(base) > 2 and part in ("A", "B"))
    return shape == expected[part] and (is_matrix or part in ("replacement", "added"))


def _flaws(
    target: str,
    found: Mapping[str, Mapping[str, str]],
    entries: Mapping[str, Entry],
    settings: Settings,
) -> Iterator[tuple[str, str]]:
    """What is wrong with the parts of one parameter together: kinds, and names in the file."""
    names = found[target]
    if "added" in names and "B" not in found.get(weight_beside(target), {}):
        yield "without the other half", names["added"]
    for half, other in (("A", "B"), ("embedding A", "embedding B")):
        if (half in names) != (other in names):
            yield "without the other half", names.get(half) or names[other]
        elif half in names:
            a, b = entries[names[half]].shape, entries[names[other]].shape
            rank = settings.rank_of(module_of(names[half])) or max(1, *a[:1], 1)
            if not a[:1] == b[1:2] == (rank,):
                yield "of another rank", f"{names[half]} {list(a)} and {list(b)} for rank {rank}"
            if settings.dora and (half != "A" or "magnitude" not in names):
                yield "without a lora_magnitude_vector that is supported", names[half]
    if "magnitude" in names and "A" not in names:
        yield "without the other half", names["magnitude"]


def weight_beside(bias: str) -> str:
    """The weight of the module that a bias is of."""
    return bias.removesuffix("bias") + "weight"


def module_of(name: str) -> str:
    """The module that a LoRA's tensor is for, by the name that the settings' patterns are for."""
    return LORA_NAME.fullmatch(name.removeprefix(PEFT_PREFIX))["module"]
