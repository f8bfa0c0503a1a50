"""The loop that all stages share: gradients, a schedule in time, files to go on from.

On a CPU with two cores the second one computes gradients too, as much as it gets to: a `Helper`
adds what it has finished to the step that is due, and never keeps it waiting. Its gradients are
taken at parameters one or two steps old, which does no harm at these rates of learning.
"""

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from recipe.optimizer import Optimizers

Metrics = dict[str, float]
Losses = Callable[[nn.Module, object], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class Stage:
    """One stage of the recipe, as plain data and functions that another process can import."""

    name: str
    hours: float
    """Computing time that is meant for it; more can be given later."""
    build: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterator]
    """From the first batch's number and the distance to the next one."""
    losses: Losses
    vision_rate: float = 1.0
    """The encoder's part of the full learning rates."""


@dataclass
class Progress:
    """How far a stage has come."""

    stage: str
    step: int = 0
    pictures: int = 0
    seconds: float = 0.0
    metrics: Metrics = field(default_factory=dict)


def rate(progress: Progress, hours: float, warmup: int = 100, decay: float = 0.3) -> float:
    """Factor on the learning rates: up in `warmup` steps, level, down in the last of the time.

    It depends on the time that is left: a stage given more hours later goes on at full rate.
    """
    left = max(0.0, 1 - progress.seconds / (3600 * hours))
    return min(1.0, (progress.step + 1) / warmup) * max(0.02, min(1.0, left / decay))


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in bfloat16, which the CPUs and GPUs of today multiply several times faster.

    On a CPU attention stays in float32: torch's backward pass of it crawls in bfloat16.
    """
    attention = F.scaled_dot_product_attention

    def attention_in_float32(q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return attention(q.float(), k.float(), v.float(), **arguments)

    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        F.scaled_dot_product_attention = attention_in_float32
        try:
            yield
        finally:
            F.scaled_dot_product_attention = attention


def gradients(stage: Stage, module: nn.Module, batch: object) -> Metrics:
    """Add one batch's gradients to those of the parameters."""
    device = next(module.parameters()).device
    with mixed_precision(device):
        loss, metrics = stage.losses(module, batch.to(device))
    loss.backward()
    return {"loss": loss.item(), **metrics}


class Helper:
    """A second process that adds its gradients to ours, at a lower priority."""

    def __init__(self, stage: Stage, module: nn.Module, first: int):
        self.parameters = list(module.parameters())
        size = sum(p.numel() for p in self.parameters)
        self.weights = torch.zeros(size).share_memory_()
        self.sum = torch.zeros(size).share_memory_()
        context = mp.get_context("spawn")
        self.count = context.Value("i", 0)
        self.publish()
        arguments = (stage, self.weights, self.sum, self.count, first)
        self.process = context.Process(target=_help, args=arguments, daemon=True)
        self.process.start()

    def publish(self) -> None:
        """Show the helper the new parameters."""
        with torch.no_grad():
            torch.cat([p.flatten() for p in self.parameters], out=self.weights)

    def collect(self) -> int:
        """Add the helper's finished gradients to ours; how many batches they are of."""
        if not self.process.is_alive():
            raise RuntimeError("the helping process has ended; its error is above")
        with self.count.get_lock():
            finished, self.count.value = self.count.value, 0
            if finished:
                for parameter, gradient in pieces_of(self.sum, self.parameters):
                    if parameter.grad is not None:
                        parameter.grad += gradient
                self.sum.zero_()
        return finished

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join()


def _help(stage: Stage, weights: Tensor, total: Tensor, count: Any, first: int) -> None:
    """What the helper does: batches first, first + 2, … for ever."""
    os.nice(15)
    torch.set_num_threads(1)
    parent = os.getppid()
    module = stage.build()
    parameters = list(module.parameters())
    for batch in stage.batches(first, 2):
        if os.getppid() != parent:  # killed without a chance to end its helper
            return
        with torch.no_grad():
            for parameter, piece in pieces_of(weights, parameters):
                parameter.copy_(piece)
        gradients(stage, module, batch)
        with count.get_lock(), torch.no_grad():
            for parameter, piece in pieces_of(total, parameters):
                if parameter.grad is not None:
                    piece += parameter.grad
            count.value += 1
        module.zero_grad()


