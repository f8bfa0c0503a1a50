"""`weights/convert_meta.py`: Meta's files become the official ones, bit for bit."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_vision import LlamaVision, Prompt
from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.loading import load_model
from llama_vision.config import official_config
from llama_vision.inputs.image import TiledImage

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "weights" / "convert_meta.py"

specification = importlib.util.spec_from_file_location("convert_meta", SCRIPT)
convert_meta = importlib.util.module_from_spec(specification)
sys.modules["convert_meta"] = convert_meta  # where dataclasses look their module up
specification.loader.exec_module(convert_meta)

# What Meta's params.json says of the tiny model and of the published ones.
COMMON = {
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vision_max_num_chunks": 4,
}
TINY = COMMON | {
    "dim": 64,
    "n_layers": 8,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "ffn_dim_multiplier": 0.75,
    "multiple_of": 32,
    "vision_chunk_size": 56,
    "vision_num_cross_attention_layers": 2,
}
PUBLISHED = COMMON | {
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "vision_chunk_size": 560,
}
PARAMS = {
    "11b": PUBLISHED
    | {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "multiple_of": 1024,
        "vision_num_cross_attention_layers": 8,
    },
    "90b": PUBLISHED
    | {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "multiple_of": 4096,
        "vision_num_cross_attention_layers": 20,
    },
}

# How fairscale's parallel layers, as Meta's model.py uses them, share tensors out over the parts.
SHARED_BY_ROWS = re.compile(
    r"(attention|attn)\.w[qkv]\.weight|feed_forward\.w[13]\.weight|mlp\.c_fc\.|conv1\._linear\."
    r"|vision_projection\.|tok_embeddings\.|learnable_embedding\.|text_model\.output\."
)
SHARED_BY_COLUMNS = re.compile(
    r"(attention|attn)\.wo\.weight|feed_forward\.w2\.weight|mlp\.c_proj\.weight"
)


# --- the inverse: official tensors in Meta's names and layout -------------------------------------


def as_meta(official):
    """The tiny model as Meta would store it in one file. Its cross-attention blocks are 3 and 8."""
    state = {}
    for name, tensor in official.items():
        for place, block in enumerate([3, 8]):
            name = name.replace(
                f"language_model.model.layers.{block}.",
                f"text_model.cross_attention_layers.{place}.",
            )
        for place, block in enumerate([0, 1, 2, 4, 5, 6, 7, 9]):
            name = name.replace(
                f"language_model.model.layers.{block}.", f"text_model.layers.{place}."
            )
        if name.startswith("vision_model."):
            add_meta_vision(state, name.removeprefix("vision_model."), tensor)
        else:
            add_meta_text(state, name, tensor)
    return state


def add_meta_vision(state, name, tensor):
    new = re.sub(r"transformer\.layers\.", "transformer.resblocks.", name)
    for mine, metas in {
        "patch_embedding.weight": "conv1._linear.weight",
        "gated_positional_embedding.gate": "gated_positional_embedding_gate",
        "gated_positional_embedding.embedding": "positional_embedding",
        "gated_positional_embedding.tile_embedding.weight": "gated_positional_embedding",
        "pre_tile_positional_embedding.embedding.weight": "pre_tile_pos_embed.embedding",
        "post_tile_positional_embedding.embedding.weight": "post_tile_pos_embed.embedding",
        "pre_tile_positional_embedding.gate": "pre_tile_pos_embed.gate",
        "post_tile_positional_embedding.gate": "post_tile_pos_embed.gate",
        "layernorm_pre": "ln_pre",
        "layernorm_post": "ln_post",
        "self_attn.q_proj": "attn.wq",
        "self_attn.k_proj": "attn.wk",
        "self_attn.v_proj": "attn.wv",
        "self_attn.o_proj": "attn.wo",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
    }.items():
        if re.search(rf"(^|\.){re.escape(mine)}($|\.)", new):
            new = new.replace(mine, metas)
            break
    if name == "patch_embedding.weight":
        tensor = tensor.reshape(len(tensor), -1)
    if name.endswith("embedding.weight") and "positional" in name:
        tensor = by_row_and_column(tensor, tokens=1 if "tile_positional" in name else 17)
    state["vision_model.vision_encoder." + new] = tensor


def by_row_and_column(by_id, tokens):
    """[9, 4 · tokens · 64] -> [4, 4, tokens, 64]; what no grid uses is noise."""
    grids = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    by_id = by_id.reshape(9, 4, tokens, 64)
    table = torch.randn(4, 4, tokens, 64).to(by_id.dtype)
    for aspect_id, (rows, cols) in enumerate(grids, start=1):
        for slot in range(rows * cols):
            table[slot // cols, slot % cols] = by_id[aspect_id, slot]
    return table


def add_meta_text(state, name, tensor):
    if name == "language_model.model.embed_tokens.weight":
        state["text_model.tok_embeddings.weight"] = tensor[:512].clone()
        state["text_model.learnable_embedding.weight"] = tensor[512:].clone()
        return
    if re.search(r"self_attn\.[qk]_proj", name):
        tensor = interleaved(tensor, head_dim=16)
    for mine, metas in {
        "language_model.model.norm": "text_model.norm",
        "language_model.lm_head": "text_model.output",
        "multi_modal_projector": "vision_model.vision_projection",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "cross_attn.q_proj": "attention.wq",
        "cross_attn.k_proj": "attention.wk",
        "cross_attn.v_proj": "attention.wv",
        "cross_attn.o_proj": "attention.wo",
        "cross_attn.q_norm": "attention.q_norm",
        "cross_attn.k_norm": "attention.k_norm",
        "cross_attn_attn_gate": "gate_attn",
        "cross_attn_mlp_gate": "gate_ffwd",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(mine, metas)
    state[name] = tensor


def interleaved(weight, head_dim):
    """Rows of each head from half-split to neighbouring pairs."""
    out = torch.empty_like(weight)
    for start in range(0, len(weight), head_dim):
        for i in range(head_dim // 2):
            out[start + 2 * i] = weight[start + i]
            out[start + 2 * i + 1] = weight[start + i + head_dim // 2]
    return out


def share_out(state, parts):
    """One file's tensors over several model-parallel files."""
    files = [{} for _ in range(parts)]
    for name, tensor in state.items():
        shares = [tensor] * parts
        if SHARED_BY_ROWS.search(name):
            shares = tensor.chunk(parts, dim=0)
        elif SHARED_BY_COLUMNS.search(name):
            shares = tensor.chunk(parts, dim=1)
        assert len(shares) == parts
        for file, share in zip(files, shares, strict=True):
            file[name] = share.clone()
    return files


