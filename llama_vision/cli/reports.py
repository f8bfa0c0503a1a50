"""What the command prints beside the answer: statistics, plans, and both as JSON."""

import json
from dataclasses import replace
from typing import Any

import torch

from llama_vision.api import LlamaVision
from llama_vision.cache.kv import Cache
from llama_vision.cli.terminal import write
from llama_vision.config import Config
from llama_vision.engine.engine import Engine
from llama_vision.engine.request import Request
from llama_vision.engine.workload import Workload
from llama_vision.errors import LONGEST_MESSAGE, SettingError, printable
from llama_vision.memory.free import known_free_memory
from llama_vision.memory.largest import largest_settings
from llama_vision.memory.plan import MemoryPlan, plan_run
from llama_vision.memory.units import human_bytes, parse_bytes


def make_report(
    name: str, model: LlamaVision, engine: Engine, request: Request, load_seconds: float
) -> dict[str, Any]:
    """What --json prints: bytes, seconds, and the completion itself."""
    completion = engine.completion(request)
    seconds = {"load": load_seconds, **engine.seconds}
    steps = len(completion.token_ids)
    planned = plan_run(model.config, engine.workload, dtype=model.model.dtype, device=model.device)
    return {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_token_ids": list(request.prompt.token_ids),
        "logprobs": completion.logprobs,
        "top_logprobs": [[one._asdict() for one in step] for step in completion.top_logprobs],
        "finish_reason": completion.finish_reason,
        "model": str(name),
        "device": str(model.model.device),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "visual_tokens": completion.visual_tokens._asdict(),
        "memory": {
            "weights": sum(parameter.nbytes for parameter in model.model.parameters()),
            "text_cache": engine.cache.text.nbytes,
            "visual_cache": engine.cache.visual.nbytes,
            "peak": engine.ledger.peak,
        },
        "ledger": {"planned": planned.to_dict(), "peaks": engine.ledger.peaks},
        "seconds": seconds,
        "tokens_per_second": steps / seconds["decode"] if seconds["decode"] else 0.0,
    }


def format_stats(report: dict[str, Any]) -> str:
    """The report as a few lines for people."""
    tokens, seconds = report["visual_tokens"], report["seconds"]
    times = "  ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    return (
        f"tokens   prompt {len(report['prompt_token_ids'])}  "
        f"generated {len(report['token_ids'])} ({report['finish_reason']})  "
        f"{report['tokens_per_second']:.1f} per second\n"
        f"visual   encoded {tokens['encoded']}  valid {tokens['valid']}  kept {tokens['kept']}\n"
        f"time     {times}\n"
        f"on       {report['device']}, {report['dtype']}\n"
        + format_ledger(report["memory"], **report["ledger"])
    )


def format_ledger(memory: dict[str, Any], planned: dict[str, Any], peaks: dict[str, int]) -> str:
    """Planned beside actual bytes; a phase's peak holds weights and caches as well."""
    names = ("weights", "text_cache", "visual_cache")
    stays = sum(planned[name] for name in names)
    rows = [(name.replace("_", " "), planned[name], memory[name]) for name in names]
    rows.append(("peak", planned["total"], memory["peak"]))
    rows += [(f"  {name}", stays + planned["phases"][name], peak) for name, peak in peaks.items()]
    lines = [f"{'memory':<14}{'planned':>20}{'actual':>20}"]
    for name, plan, actual in rows:
        words = "unknown" if actual is None else f"{actual:,}"
        lines.append(f"{name:<14}{plan:>20,}{words:>20}")
    return "\n".join(lines)


