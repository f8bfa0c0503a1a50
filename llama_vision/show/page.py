"""What a run kept, as one page that needs nothing beside itself: no network, no library.

The question and the answer may hold anything: they go into the page as JSON that ends no element,
and from there as text. A policy in the page lets it run its own script and load nothing.
"""

import base64
import hashlib
import html
import json
import struct
from importlib.resources import files
from string import Template
from typing import Any

from torch import Tensor

from llama_vision.drawing import palette
from llama_vision.drawing.notebook import data_uri
from llama_vision.drawing.panel import Picture
from llama_vision.show.kept import ROWS, Shown, ShownRule

LEVELS = 255
"""Steps of an attention share in the page: each byte is the square root of its part of the most."""


def make_page(shown: Shown) -> str:
    """The page as text."""
    folder = files(__package__)
    skeleton, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    return Template(skeleton).substitute(
        title=html.escape(shown.question),
        style=style,
        script=script,
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
        data=embedded_json(page_data(shown)),
    )


def _policy_hash(text: str) -> str:
    """What a Content-Security-Policy names an element's content by."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def embedded_json(value: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`, so that it can stand in an element of HTML."""
    escapes = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&"}
    return json.dumps(value, allow_nan=False).translate(escapes)


def page_data(shown: Shown) -> dict[str, Any]:
    """All that the page's script reads: plain values, and arrays as base64 of their bytes.

    `attention` are bytes [rows, blocks, H, V], see `LEVELS`, and `most` is what their largest
    stands for; `stands` are 32-bit integers [V], little-endian.
    """
    attention, most = zip(*(quantised(shown.attention[votes]) for votes in ROWS), strict=True)
    heads, tokens = shown.attention["all"].shape[1:]
    return {
        "question": shown.question,
        "answer": shown.answer,
        "tokens": tokens,
        "patches_per_side": shown.patches_per_side,
        "blocks": shown.blocks,
        "heads": heads,
        "rows": list(ROWS.values()),
        "attention": base64.b64encode(b"".join(attention)).decode(),
        "most": most,
        "pictures": [_picture_data(picture) for picture in shown.pictures],
        "rules": [_rule_data(rule) for rule in shown.rules],
        "heat": palette.HEAT,
        "clusters": palette.CLUSTERS,
        "veil": palette.VEIL,
        "merged": palette.MERGED,
        "dropped": palette.DROPPED,
    }


def _picture_data(picture: Picture) -> dict[str, Any]:
    rows, cols = picture.grid
    source = data_uri(picture.canvas)
    return {"rows": rows, "cols": cols, "start": picture.start, "source": source}


def _rule_data(rule: ShownRule) -> dict[str, Any]:
    stops = [{"setting": stop.setting, "stands": packed(stop.stands)} for stop in rule.stops]
    return {"name": rule.name, "chosen": rule.chosen, "stops": stops}


def quantised(shares: Tensor) -> tuple[bytes, list[list[float]]]:
    """Shares of attention [blocks, H, V] as bytes, and the most of each block and head."""
    most = shares.amax(-1, keepdim=True)
    parts = (shares / most.clamp(min=1e-30)).sqrt().mul(LEVELS).round()
    return bytes(parts.int().flatten().tolist()), most.squeeze(-1).tolist()


def packed(stands: Tensor) -> str:
    """Indices [V] as base64 of 32-bit integers, little-endian."""
    return base64.b64encode(struct.pack(f"<{len(stands)}i", *stands.tolist())).decode()
