"""Arguments of the command, and the rule of pruning that they ask for."""

import argparse
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from llama_vision.cache.choose_rule import RULE_OPTIONS, choose_rule
from llama_vision.cache.pruning import Pruner
from llama_vision.cache.rules import COUNTED_RULES
from llama_vision.checkpoint.hub import EMBEDDED_MODEL
from llama_vision.cli.parsing import SHOWN_RULES, number, real, rule_names, text, whole
from llama_vision.cli.terminal import write
from llama_vision.engine.settings import Settings
from llama_vision.engine.workload import PREFILL_CHUNK
from llama_vision.errors import LlamaVisionError, SettingError
from llama_vision.quantization import INT4, Quantization, choose_quantization


class UsageError(LlamaVisionError):
    """Arguments that are none of the command's."""


class Parser(argparse.ArgumentParser):
    """argparse with an exception for a mistake, and no page of usage around it."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}; see --help")

    def print_help(self, file: IO[str] | None = None) -> None:
        """Print it as an answer is."""
        write(self.format_help(), end="")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Python 3.11 and older take the `--` of `--top-k=--` for the end of all options."""
        if action.option_strings and arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `--max-new-tokens`, `--max_new_tokens` and `--max-tokens` are one.

    Raises:
        UsageError: it cannot be parsed.
    """
    parser = Parser(
        prog="llama-vision",
        description="Ask Llama-3.2-Vision about pictures.",
        epilog="Text streams to stdout; progress, statistics and problems go to stderr.",
    )
    _add_question(parser.add_argument_group("question"))
    _add_answer(parser.add_argument_group("answer"))
    _add_batch(parser.add_argument_group("many prompts"))
    _add_pruning(parser.add_argument_group("pruning"))
    _add_showing(parser.add_argument_group("what was kept, to look at"))
    _add_device(parser.add_argument_group("device and weights"))
    _add_memory(parser.add_argument_group("memory"))
    return parser.parse_args([_with_dashes(argument) for argument in arguments])


Group = argparse._ArgumentGroup


def _add_question(group: Group) -> None:
    add = group.add_argument
    add(
        "--model",
        default=str(EMBEDDED_MODEL),
        metavar="DIR|REPO",
        help="checkpoint in the official layout (default: the small one that comes with the code)",
    )
    add("--image", action="append", default=[], metavar="PATH", help="a picture; may be repeated")
    add("--prompt", type=text, metavar="TEXT")
    add("--system", type=text, metavar="TEXT", help="system message")
    add(
        "--raw",
        action="store_true",
        help="no chat format: complete the text, for base models; <|image|> marks places for "
        "images, else they go first",
    )
    add(
        "--parse-special",
        action="store_true",
        help="read <|eot_id|> and the like in --prompt and --system as the tokens they name, and "
        "<|image|> as the place of an image; else they are text",
    )
    add(
        "--guard",
        action="store_true",
        help="for Llama Guard 3 Vision: judge --prompt, and --image, as a user's message; greedy "
        "unless --temperature says otherwise",
    )
    add("--response", type=text, metavar="TEXT", help="with --guard, judge this answer to it")
    add("--max-tiles", type=whole, metavar="N", help="most tiles an image is cut into")
    add(
        "--chat",
        action="store_true",
        help="a conversation on the terminal, about the pictures given; /help lists its commands",
    )
    _add_image_cache(group)


def _add_answer(group: Group) -> None:
    add = group.add_argument
    most = f"most tokens of the answer (default: {Settings.max_new_tokens})"
    add("--max-new-tokens", "--max-tokens", type=whole, metavar="N", help=most)
    add("--temperature", type=real, metavar="T", help="0 is greedy (default: the checkpoint's)")
    add("--top-p", type=real, metavar="P")
    add("--top-k", type=whole, metavar="K", help="0 is no limit")
    add("--min-p", type=real, metavar="P", help="least share of the likeliest token's probability")
    add("--repetition-penalty", type=real, metavar="R", help="1 is none")
    add("--seed", type=whole, metavar="N", help="make the random draws repeatable")
    add(
        "--stop",
        type=text,
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    add("--ignore-stop", action="store_true", help="go on past stop tokens")
    add(
        "--stats",
        action="store_true",
        help="print tokens, times, and memory beside its plan to stderr",
    )
    add("--json", action="store_true", help="print one JSON object on the last line of stdout")
    add("--top-logprobs", type=whole, metavar="N", help="in --json, of the N likeliest tokens")


def _add_batch(group: Group) -> None:
    add = group.add_argument
    add(
        "--batch",
        metavar="FILE|FOLDER",
        help='answer every line of a JSONL file, {"id": …, "prompt": …, "images": […]} or '
        '{"id": …, "messages": […]}, with settings of its own by name; or --prompt about every '
        "picture of a folder",
    )
    add(
        "--out",
        metavar="FILE",
        help="of the answers, a line each in the order of the prompts (--json adds tokens); what "
        "is answered there is not asked again",
    )
    add("--slots", type=whole, metavar="N", help="prompts at once (default: what fits, at most 8)")


def _add_pruning(group: Group) -> None:
    add = group.add_argument
    add(
        "--keep",
        type=number,
        metavar="R|N",
        help="visual tokens to keep, 0.5 for half or 800 for a count: those that differ most "
        "(max-min), with the others merged into them, unless --pruner names another rule",
    )
    add("--pruner", choices=COUNTED_RULES, help="another rule for --keep; it drops the others")
    add(
        "--k-ratio",
        type=real,
        metavar="R",
        help="prune with the paper's rule, Trimmed Llama: top-k per head, k = R·V",
    )
    add(
        "--merge", action="store_true", help="with --pruner or --k-ratio, merge instead of dropping"
    )
    add(
        "--visual-budget",
        type=number,
        metavar="R|N",
        help="most visual tokens to keep, and the size of their cache",
    )


def _add_showing(group: Group) -> None:
    group.add_argument(
        "--show-kept",
        metavar="PATH",
        help="write the pictures with what was kept, merged and dropped, and the attention to it: "
        "a picture (.png), or a page that needs no network (.html)",
    )
    group.add_argument(
        "--show-rules",
        type=rule_names,
        default=[],
        metavar="NAME,…",
        help=f"beside it, what these would keep at the same count: {', '.join(SHOWN_RULES)}",
    )


def _add_device(group: Group) -> None:
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add_quantization(group)
    add(
        "--devices",
        type=whole,
        metavar="N",
        help="with --plan or --fit, of each of N devices that torchrun divides the model among",
    )


def _add_memory(group: Group) -> None:
    add = group.add_argument
    add("--max-seq-len", type=whole, metavar="N", help="most tokens of prompt and answer together")
    add(
        "--prefill-chunk",
        type=whole,
        default=PREFILL_CHUNK,
        metavar="N",
        help="most prompt tokens that go through a block at once (default: %(default)s); it "
        "changes no answer, only what memory a long prompt needs",
    )
    add(
        "--plan",
        action="store_true",
        help="print what memory the run takes and stop, before any weight is read; --model may "
        "also be 11b or 90b",
    )
    add(
        "--fit",
        nargs="?",
        const="free",
        metavar="SIZE",
        help="print the largest batch, images and lengths that fit into so much memory, such as "
        "24GiB (default: what is free), and stop",
    )
    add(
        "--compile",
        action="store_true",
        help="compile decoding: the first run waits for it; worth it for long answers",
    )
    add("--no-graphs", action="store_true", help="on CUDA, do not capture decoding as graphs")
    add("--force", action="store_true", help="go on even where memory seems not to suffice")


def add_quantization(group: argparse._ActionsContainer) -> None:
    """What the weights are to become."""
    add = group.add_argument
    add(
        "--quantize",
        metavar="FORMAT",
        help="keep the decoder's matrices as int8 or int4 (default: as the checkpoint has them; "
        "none makes bfloat16 of a quantised one)",
    )
    add("--quantize-all", action="store_true", help="the other matrices too, as int8")
    add("--quantize-group", type=whole, metavar="N", help="weights that share a scale in int4")
    add("--quantize-cross", metavar="FORMAT", help="of the cross-attention blocks alone")
    add("--adapter", metavar="DIR|REPO", help="merge a LoRA, as peft saves it, into the weights")


def _add_image_cache(group: Group) -> None:
    """How much of the host's memory may hold what pictures became."""
    group.add_argument(
        "--image-cache",
        metavar="SIZE",
        help="keep the features of pictures in so much host memory, such as 1GiB, for further "
        "questions about them (default: in a chat 256MiB, else only while a prompt that shows the "
        "same picture waits)",
    )


def build_quantization(options: argparse.Namespace) -> str | Quantization | None:
    """What --quantize and its companions ask for."""
    name, group, cross = options.quantize, options.quantize_group, options.quantize_cross
    details = options.quantize_all or group is not None or cross is not None
    if name in (None, "none") and details:
        raise SettingError(
            "--quantize-all, --quantize-group and --quantize-cross are of --quantize int8 or int4; "
            "give it too"
        )
    if not details:
        return name
    group = INT4.group if group is None else group
    return choose_quantization(name, everything=options.quantize_all, group=group, cross=cross)


def build_pruner(options: argparse.Namespace) -> Pruner | None:
    """The rule that --keep, --pruner or --k-ratio asks for."""
    return choose_rule(**{name: getattr(options, name) for name in (*RULE_OPTIONS, "seed")})


def _with_dashes(argument: str) -> str:
    """`--max_seq_len=5` -> `--max-seq-len=5`; values stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
