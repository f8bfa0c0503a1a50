"""What int8 and int4 matrices cost and gain: decoding, prefill, bytes, and memory while loading.

    python tools/bench/measure_quantised.py 340m
    python tools/bench/measure_quantised.py 1b --text-only

A random checkpoint is written once and loaded in each format; then all formats answer in turns, and
the shortest of the rounds counts: a machine's other work only ever lengthens them. "1b" has the
decoder of Llama 3.2 1B (16 blocks, 2048 wide) with two cross-attention blocks more.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from models import middle_config, random_model, save_checkpoint
from PIL import Image

from llama_vision import LlamaVision, Prompt
from llama_vision.config import Config

FORMATS = ("bfloat16", "int8", "int4")


def one_billion() -> Config:
    """A decoder of about a billion parameters, and a small encoder."""
    config = middle_config()
    text = replace(
        config.text,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=18,
        num_attention_heads=32,
        num_key_value_heads=8,
        cross_attention_layers=(5, 12),
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )
    return replace(config, text=text)


def answer(model: LlamaVision, prompt: Prompt, tokens: int) -> dict[str, float]:
    """Seconds of one run: prefill with the picture's part, and a step of decoding."""
    engine, requests = model.start([prompt], max_new_tokens=tokens, temperature=0, ignore_stop=True)
    engine.run(*requests)
    seconds = engine.seconds
    prefill = seconds["prefill"] + seconds["vision"]
    return {"prefill": prefill, "step": seconds["decode"] / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("size", choices=("340m", "1b"))
    parser.add_argument("--text-only", action="store_true", help="prompts without a picture")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    config = middle_config() if options.size == "340m" else one_billion()
    with tempfile.TemporaryDirectory() as directory:
        made = random_model(config, torch.bfloat16, torch.device("cpu"))
        save_checkpoint(made, Path(directory))
        del made
        models = {}
        for form in FORMATS:
            start = time.perf_counter()
            quantize = None if form == "bfloat16" else form
            models[form] = LlamaVision.from_pretrained(directory, device="cpu", quantize=quantize)
            print(f"loaded {form} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    ids = [config.text.bos_token_id, *range(100, 99 + options.prompt_tokens)]
    images = [] if options.text_only else [Image.new("RGB", (640, 480), "teal")]
    if images:
        ids[1] = config.text.image_token_id
    best: dict[str, dict[str, float]] = {form: {} for form in FORMATS}
    for _ in range(options.rounds):
        for form, model in models.items():
            for name, seconds in answer(model, Prompt(ids, images), options.tokens).items():
                best[form][name] = min(seconds, best[form].get(name, seconds))
    for form, seconds in best.items():
        size = sum(p.nbytes for p in models[form].model.parameters())
        faster = best["bfloat16"]["step"] / seconds["step"]
        slower = seconds["prefill"] / best["bfloat16"]["prefill"]
        print(
            f"{form:<10}{size / 2**20:>9.0f} MiB  step {1e3 * seconds['step']:7.1f} ms "
            f"({faster:.2f} x)  prefill {1e3 * seconds['prefill']:8.0f} ms ({slower:.2f} x)"
        )
    print(json.dumps({"size": options.size, "threads": torch.get_num_threads(), **best}))


if __name__ == "__main__":
    main()
