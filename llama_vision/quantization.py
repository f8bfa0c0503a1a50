"""Which weights are kept as integers of 8 or 4 bits: the matrices that a forward multiplies by.

Norms, embeddings, biases and gates are few and stay as they are. The activations are bfloat16: only
the weights are quantised ("weight-only").
"""

from dataclasses import dataclass, replace

from llama_vision.errors import SettingError, quote

GROUPS = (32, 64, 128, 256)
"""Weights of a row that share one scale in int4: what torch's products take."""


@dataclass(frozen=True)
class Format:
    """What one matrix is kept as.

    int8: each output channel has one scale. int4: each `group` of its weights has one.
    """

    bits: int
    group: int = 0

    def __post_init__(self) -> None:
        whole = type(self.bits) is int and type(self.group) is int
        if not whole or (self.bits, self.group) not in {(8, 0), *((4, size) for size in GROUPS)}:
            raise SettingError(
                f"a format of {quote(self.bits)} bits in groups of {quote(self.group)}; expected "
                f"8 and 0, or 4 and one of {GROUPS}"
            )

    def __str__(self) -> str:
        return f"int{self.bits}" + (f" in groups of {self.group}" if self.group else "")


INT8, INT4 = Format(8), Format(4, 128)
FORMATS = {"int8": INT8, "int4": INT4}

PARTS = ("text", "cross", "vision", "projector", "head")
"""Parts of the model that have a format each: the decoder's self-attention blocks, its
cross-attention blocks, the vision encoder, the projector, and the decoder's head."""


@dataclass(frozen=True)
class Quantization:
    """The format of each of `PARTS`; None where its matrices stay as they are."""

    text: Format | None = None
    cross: Format | None = None
    vision: Format | None = None
    projector: Format | None = None
    head: Format | None = None
    exceptions: tuple[tuple[str, Format | None], ...] = ()
    """Single matrices, by the name of their module, that are kept otherwise than their part."""
    stored: bool = False
    """Whether the checkpoint's own matrices are of these formats, and so are read as they are."""

    def __post_init__(self) -> None:
        for part in PARTS:
            if not isinstance(form := getattr(self, part), Format | None):
                raise SettingError(
                    f"{part} is {quote(form)}; expected a Format or None, see choose_quantization"
                )

    def __str__(self) -> str:
        """As a phrase, such as `int4 in groups of 128 (text, cross)`."""
        found: dict[Format, list[str]] = {}
        for part in PARTS:
            if (form := getattr(self, part)) is not None:
                found.setdefault(form, []).append(part)
        return "; ".join(f"{form} ({', '.join(parts)})" for form, parts in found.items())

    @property
    def forms(self) -> set[Format]:
        """All that there are."""
        every = [getattr(self, part) for part in PARTS] + [form for _, form in self.exceptions]
        return {form for form in every if form is not None}

    def form_of(self, module: str, cross_layers: tuple[int, ...]) -> Format | None:
        """Of one matrix, by the name of its module."""
        for name, form in self.exceptions:
            if name == module:
                return form
        return getattr(self, part_of(module, cross_layers))

    def without_exceptions(self) -> "Quantization":
        """The formats of the parts alone."""
        return replace(self, exceptions=())


def nearest_int4(group: int) -> Format:
    """The int4 that has groups of `group` weights without loss; if there is none, the finest.

    A scale of more weights than a group of ours is that of several of them.
    """
    return Format(4, max((size for size in GROUPS if group % size == 0), default=GROUPS[0]))


def part_of(module: str, cross_layers: tuple[int, ...]) -> str:
    """The part that a matrix belongs to, by the name of its module in our tree."""
    top, *below = module.split(".")
    if top == "text" and below[0] == "layers":
        return "cross" if int(below[1]) in cross_layers else "text"
    return "head" if top == "text" else top


def choose_quantization(
    name: str, *, everything: bool = False, group: int = INT4.group, cross: str | None = None
) -> Quantization:
    """What `--quantize` and its companions ask for.

    Args:
        name: int8 or int4, of the matrices of the decoder's blocks.
        everything: the vision encoder, the projector and the head too, in int8.
        group: of int4, one of `GROUPS`.
        cross: the same as `name` for the cross-attention blocks alone, which lose the most by few
            bits; None for `name`.

    Raises:
        SettingError: a name or a group that there is not.
    """
    for given in (name, cross):
        if given not in (*FORMATS, None) or name is None:
            names = " or ".join(FORMATS)
            raise SettingError(f"quantize is {quote(given)}; expected {names}")
    if type(group) is not int or group not in GROUPS:
        raise SettingError(f"quantize_group is {quote(group)}; expected one of {GROUPS}")
    forms = {"int8": INT8, "int4": Format(4, group)}
    rest = INT8 if everything else None
    return Quantization(forms[name], forms[cross or name], rest, rest, rest)
