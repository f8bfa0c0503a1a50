"""`weights/convert_meta.py`: Meta's files become the official ones, bit for bit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, golden_json
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "weights"))

import convert_meta

from llama_vision import LlamaVision, Prompt
from llama_vision.checkpoint.config_json import read_config
from llama_vision.checkpoint.loading import load_model
from llama_vision.config import official_config
from llama_vision.inputs.image import TiledImage

PART, INDEX = "consolidated.00.pth", "model.safetensors.index.json"
TINY_CONFIG = read_config(TINY)

# What Meta's params.json says of the tiny model and of the published ones.
FIELDS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier"),
    *("multiple_of", "vision_chunk_size", "vision_num_cross_attention_layers"),
    *("norm_eps", "rope_theta", "use_scaled_rope", "vision_max_num_chunks"),
)
PARAMS = {
    name: dict(zip(FIELDS, values, strict=True))
    for name, *values in (
        ("tiny", 64, 8, 4, 2, 512, 0.75, 32, 56, 2, 1e-05, 500000.0, True, 4),
        ("11b", 4096, 32, 32, 8, 128256, 1.3, 1024, 560, 8, 1e-05, 500000.0, True, 4),
        ("90b", 8192, 80, 64, 8, 128256, 1.3, 4096, 560, 20, 1e-05, 500000.0, True, 4),
    )
}
TINY_PARAMS = PARAMS["tiny"]

# How fairscale's parallel layers, as Meta's model.py uses them, share tensors out over the parts.
SHARED_BY_ROWS = re.compile(
    r"(attention|attn)\.w[qkv]\.weight|feed_forward\.w[13]\.weight|mlp\.c_fc\.|conv1\._linear\."
    r"|vision_projection\.|tok_embeddings\.|learnable_embedding\.|text_model\.output\."
)
SHARED_BY_COLUMNS = re.compile(r"(attention|attn)\.wo|feed_forward\.w2|mlp\.c_proj\.weight")

# The inverse: official names, and what stands in Meta's in their place.
VISION_NAMES = {
    "^vision_model": "vision_model.vision_encoder",
    r"transformer\.layers": "transformer.resblocks",
    r"patch_embedding\.weight": "conv1._linear.weight",
    r"gated_positional_embedding\.gate": "gated_positional_embedding_gate",
    r"gated_positional_embedding\.embedding": "positional_embedding",
    r"gated_positional_embedding\.tile_embedding\.weight": "gated_positional_embedding",
    r"(pre|post)_tile_positional_embedding\.gate": r"\1_tile_pos_embed.gate",
    r"(pre|post)_tile_positional_embedding\.embedding\.weight": r"\1_tile_pos_embed.embedding",
    r"layernorm_(pre|post)": r"ln_\1",
    r"self_attn\.([qkvo])_proj": r"attn.w\1",
    r"mlp\.fc1": "mlp.c_fc",
    r"mlp\.fc2": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
}
BLOCK, SELF_ATTENTION = r"language_model\.model\.layers", (0, 1, 2, 4, 5, 6, 7, 9)
TEXT_NAMES = {
    **{rf"{BLOCK}\.{at}\.": f"text_model.layers.{i}." for i, at in enumerate(SELF_ATTENTION)},
    rf"{BLOCK}\.3\.": "text_model.cross_attention_layers.0.",
    rf"{BLOCK}\.8\.": "text_model.cross_attention_layers.1.",
    r"language_model\.model\.norm": "text_model.norm",
    r"language_model\.lm_head": "text_model.output",
    "multi_modal_projector": "vision_model.vision_projection",
    r"(self|cross)_attn\.([qkvo])_proj": r"attention.w\2",
    r"cross_attn\.([qk])_norm": r"attention.\1_norm",
    "cross_attn_attn_gate": "gate_attn",
    "cross_attn_mlp_gate": "gate_ffwd",
    r"mlp\.gate_proj": "feed_forward.w1",
    r"mlp\.down_proj": "feed_forward.w2",
    r"mlp\.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def as_meta(official):
    """The tiny model as Meta would store it in one file."""
    state = {}
    for name, tensor in official.items():
        vision = name.startswith("vision_model.")
        if name == "vision_model.patch_embedding.weight":
            tensor = tensor.reshape(len(tensor), -1)
        elif re.search(r"positional_embedding\..*embedding\.weight", name):
            tensor = by_row_and_column(tensor, tokens=1 if "tile_positional" in name else 17)
        elif not vision and re.search(r"self_attn\.[qk]_proj", name):
            tensor = interleaved(tensor, head_dim=16)
        for pattern, metas in (VISION_NAMES if vision else TEXT_NAMES).items():
            name = re.sub(pattern, metas, name)
        state[name] = tensor
    embeddings = state.pop("language_model.model.embed_tokens.weight")
    state["text_model.tok_embeddings.weight"] = embeddings[:512].clone()
    state["text_model.learnable_embedding.weight"] = embeddings[512:].clone()
    return state


def by_row_and_column(by_id, tokens):
    """[9, 4 · tokens · 64] -> [4, 4, tokens, 64]; what no grid uses is noise."""
    grids = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    by_id = by_id.reshape(9, 4, tokens, 64)
    table = torch.randn(4, 4, tokens, 64).to(by_id.dtype)
    for aspect_id, (rows, cols) in enumerate(grids, start=1):
        for slot in range(rows * cols):
            table[divmod(slot, cols)] = by_id[aspect_id, slot]
    return table


def interleaved(weight, head_dim):
    """Rows of each head from half-split to neighbouring pairs."""
    heads, half = weight.unflatten(0, (-1, head_dim)), head_dim // 2
    return torch.stack([heads[:, :half], heads[:, half:]], dim=2).flatten(0, 2)


def share_out(state, parts):
    """One file's tensors over several model-parallel files."""
    files = [{} for _ in range(parts)]
    for name, tensor in state.items():
        shares = [tensor] * parts
        if SHARED_BY_ROWS.search(name):
            shares = tensor.chunk(parts, dim=0)
        elif SHARED_BY_COLUMNS.search(name):
            shares = tensor.chunk(parts, dim=1)
        for file, share in zip(files, shares, strict=True):
            file[name] = share.clone()
    return files


