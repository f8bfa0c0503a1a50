"""The errors that all of the package shares, and how a message quotes what came in.

A message is one line, has no character that a terminal would act on, and is never long, whatever it
quotes: what comes in at a door may be a whole file, or written to harm.
"""

import reprlib

LONGEST_MESSAGE = 600
LONGEST_QUOTE = 80
"""Characters of a message, and of one value, name or path that it quotes."""


class LlamaVisionError(ValueError):
    """Bad input at one of the package's doors: what came, what was expected, what to do."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message, LONGEST_MESSAGE))


class SettingError(LlamaVisionError):
    """A setting out of its range: a device, type, length or sampling number that cannot be had."""


def printable(text: object, most: int = LONGEST_QUOTE) -> str:
    r"""A text with all that is not printable as `\x1b`, `\n`, `\udcff`, cut to `most` characters.

    That takes in control characters, line ends, direction marks and lone surrogates.
    """
    text = str(text)
    escaped = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1])
    return escaped if len(escaped) <= most else escaped[: most - 1] + "…"


def quote(value: object, most: int = LONGEST_QUOTE) -> str:
    """A value as Python would write it, on one line of at most `most` characters.

    Of what has a shape (a tensor, an array) kind, type and shape; of what cannot be written, or is
    no plain value and writes itself at length, the kind.
    """
    kind = type(value).__name__
    try:
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return printable(f"a {kind} {value.dtype} {list(value.shape)}", most)
        return printable(_brief(most).repr(value), most)
    except Exception:  # a repr may raise anything; an integer of 5,000 digits does
        return printable(f"a value of type {kind}", most)


def _brief(most: int) -> reprlib.Repr:
    """What looks at the first parts of a value only, however large it is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = most
    return brief


def name_of(function: object) -> str:
    """The name of what can be called: a function's own, or that of an object's class."""
    return printable(getattr(function, "__name__", type(function).__name__))


def some(names: list[str], most: int = 3) -> str:
    """The first of them, for a message, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
