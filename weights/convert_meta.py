"""Meta's own checkpoint files -> the official safetensors layout.

    python weights/convert_meta.py SOURCE TARGET [--shard-size 5GB]

SOURCE holds `consolidated.pth` or `consolidated.00.pth`, `.01.pth`, … (model-parallel parts; the
90B has eight), `params.json` and `tokenizer.model`, as Meta publishes them. TARGET becomes a
directory in the layout of 2024; every number keeps the type it is stored in. The parts are mapped
into memory and converted shard by shard, so it takes the memory of one shard.

Source of names, shapes and shares: llama_models/llama3/multimodal/model.py and the parallel layers
of fairscale that it uses.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs where not installed
from llama_vision.checkpoint.config_json import MOST_LAYERS, config_from_dict, config_to_dict
from llama_vision.checkpoint.files import CheckpointError, Entry
from llama_vision.checkpoint.names import match_names
from llama_vision.cli.arguments import Parser
from llama_vision.cli.terminal import run_command
from llama_vision.config import DTYPES, Config, official_config
from llama_vision.errors import LlamaVisionError, printable, quote, some
from llama_vision.model.model import LlamaVisionModel
from llama_vision.reading import read_json, shown

COPY, COLUMN, ROW = None, 0, 1
"""How parts hold a tensor: each has all of it, a share of its rows, or a share of its columns."""

MOST = 2**31
"""Beyond any number in a params.json."""

Parts = list[dict[str, Tensor]]


class ConversionError(LlamaVisionError):
    """A source that cannot be converted, or a target that cannot be written."""


# --- what changes in a tensor: (config, joined tensor) -> official tensor -------------------------


def unchanged(config: Config, tensor: Tensor) -> Tensor:
    """The tensor as it is."""
    return tensor


def rotary_halves(config: Config, weight: Tensor) -> Tensor:
    """Reorder each head's rows [(0, 1), (2, 3), …] -> [0, 2, …, 1, 3, …].

    Source: apply_rotary_emb in llama_models/llama3/model.py turns neighbours; the official layout
    turns row i of a head together with row i + d/2.
    """
    return weight.unflatten(0, (-1, config.text.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def patch_kernel(config: Config, weight: Tensor) -> Tensor:
    """[E, 3 · h · w] -> [E, 3, h, w]: a linear layer over unfolded patches is a convolution."""
    return weight.unflatten(1, (config.vision.num_channels, config.vision.patch_size, -1))


def by_id(config: Config, table: Tensor) -> Tensor:
    """[T, T, …] by row and column of a tile -> [grids + 1, T · …] by aspect-ratio id.

    Row 0 (no image) and the slots of tiles that a grid has not are zero.

    Source: VisionEncoder.apply_positional_embedding and TilePositionEmbedding.forward.
    """
    grids = config.vision.grids
    rows_by_id = table.new_zeros(len(grids) + 1, *table.shape[1:])
    for aspect_id, (rows, cols) in enumerate(grids, start=1):
        rows_by_id[aspect_id, : rows * cols] = table[:rows, :cols].flatten(0, 1)
    return rows_by_id.flatten(1)


def first_element(config: Config, gate: Tensor) -> Tensor:
    """[n] -> [1]: a gate is one number, however often it is stored."""
    return gate.flatten()[:1].clone()


def append_rows(config: Config, embedding: Tensor, extra: Tensor) -> Tensor:
    """The vocabulary [V, D] and the learnable rows [8, D] -> [V + 8, D]."""
    return torch.cat([embedding, extra.to(embedding.dtype)])


# --- the name table: Meta's name, the official name, how parts hold it, what changes --------------

VISION = (
    ("class_embedding", "class_embedding", COPY),
    ("positional_embedding", "gated_positional_embedding.embedding", COPY),
    ("gated_positional_embedding_gate", "gated_positional_embedding.gate", COPY, first_element),
    ("gated_positional_embedding", "gated_positional_embedding.tile_embedding.weight", COPY, by_id),
    ("pre_tile_pos_embed.gate", "pre_tile_positional_embedding.gate", COPY, first_element),
    ("pre_tile_pos_embed.embedding", "pre_tile_positional_embedding.embedding.weight", COPY, by_id),
    ("post_tile_pos_embed.gate", "post_tile_positional_embedding.gate", COPY, first_element),
    (
        "post_tile_pos_embed.embedding",
        "post_tile_positional_embedding.embedding.weight",
        COPY,
        by_id,
    ),
    ("conv1._linear.weight", "patch_embedding.weight", COLUMN, patch_kernel),
    ("ln_pre.weight", "layernorm_pre.weight", COPY),
    ("ln_pre.bias", "layernorm_pre.bias", COPY),
    ("ln_post.weight", "layernorm_post.weight", COPY),
    ("ln_post.bias", "layernorm_post.bias", COPY),
)
VISION_BLOCK = (
    ("attn.wq.weight", "self_attn.q_proj.weight", COLUMN),
    ("attn.wk.weight", "self_attn.k_proj.weight", COLUMN),
    ("attn.wv.weight", "self_attn.v_proj.weight", COLUMN),
    ("attn.wo.weight", "self_attn.o_proj.weight", ROW),
    ("mlp.c_fc.weight", "mlp.fc1.weight", COLUMN),
    ("mlp.c_fc.bias", "mlp.fc1.bias", COLUMN),
    ("mlp.c_proj.weight", "mlp.fc2.weight", ROW),
    ("mlp.c_proj.bias", "mlp.fc2.bias", COPY),
    ("ln_1.weight", "input_layernorm.weight", COPY),
    ("ln_1.bias", "input_layernorm.bias", COPY),
    ("ln_2.weight", "post_attention_layernorm.weight", COPY),
    ("ln_2.bias", "post_attention_layernorm.bias", COPY),
)
VISION_GATES = (
    ("gate_attn", "gate_attn", COPY, first_element),
    ("gate_ffn", "gate_ffn", COPY, first_element),
)
TEXT_BLOCK = (
    ("attention_norm.weight", "input_layernorm.weight", COPY),
    ("ffn_norm.weight", "post_attention_layernorm.weight", COPY),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", COLUMN),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", ROW),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", COLUMN),
)
SELF_ATTENTION = (
    ("attention.wq.weight", "self_attn.q_proj.weight", COLUMN, rotary_halves),
    ("attention.wk.weight", "self_attn.k_proj.weight", COLUMN, rotary_halves),
    ("attention.wv.weight", "self_attn.v_proj.weight", COLUMN),
    ("attention.wo.weight", "self_attn.o_proj.weight", ROW),
)
CROSS_ATTENTION = (
    ("attention.wq.weight", "cross_attn.q_proj.weight", COLUMN),
    ("attention.wk.weight", "cross_attn.k_proj.weight", COLUMN),
    ("attention.wv.weight", "cross_attn.v_proj.weight", COLUMN),
    ("attention.wo.weight", "cross_attn.o_proj.weight", ROW),
    ("attention.q_norm.weight", "cross_attn.q_norm.weight", COPY),
    ("attention.k_norm.weight", "cross_attn.k_norm.weight", COPY),
    ("gate_attn", "cross_attn_attn_gate", COPY, first_element),
    ("gate_ffwd", "cross_attn_mlp_gate", COPY, first_element),
)
ENDS = (
    ("vision_model.vision_projection.weight", "multi_modal_projector.weight", COLUMN),
    ("vision_model.vision_projection.bias", "multi_modal_projector.bias", COLUMN),
    ("text_model.norm.weight", "language_model.model.norm.weight", COPY),
    ("text_model.output.weight", "language_model.lm_head.weight", COLUMN),
)
DERIVED = {"text_model.rope.freqs"}
"""Computed from params.json; some files hold it."""


@dataclass(frozen=True)
class Rule:
    """How one official tensor is made."""

    official: str
    sources: tuple[str, ...]
    join: int | None
    change: Callable[..., Tensor] = unchanged

    def make(self, config: Config, parts: Parts) -> Tensor:
        """Join the sources over the parts and change what has to change."""
        tensors = [[part[name] for part in parts] for name in self.sources]
        try:
            return self.change(config, *(self.joined(shares) for shares in tensors))
        except (RuntimeError, ValueError) as error:
            shapes = ", ".join(str(list(share.shape)) for shares in tensors for share in shares)
            raise ConversionError(
                f"{' and '.join(self.sources)}: {error} (shapes found: {shapes})"
            ) from None

    def joined(self, shares: list[Tensor]) -> Tensor:
        """One tensor of what the parts hold of it."""
        if self.join is COPY or len(shares) == 1:
            return shares[0]
        return torch.cat(shares, dim=self.join)


def name_table(config: Config) -> list[Rule]:
    """A rule for every official tensor, in the order in which they are written."""

    def add(meta: str, official: str, *tables: tuple) -> None:
        for table in tables:
            rules.extend(Rule(official + to, (meta + of,), *how) for of, to, *how in table)

    rules: list[Rule] = []
    add("vision_model.vision_encoder.", "vision_model.", VISION)
    stacks = (
        ("transformer", config.vision.num_hidden_layers, ()),
        ("global_transformer", config.vision.num_global_layers, VISION_GATES),
    )
    for stack, count, gates in stacks:
        for i in range(count):
            meta = f"vision_model.vision_encoder.{stack}.resblocks.{i}."
            add(meta, f"vision_model.{stack}.layers.{i}.", VISION_BLOCK, gates)
    embeddings = ("text_model.tok_embeddings.weight", "text_model.learnable_embedding.weight")
    rules.append(Rule("language_model.model.embed_tokens.weight", embeddings, COLUMN, append_rows))
    crosses = 0
    for layer in range(config.text.num_hidden_layers):
        official = f"language_model.model.layers.{layer}."
        if layer in config.text.cross_attention_layers:
            meta = f"text_model.cross_attention_layers.{crosses}."
            add(meta, official, TEXT_BLOCK, CROSS_ATTENTION)
            crosses += 1
        else:
            add(f"text_model.layers.{layer - crosses}.", official, TEXT_BLOCK, SELF_ATTENTION)
    add("", "", ENDS)
    return rules


# --- params.json -> config.json -------------------------------------------------------------------


def merged_cross_attention_layers(layers: int, crosses: int) -> tuple[int, ...]:
    """Where Meta's cross-attention blocks stand in one list: each before the block it is fused to.

    Source: CrossAttentionTransformerText._init_fusion_schedule; from the last block backwards.
    """
    fused = range(layers - 1, -1, -math.ceil(layers / crosses))[:crosses]
    return tuple(block + earlier for earlier, block in enumerate(sorted(fused)))


def read_config(path: Path, template: Config, dtype: torch.dtype) -> Config:
    """The configuration that a `params.json` describes.

    Args:
        path: of the file.
        template: gives what Meta writes into its code: the vision encoder's widths, token ids, ….
        dtype: of the tensors.

    Source: llama_models/llama3/args.py, ModelArgs, with its defaults; FeedForward for the width.
    """
    params = read_json(path, ConversionError)

    def number(name: str, default: float | None = None, kind: Any = int) -> Any:
        value = params.get(name)
        value = default if value is None else value
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not 0 < value < MOST:
            raise ConversionError(
                f"{shown(path)}: {name} is {quote(value)}, expected a positive number as in the "
                "params.json of a Llama 3.2 Vision model"
            )
        return value

    layers, heads, width = number("n_layers"), number("n_heads"), number("dim")
    crosses = number("vision_num_cross_attention_layers")
    if max(layers, crosses) > MOST_LAYERS:
        raise ConversionError(
            f"{shown(path)}: {layers} layers and {crosses} for images, expected {MOST_LAYERS} at "
            "most"
        )
    cross_attention_layers = merged_cross_attention_layers(layers, crosses)
    hidden = int(number("ffn_dim_multiplier", 1, (int, float)) * int(2 * 4 * width / 3))
    multiple = number("multiple_of", 256)
    text = replace(
        template.text,
        vocab_size=number("vocab_size"),
        hidden_size=width,
        intermediate_size=multiple * math.ceil(hidden / multiple),
        num_hidden_layers=layers + len(cross_attention_layers),
        num_attention_heads=heads,
        num_key_value_heads=number("n_kv_heads", heads),
        cross_attention_layers=cross_attention_layers,
        rms_norm_eps=float(number("norm_eps", 1e-5, (int, float))),
        rope_theta=float(number("rope_theta", 500_000.0, (int, float))),
        rope_scaling=template.text.rope_scaling if params.get("use_scaled_rope") else None,
    )
    vision = replace(
        template.vision,
        image_size=number("vision_chunk_size"),
        max_num_tiles=number("vision_max_num_chunks", 4),
    )
    return config_from_dict(config_to_dict(Config(vision, text, dtype)))  # which checks it


def generation_json(config: Config) -> dict[str, Any]:
    """The official `generation_config.json` of the Instruct models."""
    return {
        "bos_token_id": config.text.bos_token_id,
        "do_sample": True,
        "eos_token_id": list(config.text.eos_token_ids),
        "pad_token_id": config.text.pad_token_id,
        "temperature": 0.6,
        "top_p": 0.9,
    }


# --- reading and checking -------------------------------------------------------------------------


def find_parts(source: Path) -> list[Path]:
    """The checkpoint files of a directory, in the order of their numbers."""
    found = sorted(source.glob("consolidated*.pth"))
    if not found:
        raise ConversionError(
            f"{source} has no consolidated.pth or consolidated.00.pth; expected a directory as "
            "Meta publishes it ('original' in the Hugging Face repositories)"
        )
    names = [path.name for path in found]
    if names == ["consolidated.pth"]:
        return found
    last = re.fullmatch(r"consolidated\.(\d{2,3})\.pth", names[-1])
    expected = [f"consolidated.{i:02d}.pth" for i in range(int(last[1]) + 1 if last else 1)]
    if names != expected:
        ends = " to ".join(dict.fromkeys((expected[0], expected[-1])))
        raise ConversionError(
            f"{shown(source)} holds {some(names)}; expected {ends}, all the "
            "model-parallel parts of one model and nothing else"
        )
    return found


def load_part(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory."""
    try:
        state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # whatever the unpickler makes of a file that is none
        reason = printable(next(iter(str(error).splitlines()), type(error).__name__), 200)
        raise ConversionError(
            f"{shown(path)} cannot be loaded as PyTorch weights: {reason}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise ConversionError(f"{path} is no table of tensors; expected a model's state dict")
    return {name: tensor.detach() for name, tensor in state.items() if name not in DERIVED}


def check_names(rules: list[Rule], parts: Parts) -> None:
    """Every part has every tensor of the table, and no other."""
    expected = {name for rule in rules for name in rule.sources}
    problems = []
    for number, part in enumerate(parts):
        for kind, names in (
            ("unexpected", set(part) - expected),
            ("missing", expected - set(part)),
        ):
            problems.extend(f"part {number}: {kind} {name}" for name in sorted(names))
    if problems:
        raise ConversionError(f"tensor names are not those of the model: {some(problems)}")


def check_copies(rules: list[Rule], parts: Parts) -> None:
    """What every part has a copy of is the same in all of them."""
    copied = [name for rule in rules if rule.join is COPY for name in rule.sources]
    first, *others = parts
    differing = [
        name for name in copied if not all(torch.equal(first[name], part[name]) for part in others)
    ]
    if differing:
        raise ConversionError(
            "tensors that every model-parallel part has a copy of differ between the parts; are "
            f"they of one model? {some(differing)}"
        )


def plan(config: Config, rules: list[Rule], parts: Parts) -> dict[str, int]:
    """Bytes of each official tensor; a conversion without data proves that the model will fit."""
    shapes = [{name: tensor.to("meta") for name, tensor in part.items()} for part in parts]
    made = {rule.official: rule.make(config, shapes) for rule in rules}
    with torch.device("meta"):
        model = LlamaVisionModel(config)
    try:
        match_names(
            dict(model.named_parameters()),
            {name: Entry(Path(), tuple(tensor.shape), "F32", 0) for name, tensor in made.items()},
        )
    except CheckpointError as error:
        raise ConversionError(
            f"{error}. Model-parallel parts found: {len(parts)}; is one missing? Or "
            "is params.json of another model?"
        ) from None
    return {name: tensor.nbytes for name, tensor in made.items()}


# --- writing --------------------------------------------------------------------------------------


def convert(
    source: Path, target: Path, shard_size: int = 5 * 10**9, template: Config | None = None
) -> None:
    """Convert the checkpoint in `source`; the index is written last, and nothing loads without it.

    Args:
        source: a directory as Meta publishes it.
        target: a directory that does not exist or is empty.
        shard_size: most bytes of tensors in a file; a larger tensor gets a file of its own.
        template: what params.json does not say; that of the official models if not given.

    Raises:
        LlamaVisionError: the source is not complete, or the target cannot be written.
    """
    if find_spec("numpy") is None:
        raise ConversionError("writing safetensors needs NumPy; run: pip install numpy")
    paths = find_parts(source)
    for name in ("params.json", "tokenizer.model"):
        if not (source / name).is_file():
            raise ConversionError(f"{source} has no {name}; expected it beside {paths[0].name}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(
            f"{target} exists and is not an empty directory; name another one, or delete it "
            "(an interrupted conversion leaves shards without an index)"
        )
    parts = [load_part(path) for path in paths]
    embedding = parts[0].get("text_model.tok_embeddings.weight")
    dtype = torch.bfloat16 if embedding is None else embedding.dtype
    if dtype not in DTYPES.values():
        raise ConversionError(f"{paths[0]} stores {dtype}, expected one of {', '.join(DTYPES)}")
    config = read_config(source / "params.json", template or official_config("11b"), dtype)
    rules = name_table(config)
    check_names(rules, parts)
    sizes = plan(config, rules, parts)
    check_copies(rules, parts)

    target.mkdir(parents=True, exist_ok=True)
    total, free = sum(sizes.values()), shutil.disk_usage(target).free
    if free < total:
        raise ConversionError(f"{target} has room for {free:,} bytes, the model takes {total:,}")
    shards = split(sizes, shard_size)
    print(f"{len(rules)} tensors, {total:,} bytes, {len(shards)} shards", file=sys.stderr)
    make = {rule.official: rule.make for rule in rules}
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(target / file, {name: make[name](config, parts) for name in names})
        weight_map |= dict.fromkeys(names, file)
        print(f"{file}: {sum(sizes[name] for name in names):,} bytes", file=sys.stderr)
    write_json(target / "config.json", config_to_dict(config))
    write_json(target / "generation_config.json", generation_json(config))
    shutil.copyfile(source / "tokenizer.model", target / "tokenizer.model")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(target / "model.safetensors.index.json", index)


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in their order, as many to a shard as fit."""
    shards, used = [], limit
    for name, size in sizes.items():
        if used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one file of tensors."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConversionError(f"{path} cannot be written: {error}") from None


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def parse_size(text: str) -> int:
    """`"5GB"` -> 5,000,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?)B?", text.strip().upper())
    size = int(min(float(match[1]), 1e15) * 1000 ** " KMG".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(
            f"{quote(text)} is no size; expected one like 5GB or 500MB"
        )
    return size


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 if it could not be done."""
    parser = Parser(prog="convert_meta", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("source", type=Path, help="directory with consolidated*.pth")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--shard-size", type=parse_size, default="5GB", help="default: 5GB")

    def run() -> int:
        options = parser.parse_args(arguments)
        try:
            convert(options.source, options.target, options.shard_size)
        except OSError as error:
            raise ConversionError(str(error)) from None
        return 0

    return run_command("convert_meta", run)


if __name__ == "__main__":
    sys.exit(main())