def pieces_of(
    flat: Tensor, parameters: list[nn.Parameter]
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter with its part of a vector that holds all of them, as a view."""
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        yield parameter, piece.view_as(parameter)


class Recorder:
    """The run's folder: a table of measurements, and checkpoints that are replaced whole."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, stage: str) -> Path:
        """Checkpoint of a stage."""
        return self.folder / f"stage_{stage}.pt"

    def save(
        self, progress: Progress, module: nn.Module, average: nn.Module, optimizers: Optimizers
    ) -> None:
        """Write beside the old checkpoint first, so that a kill leaves one of them whole."""
        state = {
            "progress": asdict(progress),
            "module": module.state_dict(),
            "average": average.state_dict(),
            "optimizers": optimizers.state_dict(),
        }
        path = self.path(progress.stage)
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, stage: str) -> dict | None:
        """A stage's checkpoint, if there is one."""
        path = self.path(stage)
        if not path.exists():
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    def log(self, progress: Progress) -> None:
        """Add a row to the table."""
        row = {key: value for key, value in asdict(progress).items() if key != "metrics"}
        row["seconds"] = round(progress.seconds, 1)
        row["metrics"] = " ".join(f"{k}={v:.4f}" for k, v in progress.metrics.items())
        path = self.folder / "log.csv"
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)


def smooth(old: Metrics, new: Metrics, keep: float = 0.95) -> Metrics:
    """Running means; a value that is missing or undefined now leaves the old one."""
    merged = dict(old)
    for name, value in new.items():
        if value == value:
            merged[name] = keep * merged[name] + (1 - keep) * value if name in merged else value
    return merged


class Every:
    """Whether so many seconds have passed since it last said so."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self) -> bool:
        """Ask, and begin again if so."""
        now = time.monotonic()
        if now - self.last < self.seconds:
            return False
        self.last = now
        return True


def restore(
    stage: Stage, module: nn.Module, recorder: Recorder
) -> tuple[Optimizers, nn.Module, Progress]:
    """The stage's checkpoint, or its beginning: optimizers, averaged module, progress."""
    optimizers = Optimizers(module, vision_rate=stage.vision_rate)
    average = deepcopy(module)
    saved = recorder.load(stage.name)
    if saved is None:
        return optimizers, average, Progress(stage.name)
    module.load_state_dict(saved["module"])
    average.load_state_dict(saved.get("average", saved["module"]))
    optimizers.load_state_dict(saved["optimizers"])
    return optimizers, average, Progress(**saved["progress"])


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int, horizon: int = 400) -> None:
    """Move the averaged parameters towards the new ones.

    At a full learning rate the parameters jump about the good ones; their mean over the last
    `horizon` steps is nearly as good as what a decay of the rate would reach.
    """
    weight = 1 / min(step + 1, horizon)
    for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
        slow.lerp_(fast, weight)


def step(
    stage: Stage,
    module: nn.Module,
    optimizers: Optimizers,
    batch: object,
    factor: float,
    helper: Helper | None,
) -> tuple[int, Metrics]:
    """One step of the optimizers; how many batches it was of, and what ours measured."""
    metrics = gradients(stage, module, batch)
    finished = 1
    if helper is not None:
        finished += helper.collect()
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.grad /= finished
    optimizers.step(factor)
    if helper is not None:
        helper.publish()
    return finished, metrics


def train(
    stage: Stage,
    module: nn.Module,
    recorder: Recorder,
    *,
    helpers: int = 0,
    log_every: float = 30.0,
    save_every: float = 120.0,
) -> nn.Module:
    """Run a stage until its time is used up, from where its checkpoint left off."""
    optimizers, average, progress = restore(stage, module, recorder)
    # A start takes batches that no earlier one took: two processes make far fewer than 8 a step.
    first = 8 * progress.step
    helper = Helper(stage, module, first + 1) if helpers else None
    stream = stage.batches(first, 2 if helper else 1)
    log, save = Every(log_every), Every(save_every)
    last = time.monotonic()
    while progress.seconds < 3600 * stage.hours:
        batch = next(stream)
        factor = rate(progress, stage.hours)
        finished, metrics = step(stage, module, optimizers, batch, factor, helper)
        follow(average, module, progress.step)
        now = time.monotonic()
        progress.seconds, last = progress.seconds + now - last, now
        progress.step += 1
        progress.pictures += finished * len(batch)
        progress.metrics = smooth(progress.metrics, metrics)
        if log.due():
            recorder.log(progress)
            report(progress, stage.hours)
        if save.due():
            recorder.save(progress, module, average, optimizers)
    if helper is not None:
        helper.stop()
    recorder.log(progress)
    recorder.save(progress, module, average, optimizers)
    return module


def report(progress: Progress, hours: float) -> None:
    """One line: where the stage is, how long it has left, what it measures."""
    left = max(0, round(3600 * hours - progress.seconds))
    values = "  ".join(f"{name} {value:.3f}" for name, value in progress.metrics.items())
    print(
        f"{progress.stage} step {progress.step}, {progress.pictures} pictures, "
        f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left  {values}",
        flush=True,
    )
