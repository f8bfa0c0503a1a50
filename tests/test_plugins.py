"""The plug-ins, on lmms-eval's base class where it is installed, else on its interface.

VLMEvalKit is not on PyPI: its interface stands here as `BaseModel` and `DATASET_TYPE`.
"""

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "plugins"))

from llama_vision_plugins import lmms_eval_manifest
from llama_vision_plugins.settings import PluginError, pictures_first, rule_of

from llama_vision import LlamaVision, LlamaVisionError, MaxMin, Prompt, TrimmedLlama
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.checkpoint.hub import EMBEDDED_MODEL

PLUGINS = Path(__file__).parents[1] / "tools" / "plugins"
EXAMPLES = Path(EMBEDDED_MODEL) / "examples"
QUESTION = "What does the text say?"


class BaseModel:
    """VLMEvalKit's, as far as it calls a model: `generate` checks a message and hands it on."""

    allowed_types = ("text", "image")

    def generate(self, message, dataset=None):
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@dataclass
class TokenCounts:
    input_tokens: int
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


class Lmms(ABC):
    """lmms-eval's, with its abstract methods."""

    is_simple = True

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


STANDINS = {
    "vlmeval": {},
    "vlmeval.vlm": {},
    "vlmeval.vlm.base": {"BaseModel": BaseModel},
    "vlmeval.dataset": {"DATASET_TYPE": {"MMBench": "MCQ", "POPE": "Y/N"}.get},
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": Lmms},
    "lmms_eval.api.instance": {
        "Instance": object,
        "TokenCounts": TokenCounts,
        "GenerationResult": GenerationResult,
    },
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
}


@pytest.fixture(autouse=True)
def harnesses(monkeypatch):
    """Both can be imported."""
    there = {name: importlib.util.find_spec(name) for name in ("vlmeval", "lmms_eval")}
    for name, attributes in STANDINS.items():
        if not there[name.partition(".")[0]]:
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
    for name in ("vlmevalkit", "lmms_eval_model"):
        monkeypatch.delitem(sys.modules, f"llama_vision_plugins.{name}", raising=False)


