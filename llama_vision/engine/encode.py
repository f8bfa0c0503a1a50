"""Pictures to visual tokens: the encoder and the projector, over one group of images at a time."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import VisionConfig
from llama_vision.inputs.image import TiledImage
from llama_vision.model.model import LlamaVisionModel

TOKENS_AT_ONCE = 8192
"""Most visual tokens that go through a layer together, which bounds what it takes in between.

A single image always goes as one through the encoder; one of the 11B, 6,432 tokens with padding,
keeps a GPU busy.
"""


def encode_group(
    model: LlamaVisionModel, images: Sequence[TiledImage], number: int = 0
) -> VisualTokens:
    """Encode and project a group of images; those of equally many tiles go together."""
    config = model.config.vision
    counts = [len(image.pixels) for image in images]
    starts = [0, *accumulate(counts)]
    features = None
    for some in _batches(counts, images_at_once(config)):
        pixels = torch.stack([images[i].pixels.to(model.device, model.dtype) for i in some])
        ids = torch.tensor([config.aspect_id(images[i].grid) for i in some], device=model.device)
        encoded = model.encode(pixels, ids)  # [N, t, P, D]
        if len(some) == len(images):
            features = encoded.flatten(0, 1)
            break
        if features is None:
            features = encoded.new_empty(sum(counts), *encoded.shape[2:])
        for i, of_image in zip(some, encoded, strict=True):
            features[starts[i] : starts[i + 1]] = of_image
    return VisualTokens.of_images(features, [image.grid for image in images], group=number)


def images_at_once(config: VisionConfig) -> int:
    """Images that the encoder takes together, which bounds its memory: one at least."""
    return max(1, TOKENS_AT_ONCE // (config.max_num_tiles * config.tokens_per_tile))


def _batches(counts: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of images that have equally many tiles, at most so many at once."""
    alike = defaultdict(list)
    for image, tiles in enumerate(counts):
        alike[tiles].append(image)
    for images in alike.values():
        for start in range(0, len(images), most):
            yield images[start : start + most]
