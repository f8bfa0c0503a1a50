"""The whole model: images and token ids in, logits out. It knows no files and no tokenizer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llama_vision.cache import Cache
from llama_vision.config import Config
from llama_vision.image import TiledImage
from llama_vision.pruning import Pruner
from llama_vision.text import TextDecoder
from llama_vision.vision import VisionEncoder
from llama_vision.visual import VisualTokens


class LlamaVisionModel(nn.Module):
    """Vision encoder, projector and text decoder."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = nn.Linear(config.vision.feature_size, config.text.hidden_size)
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
        flat = [image for sample in images for image in sample]
        if not flat:
            return None
        features: dict[int, Tensor] = {}
        for tiles in sorted({len(image.pixels) for image in flat}):
            places = [i for i, image in enumerate(flat) if len(image.pixels) == tiles]
            encoded = self._encode_same_size([flat[i] for i in places])
            features.update(zip(places, encoded, strict=True))
        in_order = (features[i] for i in range(len(flat)))
        return VisualTokens.of_images(
            [[next(in_order) for _ in sample] for sample in images],
            [[image.grid for image in sample] for sample in images],
        )

    def _encode_same_size(self, images: Sequence[TiledImage]) -> Tensor:
        """Images of t tiles each -> [N, t, P, D]."""
        pixels = torch.stack([image.pixels for image in images]).to(self.device, self.dtype)
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
        last_row_only: bool = False,
    ) -> Tensor:
        """Logits of the next S tokens of each sample.

        A pass begins a new group of images: `<|image|>` ids that follow each other directly belong
        in one pass.

        Args:
            token_ids: [B, S], padded on the right.
            visual: from `encode_images`, of the images whose ids are in `token_ids`. With a cache
                it is used up: its features are freed once the last block has read them.
            lengths: real tokens of each sample; S for all if not given.
            cache: what came before; receives these rows and is advanced by `lengths`.
            pruner: chooses among the visual tokens, see `llama_vision.pruning`.
            last_row_only: logits of each sample's last real row only.

        Returns:
            [B, S, vocabulary], or [B, vocabulary]; float32. Rows of padding mean nothing.
        """
        batch, rows = token_ids.shape
        lengths = [rows] * batch if lengths is None else lengths
        h = self.text(token_ids, lengths, visual, cache, pruner)
        if cache is not None:
            cache.advance(lengths)
        if last_row_only:
            last = torch.tensor([length - 1 for length in lengths], device=h.device)
            h = h[torch.arange(batch, device=h.device), last]  # [B, D]
        return self.text.logits(h)
