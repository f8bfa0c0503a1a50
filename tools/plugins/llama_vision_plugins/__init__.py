"""llama-vision as a model of VLMEvalKit and of lmms-eval.

    pip install -e . && pip install -e tools/plugins

Both put pictures before the text of a turn, for text before them does not see them, and answer
greedily unless told otherwise. See `settings.rule_of` for what they take to prune.
"""

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval's entry point gives: `--model llama_vision_pytorch`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="llama_vision_pytorch",
        chat_class_path="llama_vision_plugins.lmms_eval_model.LlamaVisionChat",
    )
