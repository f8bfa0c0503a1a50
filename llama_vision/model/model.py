"""The whole model: images and token ids in, logits out. It knows no files and no tokenizer."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.visual_tokens import TOKENS_AT_ONCE, VisualTokens
from llama_vision.config import Config, VisionConfig
from llama_vision.inputs.image import TiledImage
from llama_vision.model.layers import Linear
from llama_vision.model.text import TextDecoder
from llama_vision.model.vision import VisionEncoder


class LlamaVisionModel(nn.Module):
    """Vision encoder, projector and text decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = Linear(config.vision.feature_size, config.text.hidden_size)
        self.text = TextDecoder(config.text)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, and so of everything computed."""
        return self.projector.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projector.weight.device

    def encode_images(self, images: Sequence[Sequence[TiledImage]]) -> VisualTokens | None:
        """Encode and project every image of a batch.

        Args:
            images: for each sample its images, in the order of their tokens.

        Returns:
            The tokens of real tiles, [B, V, D] and where each sits; None if there is no image.
        """
        grids = [[image.grid for image in sample] for sample in images]
        if not any(grids):
            return None
        config = self.config.vision
        visual = VisualTokens.blank(
            grids, config.tokens_per_tile, self.projector.out_features, self.dtype, self.device
        )
        for places in _groups(grids, images_at_once(config)):
            features = self._encode_same_size([images[sample][i] for sample, i in places])
            for (sample, i), of_image in zip(places, features, strict=True):
                visual.fill(sample, i, of_image)
        return visual

    def _encode_same_size(self, images: Sequence[TiledImage]) -> Tensor:
        """Images of t tiles each -> [N, t, P, D]."""
        pixels = torch.stack([image.pixels.to(self.device, self.dtype) for image in images])
        aspect_ids = [self.config.vision.aspect_id(image.grid) for image in images]
        features = self.vision(pixels, torch.tensor(aspect_ids, device=self.device))
        return self.projector(features)

    def forward(
        self,
        token_ids: Tensor,
        visual: VisualTokens | None = None,
        *,
        lengths: Sequence[int] | None = None,
        cache: Cache | None = None,
        pruner: Pruner | None = None,
        prefill_chunk: int | None = None,
        last_row_only: bool = False,
    ) -> Tensor:
        """Logits of the next S tokens of each sample.

        A pass begins a new group of images: `<|image|>` ids that follow each other directly belong
        in one pass.

        Args:
            token_ids: [B, S], padded on the right; best on the host, where they are read.
            visual: from `encode_images`, of the images whose ids are in `token_ids`. With a cache
                it is used up: its features are freed once the last block has read them.
            lengths: real tokens of each sample; S for all if not given.
            cache: what came before; receives these rows and is advanced by `lengths`.
            pruner: chooses among the visual tokens, see `llama_vision.cache.pruning`.
            prefill_chunk: most rows, of all samples, that go through a block at once, which bounds
                the memory of long prompts; only with a cache. None for all of them.
            last_row_only: logits of each sample's last real row only.

        Returns:
            [B, S, vocabulary], or [B, vocabulary]; float32. Rows of padding mean nothing.
        """
        batch, rows = token_ids.shape
        lengths = [rows] * batch if lengths is None else lengths
        h = self.text(token_ids, lengths, visual, cache, pruner, prefill_chunk)
        if cache is not None:
            cache.advance(lengths)
        if last_row_only:
            last = torch.tensor([length - 1 for length in lengths], device=h.device)
            h = h[torch.arange(batch, device=h.device), last]  # [B, D]
        return self.text.logits(h)


def model_without_weights(config: Config) -> LlamaVisionModel:
    """The modules on torch's meta device: every parameter has its shape and no storage."""
    with torch.device("meta"), _Unfilled():
        return LlamaVisionModel(config)


class _Unfilled(TorchFunctionMode):
    """Modules built under it skip `torch.nn.init`: the checkpoint fills every parameter.

    On the meta device there is nothing to fill, and a random fill costs the import of a compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def images_at_once(config: VisionConfig) -> int:
    """Images that the encoder takes in one group, which bounds its memory: one at least.

    The tokens of a single image of the 11B keep a GPU busy; smaller models take more at once.
    """
    tokens = config.max_num_tiles * config.tokens_per_tile
    return max(1, TOKENS_AT_ONCE // tokens)


def _groups(
    grids: Sequence[Sequence[tuple[int, int]]], most: int
) -> Iterator[list[tuple[int, int]]]:
    """Images of equally many tiles, at most so many at once, each as (sample, number)."""
    by_tiles = defaultdict(list)
    for sample, row in enumerate(grids):
        for image, (rows, cols) in enumerate(row):
            by_tiles[rows * cols].append((sample, image))
    for places in by_tiles.values():
        for start in range(0, len(places), most):
            yield places[start : start + most]
