"""One argument's text as a value; ranges are checked where the value is used."""

import argparse
import os

from llama_vision.cache.rule import Rule
from llama_vision.cache.rules import COUNTED_RULES, TrimmedLlama
from llama_vision.errors import quote

SHOWN_RULES = {"trimmed": TrimmedLlama, **COUNTED_RULES}


def whole(argument: str) -> int:
    """A whole number; its range is checked where it is used."""
    try:
        return int(_plain(argument))
    except ValueError:  # more than 4,300 digits, too
        raise _unread(argument, "a whole number") from None


def real(argument: str) -> float:
    """A number; its range is checked where it is used."""
    try:
        return float(_plain(argument))
    except ValueError:
        raise _unread(argument, "a number") from None


def number(argument: str) -> int | float:
    """`800` is a count, `0.5` a fraction."""
    try:
        return whole(argument)
    except argparse.ArgumentTypeError:
        return real(argument)


def rule_names(argument: str) -> list[type[Rule]]:
    """Rules by name, with commas between them."""
    try:
        return [SHOWN_RULES[name] for name in argument.split(",")]
    except KeyError:
        raise _unread(argument, f"of {', '.join(SHOWN_RULES)}") from None


def text(argument: str) -> str:
    """A text that came as UTF-8; bytes that are none are in it as lone surrogates."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise _unread(argument, "a text in UTF-8") from None


def _plain(argument: str) -> str:
    """Digits of other scripts and `1_000`, which Python takes, are no numbers here."""
    if not argument.isascii() or "_" in argument:
        raise ValueError
    return argument


def _unread(argument: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"{quote(argument)} is not {expected}")
