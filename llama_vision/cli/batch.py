"""`--batch`: many prompts from a file or a folder into a file of answers, with progress."""

import argparse
import contextlib
import os
import sys
import time
from datetime import timedelta
from hashlib import blake2b
from pathlib import Path
from typing import Any

from llama_vision.api import LlamaVision
from llama_vision.batch.answers import ORDERED, PART, Answers, beside
from llama_vision.batch.run import Batch
from llama_vision.batch.tasks import Tasks, open_tasks
from llama_vision.cli.loading import load_weights
from llama_vision.cli.terminal import EXIT_INTERRUPTED, EXIT_USAGE, tell
from llama_vision.engine.engine import Engine
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import DEFAULT_SEQ_LEN, SLOTS, workload_alike
from llama_vision.errors import SettingError, printable
from llama_vision.model import parallel
from llama_vision.values import check

MOST_SLOTS = 8
"""Where the number is not given: each more takes room that few need."""
OF_ONE_PROMPT = ("image", "raw", "parse_special", "guard", "response", "chat", "serve")
OF_ONE_PROMPT += ("show_kept", "show_rules", "stats", "plan", "fit")
"""Options that say something of a single prompt, or of its answer."""
NO_OTHER_ANSWER = ("prefill_chunk",)
"""Settings that change no answer."""

REDRAWN, TOLD = 0.1, 30.0
"""Seconds between two lines of progress: on a terminal, and elsewhere."""


def check_batch(options: argparse.Namespace) -> None:
    """Refuse what is not of --batch, or of nothing else.

    Raises:
        SettingError: says what to leave out, or to give.
    """
    if options.batch is None:
        alone = next((name for name in ("out", "slots") if getattr(options, name) is not None), "")
        if alone:
            raise SettingError(f"--{alone} is of --batch FILE; give both, or neither")
        return
    for name in OF_ONE_PROMPT:
        if getattr(options, name, None) not in (None, False, []):
            flag = name.replace("_", "-")
            raise SettingError(f"--{flag} is of a single prompt; leave out --{flag} or --batch")
    if parallel.is_shared():
        raise SettingError("--batch runs in one process; leave out torchrun")
    if options.slots is not None:
        check("slots", options.slots, SLOTS)
    if options.out is None:
        raise SettingError("--batch needs a file for the answers; give --out FILE")
    if not os.path.exists(options.batch):
        name = printable(options.batch)
        raise SettingError(f"--batch {name} does not exist; expected a file of prompts or a folder")
    if os.path.isdir(options.batch) != (options.prompt is not None):
        raise SettingError(
            "--prompt is the question about each picture of --batch FOLDER; the prompts of a FILE "
            "stand in it"
        )
    check_out(Path(options.out), Path(options.batch))


def check_out(out: Path, source: Path) -> None:
    """Refuse a file of answers that must not be one.

    Raises:
        SettingError: it is no file, may not be written, or has the prompts in it.
    """
    name = printable(out)
    if os.path.exists(out) and not os.path.isfile(out):
        raise SettingError(f"--out {name} is not a file; expected one for the answers")
    if os.path.exists(out) and not os.access(out, os.W_OK):
        raise SettingError(f"--out {name} may not be written; expected another file")
    for path in (out, *(beside(out, suffix) for suffix in (PART, ORDERED))):
        if os.path.exists(path) and os.path.samefile(path, source):
            raise SettingError(f"--out {name} would overwrite the prompts; expected another file")


def run_batch(options: argparse.Namespace, settings: dict[str, Any], model: LlamaVision) -> int:
    """Answer all prompts, and say how far it is; the exit code.

    Args:
        settings: those of `Settings` that were given.
        model: without its weights, which are loaded if there is anything to answer.
    """
    base, out = Settings(**settings), Path(os.path.realpath(options.out))
    run = run_digest(model, options, settings)
    with contextlib.ExitStack() as stack:
        tasks = open_tasks(Path(options.batch), options.prompt, numbered=base.seed is not None)
        stack.callback(tasks.close)
        answers = Answers(out, run, tasks.digests)
        stack.callback(answers.close)
        progress = Progress(tasks, answers)
        stack.callback(progress.clear)
        try:
            if left := len(tasks) - answers.count:
                engine = make_engine(options, settings, model, left)
                how = {"system": options.system, "with_tokens": options.json}
                progress.follow(Batch(engine, tasks, answers, base, **how))
            answers.finish()
        except KeyboardInterrupt:
            progress.clear()
            tell(f"interrupted; {progress.answered}; the same command goes on")
            return EXIT_INTERRUPTED
    return progress.close()


