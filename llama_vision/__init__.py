"""Llama-3.2-Vision in pure PyTorch, exact and readable.

Read in this order: config; then model/ (layers, vision, text, model), the architecture; cache/
(kv, visual_tokens, pruning, rules), what it remembers of text and pictures; inputs/, what goes in;
engine/ (segments, prefill, decode, sampling, engine), what runs it; then memory/, checkpoint/,
chat/, api, drawing/, batch/, serve/, cli/. errors and values are what all doors share.

Letters for dimensions, the same everywhere:
    B  slots                          S  text rows of this forward     L  text rows cached
    T  tile slots of an image         t  its real tiles                P  tokens of a tile
    V  visual tokens of a group       N  images                        n  tokens of an image's slots
    E  vision width                   D  text width                    d  width of a head
    H  query heads                    K  key/value heads               c  rows of a chunk
"""

import warnings

# torch says this on import; it works without NumPy, and so does this package.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from llama_vision.api import LlamaVision
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.rules import (
    FeatureNorm,
    KeyNorm,
    LastQuery,
    MaxMin,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.chat.chat import Chat
from llama_vision.config import Config
from llama_vision.engine.engine import Engine
from llama_vision.engine.image_cache import ImageCache
from llama_vision.engine.request import Completion, Request
from llama_vision.engine.settings import Settings
from llama_vision.errors import LlamaVisionError
from llama_vision.inputs.chat import Prompt
from llama_vision.inputs.image import tile_image
from llama_vision.memory.plan import MemoryPlan, plan_memory

__all__ = [
    "Chat",
    "Completion",
    "Config",
    "Engine",
    "FeatureNorm",
    "ImageCache",
    "KeyNorm",
    "LastQuery",
    "LlamaVision",
    "LlamaVisionError",
    "MaxMin",
    "MemoryPlan",
    "Prompt",
    "Pruner",
    "RandomTokens",
    "Request",
    "Settings",
    "TopK",
    "TrimmedLlama",
    "UniformGrid",
    "VisualTokens",
    "plan_memory",
    "tile_image",
]