def write_meta(directory, files, params=TINY, single="consolidated.00.pth"):
    directory.mkdir(exist_ok=True)
    names = [f"consolidated.{i:02d}.pth" for i in range(len(files))] if len(files) > 1 else [single]
    for name, file in zip(names, files, strict=True):
        torch.save(file, directory / name)
    (directory / "params.json").write_text(json.dumps(params))
    (directory / "tokenizer.model").write_bytes(b"a tokenizer")
    return directory


def load_directory(directory):
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


# --- the tiny model, there and back ---------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_directory():
    return Path(__file__).parent / "golden" / "tiny"


@pytest.fixture(scope="session")
def tiny_tensors(tiny_directory):
    return load_directory(tiny_directory)


@pytest.fixture(scope="session")
def tiny_config(tiny_directory):
    return read_config(tiny_directory)


@pytest.fixture
def source(tiny_tensors, tmp_path):
    return write_meta(tmp_path / "source", [as_meta(tiny_tensors)])


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_inverse_writes_the_names_and_shapes_of_metas_model(tiny_tensors):
    state = as_meta(tiny_tensors)
    assert {name: list(tensor.shape) for name, tensor in state.items()} == meta_shapes(
        TINY, width=64, hidden=256, layers=6, global_layers=2, taps=3, ffn=128
    )


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_every_tensor_comes_back_bit_for_bit(
    tiny_tensors, tiny_config, tiny_directory, tmp_path, parts
):
    source = write_meta(tmp_path / "source", share_out(as_meta(tiny_tensors), parts))
    target = tmp_path / "target"
    convert_meta.convert(source, target, template=tiny_config)
    assert_same(load_directory(target), tiny_tensors)
    assert read_config(target) == tiny_config
    assert (target / "tokenizer.model").read_bytes() == b"a tokenizer"
    expected = json.loads((tiny_directory / "generation_config.json").read_text())
    del expected["transformers_version"]
    assert json.loads((target / "generation_config.json").read_text()) == expected


