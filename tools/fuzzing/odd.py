"""Values that nobody should hand in, and rules that say for some settings which are right."""

import math
import types
from collections.abc import Callable, Sequence
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy
import torch

from fuzzing.judge import Expected


class Level(IntEnum):
    """A whole number with a name."""

    ONE = 1


class Silent:
    """What cannot be written."""

    def __repr__(self):
        raise RuntimeError("no words")


class Prickly:
    """What raises whatever is done to it."""

    def _raise(self, *_: Any):
        raise RuntimeError("do not touch")

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __len__ = __iter__ = _raise
    __hash__ = __index__ = __int__ = __float__ = __getitem__ = _raise


class Loud:
    """What writes itself at length, with what a terminal acts on."""

    def __repr__(self):
        return "\x1b]0;title\x07\n" * 1000

    __str__ = __repr__


class Deep(int):
    """A whole number that writes itself as something else."""

    def __repr__(self):
        return "\x1b[31mred"


def _circle() -> list:
    circle: list = []
    circle.append(circle)
    return circle


def _nested() -> list:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    return nested


VALUES: dict[str, Callable[[], Any]] = {
    **{
        repr(value): (lambda value=value: value)
        for value in (
            *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**63, 10**30, -(10**30)),
            *(0.0, -0.0, 0.5, 1.0, 1.5, -1.0, math.nan, math.inf, -math.inf, 1e308, 5e-324, 1j),
            *("", "1", "x", "auto", "cpu", "all", "top-k", "\x1b[31m", "a\nb", "\ud800", "\u202ex"),
            *("\0", "~", "../..", "/dev/null", "%s", b"", b"1", b"\xff"),
            *((), (1,), range(3), Decimal("1"), Decimal("NaN"), Fraction(1, 2), Ellipsis),
        )
    },
    "10**5000": lambda: 10**5000,
    "a long text": lambda: "x\x1b" * 10**6,
    "bytearray": lambda: bytearray(b"1"),
    "memoryview": lambda: memoryview(b"1"),
    "[]": list,
    "[1]": lambda: [1],
    "[None]": lambda: [None],
    "[1.5]": lambda: [1.5],
    "[-1]": lambda: [-1],
    "[True]": lambda: [True],
    "['x']": lambda: ["x"],
    "[10**30]": lambda: [10**30],
    "[[1]]": lambda: [[1]],
    "a list in itself": _circle,
    "100,000 lists": _nested,
    "{1}": lambda: {1},
    "{}": dict,
    "{'a': 1}": lambda: {"a": 1},
    "an object": object,
    "Silent()": Silent,
    "Prickly()": Prickly,
    "Loud()": Loud,
    "Deep(1)": lambda: Deep(1),
    "Level.ONE": lambda: Level.ONE,
    "int": lambda: int,
    "Loud": lambda: Loud,
    "an exception": lambda: ValueError("\x1b[31m"),
    "a lambda": lambda: lambda *_, **__: None,
    "a generator": lambda: (i for i in range(3)),
    "a module": lambda: types,
    "Path('x')": lambda: Path("x"),
    "Path('\\x1b\\n')": lambda: Path("\x1b\n"),
    "tensor(1)": lambda: torch.tensor(1),
    "tensor([1.0, 2.0])": lambda: torch.tensor([1.0, 2.0]),
    "tensor(True)": lambda: torch.tensor(True),
    "a meta tensor": lambda: torch.empty(3, device="meta"),
    "torch.float16": lambda: torch.float16,
    "torch.int8": lambda: torch.int8,
    "torch.device": lambda: torch.device("cpu"),
    "int64(1)": lambda: numpy.int64(1),
    "float32(0.5)": lambda: numpy.float32(0.5),
    "float64(nan)": lambda: numpy.float64("nan"),
    "bool_(True)": lambda: numpy.bool_(True),
    "array([1])": lambda: numpy.array([1]),
    "array of objects": lambda: numpy.array([None, "x"], dtype=object),
}

Rule = Callable[[Any], Expected]
"""Says how a value must end."""


def _said(right: bool) -> Expected:
    return "taken" if right else "refused"


def whole(least: int = 0, most: int = 2**63 - 1, *, none: bool = False) -> Rule:
    """Whole numbers of a range are right."""

    def rule(value: Any) -> Expected:
        if value is None:
            return _said(none)
        is_whole = isinstance(value, Integral) and not isinstance(value, (bool, numpy.bool_))
        return _said(is_whole and least <= value <= most)

    return rule


def number(
    least: float, most: float = math.inf, *, above: bool = False, none: bool = False
) -> Rule:
    """Finite numbers of a range are right."""

    def rule(value: Any) -> Expected:
        if value is None:
            return _said(none)
        if isinstance(value, (bool, numpy.bool_)) or not isinstance(value, Real):
            return "refused"
        if isinstance(value, Integral) and abs(value) > 10**300:
            return "refused"
        low = value > least if above else value >= least
        return _said(low and value <= most and math.isfinite(value))

    return rule


def flag(value: Any) -> Expected:
    """True and False are right."""
    return _said(isinstance(value, bool))


def choice(*words: str) -> Rule:
    """These texts are right."""
    return lambda value: _said(isinstance(value, str) and value in words)


def of_types(*types: type, none: bool = False) -> Rule:
    """Others are wrong; whether these are right is not known here."""
    return lambda value: (
        "either" if isinstance(value, types) or (none and value is None) else "refused"
    )


def function_or_none(value: Any) -> Expected:
    """What can be called may be right; classes are not."""
    return "taken" if value is None else _may(callable(value) and not isinstance(value, type))


def fraction_or_count(value: Any) -> Expected:
    """A fraction above 0 and at most 1, a whole number from 1 on, or None."""
    if isinstance(value, Integral):
        return whole(1)(value)
    return number(0, 1, above=True, none=True)(value)


def _may(possible: bool) -> Expected:
    return "either" if possible else "refused"


def unless_refused(rule: Rule) -> Rule:
    """What the rule takes may be refused for another reason, such as the model's own limits."""
    return lambda value: _may(rule(value) != "refused")


def numbers_or_none(value: Any) -> Expected:
    """A list or set of whole numbers from 0 on may be right."""
    if value is None:
        return "taken"
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return "refused"
    if not isinstance(value, (Sequence, set, frozenset)):
        return _may(False)
    return _may(all(whole()(one) == "taken" for one in value))
