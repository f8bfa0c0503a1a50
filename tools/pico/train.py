"""Train the embedded model: a small one of the real architecture that answers about pictures.

    pip install -r tools/pico/requirements.txt
    python tools/pico/train.py --run runs/pico --hours 1.5 1.5 5
    python tools/pico/train.py --run runs/pico --hours 1.5 1.5 9   # later: four more

Three stages, each with its own hours:
  A  the vision encoder alone reads full pages of one tile: every patch is labelled;
  B  one tile, with questions and answers; the labels go on at a low weight;
  C  pictures of one to four tiles, in the encoder's full size.
A run that was stopped, or killed, goes on where its last checkpoint is; more hours count for the
stage that it is in and those after. When the time is used up the model is in RUN/checkpoint, in the
official layout.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from recipe.batches import Pages, Pictures, Quiz, Quizzes, Rows, stream
from recipe.chat import Chat, train_tokenizer
from recipe.drawing import IGNORED
from recipe.export import export
from recipe.model import MAX_TILES, Seer, Student, label_losses, model_config, vision_config
from recipe.plot import plot
from recipe.sources import Sources
from recipe.training import Metrics, Recorder, Stage, train
from torch import Tensor

LABEL_SHARE = 0.5
"""Weight of the label losses beside the answers, in stages B and C."""

VISION_RATES = {"A": 1.0, "B": 0.2, "C": 0.6}
"""Of the learning rates. At the full rate the first, wild gradients of a new decoder undo in
minutes what the encoder has learned: a step of Muon is equally long whatever the gradient.
"""

ONE_TILE = {1: 1.0}
ALL_TILES = {1: 0.4, 2: 0.22, 3: 0.14, 4: 0.24}


@dataclass(frozen=True)
class Settings:
    """What a run is made with; the same for all its processes."""

    run: Path
    width: int
    device: str
    workers: int
    seed: int
    size: int
    """Pictures a batch in stage A; the other stages take fewer, for they cost more."""
    minimal: bool
    """Do without the packages of fonts and words."""

    @property
    def sources(self) -> Sources:
        """Fonts and words."""
        return Sources.minimal() if self.minimal else Sources.trained()

    @property
    def chat(self) -> Chat:
        """The run's tokenizer, which is made first."""
        path = self.run / "tokenizer.model"
        if not path.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            train_tokenizer(path, self.sources)
        return Chat(path)


def new_seer(settings: Settings) -> Seer:
    """Stage A's module, fresh."""
    torch.manual_seed(settings.seed)
    seer = Seer.new(vision_config(settings.width, max_tiles=1), settings.width)
    return seer.to(settings.device)


def new_student(settings: Settings, max_tiles: int) -> Student:
    """Stage B's or C's module, fresh."""
    torch.manual_seed(settings.seed)
    config = model_config(settings.chat.first_special, settings.width, max_tiles)
    return Student.new(config).to(settings.device)


def page_stream(settings: Settings, start: int, step: int) -> Iterator[Pictures]:
    """Batches of stage A."""
    pages = Pages(settings.sources, f"train-{settings.seed}", settings.size)
    return stream(pages, start, step, settings.workers)


