"""LoRA: adapters that peft itself wrote, merged to the weights that peft merges them to."""

import json
import shutil
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import TINY, assert_close
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from stub_hub import REPO, StubHub
from test_unsupported import refusal
from torch import Tensor
from transformers import MllamaForConditionalGeneration

from llama_vision.checkpoint.adapter import Adapter, find_adapter, read_adapter
from llama_vision.checkpoint.adapter_json import Settings, read_settings
from llama_vision.checkpoint.adapter_names import find_parts
from llama_vision.checkpoint.files import Entry, read_headers
from llama_vision.checkpoint.names import NAME_TABLE

BASE = "meta-llama/Llama-3.2-11B-Vision"
NAMES = ["adapter_config.json", "adapter_model.safetensors"]
EVERYWHERE = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
    *("multi_modal_projector", "lm_head", "patch_embedding"),
]
Q_OF_TEXT = "model.language_model.layers.{}.self_attn.q_proj"


@cache
def peer() -> MllamaForConditionalGeneration:
    return MllamaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)


def ours(name: str) -> str:
    """A newer official name of a parameter, as our tree has it."""
    row = next(row for row in NAME_TABLE if name.startswith(row[2]))
    return row[0] + name.removeprefix(row[2])


@cache
def base() -> dict[str, Tensor]:
    """The weights of the model, by our names."""
    return {ours(name): tensor.detach() for name, tensor in peer().named_parameters()}


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in base().items()}


