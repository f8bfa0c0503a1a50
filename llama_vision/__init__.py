"""Llama-3.2-Vision in pure PyTorch, exact and readable.

Read in this order: config, image, tokenizer, chat; then the model from the inside out: layers,
visual, vision, cache, pruning, passes, text, model; then what it takes: memory, fitting, planning;
then what runs it: checkpoint, sampling, stepping, decoding, generation, reporting, cli.

Letters for dimensions, the same everywhere:
    B  batch                          S  text rows of this pass        L  text rows cached
    T  tile slots of an image         t  its real tiles                P  tokens of a tile
    V  visual tokens of a sample      N  images                        n  tokens of an image's slots
    E  vision width                   D  text width                    d  width of a head
    H  query heads                    K  key/value heads
"""

import warnings

# torch says this on import; it works without NumPy, and so does this package.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

from llama_vision.api import LlamaVision
from llama_vision.cache.pruning import (
    KeyNorm,
    LastQuery,
    Pruner,
    RandomTokens,
    TopK,
    TrimmedLlama,
    UniformGrid,
)
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.config import Config, LlamaVisionError
from llama_vision.engine.engine import Completion
from llama_vision.inputs.chat import Prompt
from llama_vision.memory.largest import plan_memory
from llama_vision.memory.plan import MemoryPlan

__all__ = [
    "Completion",
    "Config",
    "KeyNorm",
    "LastQuery",
    "LlamaVision",
    "LlamaVisionError",
    "MemoryPlan",
    "Prompt",
    "Pruner",
    "RandomTokens",
    "TopK",
    "TrimmedLlama",
    "UniformGrid",
    "VisualTokens",
    "plan_memory",
]
