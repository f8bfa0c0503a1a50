"""Models to measure with: official sizes, a middle one, and checkpoints in directories."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from llama_vision.checkpoint.config_json import config_to_dict
from llama_vision.checkpoint.hub import load_config
from llama_vision.checkpoint.loading import load_model
from llama_vision.checkpoint.names import official_names
from llama_vision.config import DTYPES, Config, official_config
from llama_vision.model.model import LlamaVisionModel, model_without_weights


def middle_config() -> Config:
    """About 340 million parameters, with the proportions of the 11B."""
    config = official_config("11b")
    vision = replace(
        config.vision,
        hidden_size=768,
        attention_heads=12,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_global_layers=3,
        intermediate_layers_indices=(1, 3, 6, 9, 11),
        image_size=224,
    )
    text = replace(
        config.text,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        cross_attention_layers=(3, 8, 13),
        bos_token_id=31744,
        eos_token_ids=(31745, 31752, 31753),
    )
    return replace(config, vision=vision, text=text)


def named_config(name: str) -> Config:
    """`340m`, `11b`, `90b`, or a checkpoint's."""
    return middle_config() if name == "340m" else load_config(name)


@torch.no_grad()
def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> LlamaVisionModel:
    """Random weights, made where they stay; speed and memory do not depend on the values."""
    model = model_without_weights(config).to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(0.5)  # norms, and gates that are open
    for entry in model.vision.padding_entries():
        entry.zero_()  # as published
    model.vision.compare_padding_tiles()
    return model.eval().requires_grad_(False)


def load(name: str, config: Config, dtype: torch.dtype, device: torch.device) -> LlamaVisionModel:
    """Random weights, or those of a directory."""
    if Path(name).is_dir():
        return load_model(Path(name), config, device=device, dtype=dtype)
    return random_model(config, dtype, device)


def bench_parser(doc: str) -> argparse.ArgumentParser:
    """Arguments that most benchmarks have: the model, and what it runs on."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter)
    add = parser.add_argument
    add("model", help="a directory, 340m, 11b or 90b; random weights, but for a directory's")
    add("--device", default="cpu")
    add("--dtype", default="float32", choices=DTYPES)
    add("--threads", type=int, default=0, help="of a CPU; 0: torch's")
    add("--rounds", type=int, default=5)
    return parser


def save_checkpoint(model: LlamaVisionModel, directory: Path) -> None:
    """In the official layout, in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    names = official_names(list(parameters))
    tensors = {theirs: parameters[ours].detach().cpu() for theirs, ours in names.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_dict(model.config), indent=1))