def write_adapter(
    directory: Path, *, embeddings: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """Have peft write an adapter of random numbers; what it merges the weights to, by our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(deepcopy(peer()), LoraConfig(**settings))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.1 if "lora_" in name and "magnitude" not in name else 0.01
                parameter.data = scale * noise + ("lora_" not in name or "magn" in name) * (
                    parameter.data
                )
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained(directory, save_embedding_layers=embeddings)
        merged = model.merge_and_unload()
    return {ours(name): tensor.detach() for name, tensor in merged.named_parameters()}


def rename(directory: Path, change: Callable[[str], str]) -> None:
    path = directory / NAMES[1]
    save_file({change(name): tensor for name, tensor in load_file(path).items()}, path)


def edit(directory: Path, **fields: Any) -> None:
    path = directory / NAMES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def merged(adapter: Adapter, name: str, rows: int = 7) -> Tensor:
    """A parameter in pieces of a few rows, as it is loaded."""
    stored, delta = base()[name], adapter.deltas.get(name)
    if delta is None:
        return stored
    starts = range(0, len(stored), rows)
    pieces = [(i, min(i + rows, len(stored))) for i in starts]
    return torch.cat([delta.apply(stored[i:j].clone(), i, j) for i, j in pieces])


def assert_merged(directory: Path, want: dict[str, Tensor]) -> Adapter:
    """Every parameter is as peft has it, and those that peft changes are those of the adapter."""
    adapter = read_adapter(directory, shapes())
    assert want.keys() == base().keys()
    for name, tensor in want.items():
        assert_close(name, merged(adapter, name), tensor, 1e-6)
    assert {n for n in want if not want[n].equal(base()[n])} == adapter.deltas.keys()
    return adapter


PATTERNS = {
    "rank_pattern": {Q_OF_TEXT.format(1): 3, "cross_attn.q_proj": 5, r"layers\.0\..*fc1": 2},
    "alpha_pattern": {"fc1": 7, "^" + Q_OF_TEXT.format(0): 32, "q_proj": 4},
}
WRITTEN = {
    "everywhere": {"target_modules": EVERYWHERE},
    "a regex": {"target_modules": r".*\.language_model\..*cross_attn\.(q|k)_proj"},
    "patterns": {"target_modules": ["q_proj", "fc1"], **PATTERNS},
    "patterns and rslora": {"target_modules": ["q_proj", "fc1"], "use_rslora": True, **PATTERNS},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 16},
    "fan_in_fan_out": {"target_modules": ["k_proj", "o_proj"], "fan_in_fan_out": True},
    "all biases": {"target_modules": ["fc1", "multi_modal_projector"], "bias": "all"},
    "biases of its modules": {"target_modules": ["fc1", "q_proj"], "bias": "lora_only"},
    "biases of B": {"target_modules": ["fc1", "fc2"], "lora_bias": True},
    "biases of B and all": {"target_modules": ["fc1"], "lora_bias": True, "bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "tile_embedding"]},
    "whole modules": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["multi_modal_projector", "lm_head", "norm"],
    },
    "DoRA": {"target_modules": ["q_proj", "down_proj", "fc1", "lm_head"], "use_dora": True},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("settings", WRITTEN.values(), ids=WRITTEN)
def test_weights_are_those_that_peft_merges(tmp_path, settings):
    assert_merged(tmp_path, write_adapter(tmp_path, r=4, **settings))


def test_what_is_replaced_is_added_to_after(tmp_path):
    """As peft saves embeddings that it changes: whole, beside what is added to them."""
    want = write_adapter(tmp_path, embeddings=True, target_modules=["embed_tokens", "lm_head"])
    path = tmp_path / NAMES[1]
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".base_layer.weight"):
            tensors[name] += 1.0
    save_file(tensors, path)
    names = ["text.embed_tokens.weight", "text.lm_head.weight"]
    adapter = assert_merged(tmp_path, want | {name: want[name] + 1.0 for name in names})
    assert str(adapter) == "LoRA of rank 8 on 2 matrices, 2 tensors replaced"


def older(name: str) -> str:
    """A name of 2025 and later, as it was before."""
    peft = "base_model.model."
    name = name.removeprefix(peft)
    row = next(row for row in NAME_TABLE if name.startswith(row[2]))
    return peft + row[1] + name.removeprefix(row[2])


def with_name_of_adapter(name: str) -> str:
    parts = name.split(".")
    at = next(i for i, part in enumerate(parts) if part.startswith("lora_")) + 1
    return ".".join([*parts[:at], "default", *parts[at:]])


RENAMED = {
    "before transformers 4.52": older,
    "with the adapter's name": with_name_of_adapter,
    "both": lambda name: with_name_of_adapter(older(name)),
    "without peft's prefix": lambda name: name.removeprefix("base_model.model."),
    "our names": lambda name: ours(name.removeprefix("base_model.model.")),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of all kinds of modules, and what peft merges the weights to."""
    directory = tmp_path_factory.mktemp("written")
    targets = [*EVERYWHERE, "embed_tokens"]
    return directory, write_adapter(directory, r=4, target_modules=targets)


@pytest.fixture
def adapter(written, tmp_path) -> Path:
    """A copy of it, to change."""
    return Path(shutil.copytree(written[0], tmp_path / "adapter"))


@pytest.mark.parametrize("change", RENAMED.values(), ids=RENAMED)
def test_all_generations_of_names_are_read(written, adapter, change):
    rename(adapter, change)
    assert_merged(adapter, written[1])


def test_patterns_are_of_the_names_in_the_file(tmp_path):
    settings = {"target_modules": ["q_proj"], "alpha_pattern": {"^" + Q_OF_TEXT.format(0): 32}}
    want = write_adapter(tmp_path, r=4, **settings)
    rename(tmp_path, older)
    edit(tmp_path, alpha_pattern={"^language_model.model.layers.0.self_attn.q_proj": 32})
    assert_merged(tmp_path, want)


@pytest.mark.parametrize("columns", [(0, 32), (32, 64), (5, 6)])
def test_some_columns_are_those_of_the_whole(written, columns):
    adapter, piece = read_adapter(written[0], shapes()), slice(*columns)
    for name in ("text.layers.0.self_attn.o_proj.weight", "text.embed_tokens.weight"):
        rows = base()[name][3:9, piece].clone()
        got = adapter.deltas[name].apply(rows, 3, 9, columns)
        assert_close(name, got, written[1][name][3:9, piece], 1e-6)


def test_what_is_replaced_is_read_in_pieces_of_columns_too(tmp_path):
    settings = {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}
    want = write_adapter(tmp_path, r=4, **settings)["text.lm_head.weight"]
    delta = read_adapter(tmp_path, shapes()).deltas["text.lm_head.weight"]
    assert torch.equal(delta.apply(torch.zeros(5, 16), 2, 7, (16, 32)), want[2:7, 16:32])


def test_numbers_of_fewer_bits_are_added_in_float32(written, adapter):
    path = adapter / NAMES[1]
    halves = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(halves, path)
    prefix = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_"
    a, b = (halves[f"{prefix}{part}.weight"].double() for part in "AB")
    name = "text.layers.0.mlp.up_proj.weight"
    want = base()[name].double() + 8 / 4 * (b @ a)
    got = merged(read_adapter(adapter, shapes()), name)
    assert got.dtype == torch.float32
    assert_close(name, got, want, 1e-6)


def test_it_says_how_many_matrices_change(written, tmp_path):
    matrices = sum(not written[1][n].equal(t) for n, t in base().items())
    adapter = read_adapter(written[0], shapes())
    assert str(adapter) == f"LoRA of rank 4 on {matrices} matrices"
    assert adapter.base == BASE
    assert matrices > 70
    targets = {"target_modules": r".*language_model.layers.[01].self_attn.q_proj", "bias": "all"}
    write_adapter(tmp_path, r=4, rank_pattern={Q_OF_TEXT.format(0): 2}, **targets)
    replaced = sum(name.endswith(".bias") for name in base())
    says = f"LoRA of rank 2, 4 on 2 matrices, {replaced} tensors replaced"
    assert str(read_adapter(tmp_path, shapes())) == says


def test_dora_is_refused_for_some_columns(tmp_path):
    write_adapter(tmp_path, target_modules=["o_proj"], use_dora=True)
    name = "text.layers.0.self_attn.o_proj.weight"
    delta = read_adapter(tmp_path, shapes()).deltas[name]
    says = refusal(lambda: delta.apply(base()[name][:, :32], 0, 64, (0, 32)))
    assert "DoRA, which is not supported on several devices" in says
    assert "text.layers.0.self_attn.o_proj" in says


Q = "base_model.model." + Q_OF_TEXT.format(0)
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
NAN = torch.full((4, 64), float("nan"))
CHANGED = {
    "a name of another layer": ({A: None, A.replace("s.0.", "s.99."): "A"}, ["s.99.", B]),
    "a name that is misspelt": ({A: None, A.replace("q_proj", "qproj"): "A"}, ["qproj", B]),
    "A alone": ({B: None}, [f"1 without the other half: {A}"]),
    "B alone": ({A: None}, [f"1 without the other half: {B}"]),
    "something else": ({"hello": "A"}, ["1 not of this model: hello"]),
    "many": ({f"x{i}": "A" for i in range(9)}, ["9 not of this model: x0, x1, and 7 more"]),
    "DoRA's without use_dora": ({f"{Q}.lora_magnitude_vector": "A"}, ["1 not of this", "magnit"]),
    "a bias of B without lora_bias": ({f"{Q}.lora_B.bias": "A"}, ["1 not of this", "lora_B.bias"]),
    "a bias of A": ({f"{Q}.lora_A.bias": "A"}, ["1 not of this model", "lora_A.bias"]),
    "two adapters": ({A.replace("A.", "A.other."): "A"}, ["1 there twice", "lora_A"]),
    "two generations": ({older(A): "A"}, ["1 there twice", "q_proj.lora_A"]),
    "another width": ({A: torch.zeros(4, 32)}, [f"{A} [4, 32] for [64, 64]", BASE]),
    "another height": ({B: torch.zeros(32, 4)}, [f"{B} [32, 4] for [64, 64]", BASE]),
    "no matrix": ({A: torch.zeros(4)}, [f"{A} [4] for [64, 64]", BASE]),
    "a cube": ({B: torch.zeros(64, 4, 2)}, [f"{B} [64, 4, 2] for [64, 64]"]),
    "another rank of A": ({A: torch.zeros(2, 64)}, [f"{A} [2, 64] and [64, 4] for rank 4"]),
    "another rank of both": (
        {A: torch.zeros(8, 64), B: torch.zeros(64, 8)},
        [f"1 of another rank: {A} [8, 64] and [64, 8] for rank 4"],
    ),
    "whole numbers": ({A: torch.zeros(4, 64, dtype=torch.int32)}, [f"type: {A} (I32)"]),
    "no numbers": ({A: NAN}, [f"{A} of the adapter is not finite"]),
    "an infinite number": ({B: torch.full((64, 4), torch.inf)}, [f"{B} of the adapter is not fin"]),
    "a replacement that does not fit": (
        {f"{Q}.base_layer.weight": torch.zeros(65, 64)},
        ["base_layer.weight [65, 64] for [64, 64]"],
    ),
    "new tokens": (
        {"base_model.model.model.language_model.embed_tokens.token_adapter.x": "A"},
        ["token_adapter.x"],
    ),
    "a norm": (
        {"base_model.model.model.language_model.norm.lora_A.weight": "A"},
        ["language_model.norm.lora_A.weight [4, 64] for [64]"],
    ),
}


@pytest.mark.parametrize(("change", "says"), CHANGED.values(), ids=CHANGED)
def test_every_tensor_is_used_or_named(adapter, change, says):
    path = adapter / NAMES[1]
    tensors = load_file(path)
    a = tensors[A]
    changed = {n: a.clone() if isinstance(t, str) else t for n, t in change.items()}
    tensors = {n: t for n, t in (tensors | changed).items() if t is not None}
    save_file(tensors, path)
    message = refusal(lambda: read_adapter(adapter, shapes()))
    for part in says:
        assert part in message


def test_any_renamed_tensor_is_named(written):
    entries = read_headers([written[0] / NAMES[1]])
    settings = read_settings(written[0])
    for name in entries:
        changed = name.replace("lora_", "lora-")
        renamed = {changed if n == name else n: entry for n, entry in entries.items()}
        message = refusal(lambda renamed=renamed: find_parts(renamed, shapes(), settings))
        assert f"1 not of this model: {changed}" in message


def test_what_replaces_must_be_finite(tmp_path):
    write_adapter(tmp_path, target_modules=["fc1"], bias="lora_only")
    path = tmp_path / NAMES[1]
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("bias"))
    tensors[name][3] = torch.nan
    save_file(tensors, path)
    delta = read_adapter(tmp_path, shapes()).deltas[ours(name[17:].replace("base_layer.", ""))]
    assert "not finite" in refusal(lambda: delta.apply(torch.zeros(9), 0, 9))


