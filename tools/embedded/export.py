"""The trained model as a checkpoint in the official layout, in bfloat16."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from embedded.chat import SPECIAL_TOKENS, Chat
from llama_vision.config import Config
from llama_vision.image import MEAN, STD
from llama_vision.model import LlamaVisionModel

OFFICIAL_PREFIXES = (
    ("text.lm_head.", "language_model.lm_head."),
    ("text.", "language_model.model."),
    ("vision.", "vision_model."),
    ("projector.", "multi_modal_projector."),
)


def official_name(name: str) -> str:
    """Our name of a parameter -> the official checkpoint's."""
    for ours, official in OFFICIAL_PREFIXES:
        if name.startswith(ours):
            return official + name.removeprefix(ours)
    raise ValueError(f"got the parameter {name!r}, which has no official name")


def export(model: LlamaVisionModel, chat: Chat, folder: Path) -> None:
    """Write everything that `from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        official_name(name): parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = model.config
    _write(folder / "config.json", _config(config, chat))
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": config.text.bos_token_id,
            "do_sample": False,
            "eos_token_id": list(config.text.eos_token_ids),
            "pad_token_id": chat.padding,
        },
    )
    _write(folder / "preprocessor_config.json", _preprocessor(config))
    if chat.path.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(chat.path, folder / "tokenizer.model")


def _write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _config(config: Config, chat: Chat) -> dict:
    """`config.json` in the layout of 2024."""
    text, vision, scaling = config.text, config.vision, config.text.rope_scaling
    assert text.vocab_size == chat.first_special + len(SPECIAL_TOKENS)
    return {
        "architectures": ["MllamaForConditionalGeneration"],
        "image_token_index": text.image_token_id,
        "model_type": "mllama",
        "text_config": {
            "bos_token_id": text.bos_token_id,
            "cross_attention_layers": list(text.cross_attention_layers),
            "eos_token_id": list(text.eos_token_ids),
            "hidden_act": "silu",
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "model_type": "mllama_text_model",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "pad_token_id": chat.padding,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_scaling": {
                "factor": scaling.factor,
                "high_freq_factor": scaling.high_freq_factor,
                "low_freq_factor": scaling.low_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "rope_type": "llama3",
            },
            "rope_theta": text.rope_theta,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": text.vocab_size,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {
            "attention_heads": vision.attention_heads,
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_layers_indices": list(vision.intermediate_layers_indices),
            "intermediate_size": vision.intermediate_size,
            "max_num_tiles": vision.max_num_tiles,
            "model_type": "mllama_vision_model",
            "norm_eps": vision.norm_eps,
            "num_channels": vision.num_channels,
            "num_global_layers": vision.num_global_layers,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "supported_aspect_ratios": [list(grid) for grid in vision.grids],
            "torch_dtype": "bfloat16",
            "vision_output_dim": vision.feature_size,
        },
    }


def _preprocessor(config: Config) -> dict:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "MllamaImageProcessor",
        "image_std": list(STD),
        "max_image_tiles": config.vision.max_num_tiles,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": config.vision.image_size, "width": config.vision.image_size},
    }


def load(folder: Path) -> tuple[LlamaVisionModel, Chat]:
    """A checkpoint that `export` wrote: the model in bfloat16, and its tokenizer."""
    model = LlamaVisionModel(Config.from_directory(folder)).to(torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    names = dict(model.named_parameters())
    model.load_state_dict({name: tensors.pop(official_name(name)) for name in names})
    assert not tensors, f"unused tensors in {folder}: {sorted(tensors)}"
    return model.eval(), Chat(folder / "tokenizer.model")
