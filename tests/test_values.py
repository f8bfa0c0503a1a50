"""Kinds and ranges of settings, and how a message quotes what came instead."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

import numpy as np
import pytest
import torch

from llama_vision.errors import LlamaVisionError, SettingError, printable, quote, some
from llama_vision.values import (
    Choice,
    Either,
    Flag,
    Function,
    ListOf,
    Number,
    Text,
    Whole,
    check,
    check_fields,
)

NAN, INF = float("nan"), float("inf")
ODD = [
    "x",
    "1",
    b"1",
    None,
    [],
    [1],
    {},
    True,
    False,
    NAN,
    INF,
    -INF,
    10**30,
    -1,
    1j,
    int,
]


class Unwritable:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("kind", "good", "bad", "expected"),
    [
        (Whole(1), [1, 2**63 - 1, np.int64(7)], [0, 1.0, np.True_, 2**63], "1 or more"),
        (Whole(1, 4), [1, 4], [0, 5, *ODD], "1 to 4"),
        (Whole(0, means="(no limit)"), [0], ["0"], "0 or more (no limit)"),
        (Number(0, 1, above=True), [1, np.float32(0.5)], [0, 1.1], "more than 0 and at most 1"),
        (Number(0), [0, 0.0, Fraction(1, 2)], [-0.1, 10**400, NAN, INF, "0", None], "0 or more"),
        (Number(), [-1e300, 0], [NAN, INF, -INF, True, "x", 10**400], "a finite number"),
        (Flag(), [True, False], [0, 1, "yes", None, np.True_], "True or False"),
        (Choice(("a", "b")), ["a", "b"], ["c", None, 1, ["a"]], "'a' or 'b'"),
        (Text(), ["a"], ["", b"a", None, 1], "a text"),
        (Function(), [print], [int, "print", None, 3], "a function"),
        (ListOf(Whole(0)), [[], (1, 2)], ["12", b"12", [-1], [None], 3, None, {3}], "a list"),
        (ListOf(Whole(0), ordered=False), [[1], {3}], ["12", memoryview(b"12")], "a list"),
        (Either((Whole(1), Text())), [1, "a"], [0, "", None], "1 or more, or a text"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_kind_takes_what_it_says_and_refuses_all_else(kind, good, bad, expected):
    for value in good:
        plain = check("name", value, kind)
        assert plain == (tuple(value) if isinstance(value, (list, set)) else value)
        assert type(plain).__module__ == "builtins"
    for value in bad:
        with pytest.raises(SettingError) as error:
            check("name", value, kind)
        assert str(error.value).startswith("name is "), value
        assert f"; expected {expected}" in str(error.value)


@pytest.mark.parametrize("value", ODD, ids=quote)
@pytest.mark.parametrize(
    "kind", [Whole(2, 3), Number(2, 3), Choice(("a",)), ListOf(Number(5, 6), least=1)], ids=repr
)
def test_odd_values_are_refused_by_every_kind(kind, value):
    with pytest.raises(LlamaVisionError):
        check("name", value, kind)


def test_fields_are_checked_by_their_annotation_and_made_plain():
    @dataclass(frozen=True)
    class Some:
        free: object = None
        count: Annotated[int, Whole(1)] = 5
        share: Annotated[float | None, Number(0, 1)] = None
        ids: Annotated[tuple, ListOf(Whole(0))] = ()

        def __post_init__(self):
            check_fields(self)

    plain = Some("anything", np.int32(3), np.float32(0.5), [1, 2])
    assert plain == Some("anything", 3, 0.5, (1, 2))
    assert [type(v) for v in (plain.count, plain.share, plain.ids)] == [int, float, tuple]
    assert Some().share is None  # its default, and so taken
    for name, value in (("count", None), ("share", "x"), ("ids", [-1]), ("ids", None)):
        with pytest.raises(SettingError, match=f"{name} is "):
            Some(**{name: value})


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("a\x1b[2Jb\n\r\x00", r"'a\x1b[2Jb\n\r\x00'"),
        ("a\udcff\u202eb", r"'a\udcff\u202eb'"),
        ("Grüße 你好", "'Grüße 你好'"),
        (torch.zeros(3, 10**3), "a Tensor torch.float32 [3, 1000]"),
        (np.zeros((2, 2), np.uint8), "a ndarray uint8 [2, 2]"),
        (Unwritable(), "Unwritable"),
        (10**5000, "a value of type int"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quote_is_one_printable_line(value, quoted):
    assert quoted in quote(value)


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, b"\x00" * 10**6, list(range(10**6)), {"a" * 10**5: ["b" * 10**5] * 10}, 10**200],
    ids=lambda value: type(value).__name__,
)
def test_a_quote_is_short_whatever_it_quotes(value):
    assert 20 < len(quote(value)) <= 80
    assert quote(value).isprintable()
    assert len(quote(value, 30)) <= 30


def test_an_error_is_one_short_printable_line():
    assert str(LlamaVisionError("a\x1b]0;b\x07\nc")) == r"a\x1b]0;b\x07\nc"
    assert len(str(LlamaVisionError("x" * 10**6))) == 600
    assert printable("abcdef", 4) == "abc…"
    assert some(["a", "b\n", "c" * 100, "d", "e"]) == rf"a, b\n, {'c' * 79}…, and 2 more"