def test_the_written_config_says_what_the_official_one_says(
    source, tiny_config, tiny_directory, tmp_path
):
    convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    official = json.loads((tiny_directory / "config.json").read_text())
    written = json.loads((tmp_path / "target" / "config.json").read_text())
    for section in ("text_config", "vision_config"):
        for field, value in written.pop(section).items():
            assert official[section][field] == value, field
    for field, value in written.items():
        assert official[field] == value, field


def test_logits_are_those_of_the_official_files(source, tiny_directory, tiny_config, tmp_path):
    convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    converted = logits(read_config(tmp_path / "target"), tmp_path / "target")
    assert torch.equal(converted, logits(tiny_config, tiny_directory))


def logits(config, directory):
    """Of a prompt with a 1 × 2 and a 2 × 2 image."""
    model = load_model(directory, config, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    images = [
        TiledImage(torch.randn(grid[0] * grid[1], 3, 56, 56), grid, config.vision.aspect_id(grid))
        for grid in [(1, 2), (2, 2)]
    ]
    return LlamaVision(model).logits(Prompt([500, 7, 512, 8, 9, 512, 10, 11], images))


def test_shards_keep_to_their_size_and_the_index_tells_where(
    source, tiny_tensors, tiny_config, tmp_path
):
    target = tmp_path / "target"
    convert_meta.convert(source, target, shard_size=400_000, template=tiny_config)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny_tensors.values())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 5
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    for file in files:
        tensors = load_file(target / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 400_000
        assert {name for name, where in index["weight_map"].items() if where == file} == set(
            tensors
        )
    assert_same(load_directory(target), tiny_tensors)


def test_a_tensor_larger_than_a_shard_has_a_shard_of_its_own():
    sizes = {"a": 3, "b": 9, "c": 2, "d": 2}
    assert convert_meta.split(sizes, 4) == [["a"], ["b"], ["c", "d"]]


def test_consolidated_without_a_number_and_bfloat16_stay_as_stored(
    tiny_tensors, tiny_config, tmp_path
):
    half = {name: tensor.bfloat16() for name, tensor in tiny_tensors.items()}
    source = write_meta(tmp_path / "source", [as_meta(half)], single="consolidated.pth")
    convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    assert_same(load_directory(tmp_path / "target"), half)
    assert read_config(tmp_path / "target").dtype == torch.bfloat16


def test_tensors_that_are_views_of_one_storage(tiny_tensors, tiny_config, tmp_path):
    state = as_meta(tiny_tensors)
    storage = torch.cat([tensor.flatten() for tensor in state.values()])
    slices = storage.split([tensor.numel() for tensor in state.values()])
    views = {name: view.view(state[name].shape) for name, view in zip(state, slices, strict=True)}
    views["text_model.output.weight"] = views["text_model.output.weight"].t().clone().t()
    source = write_meta(tmp_path / "source", [views])
    convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    assert_same(load_directory(tmp_path / "target"), tiny_tensors)


def test_gates_of_many_elements_become_one_and_derived_tensors_are_left_out(
    tiny_tensors, tiny_config, tmp_path
):
    state = as_meta(tiny_tensors)
    gates = [name for name in state if re.search(r"gate(_attn|_ffn|_ffwd)?$", name)]
    assert len(gates) == 3 + 2 * 2 + 2 * 2
    state |= {name: state[name].repeat(8) for name in gates}
    state["text_model.rope.freqs"] = torch.ones(8)
    source = write_meta(tmp_path / "source", [state])
    convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    assert_same(load_directory(tmp_path / "target"), tiny_tensors)


# --- the published sizes, without data ------------------------------------------------------------


def meta_shapes(params, width, hidden, layers, global_layers, taps, ffn):
    """Names and shapes of Meta's CrossAttentionTransformer, unshared, written from its source."""
    dim, vocabulary = params["dim"], params["vocab_size"]
    head = dim // params["n_heads"]
    keys = params["n_kv_heads"] * head
    tokens = (params["vision_chunk_size"] // 14) ** 2 + 1
    shapes = {
        "vision_model.vision_projection.weight": [dim, width * (1 + taps)],
        "vision_model.vision_projection.bias": [dim],
        "text_model.tok_embeddings.weight": [vocabulary, dim],
        "text_model.learnable_embedding.weight": [8, dim],
        "text_model.norm.weight": [dim],
        "text_model.output.weight": [vocabulary, dim],
    }
    encoder = "vision_model.vision_encoder."
    shapes |= {
        encoder + "class_embedding": [width],
        encoder + "positional_embedding": [tokens, width],
        encoder + "gated_positional_embedding": [4, 4, tokens, width],
        encoder + "gated_positional_embedding_gate": [1],
        encoder + "conv1._linear.weight": [width, 3 * 14 * 14],
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{encoder}{norm}.weight": [width], f"{encoder}{norm}.bias": [width]}
    for table in ("pre_tile_pos_embed", "post_tile_pos_embed"):
        shapes |= {f"{encoder}{table}.embedding": [4, 4, 1, width], f"{encoder}{table}.gate": [1]}
    for stack, count in (("transformer", layers), ("global_transformer", global_layers)):
        for i in range(count):
            block = f"{encoder}{stack}.resblocks.{i}."
            shapes |= {f"{block}attn.w{letter}.weight": [width, width] for letter in "qkvo"}
            shapes |= {
                f"{block}ln_{n}.{kind}": [width] for n in "12" for kind in ("weight", "bias")
            }
            shapes |= {
                block + "mlp.c_fc.weight": [hidden, width],
                block + "mlp.c_fc.bias": [hidden],
                block + "mlp.c_proj.weight": [width, hidden],
                block + "mlp.c_proj.bias": [width],
            }
            if stack == "global_transformer":
                shapes |= {block + "gate_attn": [1], block + "gate_ffn": [1]}
    crosses = params["vision_num_cross_attention_layers"]
    for stack, count in (("layers", params["n_layers"]), ("cross_attention_layers", crosses)):
        for i in range(count):
            block = f"text_model.{stack}.{i}."
            shapes |= {
                block + "attention.wq.weight": [dim, dim],
                block + "attention.wk.weight": [keys, dim],
                block + "attention.wv.weight": [keys, dim],
                block + "attention.wo.weight": [dim, dim],
                block + "feed_forward.w1.weight": [ffn, dim],
                block + "feed_forward.w2.weight": [dim, ffn],
                block + "feed_forward.w3.weight": [ffn, dim],
                block + "attention_norm.weight": [dim],
                block + "ffn_norm.weight": [dim],
            }
            if stack == "cross_attention_layers":
                shapes |= {f"{block}attention.{letter}_norm.weight": [head] for letter in "qk"}
                shapes |= {block + "gate_attn": [1], block + "gate_ffwd": [1]}
    return shapes


@pytest.mark.parametrize(("name", "parts"), [("11b", 1), ("11b", 8), ("90b", 8)])
def test_published_sizes_become_the_official_names_and_shapes(name, parts, tmp_path):
    whole = {
        tensor: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for tensor, shape in meta_shapes(
            PARAMS[name],
            width=1280,
            hidden=5120,
            layers=32,
            global_layers=8,
            taps=5,
            ffn={"11b": 14336, "90b": 28672}[name],
        ).items()
    }
    files = share_out(whole, parts)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS[name]))
    config = convert_meta.read_config(
        tmp_path / "params.json", official_config("11b"), torch.bfloat16
    )
    assert config == official_config(name)
    rules = convert_meta.name_table(config)
    convert_meta.check_names(rules, files)
    sizes = convert_meta.plan(config, rules, files)
    official = json.loads((ROOT / "tests/golden/official" / f"{name}.json").read_text())
    assert {rule.official: list(rule.make(config, files).shape) for rule in rules} == official
    assert sum(sizes.values()) == 2 * sum(torch.Size(shape).numel() for shape in official.values())


@pytest.mark.parametrize(
    ("layers", "crosses", "merged"),
    [
        (8, 2, (3, 8)),
        (10, 3, (1, 6, 11)),
        (32, 8, tuple(range(3, 40, 5))),
        (80, 20, tuple(range(3, 100, 5))),
        (10, 6, (1, 4, 7, 10, 13)),  # Meta's schedule then has five entries
    ],
)
def test_cross_attention_blocks_stand_where_metas_schedule_runs_them(layers, crosses, merged):
    assert convert_meta.merged_cross_attention_layers(layers, crosses) == merged


# --- what cannot be converted ---------------------------------------------------------------------


def refused(source, target, template=None):
    with pytest.raises(convert_meta.ConversionError) as caught:
        convert_meta.convert(source, target, template=template)
    assert not (target / "model.safetensors.index.json").exists()
    return str(caught.value)


@pytest.mark.parametrize("missing", ["params.json", "tokenizer.model"])
def test_a_file_beside_the_weights_is_missing(source, tmp_path, missing):
    (source / missing).unlink()
    assert f"has no {missing}" in refused(source, tmp_path / "target")


def test_a_directory_without_weights(tmp_path):
    message = refused(tmp_path / "nowhere", tmp_path / "target")
    assert "nowhere has no consolidated.pth or consolidated.00.pth" in message


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_part_is_named(tiny_tensors, tmp_path, number):
    source = write_meta(tmp_path / "source", share_out(as_meta(tiny_tensors), 4))
    (source / f"consolidated.{number:02d}.pth").unlink()
    message = refused(source, tmp_path / "target")
    assert "expected consolidated.00.pth, consolidated.01.pth, consolidated.02.pth, " in message
    assert "consolidated.03.pth, all the model-parallel parts" in message


def test_a_missing_last_part_shows_in_the_shapes(tiny_tensors, tiny_config, tmp_path):
    source = write_meta(tmp_path / "source", share_out(as_meta(tiny_tensors), 2))
    (source / "consolidated.01.pth").unlink()
    message = refused(source, tmp_path / "target", tiny_config)
    assert "patch_embedding.weight [32, 3, 14, 14] instead of [64, 3, 14, 14]" in message
    assert "Model-parallel parts found: 1; is one missing?" in message


def test_a_whole_file_beside_parts_is_ambiguous(source, tmp_path):
    (source / "consolidated.pth").write_bytes(b"")
    assert "holds consolidated.00.pth, consolidated.pth; expected" in refused(
        source, tmp_path / "target"
    )


def test_names_that_are_missing_or_unexpected_are_listed(tiny_tensors, tiny_config, tmp_path):
    files = share_out(as_meta(tiny_tensors), 2)
    files[1]["text_model.layers.8.attention.wq.weight"] = torch.zeros(1)
    del files[0]["text_model.cross_attention_layers.1.gate_ffwd"]
    message = refused(write_meta(tmp_path / "source", files), tmp_path / "target", tiny_config)
    assert "tensor names are not those of the model" in message
    assert "part 0: missing text_model.cross_attention_layers.1.gate_ffwd" in message
    assert "part 1: unexpected text_model.layers.8.attention.wq.weight" in message


def test_a_long_list_is_cut_short(tmp_path):
    source = write_meta(tmp_path / "source", [{"weight": torch.zeros(1)}])
    message = refused(source, tmp_path / "target")
    assert "… and " in message
    assert len(message.splitlines()) < 50


def test_parts_of_different_models_are_refused(tiny_tensors, tiny_config, tmp_path):
    files = share_out(as_meta(tiny_tensors), 2)
    files[1]["text_model.norm.weight"] += 1
    message = refused(write_meta(tmp_path / "source", files), tmp_path / "target", tiny_config)
    assert "differ between the parts; are they of one model?\n  text_model.norm.weight" in message
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("shape", [[64], [63, 64], [64, 63]])
def test_a_wrong_shape_is_named(tiny_tensors, tiny_config, tmp_path, shape):
    state = as_meta(tiny_tensors) | {"text_model.layers.0.attention.wq.weight": torch.zeros(shape)}
    message = refused(write_meta(tmp_path / "source", [state]), tmp_path / "target", tiny_config)
    assert re.search(r"layers\.0\.(attention\.wq|self_attn\.q_proj)\.weight", message)
    assert str(shape) in message


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02cos\nsystem\n."])
def test_a_damaged_file_is_named(source, tmp_path, content):
    (source / "consolidated.00.pth").write_bytes(content)
    message = refused(source, tmp_path / "target")
    assert "consolidated.00.pth cannot be loaded as PyTorch weights" in message


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"weight": 1}])
def test_a_file_of_something_else_is_named(source, tmp_path, content):
    torch.save(content, source / "consolidated.00.pth")
    assert "is no table of tensors" in refused(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, expected a JSON object"),
        (json.dumps({"dim": 64}), "n_layers is None, expected a positive number"),
        (json.dumps(TINY | {"dim": "64"}), "dim is '64', expected a positive number"),
        (json.dumps(TINY | {"n_heads": 3}), "num_attention_heads is 3, expected a divisor"),
    ],
)
def test_bad_params_are_named(source, tiny_config, tmp_path, content, message):
    (source / "params.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_meta.convert(source, tmp_path / "target", template=tiny_config)
    assert not (tmp_path / "target").exists()


def test_nothing_is_written_over(source, tiny_config, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine").write_text("precious")
    assert "is not an empty directory" in refused(source, target, tiny_config)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert "is not an empty directory" in refused(source, target / "mine", tiny_config)


def test_a_full_disk_is_noticed_before_writing(source, tiny_config, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(convert_meta.shutil, "disk_usage", lambda path: usage)
    assert "has room for 1,000 bytes" in refused(source, tmp_path / "target", tiny_config)
    assert not list((tmp_path / "target").iterdir())


def test_an_interrupted_conversion_does_not_look_complete(
    source, tiny_config, tmp_path, monkeypatch
):
    save_file, saved = convert_meta.save_file, []

    def fails_at_the_second(tensors, path, **options):
        if saved:
            raise OSError("no space left on device")
        saved.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(convert_meta, "save_file", fails_at_the_second)
    target = tmp_path / "target"
    with pytest.raises(convert_meta.ConversionError, match="cannot be written: no space left"):
        convert_meta.convert(source, target, shard_size=400_000, template=tiny_config)
    assert [path.suffix for path in target.iterdir()] == [".safetensors"]


# --- the command ----------------------------------------------------------------------------------


def run(*arguments, directory):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, cwd=directory
    )


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    done = run("source", "target", directory=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("convert_meta: source has no consolidated.pth")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_command_converts_and_tells_its_progress(
    source, tiny_tensors, tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(convert_meta, "official_config", lambda name: tiny_config)
    assert convert_meta.main([str(source), str(tmp_path / "target"), "--shard-size", "2MB"]) == 0
    assert_same(load_directory(tmp_path / "target"), tiny_tensors)
    assert "model-00002-of-00002.safetensors: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 500 * 10**6), ("1.5 G", 1_500_000_000), ("12", 12)],
)
def test_shard_sizes(text, size):
    assert convert_meta.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "five", "5TB"])
def test_shard_sizes_that_are_none(text, capsys):
    with pytest.raises(SystemExit) as ended:
        convert_meta.main(["source", "target", f"--shard-size={text}"])
    assert ended.value.code == 2
    assert "is no size; expected one like 5GB" in capsys.readouterr().err
