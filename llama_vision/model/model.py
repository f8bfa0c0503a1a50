"""The whole model: what a checkpoint holds, in three parts. It knows no files and no tokenizer."""

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llama_vision.config import Config
from llama_vision.model.layers import Linear
from llama_vision.model.quantized import quantise_modules
from llama_vision.model.text import TextDecoder
from llama_vision.model.vision import VisionEncoder


class LlamaVisionModel(nn.Module):
    """Vision encoder, projector and text decoder.

    Images and text meet in the decoder's cross-attention blocks; `engine.prefill` runs a prompt
    through all of it, `engine.decode` the decoder alone.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = Linear(config.vision.feature_size, config.text.hidden_size)
        self.text = TextDecoder(config.text)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that are not quantised, and of everything computed."""
        return self.text.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.norm.weight.device

    def encode(self, pixels: Tensor, aspect_ids: Tensor) -> Tensor:
        """Visual tokens of N images with t real tiles each.

        Args:
            pixels: [N, t, 3, h, w], normalised.
            aspect_ids: [N], from `VisionConfig.aspect_id`.

        Returns:
            [N, t, P, D].
        """
        return self.projector(self.vision(pixels, aspect_ids))


def model_without_weights(config: Config) -> LlamaVisionModel:
    """The modules on torch's meta device: every parameter has its shape and no storage."""
    with torch.device("meta"), _Unfilled():
        model = LlamaVisionModel(config)
        if config.quantization is not None:
            quantise_modules(model, config.quantization, config.text.cross_attention_layers)
    return model


class _Unfilled(TorchFunctionMode):
    """Modules built under it skip `torch.nn.init`: the checkpoint fills every parameter.

    On the meta device there is nothing to fill, and a random fill costs the import of a compiler.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))