def load(path):
    """A class by its dotted path, as lmms-eval's registry does it."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def kit(**arguments):
    made = load("llama_vision_plugins.vlmevalkit.LlamaVisionKit")
    return made(EMBEDDED_MODEL, device="cpu", dtype="float32", **arguments)


def chat(**arguments):
    made = load(lmms_eval_manifest().chat_class_path)
    model = made(str(EMBEDDED_MODEL), device="cpu", dtype="float32", **arguments)
    model.task_dict = {"signs": {"test": {name: name for name in ("sign", "colors", "tall")}}}
    return model


def picture(name):
    return Image.open(EXAMPLES / f"{name}.png")


def request(name, **gen_kwargs):
    def to_messages(doc):
        text = {"type": "text", "text": QUESTION}
        return [{"role": "user", "content": [text, {"type": "image", "url": picture(doc)}]}]

    return SimpleNamespace(args=("", to_messages, gen_kwargs, name, "signs", "test"))


def answers(names, **settings):
    """Of the model itself."""
    model = LlamaVision.from_pretrained(EMBEDDED_MODEL, device="cpu", dtype="float32")
    prompts = [[{"role": "user", "content": [picture(name), QUESTION]}] for name in names]
    return [made.text for made in model.generate(prompts, temperature=0, **settings)]


def test_the_entry_point_names_a_model_that_is_there():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((PLUGINS / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (path,) = project["entry-points"]["lmms_eval.models"].values()
    module, _, name = path.partition(":")
    made = load(getattr(importlib.import_module(module), name)().chat_class_path)
    assert not made.is_simple
    assert issubclass(made, importlib.import_module("lmms_eval.api.model").lmms)
    assert not made.__abstractmethods__


@pytest.mark.parametrize("rule", [{}, {"keep": 0.5}, {"k_ratio": 0.02}], ids=str)
def test_both_give_what_the_model_gives(rule):
    names = ["sign", "colors", "tall"]
    expected = answers(names, pruner=rule_of(**rule))
    model = kit(**rule)
    path = {name: str(EXAMPLES / f"{name}.png") for name in names}
    text = {"type": "text", "value": QUESTION}
    for name, said in zip(names, expected, strict=True):
        message = [text, {"type": "image", "value": path[name]}]
        assert model.generate(message, "MMBench") == said
    made = chat(batch_size="2", **rule).generate_until([request(name) for name in names])
    assert [result.text for result in made] == expected
    assert all(result.token_counts.output_tokens > 0 for result in made)
    if not rule:
        assert expected[0] == "Undone"


def test_answers_come_in_the_order_of_requests_whose_settings_differ():
    asked = [request("sign", max_new_tokens=1), request("sign"), request("tall", max_new_tokens=1)]
    asked.append(request("sign", until=["o"], max_new_tokens=None))
    made = chat(batch_size=4).generate_until(asked)
    counts = [result.token_counts.output_tokens for result in made]
    assert (counts[0], counts[2]) == (1, 1)
    assert [made[1].text, made[3].text] == ["Undone", "Und"]


def test_log_probabilities_are_those_of_the_continuation():
    model = chat()
    visual = lambda doc: [picture(doc)]  # noqa: E731
    place = (visual, "sign", "signs", "test")
    asked = [SimpleNamespace(args=(QUESTION, text, *place)) for text in ("Undone", "Undine")]
    asked.append(SimpleNamespace(args=(QUESTION, lambda doc: "Undone", *place)))
    right, wrong, same = model.loglikelihood(asked)
    assert right[1]
    assert not wrong[1]
    assert right == same
    assert wrong[0] < right[0] < 0
    prompt = model.model.prompt([{"role": "user", "content": [picture("sign"), QUESTION]}])
    made = model.model.generate(prompt, temperature=0)
    assert right[0] == pytest.approx(sum(made.logprobs[:-1]), abs=1e-3)
    ids, total = model.model.tokenizer.encode("Undine"), 0.0
    for i, token in enumerate(ids):  # one token after the other
        so_far = Prompt([*prompt.token_ids, *ids[:i]], prompt.images)
        total += float(model.model.logits(so_far)[-1].log_softmax(-1)[token])
    assert wrong[0] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("dataset", "tokens"),
    [("MMBench", 128), ("POPE", 128), ("AI2D_TEST", 400), ("MMMU_DEV_VAL", 2048), ("DocVQA", 512)],
)
def test_an_answer_is_as_long_as_its_dataset_needs(dataset, tokens, monkeypatch):
    model, asked = kit(), {}
    monkeypatch.setattr(
        model.model, "generate", lambda _, **given: asked.update(given) or SimpleNamespace(text="")
    )
    model.generate([{"type": "text", "value": "?"}], dataset)
    assert (asked["max_new_tokens"], asked["temperature"]) == (tokens, 0)
    assert not model.use_custom_prompt(dataset)


def test_pictures_go_before_texts_each_in_its_order():
    parts = [{"type": kind, "n": n} for n, kind in enumerate(("text", "image", "text", "image"))]
    assert [part["n"] for part in pictures_first(parts)] == [1, 3, 0, 2]


def test_rules():
    assert rule_of() is None
    assert rule_of(k_ratio=0.5) == TrimmedLlama(0.5)
    assert rule_of(keep=0.5) == MaxMin(0.5, merge=True)
    assert rule_of(keep=8, merge=False) == MaxMin(8)
    for name, rule in COUNTED_RULES.items():
        assert rule_of(keep=0.5, pruner=name) == rule(0.5)
        assert rule_of(keep=0.5, pruner=name, merge=True) == rule(0.5, merge=True)


@pytest.mark.parametrize(
    "rule",
    [
        {"k_ratio": 0.5, "keep": 0.5},
        {"pruner": "uniform"},
        {"merge": True},
        {"keep": 0.5, "pruner": "best"},
        {"keep": 2.5},
        {"keep": "half"},
        {"k_ratio": 0},
        {"k_ratio": 0.5, "merge": "yes"},
    ],
    ids=str,
)
def test_a_rule_that_cannot_be_is_refused_before_weights_are_read(rule):
    with pytest.raises(LlamaVisionError):
        kit(**rule)
    with pytest.raises(LlamaVisionError):
        chat(**rule)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(PluginError, match="num_beams"):
        chat().generate_until([request("sign", num_beams=4)])
    with pytest.raises(NotImplementedError):
        chat().generate_until_multi_round([])
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    asked = SimpleNamespace(args=("", lambda doc: video, {}, "sign", "signs", "test"))
    with pytest.raises(LlamaVisionError, match="video"):
        chat().generate_until([asked])
