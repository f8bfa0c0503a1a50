"""What a notebook shows of an object: HTML that loads nothing and takes no text for markup."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from math import isqrt

from PIL import Image
from torch import Tensor

from llama_vision.drawing.panel import DROPPED, Panel, Picture, counted, pictures_of, stands_of
from llama_vision.inputs.image import TiledImage

NO_FORMULAS = "tex2jax_ignore mathjax_ignore"
"""Classes of an element in which a notebook takes dollar signs for what they are."""
LONGEST_SIDE = 448
"""Pixels of a picture's longer side."""


def answer_html(
    text: str,
    counts: str,
    images: Iterable[TiledImage],
    kept: Sequence[Tensor],
    stands: Sequence[Tensor],
    groups: Sequence[int],
) -> str:
    """An answer: its text, its counts, and its pictures with what was not kept of them dimmed.

    Args:
        counts: a line below the text.
        images: one for each of `kept`.
        kept, stands, groups: see `stands_of`.
    """
    figures = ""
    if kept:
        who = stands_of(kept, stands, groups)
        pictures = pictures_of(images, kept[0].shape[-1])
        pairs = zip(pictures, kept, strict=True)
        figures = "".join(_figure(picture, mask, who) for picture, mask in pairs)
    return (
        f'<div class="{NO_FORMULAS}"><p style="white-space: pre-wrap">{html.escape(text)}</p>'
        f"<p><small>{html.escape(counts)}</small></p>{figures}</div>"
    )


def _figure(picture: Picture, kept: Tensor, stands: Tensor) -> str:
    """A picture [t, P] of tokens, and in words how many of them are kept."""
    panel = Panel(picture, isqrt(kept.shape[-1] - 1), LONGEST_SIDE)
    panel.veil_dropped(stands)
    own = stands[picture.start :][: kept.numel()][~kept.flatten()]
    fates = ["merged into others"] * bool((own >= 0).any())
    fates += ["dropped"] * bool((own == DROPPED).any())
    caption = f"kept {counted(kept)}" + f"; dimmed: {' or '.join(fates)}" * bool(fates)
    return (
        '<figure style="display: inline-block; margin: 0 1em 1em 0">'
        f'<img src="{data_uri(panel.image)}" alt="{caption}">'
        f"<figcaption><small>{caption}</small></figcaption></figure>"
    )


def table_html(rows: Iterable[Sequence[str]]) -> str:
    """A table: names on the left, indented as far as they begin with blanks; the rest on the right.

    What is not indented stands out.
    """
    lines = []
    for name, *values in rows:
        depth = len(name) - len(name.lstrip())
        cell = "td" if depth else "th"
        style = f"text-align: left; padding-left: {depth / 2 + 0.5:g}em"
        cells = [f'<{cell} style="{style}">{html.escape(name.strip())}</{cell}>']
        for value in values:
            cells.append(f'<{cell} style="text-align: right">{html.escape(value)}</{cell}>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="{NO_FORMULAS}">{"".join(lines)}</table>'


def data_uri(image: Image.Image) -> str:
    """A picture as text, exact."""
    png = io.BytesIO()
    image.save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