def write_meta(source, *files):
    source.mkdir()
    for number, file in enumerate(files):
        torch.save(file, source / f"consolidated.{number:02d}.pth")
    (source / "params.json").write_text(json.dumps(TINY_PARAMS))
    (source / "tokenizer.model").write_bytes(b"a tokenizer")
    return source


def load_directory(directory):
    shards = map(load_file, directory.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in shard.items()}


OFFICIAL = load_directory(TINY)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.fixture
def source(tmp_path):
    return write_meta(tmp_path / "source", as_meta(OFFICIAL))


def convert(source, target, **how):
    convert_meta.convert(source, target, template=TINY_CONFIG, **how)


def assert_holds(target, expected=OFFICIAL):
    found = load_directory(target)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_the_inverse_writes_the_names_and_shapes_of_metas_model():
    sizes = {"width": 64, "hidden": 256, "layers": 6, "global_layers": 2, "taps": 3, "ffn": 128}
    shapes = {name: list(tensor.shape) for name, tensor in as_meta(OFFICIAL).items()}
    assert shapes == meta_shapes(TINY_PARAMS, **sizes)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, target, parts):
    convert(write_meta(tmp_path / "source", *share_out(as_meta(OFFICIAL), parts)), target)
    assert_holds(target)
    assert read_config(target) == TINY_CONFIG
    assert (target / "tokenizer.model").read_bytes() == b"a tokenizer"
    expected = json.loads((TINY / "generation_config.json").read_text())
    del expected["transformers_version"]
    assert json.loads((target / "generation_config.json").read_text()) == expected


def test_the_written_config_says_what_the_official_one_says(source, target):
    convert(source, target)
    official, written = (json.loads((d / "config.json").read_text()) for d in (TINY, target))
    for section in ("text_config", "vision_config"):
        assert written.pop(section).items() <= official[section].items()
    assert written.items() <= official.items()


def test_logits_are_those_of_the_official_files(source, target):
    convert(source, target)
    assert torch.equal(logits(read_config(target), target), logits(TINY_CONFIG, TINY))