def quiz_stream(settings: Settings, stage: str, start: int, step: int) -> Iterator[Quiz]:
    """Batches of stages B and C."""
    one_tile = stage == "B"
    quizzes = Quizzes(
        settings.sources,
        settings.chat,
        f"train-{settings.seed}-{stage}",
        tiles=ONE_TILE if one_tile else ALL_TILES,
        size=max(2, settings.size // (2 if one_tile else 3)),
        questions=4 if one_tile else 5,
        pages=0.25,
    )
    return stream(quizzes, start, step, settings.workers)


def page_losses(seer: Seer, pages: Pictures) -> tuple[Tensor, Metrics]:
    """What stage A minimises."""
    return label_losses(seer.labels, seer(pages.pixels, pages.aspect_ids), pages.labels)


def quiz_losses(student: Student, quiz: Quiz) -> tuple[Tensor, Metrics]:
    """What stages B and C minimise: the answers' cross-entropy, and a little of the labels'."""
    pictures = quiz.pictures
    features = student.see(pictures.pixels, pictures.aspect_ids)
    seen, labels = label_losses(student.labels, features, pictures.labels)
    answers, exact = answer_losses(
        student, quiz.rows, student.hidden(quiz.rows.ids, features, quiz.shown)
    )
    talk, talk_exact = answer_losses(student, quiz.talk, student.hidden(quiz.talk.ids))
    by_type = defaultdict(list)
    for kind, hit in zip(quiz.types, exact.tolist(), strict=True):
        by_type[kind].append(hit)
    metrics = {kind: sum(hits) / len(hits) for kind, hits in sorted(by_type.items())}
    metrics["exact"] = exact.float().mean().item()
    metrics[f"tiles_{pictures.pixels.shape[1]}"] = metrics["exact"]
    metrics["talk"] = talk_exact.float().mean().item()
    metrics["left_char"] = labels["left_char"]
    return answers + 0.05 * talk + LABEL_SHARE * seen, metrics


def answer_losses(student: Student, rows: Rows, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, and which rows [R] are right throughout.

    A row whose every token is the likeliest one after the true ones before is what greedy decoding
    would have written, so this measures exact answers without decoding.
    """
    asked = rows.targets != IGNORED
    logits = student.model.text.logits(hidden[asked])
    wanted = rows.targets[asked]
    wrong = torch.zeros_like(asked)
    wrong[asked] = logits.argmax(-1) != wanted
    return F.cross_entropy(logits, wanted), ~wrong.any(1)


def make_stages(settings: Settings, hours: dict[str, float]) -> dict[str, Stage]:
    """The three stages."""
    b, c = (partial(quiz_stream, settings, name) for name in "BC")
    return {
        name: Stage(name, hours[name], *parts, VISION_RATES[name])
        for name, *parts in (
            ("A", partial(new_seer, settings), partial(page_stream, settings), page_losses),
            ("B", partial(new_student, settings, 1), b, quiz_losses),
            ("C", partial(new_student, settings, MAX_TILES), c, quiz_losses),
        )
    }


def run(settings: Settings, hours: dict[str, float], helpers: int, log_every: float) -> Student:
    """All stages, each from where the run's files say it is."""
    recorder = Recorder(settings.run)
    stages = make_stages(settings, hours)
    training = partial(train, recorder=recorder, helpers=helpers, log_every=log_every)
    seer = student = wide = None
    if not recorder.path("B").exists():
        seer = training(stages["A"], stages["A"].build())
    if not recorder.path("C").exists():
        student = stages["B"].build()
        if seer is not None:
            student.learn_to_see_from(seer)
        student = training(stages["B"], student)
        wide = student.widened(MAX_TILES).to(settings.device)
    return training(stages["C"], wide or stages["C"].build())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="folder for checkpoints and the log"
    )
    parser.add_argument(
        "--hours",
        type=float,
        nargs="+",
        default=[8.0],
        help="for all (split 2 : 2 : 6), or for A, B and C; a run given more later goes on",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--helpers", type=int, choices=(0, 1), default=0, help="second CPU process")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    parser.add_argument("--size", type=int, default=64, help="pictures a batch in stage A")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the whole recipe in about a minute")
    parser.add_argument(
        "--export-only", action="store_true", help="of stage C as far as it has come"
    )
    options = parser.parse_args(arguments)
    if len(options.hours) not in (1, 3):
        parser.error("--hours takes one number, or one for each of the three stages")
    if options.helpers and options.device != "cpu":
        parser.error("--helpers is for CPUs; beside a GPU, give --workers to draw the pictures")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Train, then export and plot."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(
        options.run,
        options.width,
        options.device,
        options.workers,
        options.seed,
        options.size,
        False,
    )
    hours = (
        options.hours
        if len(options.hours) == 3
        else [options.hours[0] * x for x in (0.2, 0.2, 0.6)]
    )
    log_every = 30.0
    if options.smoke:
        settings = replace(settings, width=32, size=8, minimal=True)
        hours, log_every = [12 / 3600] * 3, 3.0
    if options.export_only:
        student = new_student(settings, MAX_TILES)
        student.load_state_dict(Recorder(settings.run).load("C")["average"])
    else:
        student = run(settings, dict(zip("ABC", hours, strict=True)), options.helpers, log_every)
    export(student.model, settings.chat, settings.run / "checkpoint")
    plot(settings.run / "log.csv", settings.run / "curves.png")
    print(f"the checkpoint is in {settings.run / 'checkpoint'}")


if __name__ == "__main__":
    main()
