"""The tiny checkpoint and a small picture, which most kinds hand in beside what is odd."""

import os
from functools import cache
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image

from llama_vision import LlamaVision, Prompt

torch.set_num_threads(1)  # processes are forked, which threads do not survive

TINY = Path(__file__).parents[2] / "tests" / "golden" / "tiny"
BOS, IMAGE = 500, 512
"""Token ids of the tiny checkpoint."""


@cache
def tiny() -> LlamaVision:
    """The tiny checkpoint, which has planned and answered once: the first time takes longer."""
    model = LlamaVision.from_pretrained(TINY, device="cpu")
    model.plan([prompt()])
    model.generate(prompt(), max_new_tokens=2, temperature=0.0)
    return model


@cache
def picture() -> Image.Image:
    """Of one tile."""
    return Image.linear_gradient("L").resize((40, 30)).convert("RGB")


def prompt(images: int = 1) -> Prompt:
    """So many pictures, and a few tokens."""
    return Prompt([IMAGE] * images + [BOS, 72, 105], [picture()] * images)