def print_plan(
    name: str,
    config: Config,
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fit: str | None = None,
    as_json: bool = False,
) -> int:
    """Print a plan; with `fit` (a size, or "free") the largest settings that fit. Returns 0."""
    free = known_free_memory(device)
    room = free if fit in (None, "free") else parse_bytes(fit)
    plan = plan_run(config, workload, dtype=dtype, device=device)
    data = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "batch": len(workload.prompts),
        "images": [len(prompt.grids) for prompt in workload.prompts],
        "tiles": [[rows * cols for rows, cols in prompt.grids] for prompt in workload.prompts],
        "max_seq_len": workload.max_text_tokens,
        "free": free,
        **plan.to_dict(),
    }
    if fit is None:
        write(format_heading(data))
        write(format_plan(plan, workload, config, device.type, free))
    else:
        if room is None:
            raise SettingError(f"what is free on {device} is unknown; give a size: --fit 24GiB")
        data["fit"] = largest_settings(config, workload, dtype=dtype, device=device, room=room)
        data["room"] = room
        write(format_fit(data))
    if as_json:
        write(json.dumps(data))
    return 0


def format_heading(data: dict[str, Any]) -> str:
    """What is planned for, in one line."""
    images, tiles = data["images"], [n for sample in data["tiles"] for n in sample]
    each = f"{images[0]} image{'s' * (images[0] != 1)}" if len(set(images)) == 1 else "images"
    each += f" of {max(tiles)} tile{'s' * (max(tiles) != 1)}" if tiles else ""
    prompts = f"{data['batch']} prompt{'s' * (data['batch'] != 1)}"
    return (
        f"{printable(data['model'], LONGEST_MESSAGE)}, {data['dtype']}, {data['device']}: "
        f"{prompts}, each {each}, "
        f"at most {data['max_seq_len']:,} tokens"
    )


def format_plan(
    plan: MemoryPlan, workload: Workload, config: Config, device: str, free: int | None
) -> str:
    """A plan as a table: names, human units, exact bytes."""
    one = Cache.plan(
        config.text,
        slots=1,
        max_text_tokens=1,
        visual_capacity=config.vision.tokens_per_tile,
        dtype=plan.dtype,
    )
    whole = replace(workload, visual_budget=None, pruner=None)
    in_full = Cache.plan(config.text, dtype=plan.dtype, **whole.cache_sizes(config)).visual
    grids = (grid for prompt in workload.prompts for grid in prompt.grids)
    tiles = max((rows * cols for rows, cols in grids), default=0)
    of_visual = [("  a tile of one image", one.visual)]
    of_visual += [(f"  an image of {tiles}", tiles * one.visual)] if tiles > 1 else []
    of_visual += [("  one prompt", plan.visual_cache // workload.slots)]
    of_visual += [("  without the budget", in_full)] if workload.visual_budget is not None else []
    rows = plan.rows([("  a token of one prompt", one.text)], of_visual)
    rows += [("free", free)] if free is not None else []
    lines = [f"{name:<26}{human_bytes(size):>12}{size:>20,}" for name, size in rows]
    scratch = "oneDNN's and MKL's scratch" if device == "cpu" else "libraries' workspaces"
    return "\n".join([*lines, f"(of tensors; {scratch}, which the processor decides, on top)"])


def format_fit(data: dict[str, Any]) -> str:
    """The largest settings as a small table."""
    room, fit = data["room"], data["fit"]
    head = f"{format_heading(data)}\ntakes {human_bytes(data['total'])}"
    if data["weights"] > room:
        return (
            f"{head}; the weights alone, {human_bytes(data['weights'])}, do not fit into "
            f"{human_bytes(room)}; use {fit['instead']}"
        )
    rows = (
        ("prompts at once", fit["batch"], ""),
        ("images a prompt", fit["images"], "--image, repeated"),
        ("tokens a prompt, answer included", fit["max_seq_len"], "--max-seq-len"),
        ("visual tokens a prompt", fit["visual_budget"], "--visual-budget"),
    )
    lines = [f"{head}; into {human_bytes(room)} fit, each with the rest as it is:"]
    for name, value, flag in rows:
        words = "none" if not value["largest"] else f"{value['largest']:,}"
        words += " or more" if value["all"] else ""
        lines.append(f"  {name:<34}{words:>16}  {flag}".rstrip())
    return "\n".join(lines)
