"""Save a quantised copy of a checkpoint: `python -m llama_vision.cli.save --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_vision.checkpoint.files import CheckpointError
from llama_vision.checkpoint.outline import read_outline
from llama_vision.checkpoint.save import save_quantized
from llama_vision.cli.arguments import Parser, add_quantization, build_quantization
from llama_vision.cli.terminal import run_command, tell
from llama_vision.errors import SettingError
from llama_vision.memory.units import human_bytes
from llama_vision.reading import shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, see `run_command`."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("llama-vision", lambda: save(read_arguments(given)))


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="python -m llama_vision.cli.save",
        description="Write a checkpoint with its matrices as int8 or int4, which loads without it.",
    )
    parser.add_argument("--model", required=True, metavar="DIR|REPO")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new directory")
    add_quantization(parser)
    return parser.parse_args(arguments)


def save(options: argparse.Namespace) -> int:
    """Read, round and write."""
    quantize = build_quantization(options)
    if quantize in (None, "none"):
        raise SettingError("what to save is not said; give --quantize int8 or int4")
    how = {"quantize": quantize, "adapter": options.adapter}
    how = {"quantize": quantize, "adapter": options.adapter}
    outline, out = read_outline(options.model, device="cpu", **how), Path(options.out)
    directory, config, adapter = outline.directory, outline.config, outline.adapter
    if config.quantization.stored:
        raise CheckpointError(f"{shown(directory)} is quantised already; copy it as it is")
    if adapter is not None:
        tell(f"the adapter is merged: {adapter}")
    size = save_quantized(directory, config, out, dtype=outline.dtype, adapter=adapter)
    tell(f"{shown(out)} holds {human_bytes(size)}: {config.quantization}, the rest bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
