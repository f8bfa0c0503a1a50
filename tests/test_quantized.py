"""Integers for weights: rounding, products, loading, adapters, and what the plan says of them."""

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_close, case_prompts, needs_compiler
from safetensors.torch import save_file
from test_adapter import EVERYWHERE, write_adapter
from test_cli import ASK, answer, refused
from test_memory import DRAWN, assert_as_planned
from test_unsupported import refusal
from torch import Tensor

from llama_vision import LlamaVision, Prompt, plan_memory
from llama_vision.checkpoint.hub import EMBEDDED_MODEL, load_config
from llama_vision.checkpoint.loading import full_shapes, share
from llama_vision.checkpoint.names import official_names
from llama_vision.checkpoint.resolve import resolve
from llama_vision.config import divided
from llama_vision.inputs.image import open_image
from llama_vision.memory.plan import weight_bytes
from llama_vision.model import quantized
from llama_vision.model.model import model_without_weights
from llama_vision.model.quantized import (
    PACKED_ROWS,
    ROWS_OF_PRODUCT,
    QuantizedLinear,
    check_device,
    dequantise,
    quantise,
)
from llama_vision.quantization import GROUPS, INT8, Format, Quantization, choose_quantization

CPU = torch.device("cpu")
FORMS = [INT8, *(Format(4, group) for group in GROUPS)]
CACHES = ("text_cache", "visual_cache")
LEVELS = {8: (-127, 127), 4: (-8, 7)}


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def odd_weight() -> Tensor:
    """Rows of chance, of zeros, of one sign, of one number, tiny, huge, and of a bound on top."""
    weight = random_weight(9, 512)
    weight[1] = 0
    weight[2], weight[3] = weight[2].abs(), -weight[3].abs()
    weight[4], weight[5] = 0.3, 0
    weight[5, ::32] = -2.0
    weight[6], weight[7] = weight[6] * 1e-30, weight[7] * 1e30
    weight[8, 0], weight[8, 1] = 5.0, -4.99  # the second is none of the levels of int4
    return weight


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_weight_becomes_the_nearest_multiple_of_its_scale(form):
    weight, (least, most) = odd_weight(), LEVELS[form.bits]
    q, scale = quantise(weight, form)
    assert (q.dtype, scale.dtype, q.shape) == (torch.int8, torch.bfloat16, weight.shape)
    assert scale.shape == (9, 512 // form.group if form.group else 1)
    assert (int(q.min()), int(q.max())) == (least, most)
    step = scale.double().repeat_interleave(512 // scale.shape[1], dim=1)
    error = (dequantise((q, scale)).double() - weight.double()).abs()
    clamped = weight.double() / step.where(step != 0, 1) > most + 0.5
    assert (error <= 0.5001 * step.abs())[~clamped].all()
    assert (q == most)[clamped].all()
    assert (error <= 1.02 * step.abs())[clamped].all()  # the scale itself is rounded
    assert not clamped.any() or form.bits == 4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_largest_of_each_group_becomes_the_outermost_level(form):
    weight = odd_weight()
    q, scale = quantise(weight, form)
    groups, integers = (t.unflatten(1, (scale.shape[1], -1)) for t in (weight, q))
    at = groups.abs().argmax(-1, keepdim=True)
    largest, outermost = groups.gather(-1, at)[..., 0], integers.gather(-1, at)[..., 0]
    there = largest != 0
    want = 127 * largest.sign() if form.bits == 8 else torch.full_like(largest, -8)
    assert torch.equal(outermost[there], want[there].to(torch.int8))
    assert not integers[~there].any()
    assert not scale[~there].any()


def layer(form: Format, outputs: int, inputs: int, pieces: int | None = None) -> tuple:
    """A filled layer with a bias, and its weights and bias in float64."""
    integers = quantise(random_weight(outputs, inputs), form)
    module = QuantizedLinear(inputs, outputs, True, form)
    module.allocate(CPU)
    for start in range(0, outputs, pieces or outputs):
        module.fill(start, tuple(t[start : start + (pieces or outputs)] for t in integers))
    bias = random_weight(1, outputs, seed=1)[0].bfloat16()
    module.bias = torch.nn.Parameter(bias, requires_grad=False)
    return module, dequantise(integers).double(), bias.double()


PRODUCTS = [
    pytest.param(form, outputs, inputs, id=f"{form}, {inputs} to {outputs}")
    for form in FORMS
    for outputs in (16, 64, 80, 1040)
    for inputs in (32, 128, 256)
    if inputs % (form.group or 1) == 0
]


@pytest.mark.parametrize("at_once", [64, 2**22], ids=["64 rows at once", "all at once"])
@pytest.mark.parametrize(("form", "outputs", "inputs"), PRODUCTS)
def test_the_product_is_that_of_the_weights(form, outputs, inputs, at_once, monkeypatch):
    """On both sides of the number of rows from which on the integers become floats."""
    monkeypatch.setattr(quantized, "UNPACKED_ROWS", at_once)
    module, weight, bias = layer(form, outputs, inputs)
    most = ROWS_OF_PRODUCT[form.bits]
    for rows in (1, most, most + 1, 70):
        x = random_weight(rows, inputs, seed=rows).bfloat16()
        want = x.double() @ weight.T + bias
        got = module(x.view(1, rows, inputs))
        assert (got.shape, got.dtype) == ((1, rows, outputs), torch.bfloat16)
        assert_close(f"{rows} rows", got[0], want, 0.01 * want.abs().max().item())


@pytest.mark.parametrize("pieces", [PACKED_ROWS, 2 * PACKED_ROWS])
@pytest.mark.parametrize(("form", "outputs", "inputs"), PRODUCTS)
def test_rows_may_be_packed_apart(form, outputs, inputs, pieces):
    apart, whole = (layer(form, outputs, inputs, n)[0] for n in (pieces, None))
    assert torch.equal(apart.weight, whole.weight)
    assert torch.equal(apart.scale, whole.scale)


ELSEWHERE = """
import torch
from llama_vision.model.quantized import *
from llama_vision.quantization import Format
torch.manual_seed(0)
print(torch.backends.cpu.get_cpu_capability(), packed_block()[0])
for outputs in (80, 128):
    for form in (Format(8), Format(4, 32)):
        integers = quantise(torch.randn(outputs, 64), form)
        module = QuantizedLinear(64, outputs, False, form)
        module.allocate(torch.device("cpu"))
        module.fill(0, integers)
        for rows in (3, 50):
            x = torch.randn(rows, 64).bfloat16()
            want = x.float() @ dequantise(integers).T
            worst = (module(x).float() - want).abs().max() / want.abs().max()
            assert worst < 0.01, (outputs, form, rows, worst)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_with_fewer_instructions_pack_and_multiply_too(capability):
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "32"


INT4 = Format(4, 128)
ASKED = {
    "int8": ("int8", {"text": INT8, "cross": INT8}, 0.999),
    "int4": ("int4", {"text": INT4, "cross": INT4}, 0.98),
    "all": (
        choose_quantization("int4", everything=True),
        {"text": INT4, "cross": INT4, "vision": INT8, "projector": INT8, "head": INT8},
        0.98,
    ),
    "cross": (
        choose_quantization("int4", group=32, cross="int8"),
        {"text": Format(4, 32), "cross": INT8},
        0.98,
    ),
}
MATRICES = {
    "text": (r"text\.layers\.[0135]\.(self_attn|mlp)\..*", 4 * 7),
    "cross": (r"text\.layers\.[246]\.(cross_attn|mlp)\..*", 3 * 7),
    "vision": (r"vision\..*", 7 * 6),
    "projector": (r"projector", 1),
    "head": (r"text\.lm_head", 1),
}
"""Names and number of pico's matrices in each part."""


def pico_prompt(model: LlamaVision, name: str = "scene") -> Prompt:
    picture = open_image(EMBEDDED_MODEL / "examples" / f"{name}.png")
    return model.prompt([{"role": "user", "content": [picture, "Describe the image."]}])


def load_pico(quantize: object) -> LlamaVision:
    return LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", quantize=quantize)


@pytest.fixture(scope="module")
def plain_logits() -> Tensor:
    model = load_pico("none")
    return model.logits(pico_prompt(model)).double()


@pytest.fixture(scope="module", params=ASKED)
def quantised(request) -> tuple[str, LlamaVision]:
    return request.param, load_pico(ASKED[request.param][0])


def test_the_matrices_of_each_part_have_its_format(quantised):
    name, model = quantised
    found = Counter()
    for module_name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear | QuantizedLinear):
            part = next(p for p, (names, _) in MATRICES.items() if re.fullmatch(names, module_name))
            found[part, getattr(module, "form", None)] += 1
    assert found == {(p, ASKED[name][1].get(p)): count for p, (_, count) in MATRICES.items()}


def test_its_logits_stay_near_those_of_the_plain_weights(quantised, plain_logits):
    name, model = quantised
    prompt = pico_prompt(model)
    logits = model.logits(prompt).double()
    assert torch.cosine_similarity(logits, plain_logits, dim=-1).min() > ASKED[name][2]
    assert not torch.equal(logits, plain_logits)
    text = model.generate(prompt, max_new_tokens=40, temperature=0).text
    assert text == 'A red circle, a black cross and the text "pride".'


def test_it_takes_what_was_planned(quantised):
    name, model = quantised
    prompts = [pico_prompt(model), pico_prompt(model, "sign")]
    model.generate(prompts[0], max_new_tokens=1)  # what is done once in a process
    engine, requests = model.start(prompts, max_new_tokens=3, track_memory=True, **DRAWN)
    engine.run(*requests)
    plan = assert_as_planned(model, engine)
    assert engine.ledger.peak == plan.total
    assert plan_memory(EMBEDDED_MODEL, quantize=ASKED[name][0]).weights == plan.weights
    assert model.plan(prompts).weights == plan.weights


def test_the_command_reports_the_plan_of_the_integers(capsys):
    picture = str(EMBEDDED_MODEL / "examples" / "scene.png")
    ask = ["--prompt", "Describe the image.", "--image", picture, "--stats", "--max-new-tokens=3"]
    how = ["--quantize", "int4", "--quantize-all", "--quantize-group", "32", "--device", "cpu"]
    asked = choose_quantization("int4", everything=True, group=32)
    stats = answer(capsys, *ask, "--temperature=1", "--ignore-stop", *how)
    planned = stats["ledger"]["planned"]
    assert planned["weights"] == plan_memory(EMBEDDED_MODEL, quantize=asked).weights
    assert stats["memory"] == {name: planned[name] for name in ("weights", *CACHES)} | {
        "peak": planned["total"]
    }
    assert stats["dtype"] == "bfloat16"


@needs_compiler
def test_compiled_steps_answer_alike():
    """With both formats in one model."""
    model = load_pico(ASKED["cross"][0])
    how = {"max_new_tokens": 12, "temperature": 0, "ignore_stop": True}
    plain, compiled = (
        model.generate(pico_prompt(model), compiled=compiled, **how) for compiled in (False, True)
    )
    assert compiled.token_ids == plain.token_ids


def of_tiny(**how: object) -> object:
    return lambda: LlamaVision.from_pretrained(TINY, device="cpu", **how)


def of_copy(quantize: object) -> object:
    config = replace(load_config(TINY), quantization=choose_quantization("int8"))
    return lambda: resolve(config, None, quantize, "auto")


EXPECTED = "expected int8, int4 or none"
IN_FLOAT = "multiplied in bfloat16 alone; leave out --dtype or --quantize"
MISTAKES = {
    "int3": (of_tiny(quantize="int3"), "quantize is 'int3'; " + EXPECTED),
    "a number": (of_tiny(quantize=5), "quantize is 5; " + EXPECTED),
    "a list": (of_tiny(quantize=["int8"]), "quantize is ['int8']; " + EXPECTED),
    "another name": (
        lambda: choose_quantization("nf4"),
        "quantize is 'nf4'; expected int8 or int4",
    ),
    "of cross": (lambda: choose_quantization("int8", cross="int3"), "is 'int3'; expected int8 or"),
    **{
        f"group {group!r}": (
            lambda group=group: choose_quantization("int4", group=group),
            f"quantize_group is {group!r}; expected one of (32, 64, 128, 256)",
        )
        for group in (100, 0, -32, "128", None, 128.0, [32])
    },
    "a group that does not divide": (
        of_tiny(quantize="int4"),
        "q_proj cannot be int4 in groups of 128: it has rows of 64 weights, which groups of 128 do "
        "not divide; use --quantize-group (quantize_group) of 32",
    ),
    "float32": (of_tiny(quantize="int8", dtype="float32"), "dtype is float32 and " + "quantised"),
    "float16": (of_tiny(quantize="int8", dtype="float16"), IN_FLOAT),
    "a torch type": (of_tiny(quantize="int8", dtype=torch.float32), IN_FLOAT),
    "int4 on mps": (
        lambda: check_device(choose_quantization("int4"), torch.device("mps")),
        "torch has no product of int4 matrices on mps; use --quantize int8, or a CPU",
    ),
    "int4 of cross alone on mps": (
        lambda: check_device(choose_quantization("int8", cross="int4"), torch.device("mps")),
        "torch has no product of int4 matrices on mps",
    ),
    "int4 of an int8 copy": (
        of_copy("int4"),
        "this checkpoint is quantised already and is read as int8 (text, cross); leave out "
        "--quantize (quantize), or give none",
    ),
    **{
        f"a format of {bits!r} bits, {group!r}": (
            lambda how=(bits, group): Format(*how),
            f"a format of {bits!r} bits in groups of {group!r}; expected 8 and 0, or 4 and one of",
        )
        for bits, group in ((3, 32), (4, 0), (4, 16), (4, 100), (4, 32.0), (8, 128), ("4", 32))
    },
    "a name for a format": (
        lambda: Quantization(text="int8"),
        "text is 'int8'; expected a Format or None, see choose_quantization",
    ),
}


@pytest.mark.parametrize(("run", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(run, says):
    assert says in refusal(run)


def test_what_devices_and_copies_allow_is_let_be():
    check_device(choose_quantization("int8"), torch.device("mps"))
    check_device(choose_quantization("int4"), CPU)
    for asked, want in ((None, INT8), ("int8", INT8), ("none", None)):
        config, dtype = of_copy(asked)()
        assert getattr(config.quantization, "text", None) == want
        assert dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "says"),
    {
        "--quantize-group 32": "--quantize-group and --quantize-cross are of --quantize int8 or",
        "--quantize none --quantize-all": "give it too",
        "--quantize-cross int8": "give it too",
        "--quantize int3": "quantize is 'int3'; " + EXPECTED,
        "--quantize int3 --quantize-all": "quantize is 'int3'; expected int8 or int4",
        "--quantize int4 --quantize-group 100": "quantize_group is 100; expected one of (32, 64,",
        "--quantize int4 --quantize-cross int3": "'int3'; expected int8 or int4",
        "--quantize int4": "cannot be int4 in groups of 128",
        "--quantize int8 --dtype float32": IN_FLOAT,
        "--devices 2": "--devices is of --plan and --fit; to run, torchrun --nproc-per-node 2",
        "--devices 0 --plan": "devices is 0; expected",
        "--devices 4 --plan": "4 devices cannot divide this model's 2 key/value heads; expected 1",
    }.items(),
)
def test_a_mistake_of_the_command_is_one_line(capsys, flags, says):
    assert says in refused(capsys, *ASK, *flags.split())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, Path]:
    """An adapter, and a checkpoint of the weights that peft merges it to."""
    directory, merged = (tmp_path_factory.mktemp(name) for name in ("adapter", "merged"))
    weights = write_adapter(directory, r=4, target_modules=[*EVERYWHERE, "embed_tokens"])
    save_as_checkpoint(merged, weights)
    return directory, merged