def logits(config, directory):
    """Of a prompt with a 1 × 2 and a 2 × 2 image."""
    model = load_model(directory, config, device=torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    images = [
        TiledImage(torch.randn(grid[0] * grid[1], 3, 56, 56), grid, config.vision.aspect_id(grid))
        for grid in [(1, 2), (2, 2)]
    ]
    return LlamaVision(model).logits(Prompt([500, 7, 512, 8, 9, 512, 10, 11], images))


def test_shards_keep_to_their_size_and_the_index_tells_where(source, target):
    convert(source, target, shard_size=400_000)
    assert_holds(target)
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in OFFICIAL.values())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    count = len(files)
    assert count > 5
    assert files == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file in files:
        tensors = load_file(target / file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 400_000
        assert {name for name, at in index["weight_map"].items() if at == file} == set(tensors)


def test_a_tensor_larger_than_a_shard_has_a_shard_of_its_own():
    sizes = {"a": 3, "b": 9, "c": 2, "d": 2}
    assert convert_meta.split(sizes, 4) == [["a"], ["b"], ["c", "d"]]


def test_consolidated_without_a_number_and_bfloat16_stay_as_stored(tmp_path, target):
    half = {name: tensor.bfloat16() for name, tensor in OFFICIAL.items()}
    source = write_meta(tmp_path / "source", as_meta(half))
    (source / PART).rename(source / "consolidated.pth")
    convert(source, target)
    assert_holds(target, half)
    assert read_config(target).dtype == torch.bfloat16


def test_tensors_that_are_views_of_one_storage(tmp_path, target):
    state = as_meta(OFFICIAL)
    storage = torch.cat([tensor.flatten() for tensor in state.values()])
    slices = storage.split([tensor.numel() for tensor in state.values()])
    views = {name: view.view(state[name].shape) for name, view in zip(state, slices, strict=True)}
    views["text_model.output.weight"] = views["text_model.output.weight"].t().clone().t()
    convert(write_meta(tmp_path / "source", views), target)
    assert_holds(target)


def test_gates_of_many_elements_become_one_and_derived_tensors_are_left_out(tmp_path, target):
    state = as_meta(OFFICIAL)
    gates = [name for name in state if re.search(r"gate(_attn|_ffn|_ffwd)?$", name)]
    assert len(gates) == 3 + 2 * 2 + 2 * 2
    state |= {name: state[name].repeat(8) for name in gates}
    state["text_model.rope.freqs"] = torch.ones(8)
    convert(write_meta(tmp_path / "source", state), target)
    assert_holds(target)


def meta_shapes(params, width, hidden, layers, global_layers, taps, ffn):
    """Names and shapes of Meta's CrossAttentionTransformer, unshared, written from its source."""
    dim, vocabulary = params["dim"], params["vocab_size"]
    head = dim // params["n_heads"]
    keys = params["n_kv_heads"] * head
    tokens = (params["vision_chunk_size"] // 14) ** 2 + 1
    encoder = "vision_model.vision_encoder."
    shapes = {
        "vision_model.vision_projection.weight": [dim, width * (1 + taps)],
        "vision_model.vision_projection.bias": [dim],
        "text_model.tok_embeddings.weight": [vocabulary, dim],
        "text_model.learnable_embedding.weight": [8, dim],
        "text_model.norm.weight": [dim],
        "text_model.output.weight": [vocabulary, dim],
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
            at = f"{encoder}{stack}.resblocks.{i}."
            shapes |= {f"{at}attn.w{letter}.weight": [width, width] for letter in "qkvo"}
            shapes |= {f"{at}ln_{n}.{kind}": [width] for n in "12" for kind in ("weight", "bias")}
            shapes |= {at + "mlp.c_fc.weight": [hidden, width], at + "mlp.c_fc.bias": [hidden]}
            shapes |= {at + "mlp.c_proj.weight": [width, hidden], at + "mlp.c_proj.bias": [width]}
            if stack == "global_transformer":
                shapes |= {at + "gate_attn": [1], at + "gate_ffn": [1]}
    crosses = params["vision_num_cross_attention_layers"]
    for stack, count in (("layers", params["n_layers"]), ("cross_attention_layers", crosses)):
        for i in range(count):
            at = f"text_model.{stack}.{i}."
            shapes |= {f"{at}attention.w{letter}.weight": [dim, dim] for letter in "qo"}
            shapes |= {f"{at}attention.w{letter}.weight": [keys, dim] for letter in "kv"}
            shapes |= {f"{at}feed_forward.w{n}.weight": [ffn, dim] for n in "13"}
            shapes |= {at + "feed_forward.w2.weight": [dim, ffn]}
            shapes |= {at + "attention_norm.weight": [dim], at + "ffn_norm.weight": [dim]}
            if stack == "cross_attention_layers":
                shapes |= {f"{at}attention.{letter}_norm.weight": [head] for letter in "qk"}
                shapes |= {at + "gate_attn": [1], at + "gate_ffwd": [1]}
    return shapes


@pytest.mark.parametrize(("name", "parts"), [("11b", 1), ("11b", 8), ("90b", 8)])
def test_published_sizes_become_the_official_names_and_shapes(name, parts, tmp_path):
    sizes = {"width": 1280, "hidden": 5120, "layers": 32, "global_layers": 8, "taps": 5}
    shapes = meta_shapes(PARAMS[name], **sizes, ffn={"11b": 14336, "90b": 28672}[name])
    with torch.device("meta"):
        whole = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    files = share_out(whole, parts)
    path = tmp_path / "params.json"
    path.write_text(json.dumps(PARAMS[name]))
    config = convert_meta.read_config(path, official_config("11b"), torch.bfloat16)
    assert config == official_config(name)
    rules = convert_meta.name_table(config)
    convert_meta.check_names(rules, files)
    sizes = convert_meta.plan(config, rules, files)
    official = golden_json(f"official/{name}")
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


def refused(source, target):
    with pytest.raises(convert_meta.ConversionError) as caught:
        convert(source, target)
    assert not (target / INDEX).exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("params.json", None, "has no params.json"),
        ("tokenizer.model", None, "has no tokenizer.model"),
        ("consolidated.pth", b"", "holds consolidated.00.pth, consolidated.pth; expected"),
        (PART, b"", f"{PART} cannot be loaded as PyTorch weights"),
        (PART, b"not a checkpoint", f"{PART} cannot be loaded as PyTorch weights"),
        (PART, b"\x80\x02cos\nsystem\n.", f"{PART} cannot be loaded as PyTorch weights"),
        (PART, [torch.zeros(1)], "is no table of tensors"),
        (PART, {"weight": 1}, "is no table of tensors"),
    ],
)
def test_a_missing_ambiguous_or_damaged_file_is_named(source, target, name, content, says):
    if content is None:
        (source / name).unlink()
    elif isinstance(content, bytes):
        (source / name).write_bytes(content)
    else:
        torch.save(content, source / name)
    assert says in refused(source, target)


def test_a_directory_without_weights(tmp_path, target):
    message = refused(tmp_path / "nowhere", target)
    assert "nowhere has no consolidated.pth or consolidated.00.pth" in message


@pytest.mark.parametrize("number", [0, 1])
def test_a_missing_part_is_named(tmp_path, target, number):
    source = write_meta(tmp_path / "source", *share_out(as_meta(OFFICIAL), 4))
    (source / f"consolidated.{number:02d}.pth").unlink()
    message = refused(source, target)
    assert "expected consolidated.00.pth to consolidated.03.pth, " in message
    assert "consolidated.03.pth, all the model-parallel parts" in message


def test_a_missing_last_part_shows_in_the_shapes(tmp_path, target):
    first, _ = share_out(as_meta(OFFICIAL), 2)
    message = refused(write_meta(tmp_path / "source", first), target)
    assert "patch_embedding.weight [32, 3, 14, 14] instead of [64, 3, 14, 14]" in message
    assert "Model-parallel parts found: 1; is one missing?" in message


def test_names_that_are_missing_or_unexpected_are_listed(tmp_path, target):
    files = share_out(as_meta(OFFICIAL), 2)
    files[1]["text_model.layers.8.attention.wq.weight"] = torch.zeros(1)
    del files[0]["text_model.cross_attention_layers.1.gate_ffwd"]
    message = refused(write_meta(tmp_path / "source", *files), target)
    assert "tensor names are not those of the model" in message
    assert "part 0: missing text_model.cross_attention_layers.1.gate_ffwd" in message
    assert "part 1: unexpected text_model.layers.8.attention.wq.weight" in message


def test_a_long_list_is_cut_short(tmp_path, target):
    message = refused(write_meta(tmp_path / "source", {"weight": torch.zeros(1)}), target)
    assert re.search(r"unexpected weight, part 0: missing .*, and \d+ more$", message)


def test_parts_of_different_models_are_refused(tmp_path, target):
    files = share_out(as_meta(OFFICIAL), 2)
    files[1]["text_model.norm.weight"] += 1
    message = refused(write_meta(tmp_path / "source", *files), target)
    assert "differ between the parts; are they of one model? text_model.norm.weight" in message
    assert not target.exists()


@pytest.mark.parametrize("shape", [[64], [63, 64], [64, 63]])
def test_a_wrong_shape_is_named(tmp_path, target, shape):
    state = as_meta(OFFICIAL) | {"text_model.layers.0.attention.wq.weight": torch.zeros(shape)}
    message = refused(write_meta(tmp_path / "source", state), target)
    assert re.search(r"layers\.0\.(attention\.wq|self_attn\.q_proj)\.weight", message)
    assert str(shape) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, expected a JSON object"),
        (json.dumps({"dim": 64}), "n_layers is None, expected a positive number"),
        (json.dumps(TINY_PARAMS | {"dim": "64"}), "dim is '64', expected a positive number"),
        (json.dumps(TINY_PARAMS | {"n_heads": 3}), "num_attention_heads is 3, expected a divisor"),
        (json.dumps(TINY_PARAMS | {"n_layers": 10**9}), "1000000000 layers and 2 for images"),
        (json.dumps(TINY_PARAMS | {"n_layers": 10**4000}), "n_layers is 1000000"),
        (json.dumps(TINY_PARAMS | {"norm_eps": float("inf")}), "norm_eps is inf"),
        (json.dumps(TINY_PARAMS | {"ffn_dim_multiplier": 1e300}), "ffn_dim_multiplier is 1e+300"),
        ("[" * 10**5, "nested too deeply"),
    ],
)
def test_bad_params_are_named(source, target, content, message):
    (source / "params.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, target)
    assert not target.exists()


def test_nothing_is_written_over(source, target):
    target.mkdir()
    (target / "mine").write_text("precious")
    assert "is not an empty directory" in refused(source, target)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert "is not an empty directory" in refused(source, target / "mine")


def test_a_full_disk_is_noticed_before_writing(source, target, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(convert_meta.shutil, "disk_usage", lambda path: usage)
    assert "has room for 1,000 bytes" in refused(source, target)
    assert not list(target.iterdir())


def test_an_interrupted_conversion_does_not_look_complete(source, target, monkeypatch):
    save_file, saved = convert_meta.save_file, []

    def fails_at_the_second(tensors, path, **options):
        if saved:
            raise OSError("no space left on device")
        saved.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(convert_meta, "save_file", fails_at_the_second)
    with pytest.raises(convert_meta.ConversionError, match="cannot be written: no space left"):
        convert(source, target, shard_size=400_000)
    assert [path.suffix for path in target.iterdir()] == [".safetensors"]


def test_the_command_says_what_is_wrong_without_a_traceback(tmp_path):
    command = [sys.executable, convert_meta.__file__, "source", "target"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("convert_meta: source has no consolidated.pth")
    assert "Traceback" not in done.stderr


def test_the_command_converts_and_tells_its_progress(source, target, monkeypatch, capsys):
    monkeypatch.setattr(convert_meta, "official_config", lambda name: TINY_CONFIG)
    assert convert_meta.main([str(source), str(target), "--shard-size", "2MB"]) == 0
    assert_holds(target)
    assert "model-00002-of-00002.safetensors: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 500 * 10**6), ("1.5 G", 1_500_000_000), ("12", 12)],
)
def test_shard_sizes(text, size):
    assert convert_meta.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "five", "5TB"])
def test_shard_sizes_that_are_none(text, capsys):
    assert convert_meta.main(["source", "target", f"--shard-size={text}"]) == 2
    assert "is no size; expected one like 5GB" in capsys.readouterr().err
