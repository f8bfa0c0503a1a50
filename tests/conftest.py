"""What the tests share: the golden tensors of Meta's reference, and the tiny checkpoint."""

import json
import lzma
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama_vision import LlamaVision, Prompt
from llama_vision.cache import Cache
from llama_vision.image import TiledImage, tile_image
from llama_vision.model import LlamaVisionModel

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
CASES = (
    "image_first",
    "bos_image",
    "text_before",
    "two_images",
    "consecutive",
    "batch",
    "batch_ragged",
    "text_only",
)


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """Tensors of one packed file, such as `cases/batch` or `modules`."""
    return load(lzma.decompress((GOLDEN / f"{name}.safetensors.xz").read_bytes()))


@cache
def golden_json(name: str) -> dict:
    """One of `manifest`, `images`, `tokenizer`, `official/11b`, `official/90b`."""
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def case_prompts(case: str) -> list[Prompt]:
    """The prompts of one golden case."""
    tensors = golden_tensors(f"cases/{case}")
    return [
        Prompt(ids[:length].tolist(), [Image.open(GOLDEN / path) for path in sample["images"]])
        for ids, length, sample in zip(
            tensors["tokens"],
            tensors["lengths"],
            golden_json("manifest")["cases"][case]["samples"],
            strict=True,
        )
    ]


def case_images(case: str) -> list[list[TiledImage]]:
    """The tiled images of one golden case, for each sample."""
    return [
        [tile_image(image, tile_size=56, max_tiles=4) for image in prompt.images]
        for prompt in case_prompts(case)
    ]


def new_cache(model: LlamaVisionModel, batch: int, *, text: int = 64, images: int = 4) -> Cache:
    """A cache with room for `text` rows and `images` images of all tiles."""
    vision = model.config.vision
    return Cache(
        model.config.text,
        batch=batch,
        max_text_tokens=text,
        visual_capacity=images * vision.max_num_tiles * vision.tokens_per_tile,
        dtype=model.dtype,
    )


@torch.inference_mode()
def run_batch(
    model: LlamaVisionModel,
    token_ids: list[list[int]],
    images: list[list[TiledImage]],
    cache: Cache | None = None,
) -> list[Tensor]:
    """One pass over the next rows of each sample: the logits of those rows, without padding."""
    lengths = [len(ids) for ids in token_ids]
    padded = pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True)
    logits = model(padded, model.encode_images(images), lengths=lengths, cache=cache)
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


def assert_close(name: str, got: Tensor, want: Tensor, most: float) -> None:
    """Fail with the name and the place of the largest difference if it is above `most`."""
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, expected {list(want.shape)}"
    difference = (got.double() - want.double()).abs()
    worst = difference.max().item() if difference.numel() else 0.0
    place = torch.unravel_index(difference.argmax(), difference.shape) if worst else ()
    assert worst <= most, f"{name}: off by {worst:.2e} at {[int(i) for i in place]}, allowed {most}"


@pytest.fixture(scope="session")
def tiny() -> LlamaVision:
    """The tiny reference checkpoint, float32 on the CPU."""
    return LlamaVision.from_pretrained(TINY, device="cpu")
