"""How much host memory does loading a checkpoint take, beside the model itself?

`python tools/bench/measure_loading.py` writes a random checkpoint of about 1.5 GB in 4 shards,
loads it on the CPU in fresh processes, and compares the growth of peak resident memory with the
bytes of the loaded parameters: 1.00 is perfect. The last line of stdout is JSON. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

CONFIG = {
    "model_type": "mllama",
    "image_token_index": 32000,
    "torch_dtype": "bfloat16",
    "text_config": {
        "hidden_act": "silu",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "cross_attention_layers": [3, 8],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "bos_token_id": 31744,
        "eos_token_id": [31745, 31752, 31753],
    },
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 8,
        "num_global_layers": 2,
        "intermediate_layers_indices": [1, 3, 5],
        "image_size": 224,
        "patch_size": 14,
        "max_num_tiles": 4,
        "num_channels": 3,
        "norm_eps": 1e-5,
    },
}
DTYPES = ("bfloat16", "float32", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--directory", type=Path, help="keep the checkpoint here, and reuse it")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--load", metavar="DTYPE", help=argparse.SUPPRESS)  # the fresh process
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.directory, options.load)))
        return
    if options.directory is not None:
        report(measure(options.directory, options.shards))
    else:
        with tempfile.TemporaryDirectory() as directory:
            report(measure(Path(directory), options.shards))


def measure(directory: Path, shards: int) -> dict:
    if not (directory / "config.json").exists():
        write_checkpoint(directory, shards)
    files = sorted(directory.glob("*.safetensors"))
    command = [sys.executable, __file__, "--directory", str(directory), "--load"]
    loads = {}
    for dtype in DTYPES:
        output = subprocess.run([*command, dtype], check=True, stdout=subprocess.PIPE, text=True)
        loads[dtype] = json.loads(output.stdout)
    return {
        "shards": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
        "loads": loads,
    }


def write_checkpoint(directory: Path, shards: int) -> None:
    """A random checkpoint in the official layout; the only time that it is in memory is here."""
    import torch
    from safetensors.torch import save_file

    from llama_vision.checkpoint.config_json import config_from_dict
    from llama_vision.checkpoint.names import official_names
    from llama_vision.config import DTYPES as TORCH_DTYPES
    from llama_vision.model.model import LlamaVisionModel

    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlamaVisionModel(config_from_dict(CONFIG))
    parameters = dict(model.named_parameters())
    names = official_names(list(parameters))
    dtype = TORCH_DTYPES[CONFIG["torch_dtype"]]
    total = sum(parameter.numel() for parameter in parameters.values())
    weight_map, shard, filled = {}, {}, 0
    torch.manual_seed(0)
    for official, ours in names.items():
        shard[official] = torch.randn(parameters[ours].shape, dtype=dtype) * 0.02
        filled += shard[official].numel()
        number = len(set(weight_map.values())) + 1
        if filled >= total * number / shards:
            name = f"model-{number:05}-of-{shards:05}.safetensors"
            save_file(shard, directory / name)
            weight_map |= dict.fromkeys(shard, name)
            shard = {}
    index = {"metadata": {"total_size": total * dtype.itemsize}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))


def load(directory: Path, dtype: str) -> dict:
    """Load in this process, which should have done nothing else, and say what it took."""
    import time

    from llama_vision import LlamaVision

    baseline = status_bytes("VmRSS")
    start = time.perf_counter()
    how = {"quantize" if dtype.startswith("int") else "dtype": dtype}
    model = LlamaVision.from_pretrained(directory, device="cpu", **how)
    seconds = time.perf_counter() - start
    peak = status_bytes("VmHWM")
    model_bytes = sum(parameter.nbytes for parameter in model.model.parameters())
    return {
        "model_bytes": model_bytes,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "ratio": round((peak - baseline) / model_bytes, 4),
        "seconds": round(seconds, 2),
    }


def status_bytes(field: str) -> int:
    """A size of this process, from the kernel."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def report(result: dict) -> None:
    mib = 2**20
    print(f"checkpoint: {result['file_bytes'] / mib:,.0f} MiB in {result['shards']} shards")
    print(f"{'dtype':10} {'model':>10} {'baseline':>10} {'peak':>10} {'ratio':>7} {'time':>8}")
    for dtype, row in result["loads"].items():
        sizes = " ".join(
            f"{row[f'{name}_bytes'] / mib:6,.0f} MiB" for name in ("model", "baseline", "peak")
        )
        print(f"{dtype:10} {sizes} {row['ratio']:7.3f} {row['seconds']:6.2f} s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