def save_as_checkpoint(directory: Path, weights: dict[str, Tensor]) -> None:
    for path in TINY.glob("*config.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    official = official_names(list(weights)).items()
    tensors = {name: weights[ours].contiguous() for name, ours in official}
    save_file(tensors, directory / "model.safetensors")


def test_logits_with_an_adapter_are_those_of_the_weights_that_peft_merges(adapter, tiny):
    directory, merged = adapter
    (prompt,) = case_prompts("image_first")
    ours, peers = (
        LlamaVision.from_pretrained(source, device="cpu", adapter=extra)
        for source, extra in ((TINY, directory), (merged, None))
    )
    assert_close("logits", ours.logits(prompt), peers.logits(prompt), 1e-5)
    assert (ours.logits(prompt) - tiny.logits(prompt)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_adapter_is_merged_before_weights_are_rounded(adapter, tmp_path, name):
    how = {"device": "cpu", "quantize": choose_quantization(name, everything=True, group=32)}
    merged = LlamaVision.from_pretrained(TINY, device="cpu", adapter=adapter[0])
    save_as_checkpoint(tmp_path, dict(merged.model.named_parameters()))
    got = LlamaVision.from_pretrained(TINY, adapter=adapter[0], **how).model.state_dict()
    want = LlamaVision.from_pretrained(tmp_path, **how).model.state_dict()
    assert got.keys() == want.keys()
    assert [name for name in got if not torch.equal(got[name], want[name])] == []


def config_of_four_heads(vocabulary: int):
    """The tiny one, which four devices can divide; its vocabulary not evenly."""
    config = load_config(TINY)
    return replace(config, text=replace(config.text, num_key_value_heads=4, vocab_size=vocabulary))


@pytest.mark.parametrize("vocabulary", [512, 485])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_devices_share_every_parameter_out_once(devices, vocabulary):
    config = config_of_four_heads(vocabulary)
    whole, local = (
        full_shapes(config),
        dict(model_without_weights(divided(config, devices)).named_parameters()),
    )
    assert whole.keys() == local.keys()
    kinds = set()
    for name, full in whole.items():
        here = tuple(local[name].shape)
        owners = torch.zeros(full)
        for rank in range(devices):
            rows, columns = share(full, here, rank)
            part = owners[rows] if columns is None else owners[rows, columns]
            assert all(map(int.__le__, part.shape, here)), name
            part += 1
        kinds.add(wanted := devices if here == full else 1)
        assert (owners == wanted).all(), name
    assert kinds == {1, devices}


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("size", ["11b", "90b"])
def test_the_devices_of_a_plan_hold_the_whole_model(size, quantize):
    def weights(devices: int) -> int:
        config, dtype = resolve(divided(load_config(size), devices), None, quantize, "auto")
        return weight_bytes(config, dtype)

    whole = weights(1)
    for devices in (2, 4, 8):
        assert whole <= devices * weights(devices) < 1.25 * whole


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_past_the_end_of_a_quantised_head_are_zeros(rank, monkeypatch):
    """Of pico's 485 tokens the second of two devices has one less than the first."""
    monkeypatch.setattr("llama_vision.model.parallel.rank", lambda: rank)
    how = {"device": "cpu", "quantize": choose_quantization("int8", everything=True)}
    model = LlamaVision.without_weights(EMBEDDED_MODEL, devices=2, **how)
    model.load_weights()
    whole, head = LlamaVision.without_weights(EMBEDDED_MODEL, **how), model.model.text.lm_head
    monkeypatch.setattr("llama_vision.model.parallel.rank", lambda: 0)
    whole.load_weights()
    x, here = random_weight(3, head.in_features).bfloat16(), slice(243 * rank, 243 * (rank + 1))
    want = torch.nn.functional.pad(whole.model.text.lm_head(x), (0, 1))[:, here]
    assert torch.equal(head(x), want)
