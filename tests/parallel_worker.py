"""One process of several that share the tiny checkpoint; `test_parallel` starts them.

python parallel_worker.py DIRECTORY {all|dies}
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from conftest import CASES, TINY, Conversation, case_inputs, case_prompts, new_cache
from torch import Tensor, nn

from llama_vision import KeyNorm, LlamaVision, MaxMin, TopK, TrimmedLlama
from llama_vision.cli.terminal import run_command
from llama_vision.config import Config, divided
from llama_vision.model import parallel
from llama_vision.model.model import LlamaVisionModel, model_without_weights


def every_third(saliency: Tensor, visual) -> Tensor:
    """A user's rule; it reads all that it is shown."""
    assert saliency.shape[0] == 4
    longest = visual.keys.float().norm(dim=-1).sum(0) + saliency.sum(0)
    return longest.argsort().argsort() % 3 == 0


RULES = {
    "TrimmedLlama": TrimmedLlama(0.2),
    "TopK": TopK(0.3),
    "KeyNorm": KeyNorm(0.3),
    "MaxMin, merged": MaxMin(0.3, merge=True),
    "a user's": every_third,
}
SAMPLED = {"temperature": 2.0, "max_new_tokens": 5, "ignore_stop": True}
PRUNED = {2: ("consecutive", "batch_ragged"), 4: ("consecutive",)}
"""Cases that the rules are tried on: four processes wait for two cores."""


def tiny_for(devices: int) -> tuple[Config, dict[str, Tensor]]:
    """The tiny checkpoint's configuration and weights.

    Four devices get one that answers the same: each key/value head is there twice, for there are
    two, and the last three tokens of the vocabulary are missing, so that four do not divide it.
    """
    whole = LlamaVision.from_pretrained(TINY, device="cpu").model
    config, weights = whole.config, dict(whole.state_dict())
    if devices < 4:
        return config, weights
    text = replace(config.text, num_key_value_heads=4, vocab_size=509, image_token_index=512)
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")) and name.startswith("text."):
            heads = weight.unflatten(0, (2, -1))
            weights[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    weights["text.lm_head.weight"] = weights["text.lm_head.weight"][:509]
    weights["text.embed_tokens.weight"] = weights["text.embed_tokens.weight"][:517]
    return replace(config, text=text), weights


def part_of(name: str, whole: Tensor, shape: torch.Size, rank: int) -> Tensor:
    """A device's slice: of the axis that is shorter here; what is past its end is zero."""
    axes = [axis for axis, size in enumerate(shape) if size != whole.shape[axis]]
    if not axes:
        is_added_once = name.startswith("vision.") and name.endswith("fc2.bias") and rank
        return torch.zeros_like(whole) if is_added_once else whole
    (axis,) = axes
    size = shape[axis]
    start = min(rank * size, whole.shape[axis])
    part = torch.zeros(shape)
    here = whole.narrow(axis, start, min(size, whole.shape[axis] - start))
    part.narrow(axis, 0, here.shape[axis]).copy_(here)
    return part


def checkpoint_for(sizes: int, devices: int, rank: int) -> LlamaVision:
    """What one of so many devices holds of `tiny_for(sizes)`."""
    config, weights = tiny_for(sizes)
    model = model_without_weights(divided(config, devices))
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        part = part_of(name, weights[name], parameter.shape, rank)
        setattr(model.get_submodule(module), leaf, nn.Parameter(part, requires_grad=False))
    model.vision.compare_padding_tiles()
    return LlamaVision(model.eval())


def results(sizes: int, devices: int, rank: int) -> dict:
    """All that is compared: the same on one device and on every one of several."""
    checkpoint = checkpoint_for(sizes, devices, rank)
    found: dict = {"bytes": bytes_of(checkpoint.model)}
    for case in CASES:
        cache = new_cache(checkpoint.model, 3)
        found["logits", case] = [
            Conversation(checkpoint.model, cache, slot).go_on(*inputs)
            for slot, inputs in enumerate(case_inputs(case))
        ]
        answers = checkpoint.generate(case_prompts(case), max_new_tokens=3, ignore_stop=True)
        found["greedy", case] = [answer.token_ids for answer in answers]
    for rule, pruner in RULES.items():
        for case in PRUNED[sizes]:
            answers = checkpoint.generate(
                case_prompts(case), max_new_tokens=2, ignore_stop=True, pruner=pruner
            )
            found[rule, case] = [(answer.token_ids, answer.kept) for answer in answers]
    prompts = case_prompts("batch")
    for seed in (7, None):
        answers = checkpoint.generate(prompts, seed=seed, **SAMPLED)
        found["sampled", seed] = [answer.token_ids for answer in answers]
    found["fails"] = failure(checkpoint)
    found["least"] = parallel.least(5 + parallel.rank(), devices)
    return found


def failure(checkpoint: LlamaVision) -> str:
    """What is said of a rule that fails, which only the first process asks."""
    fails = partial(int, "no number")
    try:
        checkpoint.generate(case_prompts("image_first"), pruner=lambda *_: fails())
    except ValueError as error:
        return str(error)
    return ""


def bytes_of(model: LlamaVisionModel) -> int:
    """Of all parameters."""
    return sum(parameter.nbytes for parameter in model.parameters())


def run(directory: Path, what: str) -> int:
    """All results into a file; or answer for ever, until the second process ends."""
    devices = parallel.start()
    rank = parallel.rank()
    if what == "all":
        torch.save(results(devices, devices, rank), directory / f"{rank}.pt")
        parallel.stop()
        return 0
    checkpoint = checkpoint_for(devices, devices, rank)
    engine, (request,) = checkpoint.start(
        case_prompts("image_first"), max_new_tokens=10_000, max_seq_len=20_000, ignore_stop=True
    )
    while request.finish_reason is None:
        engine.step()
        if rank == 1 and len(request.token_ids) == 5:
            os._exit(7)
    return 0


if __name__ == "__main__":
    code = run_command("llama-vision", lambda: run(Path(sys.argv[1]), sys.argv[2]))
    sys.exit(parallel.leave(code))