def test_dora_without_its_norms_is_refused(adapter):
    edit(adapter, use_dora=True)
    assert "lora_magnitude_vector" in refusal(lambda: read_adapter(adapter, shapes()))


def test_an_adapter_of_another_size_is_told(written):
    wider = {name: tuple(2 * n for n in shape) for name, shape in shapes().items()}
    message = refusal(lambda: read_adapter(written[0], wider))
    assert "lm_head.lora_A.weight [4, 64] for [1024, 128]" in message
    assert f"the adapter, made for {BASE}, does not fit the model" in message


def test_an_adapter_of_nothing_is_refused(adapter):
    save_file({}, adapter / NAMES[1])
    assert "the adapter changes nothing" in refusal(lambda: read_adapter(adapter, shapes()))


FIELDS = {
    "peft_type": ["IA3", "ADALORA", "LOHA", "VERA", "PROMPT_TUNING", None, 3, "\x1b[2J"],
    "init_lora_weights": ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new"],
    "lora_alpha": [None, "16", True, 10**400, [], float("nan")],
    "r": [0, -1, 2.5, "8"],
    "use_rslora": ["yes", 1],
    "use_dora": ["yes"],
    "lora_bias": [[1]],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": "4"}, {"(": 4}, ["q_proj"], "q_proj", {"a": None}],
    "alpha_pattern": [{"q_proj": "4"}, {"*": 4}, {"(?P<a": 1}, 5],
    "alora_invocation_tokens": [[1, 2]],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"x": 1}],
    "layer_replication": [[[0, 4]]],
    "megatron_config": [{"x": 1}],
    "monteclora_config": [{"num_samples": 8}],
    "target_parameters": [["experts.w"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "use_bdlora": [{"nblocks": 2}],
    "use_qalora": [True],
    "velora_config": [{"scale": 1.0}],
    "not_known_yet": [True, "x", [1]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f in FIELDS for v in FIELDS[f]])
def test_what_is_not_supported_is_refused_by_name(adapter, field, value):
    edit(adapter, **{field: value})
    (adapter / NAMES[1]).unlink()  # nothing of the weights is needed for that
    message = refusal(lambda: read_settings(adapter))
    assert "adapter_config.json" in message
    assert field in message


def test_every_field_of_peft_is_known(adapter):
    """One that is not refused has no effect, or is read."""
    fields = json.loads((adapter / NAMES[0]).read_text())
    accepted = {"lora_dropout": 0.5, "target_modules": "all-linear", "modules_to_save": ["x"]}
    edit(adapter, **{name: value for name, value in accepted.items() if name in fields})
    for name, value in fields.items():
        if value is None and name not in FIELDS:
            edit(adapter, **{name: {"a": 1}})
    assert read_settings(adapter).alpha == fields["lora_alpha"]


def test_a_rank_pattern_that_the_tensors_contradict_is_refused(adapter):
    edit(adapter, rank_pattern={"q_proj": 5})
    assert f"{A} [4, 64] and [64, 4] for rank 5" in refusal(lambda: read_adapter(adapter, shapes()))


def test_an_adapter_without_a_rank_in_its_settings_has_that_of_its_tensors(written, adapter):
    edit(adapter, r=None)
    assert_merged(adapter, written[1])


def test_the_proof_names_the_parts_of_a_parameter():
    settings = Settings(8, 4, False, False, False, {}, {}, "")
    entries = {A: Entry(Path("x"), (4, 64), "F32", 0), B: Entry(Path("x"), (64, 4), "BF16", 0)}
    name = "text.layers.0.self_attn.q_proj.weight"
    assert find_parts(entries, shapes(), settings) == {name: {"A": A, "B": B}}


def test_a_directory_is_taken_as_it_is(written):
    assert find_adapter(written[0]) == written[0]
    assert find_adapter(str(written[0])) == written[0]


NOWHERE = {
    "no/such/directory": "does not exist",
    "./here": "does not exist",
    "alone": "does not exist",
    "": "adapter is ''",
    5: "adapter is 5",
    "a\0b": "does not exist",
    TINY / "config.json": "is a file",
    TINY: "has no adapter_config.json",
}


@pytest.mark.parametrize(("source", "says"), NOWHERE.items(), ids=map(str, NOWHERE.values()))
def test_what_is_no_adapter_is_told(source, says):
    message = refusal(lambda: find_adapter(source))
    assert says in message
    assert "expected a directory with adapter_config.json and adapter_model.safetensors" in message


@pytest.mark.parametrize("find", [find_adapter, lambda source: read_adapter(source, shapes())])
def test_pickles_are_not_opened(adapter, find):
    (adapter / NAMES[1]).rename(adapter / "adapter_model.bin")
    message = refusal(lambda: find(adapter))
    assert "no adapter_model.safetensors; an adapter_model.bin may run code" in message


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_damaged_file_is_told(adapter, cut):
    path = adapter / NAMES[1]
    path.write_bytes(path.read_bytes()[:cut])
    assert "damaged or cut short" in refusal(lambda: read_adapter(adapter, shapes()))


@pytest.fixture
def adapter_hub(adapter, tmp_path, monkeypatch):
    """A hub that serves it and much besides, with an empty local cache."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("adapter_model.bin", "README.md", "optimizer.pt", "model.safetensors"):
        (adapter / name).write_bytes(b"not needed")
    with StubHub(adapter) as stub:
        stub.use(monkeypatch, tmp_path / "cache")
        yield stub


def test_only_the_needed_files_are_fetched_and_once(adapter_hub, written, monkeypatch):
    directory = find_adapter(REPO)
    assert adapter_hub.fetched == NAMES
    assert_merged(directory, written[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert find_adapter(REPO) == directory
    assert adapter_hub.fetched == NAMES


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(adapter_hub):
    edit(adapter_hub.directory, peft_type="IA3")
    assert "peft_type is 'IA3'" in refusal(lambda: find_adapter(REPO))
    assert adapter_hub.fetched == NAMES[:1]


@pytest.mark.parametrize("gone", NAMES)
def test_a_repository_without_one_of_them_is_told(adapter_hub, gone):
    (adapter_hub.directory / gone).unlink()
    assert f"has no {gone}" in refusal(lambda: find_adapter(REPO))


def test_a_repository_that_cannot_be_had_is_told(adapter_hub):
    adapter_hub.refuse = (403, "GatedRepo")
    assert f"{REPO} is gated" in refusal(lambda: find_adapter(REPO))