def run_digest(model: LlamaVision, options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """A digest of what makes answers to the same prompt differ, from one run to another."""
    places = (options.model, options.adapter)
    facts = [
        os.path.realpath(place) if place and os.path.exists(place) else place for place in places
    ]
    facts += [model.model.dtype, model.config.quantization, options.prompt, options.system]
    facts += [options.json, *sorted(i for i in settings.items() if i[0] not in NO_OTHER_ANSWER)]
    return blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def make_engine(
    options: argparse.Namespace, settings: dict[str, Any], model: LlamaVision, prompts: int
) -> Engine:
    """Load the weights, and give them as many slots as were asked for, or as many as fit."""
    most = model.config.text.max_position_embeddings
    length = options.max_seq_len or min(DEFAULT_SEQ_LEN, most)
    load = workload_alike(
        model.config,
        batch=options.slots or min(MOST_SLOTS, prompts),
        max_seq_len=length,
        visual_budget=options.visual_budget,
        pruner=settings.get("pruner"),
        prefill_chunk=options.prefill_chunk,
    )
    if not options.force:
        load = model.room.fitted(load, options.slots)
    load_weights(model, options)
    return Engine(
        model,
        slots=load.slots,
        max_seq_len=length,
        visual_budget=options.visual_budget,
        compiled=options.compile,
        graphs=not options.no_graphs,
        force=options.force,
    )


class Progress:
    """How far a batch is, on stderr: a line that is redrawn, or one now and then."""

    def __init__(self, tasks: Tasks, answers: Answers):
        self.tasks, self.answers = tasks, answers
        self.before, self.failed, self.tokens = answers.count, 0, 0
        self.begun = self._told = time.monotonic()
        self._on_terminal, self._width = sys.stderr.isatty(), 0

    @property
    def answered(self) -> str:
        """How many are answered, in words."""
        return f"{self.answers.count} of {len(self.tasks)} are answered"

    def follow(self, batch: Batch) -> None:
        """Run it, and tell of it."""
        self.begun = self._told = time.monotonic()
        for ended in batch.run():
            self.tokens = batch.engine.counts.generated
            if ended is not None and ended.error is not None:
                self.failed += 1
                self.clear()
                tell(f"{self.tasks.name(ended.task)}: {ended.error}")
            now = time.monotonic()
            if now - self._told >= (REDRAWN if self._on_terminal else TOLD):
                self._told = now
                self._draw()

    def close(self) -> int:
        """Sum it up; the exit code."""
        self.clear()
        before = f", {self.before} of them before" if self.before else ""
        made = f": {self.tokens:,} tokens in {self._seconds:.1f} s, {self._speed}"
        tell(f"{self.answered}{before}{made if self.tokens else ''}")
        if self.failed:
            tell(f"{self.failed} of {len(self.tasks)} failed; the same command tries them again")
        return EXIT_USAGE if self.failed else 0

    def clear(self) -> None:
        """Take the line that is redrawn away."""
        if self._width:
            _to_terminal("\r" + " " * self._width + "\r")
            self._width = 0

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def _speed(self) -> str:
        return f"{self.tokens / self._seconds:.1f} tokens per second"

    def _draw(self) -> None:
        done = self.answers.count + self.failed
        line = f"{done} of {len(self.tasks)}, {self._speed}"
        if made := done - self.before:
            left = (len(self.tasks) - done) * self._seconds / made
            line += f", {timedelta(seconds=round(left))} left"
        if not self._on_terminal:
            tell(line)
            return
        _to_terminal("\r" + line.ljust(self._width))
        self._width = len(line)


def _to_terminal(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, end="", file=sys.stderr, flush=True)
