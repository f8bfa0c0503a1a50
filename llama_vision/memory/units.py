"""Bytes for people."""

import re

from llama_vision.errors import SettingError, quote
from llama_vision.values import Whole

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def human_bytes(size: float) -> str:
    """Bytes in the unit that keeps the number below 1024."""
    unit = max((u for u in UNITS if UNITS[u] <= max(1, size)), key=UNITS.get)
    digits = {"B": 0, "KiB": 1, "MiB": 1}.get(unit, 2)
    return f"{size / UNITS[unit]:.{digits}f} {unit}"


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `512M` or a number of bytes.

    Raises:
        SettingError: something else.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
    try:
        number, prefix, binary, unit = match.groups()
        decimal = unit and not binary  # 24 GB are 24 · 10⁹; 24G is what people mean by 24 GiB
        power = " KMGT".index(prefix.upper() or " ")
        return Whole(0).read(int(float(number) * (1000 if decimal else 1024) ** power))
    except (AttributeError, ValueError, OverflowError, TypeError):
        raise SettingError(
            f"{quote(text)} is no size; expected one such as 24GiB or 800MB"
        ) from None
