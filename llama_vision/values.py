"""What a setting may be: its kind and range, written once, beside its name.

A frozen dataclass writes them into its annotations and has `check_fields` look at all of them:

    max_new_tokens: Annotated[int, Whole(1)] = 256
    temperature: Annotated[float | None, Number(0)] = None

and a function has `check` look at one of its arguments.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Protocol, get_origin, get_type_hints

from llama_vision.errors import LlamaVisionError, SettingError, printable, quote

LARGEST = 2**63 - 1
"""The largest whole number that torch counts with."""


class Kind(Protocol):
    """What a value may be."""

    @property
    def expected(self) -> str:
        """The same in words, to go on from "expected"."""

    def read(self, value: Any) -> Any:
        """The value as plain Python.

        Raises:
            ValueError: it is of another kind, or out of range.
        """


@dataclass(frozen=True)
class Whole:
    """A whole number; True and False are none, nor is 1.0."""

    least: int = 0
    most: int = LARGEST
    means: str = ""
    """What to say beside the range."""

    @property
    def expected(self) -> str:
        """The range, in words."""
        upper = "or more" if self.most == LARGEST else f"to {self.most}"
        return f"{self.least} {upper}{self.means and ' '}{self.means}"

    def read(self, value: Any) -> int:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError
        if not self.least <= value <= self.most:
            raise ValueError
        return int(value)


@dataclass(frozen=True)
class Number:
    """A finite number, whole ones among them."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    """Whether `least` itself is out of range."""
    means: str = ""

    @property
    def expected(self) -> str:
        """The range, in words."""
        upper = "" if self.most == math.inf else f" and at most {self.most:g}"
        lower = f"more than {self.least:g}" if self.above else f"{self.least:g} or more"
        lower = "a finite number" if self.least == -math.inf else lower
        return f"{lower}{upper}{self.means and ' '}{self.means}"

    def read(self, value: Any) -> float:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError
        try:
            value = float(value)
        except OverflowError:
            raise ValueError from None
        low = value > self.least if self.above else value >= self.least
        if not low or not value <= self.most or not math.isfinite(value):
            raise ValueError
        return value


@dataclass(frozen=True)
class Flag:
    """True or False."""

    expected: str = "True or False"

    def read(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        """The words."""
        *others, last = map(repr, self.words)
        return f"{', '.join(others)} or {last}" if others else last

    def read(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or value not in self.words:
            raise ValueError
        return value


@dataclass(frozen=True)
class Text:
    """A text of at least one character."""

    expected: str = "a text"

    def read(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@dataclass(frozen=True)
class Function:
    """What can be called; a class is not, where one of it is meant."""

    expected: str = "a function"

    def read(self, value: Any) -> Any:
        """See `Kind`."""
        if not callable(value) or isinstance(value, type):
            raise ValueError
        return value


@dataclass(frozen=True)
class Instance:
    """An object of a class."""

    of: type
    expected: str

    def read(self, value: Any) -> Any:
        """See `Kind`."""
        if not isinstance(value, self.of):
            raise ValueError
        return value


@dataclass(frozen=True)
class ListOf:
    """Several values of one kind; texts and bytes are no lists."""

    each: Kind
    least: int = 0
    """How many at least."""
    ordered: bool = True
    """Whether their order matters, so that a set is none."""

    @property
    def expected(self) -> str:
        """The kind of each."""
        return f"a list, each of it {self.each.expected}"

    def read(self, value: Any) -> tuple:
        """See `Kind`."""
        is_list = isinstance(value, Sequence if self.ordered else (Sequence, Set))
        is_text = isinstance(value, (str, bytes, bytearray, memoryview))
        if not is_list or is_text or len(value) < self.least:
            raise ValueError
        return tuple(self.each.read(one) for one in value)


@dataclass(frozen=True)
class Either:
    """A value of the first kind that takes it."""

    kinds: tuple[Kind, ...]
    words: str = ""
    """What to say instead of the kinds' own words."""

    @property
    def expected(self) -> str:
        """All of them."""
        return self.words or ", or ".join(kind.expected for kind in self.kinds)

    def read(self, value: Any) -> Any:
        """See `Kind`."""
        for kind in self.kinds:
            try:
                return kind.read(value)
            except ValueError:
                continue
        raise ValueError


def check(
    name: str, value: Any, kind: Kind, *, error: type[LlamaVisionError] = SettingError
) -> Any:
    """The value, as plain Python.

    Raises:
        LlamaVisionError: of the kind `error`: says the name, what came, and what is expected.
    """
    try:
        return kind.read(value)
    except ValueError:
        raise error(f"{name} is {quote(value)}; expected {kind.expected}") from None


def check_flags(**flags: Any) -> None:
    """Raise SettingError for the first of some arguments, by name, that is not True or False."""
    for name, flag in flags.items():
        check(name, flag, Flag())


def check_names(what: str, given: Iterable[str], names: Sequence[str]) -> None:
    """Raise SettingError for a keyword that is none of `names`; says which one is near."""
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            expected = near[0] if near else f"one of {', '.join(names)}"
            raise SettingError(f"there is no {what} {printable(name)}; expected {expected}")


def check_fields(
    settings: Any,
    *,
    error: type[LlamaVisionError] = SettingError,
    errors: Mapping[str, type[LlamaVisionError]] = {},
) -> None:
    """Check all fields of a frozen dataclass whose annotation has a kind, and make them plain.

    None is taken where it is the field's default.

    Raises:
        LlamaVisionError: see `check`; of the kind that `errors` has for a field, else `error`.
    """
    for field, kind in _kinds(type(settings)):
        value = getattr(settings, field.name)
        if not (value is None and field.default is None):
            plain = check(field.name, value, kind, error=errors.get(field.name, error))
            object.__setattr__(settings, field.name, plain)


@cache
def _kinds(settings: type) -> list[tuple[dataclasses.Field, Kind]]:
    """The fields of a dataclass that have a kind; looking into annotations is slow."""
    hints = get_type_hints(settings, include_extras=True)
    fields = [
        field
        for field in dataclasses.fields(settings)
        if get_origin(hints[field.name]) is Annotated
    ]
    return [(field, hints[field.name].__metadata__[0]) for field in fields]
