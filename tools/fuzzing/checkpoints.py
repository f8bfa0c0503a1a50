"""The tiny checkpoint with a fault in one of its files: refused, or loaded as the files say."""

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fuzzing.common import TINY, prompt, tiny
from fuzzing.judge import Case, Kind, WrongResult, draw_for
from llama_vision import LlamaVision, plan_memory

CASES = 2_000
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
PREFIXES = {
    "vision.": ("vision_model.", "model.vision_model."),
    "projector.": ("multi_modal_projector.", "model.multi_modal_projector."),
    "text.lm_head.": ("language_model.lm_head.", "lm_head."),
    "text.": ("language_model.model.", "model.language_model."),
}
"""Of the model's tensors, and what files call them."""

RELEVANT = (
    "image_token_index",
    "model_type",
    "torch_dtype",
    "architectures",
    "quantization_config",
)
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308),
    *("", "x", "1", "bfloat16", "float8", "\x1b[31m\n", "x" * 10**5, [], [1], [[1, 2]], [-1]),
    *([None], ["x"], [10**30], [0] * 1000, {}, {"a": 1}, {"factor": 0}, list(range(10**5))),
)
RAW = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-0",
    "1" * 5000,
    "[" * 100_000,
    '"\\ud800"',
    "{",
    "",
)
"""Values that are written into JSON as they are."""

