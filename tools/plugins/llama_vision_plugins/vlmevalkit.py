"""A model class of VLMEvalKit.

    # in vlmeval/config.py, or before its run.py is called
    from functools import partial
    from llama_vision_plugins.vlmevalkit import LlamaVisionKit
    supported_VLM["llama-vision"] = partial(LlamaVisionKit, "meta-llama/…", keep=0.5)

VLMEvalKit's own prompts for Llama 3.2 put the question before the picture; here the picture comes
first, so compare all tokens with fewer under this class, not with what is published.
"""

from typing import Any

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

from llama_vision import LlamaVision
from llama_vision_plugins.settings import pictures_first, rule_of

SHORT, LONG = 128, 512
"""Tokens of an answer: a choice or yes or no, anything else."""
NAMED = {"AI2D": 400, "MMMU": 2048, "MathVista": 2048}
"""Those of datasets whose name holds the word. Source: VLMEvalKit's model of Llama 3.2."""


class LlamaVisionKit(BaseModel):
    """A checkpoint that answers VLMEvalKit's prompts.

    Args:
        model_path: see `LlamaVision.from_pretrained`, as `device` and `dtype`.
        max_new_tokens: of an answer; None for what suits the dataset.
        rule: see `rule_of`: k_ratio, keep, pruner, merge.

    Raises:
        LlamaVisionError: the checkpoint cannot be loaded, or a value is out of range.
    """

    INSTALL_REQ = False
    INTERLEAVE = True

    def __init__(
        self,
        model_path: str = "meta-llama/Llama-3.2-11B-Vision-Instruct",
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int | None = None,
        **rule: Any,
    ):
        super().__init__()
        self.pruner, self.max_new_tokens = rule_of(**rule), max_new_tokens
        self.model = LlamaVision.from_pretrained(model_path, device=device, dtype=dtype)

    def use_custom_prompt(self, dataset: str | None) -> bool:
        """No: the dataset's own prompts are taken."""
        return False

    def build_prompt(self, line: Any, dataset: str | None = None) -> Any:
        """Not called, see `use_custom_prompt`."""
        raise NotImplementedError

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """The answer to a message of parts {"type": "image" | "text", "value": path | text}."""
        parts = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        made = self.model.generate(
            [{"role": "user", "content": pictures_first(parts)}],
            max_new_tokens=self.max_new_tokens or tokens_for(dataset),
            temperature=0,
            pruner=self.pruner,
        )
        return made.text


def tokens_for(dataset: str | None) -> int:
    """Most tokens of an answer to a dataset's questions."""
    for word, most in NAMED.items():
        if word in (dataset or ""):
            return most
    return SHORT if dataset and DATASET_TYPE(dataset) in ("MCQ", "Y/N") else LONG
