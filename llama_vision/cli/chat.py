"""A conversation on the terminal: `generate.py --chat`."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from llama_vision.api import LlamaVision
from llama_vision.chat.chat import Chat
from llama_vision.chat.turn import Turn
from llama_vision.cli.loading import load_weights
from llama_vision.cli.terminal import OutputError, tell, tell_table, write
from llama_vision.engine.image_cache import ImageCache
from llama_vision.engine.workload import DEFAULT_SEQ_LEN
from llama_vision.errors import LlamaVisionError, SettingError, quote
from llama_vision.inputs.image import open_image
from llama_vision.inputs.messages import PromptError
from llama_vision.memory.units import human_bytes
from llama_vision.model import parallel

HELP = """\
Ask a question, or give a command:
  /image PATH  show a picture with the next question; may be repeated
  /retry       answer the last question anew
  /undo        take the last question and its answer back
  /stats       tokens, images and memory
  /save PATH   write the conversation, its pictures in a folder beside it
  /load PATH   go on with a conversation that was saved
  /help        this list
  /quit        end; Ctrl-D does it too
Ctrl-C stops an answer. A question that begins with / is written with two of them."""

NOT_OF_A_CHAT = ("raw", "guard", "response", "parse_special", "show_kept", "json")
IMAGE_CACHE = 256 * 2**20
"""Bytes of `--image-cache` where none is said: for questions that are taken back or asked anew."""


def check_chat(options: argparse.Namespace) -> None:
    """Refuse what does not go with a chat.

    Raises:
        SettingError: says what to leave out.
    """
    if not options.chat:
        return
    for name in NOT_OF_A_CHAT:
        if getattr(options, name):
            raise SettingError(f"--chat has no --{name.replace('_', '-')}; leave out one of them")
    if parallel.is_shared():
        raise SettingError("--chat runs in one process; leave out torchrun")


def talk(
    options: argparse.Namespace,
    images: list[Image.Image],
    settings: dict[str, Any],
    model: LlamaVision,
) -> int:
    """Load the weights, and answer until the input ends; the exit code."""
    if model.image_cache is None:
        model.image_cache = ImageCache(IMAGE_CACHE)
    length = settings.pop("max_seq_len", DEFAULT_SEQ_LEN)
    if not options.force:
        model.room.check_slots(1, length, None)
    load_weights(model, options)
    chat = model.chat(
        system=options.system,
        max_seq_len=length,
        compiled=options.compile,
        graphs=not options.no_graphs,
        force=options.force,
        **settings,
    )
    conversation = Conversation(chat, images, show_stats=options.stats)
    if options.prompt is not None:
        conversation.guarded(lambda: conversation.ask(options.prompt))
    if sys.stdin.isatty():
        tell("ask about your pictures; /help lists the commands, Ctrl-D ends")
    conversation.run()
    return 0


class Conversation:
    """Reads questions and commands, and answers.

    Args:
        images: to show with the first question.
        show_stats: after every answer.
    """

    def __init__(self, chat: Chat, images: list[Image.Image], *, show_stats: bool = False):
        self.chat, self.images, self.show_stats = chat, list(images), show_stats
        self.tries = 0
        """How often the last question was answered anew."""
        self.commands: dict[str, Callable[[str], object]] = {
            "image": lambda path: self.images.append(open_image(path)),
            "retry": lambda _: self.retry(),
            "undo": lambda _: tell(f"taken back: {described(chat.undo())}"),
            "stats": lambda _: tell_table(self.stats()),
            "save": chat.save,
            "load": self.load,
            "help": lambda _: tell_table(HELP),
        }

    def run(self) -> None:
        """Until the input ends, or /quit."""
        for line in read_lines():
            if line.split() == ["/quit"]:
                return
            self.guarded(lambda line=line: self.take(line))

    def guarded(self, act: Callable[[], object]) -> None:
        """A mistake is one line, and the conversation goes on."""
        try:
            act()
        except OutputError:
            raise
        except LlamaVisionError as error:
            tell(error)
        except KeyboardInterrupt:
            write("")
            tell("interrupted")

    def take(self, line: str) -> None:
        """A question, or a command."""
        if not line.strip():
            return
        if not line.startswith("/") or line.startswith("//"):
            self.ask(line[1:] if line.startswith("//") else line)
            return
        name, _, argument = line[1:].partition(" ")
        if name not in self.commands:
            raise PromptError(f"there is no command /{name}; /help lists them")
        argument = argument.strip()
        if name in ("image", "save", "load") and not argument:
            raise PromptError(f"/{name} needs a path: /{name} PATH")
        self.commands[name](argument.strip("'\"") if argument[:1] in "'\"" else argument)

    def ask(self, question: str) -> None:
        """Answer a question, with the pictures that were given for it."""
        pieces = self.chat.stream([*self.images, question])
        self.show(pieces)
        self.images, self.tries = [], 0

    def retry(self) -> None:
        """Answer anew; a seed counts up, or the answer would be the same."""
        self.tries += 1
        seed = self.chat.settings.seed
        again = {} if seed is None else {"seed": seed + self.tries}
        self.show(self.chat.stream_again(**again))

    def show(self, pieces: Iterator[str]) -> None:
        """Write an answer as it comes; Ctrl-C stops it after the next token."""
        with stop_asked() as asked:
            for piece in pieces:
                write(piece, end="")
                if piece and asked():  # of an answer that has begun
                    pieces.close()
                    break
        write("")
        completion = self.chat.turns[-1].completion
        if completion.finish_reason == "interrupted":
            tell("stopped; the conversation goes on from there, /undo takes it back")
        if completion.finish_reason == "length":
            tell(f"the answer ends after {len(completion.token_ids)} tokens: --max-new-tokens")
        if self.show_stats:
            tell_table(self.stats())

    def load(self, path: str) -> None:
        """Go on with a saved conversation, whose last turn is shown."""
        self.chat.load(path)
        tell(f"{len(self.chat.turns)} questions were asked; the last answer was:")
        if self.chat.turns:
            write(self.chat.turns[-1].completion.text)

    def stats(self) -> str:
        """What the conversation took so far, as a few lines."""
        engine = self.chat.engine
        cache, seconds = engine.cache, engine.seconds
        text, images = cache.text, engine.counts.images
        rate = engine.counts.generated / seconds["decode"] if seconds["decode"] else 0.0
        return (
            f"turns    {len(self.chat.turns)}, {text.lengths[0]} of {text.capacity} tokens\n"
            f"images   {images} encoded, {max(n[0] for n in cache.visual.lengths)} visual tokens "
            "held\n"
            f"tokens   {engine.counts.prefilled} prefilled, {engine.counts.generated} generated, "
            f"{rate:.1f} per second\n"
            f"cache    {human_bytes(text.nbytes)} text, {human_bytes(cache.visual.nbytes)} visual"
        )


def described(turn: Turn) -> str:
    """A question in a few words."""
    text = " ".join(part for part in turn.content if isinstance(part, str))
    pictures = sum(not isinstance(part, str) for part in turn.content)
    return quote(text) + f", with {pictures} picture{'s' * (pictures > 1)}" * bool(pictures)


def read_lines() -> Iterator[str]:
    """Lines of stdin; on a terminal with editing and a history, which is not written anywhere."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline

            readline.parse_and_bind("tab: complete")  # names of files
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told, line by line
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                write("")
            return
        except KeyboardInterrupt:
            write("")


@contextlib.contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed meanwhile; a second one breaks in at once."""
    asked = False

    def note(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
