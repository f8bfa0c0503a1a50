"""Pruners that people may write by mistake, or to harm: all of them, at every door."""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import numpy
import torch
from torch import Tensor

from fuzzing.common import prompt, tiny
from fuzzing.judge import Case, Expected, Kind, WrongResult
from fuzzing.odd import VALUES
from llama_vision import VisualTokens

Answer = Callable[[Tensor, VisualTokens], Any]


class Mask(Tensor):
    """A tensor of a kind of its own."""


class Refusing(Tensor):
    """A tensor that lets no function of torch see it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("leave me")


def _all(saliency: Tensor, visual: VisualTokens) -> Tensor:
    return torch.ones(saliency.shape[-1], dtype=torch.bool)


def _answers(make: Callable[[Tensor], Any]) -> Answer:
    """What answers with something made of the mask that keeps all."""

    def prune(saliency: Tensor, visual: VisualTokens) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of what the pruner makes
            return make(_all(saliency, visual))

    return prune


def _spoils(spoil: Callable[[Tensor, VisualTokens], Any]) -> Answer:
    """What spoils what it was given, and keeps all."""

    def prune(saliency: Tensor, visual: VisualTokens) -> Tensor:
        keep = _all(saliency, visual)
        spoil(saliency, visual)
        return keep

    return prune


def _raises(error: BaseException) -> Answer:
    def prune(saliency: Tensor, visual: VisualTokens) -> Tensor:
        raise error

    return prune


def _returns(name: str) -> Answer:
    """One of the odd values."""
    return lambda saliency, visual: VALUES[name]()


def _with(**attributes: Any) -> Callable[[], Answer]:
    """A pruner that keeps all and has odd attributes."""

    def make() -> Answer:
        def prune(saliency: Tensor, visual: VisualTokens) -> Tensor:
            return _all(saliency, visual)

        vars(prune).update(attributes)
        return prune

    return make


def _grow(tensor: Tensor) -> None:
    tensor.resize_(2**20).fill_(1)


def _replace(visual: VisualTokens) -> None:
    for name in vars(visual):
        setattr(visual, name, None)


ANSWERS: dict[str, tuple[Answer, Expected]] = {
    "bool list": (_answers(Tensor.tolist), "refused"),
    "array": (_answers(Tensor.numpy), "refused"),
    "array of one": (_answers(lambda m: numpy.bool_(True)), "refused"),
    "sparse": (_answers(Tensor.to_sparse), "refused"),
    "sparse csr": (_answers(lambda m: m[None].float().to_sparse_csr()), "refused"),
    "meta": (_answers(lambda m: m.to("meta")), "refused"),
    "bytes": (_answers(Tensor.byte), "refused"),
    "whole numbers": (_answers(Tensor.long), "refused"),
    "floats": (_answers(Tensor.float), "refused"),
    "NaN": (_answers(lambda m: m.float() * torch.nan), "refused"),
    "complex": (_answers(lambda m: m.cfloat()), "refused"),
    "quantised": (
        _answers(lambda m: torch.quantize_per_tensor(m.float(), 1, 0, torch.qint8)),
        "refused",
    ),
    "too short": (_answers(lambda m: m[1:]), "refused"),
    "too long": (_answers(lambda m: torch.cat([m, m])), "refused"),
    "a number": (_answers(lambda m: m[0]), "refused"),
    "batched": (_answers(lambda m: m[None]), "refused"),
    "upright": (_answers(lambda m: m[:, None]), "refused"),
    "empty": (_answers(lambda m: m[:0]), "refused"),
    "none kept": (_answers(torch.zeros_like), "refused"),
    "Parameter": (_answers(lambda m: torch.nn.Parameter(m, requires_grad=False)), "either"),
    "subclass": (_answers(lambda m: m.as_subclass(Mask)), "either"),
    "refusing subclass": (_answers(lambda m: m.as_subclass(Refusing)), "refused"),
    "nested": (_answers(lambda m: torch.nested.nested_tensor([m.float()])), "refused"),
    "strided by 0": (_answers(lambda m: m[:1].expand(len(m))), "taken"),
    "backwards": (_answers(lambda m: m.flip(0)), "taken"),
    "a tensor that needs a gradient": (_answers(lambda m: m.float().requires_grad_()), "refused"),
    "tuple": (_answers(lambda m: (m, m)), "refused"),
    "a generator": (_answers(iter), "refused"),
    "saliency itself": (lambda saliency, visual: saliency, "refused"),
    "features": (lambda saliency, visual: visual.features, "refused"),
    "visual": (lambda saliency, visual: visual, "refused"),
    "raises ValueError": (_raises(ValueError("\x1b[31m\n" * 500)), "refused"),
    "raises ZeroDivisionError": (_raises(ZeroDivisionError()), "refused"),
    "raises MemoryError": (_raises(MemoryError()), "refused"),
    "raises StopIteration": (_raises(StopIteration()), "refused"),
    "raises AssertionError": (_raises(AssertionError()), "refused"),
    "raises KeyboardInterrupt": (_raises(KeyboardInterrupt()), "interrupted"),
    "takes nothing": (lambda: None, "refused"),
    "takes one": (lambda saliency: saliency, "refused"),
    **{f"returns {name}": (_returns(name), "refused") for name in VALUES},
}
SPOILERS: dict[str, Answer] = {
    "NaN into features": _spoils(lambda s, v: v.features.fill_(torch.nan)),
    "zeros into features": _spoils(lambda s, v: v.features.zero_()),
    "NaN into saliency": _spoils(lambda s, v: s.fill_(torch.nan)),
    "NaN into keys": _spoils(lambda s, v: v.keys.fill_(torch.nan)),
    "zeros into places": _spoils(lambda s, v: [t.zero_() for t in (v.image, v.tile, v.patch)]),
    "large places": _spoils(lambda s, v: [t.fill_(10**9) for t in (v.image, v.tile, v.patch)]),
    "features resized": _spoils(lambda s, v: _grow(v.features)),
    "keys resized": _spoils(lambda s, v: _grow(v.keys)),
    "features' storage": _spoils(lambda s, v: v.features.untyped_storage().fill_(255)),
    "features' data": _spoils(lambda s, v: v.features.data.fill_(torch.nan)),
    "through a view": _spoils(lambda s, v: v.features.detach().view(-1)[:5].fill_(torch.inf)),
    "through an array": _spoils(lambda s, v: v.features.numpy().fill(numpy.nan)),
    "fields replaced": _spoils(lambda s, v: _replace(v)),
    "grids replaced": _spoils(lambda s, v: setattr(v, "grids", ((9, 9),))),
    "budget raised": _spoils(lambda s, v: setattr(v, "budget", 10**9)),
    "group raised": _spoils(lambda s, v: setattr(v, "group", -7)),
}
"""They keep all: what follows must be what keeping all gives, or a refusal."""

ATTRIBUTES = {
    f"{name} = {value}": _with(**{name: VALUES[value]()})
    for name, value in product(("votes", "trim_first_layer", "__name__"), VALUES)
    if not (name == "__name__" and not isinstance(VALUES[value](), str))
}
"""Attributes that a pruner may have; most are wrong, and must do nothing worse than be refused."""


def _generate(pruner: Any, images: int, **more: Any) -> Tensor:
    short = {"max_new_tokens": 2, "temperature": 0.0, "ignore_stop": True}
    answer = tiny().generate(prompt(images), pruner=pruner, **short, **more)
    return torch.tensor(answer.logprobs)


DOORS: dict[str, Callable[..., Tensor]] = {
    "generate": _generate,
    "logits": lambda pruner, images, **more: tiny().logits(prompt(images), pruner=pruner, **more),
}


@cache
def _unspoilt(door: str, images: int) -> Tensor:
    return DOORS[door](_all, images)


def _compared(door: str, pruner: Answer, images: int) -> None:
    got = DOORS[door](pruner, images)
    if not torch.allclose(got, _unspoilt(door, images), atol=1e-4):
        raise WrongResult("the answer is not that of the same pruner without the mischief")


@cache
def _cases() -> list[tuple[str, Callable[[], Any], Expected]]:
    cases = []
    for door, images in product(DOORS, (1, 2)):
        at = f"{door}, {images} images"
        for name, (pruner, expected) in ANSWERS.items():
            run = lambda d=door, p=pruner, n=images: DOORS[d](p, n)  # noqa: E731
            cases.append((f"{at}: {name}", run, expected))
        for name, pruner in SPOILERS.items():
            run = lambda d=door, p=pruner, n=images: _compared(d, p, n)  # noqa: E731
            cases.append((f"{at}: {name}", run, "either"))
        for name, make in ATTRIBUTES.items():
            run = lambda d=door, m=make, n=images: DOORS[d](m(), n)  # noqa: E731
            cases.append((f"{at}: {name}", run, "either"))
        more = lambda d=door, n=images: DOORS[d](_all, n, visual_budget=5)  # noqa: E731
        cases.append((f"{at}: more than the budget", more, "refused"))
    return cases


def kind(seed: int, scratch: Any) -> Kind:
    """See `fuzzing.kinds`; nothing is drawn."""
    for door, images in product(DOORS, (1, 2)):
        _unspoilt(door, images)
    return Kind("pruners", len(_cases()), lambda i: Case(*_cases()[i]))