GENERATION = (
    *("temperature", "top_p", "top_k", "eos_token_id", "bos_token_id", "do_sample", "min_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "max_new_tokens", "stop_strings", "num_beams"),
)
Edit = Callable[[Path, random.Random], str]


def _json(folder: Path, name: str) -> Any:
    return json.loads((TINY / name).read_text())


def _write(folder: Path, name: str, data: bytes | str) -> None:
    """A file in place of a link, so that the original stays."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def _put(tree: Any, keys: list[Any], draw: random.Random) -> tuple[str, str]:
    """JSON with an odd value at a place, or without it; and which."""
    words = ".".join(map(str, keys))
    at = tree
    for key in keys[:-1]:
        at = at[key]
    if draw.random() < 0.1:
        at.pop(keys[-1], None)
        return json.dumps(tree), f"{words} is gone"
    if draw.random() < 0.2:
        at[keys[-1]], raw = "@@", draw.choice(RAW)
        return json.dumps(tree).replace('"@@"', raw), f"{words} = {raw[:40]}"
    at[keys[-1]] = value = draw.choice(ODD)
    return json.dumps(tree), f"{words} = {str(value)[:40]}"


def _leaves(tree: Any, before: tuple = ()) -> list[list[Any]]:
    """The places that a model's shape, or its reading, depends on."""
    unread = ("label", "beam", "penalty", "output_", "return_", "early", "typical", "encoder")
    found = []
    for key, value in tree.items():
        if not any(part in key for part in unread) and (before or key in RELEVANT):
            found.append([*before, key])
        if isinstance(value, dict) and "label" not in key:
            found += [*_leaves(value, (*before, key)), [*before, key]]
    return found


def edit_config(folder: Path, draw: random.Random) -> str:
    """A value of config.json, or two."""
    tree, words = _json(folder, "config.json"), []
    for _ in range(draw.choice((1, 1, 1, 2))):
        text, said = _put(tree, draw.choice(_leaves(tree)), draw)
        words.append(said)
        _write(folder, "config.json", text)
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not all(isinstance(tree.get(k), dict) for k in ("text_config", "vision_config")):
            break
    return "config.json: " + ", ".join(words)


def edit_quantization(folder: Path, draw: random.Random) -> str:
    """A config that says how it is quantised."""
    method = draw.choice(("bitsandbytes", "gptq", "awq", "fp8", "\x1b[31m" * 1000, 5, None, []))
    config = draw.choice(({"quant_method": method}, {"load_in_4bit": True}, {}, [], "x", method))
    tree = {**_json(folder, "config.json"), "quantization_config": config}
    _write(folder, "config.json", json.dumps(tree))
    return f"quantization_config = {str(config)[:60]}"


def edit_bytes(folder: Path, draw: random.Random) -> str:
    """The bytes of a JSON file."""
    name = draw.choice(("config.json", INDEX, "generation_config.json"))
    data = bytearray((TINY / name).read_bytes())
    ways = {
        "BOM": lambda: b"\xef\xbb\xbf" + data,
        "UTF-16": lambda: data.decode().encode("utf-16"),
        "a byte": lambda: bytes(data[:99]) + b"\xff" + bytes(data[100:]),
        "cut": lambda: data[: draw.randrange(len(data))],
        "empty": lambda: b"",
        "zeros": lambda: bytes(100),
        "a list": lambda: b"[]",
        "null": lambda: b"null",
        "a number": lambda: b"1",
        "deep": lambda: b'{"a":' * 100_000,
        "twice": lambda: data + data,
        "control": lambda: data.replace(b'"', b'"\x1b[31m', 1),
        "flip": lambda: bytes(b ^ (draw.random() < 0.002) << draw.randrange(8) for b in data),
        "large": lambda: b'{"x":"' + b"y" * 10**7 + b'"}',
    }
    way = draw.choice(sorted(ways))
    _write(folder, name, bytes(ways[way]()))
    return f"{name}: {way}"


def edit_index(folder: Path, draw: random.Random) -> str:
    """Where the index says that tensors are."""
    tree = _json(folder, INDEX)
    files = tree["weight_map"]
    name = draw.choice(sorted(files))
    outside = folder.parent / "outside.safetensors"
    shutil.copy(TINY / SHARDS[0], outside)
    ways = {
        "above": lambda: _everywhere(files, SHARDS[0], "../outside.safetensors"),
        "absolute": lambda: _everywhere(files, SHARDS[0], str(outside)),
        "absolute inside": lambda: _everywhere(files, SHARDS[0], str(folder / SHARDS[0])),
        "by detour": lambda: _everywhere(files, SHARDS[0], f"x/../{SHARDS[0]}"),
        "odd": lambda: files.update({name: draw.choice(ODD)}),
        "a device": lambda: files.update({name: "/dev/zero"}),
        "a folder": lambda: files.update({name: "."}),
        "missing": lambda: files.update({name: "\x1b[31mnowhere.safetensors"}),
        "other shard": lambda: files.update({name: SHARDS[files[name] == SHARDS[0]]}),
        "dropped": lambda: files.pop(name),
        "added": lambda: files.update({"\x1b[31m" * 99: SHARDS[0]}),
        "empty": files.clear,
        "no map": lambda: tree.pop("weight_map"),
        "map": lambda: tree.update(weight_map=draw.choice(ODD)),
        "many": lambda: files.update({f"t{n}": f"s{n}" for n in range(10**5)}),
        "metadata": lambda: tree.update(metadata=draw.choice(ODD)),
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    _write(folder, INDEX, json.dumps(tree))
    return f"index: {way} ({name})"


def _everywhere(files: dict[str, str], old: str, new: str) -> None:
    files.update({name: new for name, file in files.items() if file == old})


def edit_header(folder: Path, draw: random.Random) -> str:
    """What a shard's header says of its tensors."""
    shard = draw.choice(SHARDS)
    data = (TINY / shard).read_bytes()
    size = int.from_bytes(data[:8], "little")
    head, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = sorted(name for name in head if name != "__metadata__")
    first, second = draw.sample(names, 2)
    entry, other = head[first], head[second]
    start, end = entry["data_offsets"]
    ways = {
        "transposed": lambda: entry.update(shape=entry["shape"][::-1]),
        "flat": lambda: entry.update(shape=[(end - start) // 4]),
        "shape": lambda: entry.update(shape=draw.choice(ODD)),
        "a size": lambda: entry.update(shape=[*entry["shape"][:-1], draw.choice(ODD)]),
        "overflow": lambda: entry.update(shape=[2**32, 2**32, 0]),
        "dtype": lambda: entry.update(
            dtype=draw.choice(("I32", "U8", "F8_E4M3", "F16", "X", "BOOL", 3))
        ),
        "offsets": lambda: entry.update(
            data_offsets=draw.choice(
                ([0, 0], [end, start], [start, 2**63], [-1, 5], "x", [start, end + 4])
            )
        ),
        "renamed": lambda: head.update({draw.choice(("x", "\x1b[31m" * 99, "")): head.pop(first)}),
        "names swapped": lambda: head.update({first: other, second: entry}),
        "overlap": lambda: other.update(data_offsets=entry["data_offsets"], shape=entry["shape"]),
        "dropped": lambda: head.pop(first),
        "metadata": lambda: head.update(__metadata__=draw.choice(ODD)),
        "stale": lambda: None,
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    text = json.dumps(head).encode()
    _write(folder, shard, len(text).to_bytes(8, "little") + text + rest)
    return f"{shard}: {way} ({first}, {second})"


def edit_shard(folder: Path, draw: random.Random) -> str:
    """A shard's bytes: its length, its header, or what comes after."""
    shard = draw.choice(SHARDS)
    data = bytearray((TINY / shard).read_bytes())
    ways = {
        "cut": lambda: data[
            : draw.choice((0, 4, 8, 9, 1000, len(data) - 1, draw.randrange(len(data))))
        ],
        "longer": lambda: data + bytes(draw.choice((1, 4, 1000))),
        "header length": lambda: (
            draw.choice((0, 1, 10**8, 2**40, 2**64 - 1)).to_bytes(8, "little") + data[8:]
        ),
        "header bits": lambda: _flipped(data, draw, 8, 3000),
        "other shard": lambda: (TINY / SHARDS[shard == SHARDS[0]]).read_bytes(),
        "random": lambda: draw.randbytes(5000),
        "pickle": lambda: b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
        "zip": lambda: b"PK\3\4" + bytes(500),
    }
    way = draw.choice(sorted(ways))
    _write(folder, shard, bytes(ways[way]()))
    return f"{shard}: {way}"


def _flipped(data: bytearray, draw: random.Random, start: int, end: int) -> bytearray:
    for _ in range(draw.choice((1, 3))):
        data[draw.randrange(start, end)] ^= 1 << draw.randrange(8)
    return data


def edit_tensors(folder: Path, draw: random.Random) -> str:
    """Tensors, by a writer of such files; what the file says then is right."""
    shard = draw.choice(SHARDS)
    tensors = load((TINY / shard).read_bytes())
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    ways = {
        "NaN": lambda: tensor.clone().fill_(torch.nan),
        "infinite": lambda: tensor.clone().fill_(torch.inf),
        "large": lambda: tensor * 1e30,
        "double": tensor.double,
        "half": tensor.half,
        "bfloat16": tensor.bfloat16,
        "whole numbers": lambda: tensor.to(torch.int32),
        "8 bits": lambda: tensor.to(torch.uint8),
        "float8": lambda: tensor.to(torch.float8_e4m3fn),
        "longer": lambda: torch.cat([tensor, tensor]),
        "shorter": lambda: tensor[:-1].clone(),
        "one axis more": lambda: tensor[None].clone(),
        "empty": lambda: tensor[:0].clone(),
        "zeros": lambda: torch.zeros_like(tensor),
    }
    way = draw.choice(sorted(ways))
    tensors[name] = ways[way]()
    if draw.random() < 0.1:
        tensors["text.rotary_emb.inv_freq"] = torch.ones(8)
    _write(folder, shard, save(tensors))
    return f"{name}: {way}"


def edit_tokenizer(folder: Path, draw: random.Random) -> str:
    """A tokenizer that is none, or not that of the checkpoint."""
    pico = TINY.parents[2] / "weights" / "pico" / "tokenizer.model"
    data = bytearray(pico.read_bytes())
    pairs = b"".join(b"YQ== %d\n" % n for n in range(500))
    ways: dict[str, Callable[[], bytes]] = {
        "tokenizer.model pico": lambda: bytes(data),
        "tokenizer.model flipped": lambda: bytes(_flipped(data, draw, 0, len(data))),
        "tokenizer.model cut": lambda: bytes(data[: draw.randrange(len(data))]),
        "tokenizer.model random": lambda: draw.randbytes(draw.choice((0, 1, 1000))),
        "tokenizer.model alike": lambda: pairs,
        "tokenizer.model huge rank": lambda: b"YQ== " + b"9" * 5000,
        "tokenizer.model negative": lambda: b"YQ== -1\nYg== 0\n",
        "tokenizer.model one": lambda: b"YQ== 0",
        "tokenizer.json empty": lambda: b"{}",
        "tokenizer.json list": lambda: b"[1, 2]",
        "tokenizer.json deep": lambda: b"[" * 100_000,
        "tokenizer.json null": lambda: b'{"model": null}',
        "tokenizer.json vocab": lambda: (
            b'{"model": {"type": "BPE", "vocab": {"a": "x", "b": null}}}'
        ),
        "tokenizer.json list vocab": lambda: b'{"model": {"type": "BPE", "vocab": [["a", 1]]}}',
        "tokenizer.json type": lambda: b'{"model": {"type": "\x1b[31m", "vocab": {}}}',
        "tokenizer.json ranks": lambda: json.dumps(
            {
                "model": {
                    "type": "BPE",
                    "vocab": {chr(33 + n): n * draw.choice((0, 1, 10**30)) for n in range(90)},
                }
            }
        ).encode(),
        "tokenizer.json not UTF-8": lambda: b'{"\xff": 1}',
    }
    way = draw.choice(sorted(ways))
    _write(folder, way.split()[0], ways[way]())
    return way


def edit_generation(folder: Path, draw: random.Random) -> str:
    """A setting of generation_config.json."""
    tree = _json(folder, "generation_config.json")
    text, words = _put(tree, [draw.choice(GENERATION)], draw)
    _write(folder, "generation_config.json", text)
    return f"generation_config.json: {words}"


def edit_folder(folder: Path, draw: random.Random) -> str:
    """Files that are missing, of another kind, or of another format."""
    first, others = SHARDS[0], [*SHARDS, INDEX]
    ways: dict[str, Callable[[], Any]] = {
        "no config": lambda: (folder / "config.json").unlink(),
        "config is a folder": lambda: (
            (folder / "config.json").unlink(),
            (folder / "config.json").mkdir(),
        ),
        "config is a loop": lambda: (
            (folder / "config.json").unlink(),
            (folder / "config.json").symlink_to("config.json"),
        ),
        "no index": lambda: (folder / INDEX).unlink(),
        "no shard": lambda: (folder / first).unlink(),
        "no index, one shard": lambda: [(folder / name).unlink() for name in (INDEX, first)],
        "shard is a folder": lambda: ((folder / first).unlink(), (folder / first).mkdir()),
        "shard is a loop": lambda: ((folder / first).unlink(), (folder / first).symlink_to(first)),
        "shard is a pipe": lambda: ((folder / first).unlink(), os.mkfifo(folder / first)),
        "config is a pipe": lambda: (
            (folder / "config.json").unlink(),
            os.mkfifo(folder / "config.json"),
        ),
        "a third shard": lambda: shutil.copy(
            TINY / first, folder / "model-00003-of-00003.safetensors"
        ),
        "index is a folder": lambda: ((folder / INDEX).unlink(), (folder / INDEX).mkdir()),
        "Meta's files": lambda: [
            *((folder / name).unlink() for name in (*others, "config.json")),
            _write(folder, "consolidated.00.pth", b"PK"),
            _write(folder, "params.json", "{}"),
        ],
        "LoRA": lambda: [
            *((folder / name).unlink() for name in (*others, "config.json")),
            _write(
                folder,
                "adapter_config.json",
                json.dumps({"base_model_name_or_path": draw.choice(ODD)}),
            ),
            _write(folder, "adapter_model.safetensors", save({"x": torch.ones(1)})),
        ],
        "LoRA beside": lambda: _write(
            folder, "adapter_config.json", draw.choice(("{}", "{", "[]", "\x1b"))
        ),
        "pickles": lambda: [
            *((folder / name).unlink() for name in others),
            _write(folder, "pytorch_model.bin", b"\x80\x02."),
        ],
        "one file": lambda: _joined(folder, "model.safetensors"),
        "one file of another name": lambda: _joined(folder, "weights\x1b[31m.safetensors"),
    }
    way = draw.choice(sorted(ways))
    ways[way]()
    return f"folder: {way}"


def _joined(folder: Path, name: str) -> None:
    """All tensors in one file and no index."""
    for old in (*SHARDS, INDEX):
        (folder / old).unlink()
    _write(folder, name, _both_shards())


@cache
def _both_shards() -> bytes:
    parts = [load((TINY / shard).read_bytes()) for shard in SHARDS]
    return save({name: tensor for part in parts for name, tensor in part.items()})


def nothing(folder: Path, draw: random.Random) -> str:
    """As it is."""
    return "whole"


EDITS: tuple[Edit, ...] = (
    *(edit_config,) * 8,
    *(edit_index, edit_index, edit_header, edit_header, edit_header, edit_shard, edit_shard),
    *(edit_tensors, edit_tensors, edit_bytes, edit_bytes, edit_tokenizer, edit_generation),
    *(edit_generation, edit_folder, edit_folder, edit_quantization),
)


def load_and_compare(folder: Path) -> None:
    """Load it, hold its tensors against those in the files, and let it answer."""
    model = LlamaVision.from_pretrained(folder, device="cpu")
    files = {}
    for shard in folder.glob("*.safetensors"):
        files.update(load(shard.read_bytes()))
    for name, parameter in model.model.named_parameters():
        prefix = next(p for p in PREFIXES if name.startswith(p))
        theirs = [prefix_there + name[len(prefix) :] for prefix_there in PREFIXES[prefix]]
        stored = next((files[there] for there in theirs if there in files), None)
        if stored is None or not _same(parameter, stored):
            raise WrongResult(f"{name} is not what the file holds")
    answer = model.generate(prompt(), max_new_tokens=2)
    if not all(map(_finite, answer.logprobs)):
        raise WrongResult(f"log-probabilities {answer.logprobs}")


def _same(parameter: Tensor, stored: Tensor) -> bool:
    stored = stored.to(parameter.dtype)
    return parameter.shape == stored.shape and torch.equal(
        parameter.nan_to_num(7.0), stored.nan_to_num(7.0)
    )


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def plan_only(folder: Path) -> None:
    """What --plan does of the same."""
    plan_memory(folder, device="cpu", max_seq_len=16, tiles=1).to_dict()


def prompt_only(folder: Path) -> None:
    """All but the weights, and a prompt."""
    outline = LlamaVision.without_weights(folder, device="cpu")
    outline.plan([outline.prompt([{"role": "user", "content": "hi"}])], max_new_tokens=2)


DOORS = (load_and_compare, load_and_compare, load_and_compare, plan_only, prompt_only)


def kind(seed: int, scratch: Path) -> Kind:
    """See `fuzzing.kinds`."""
    tiny()
    originals = Path(shutil.copytree(TINY, scratch / "originals", dirs_exist_ok=True))

    def case(i: int) -> Case:
        draw = draw_for("checkpoints", seed, i)
        folder = scratch / str(os.getpid()) / "model"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(originals, folder, copy_function=os.link)
        edit = nothing if i % 100 == 0 else draw.choice(EDITS)
        words, door = edit(folder, draw), draw.choice(DOORS)
        expected = "taken" if edit is nothing else "either"
        return Case(f"{door.__name__}: {words}", lambda: door(folder), expected)

    return Kind("checkpoints", CASES, case)
