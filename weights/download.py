"""Fetch the files of a checkpoint that loading needs: `python weights/download.py REPO`.

Of a repository such as meta-llama/Llama-3.2-11B-Vision-Instruct that leaves out `original/`, a
second copy of all weights in Meta's layout. Run again after an interruption, it goes on with the
files that are not complete yet.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_vision.checkpoint.files import find_shards
from llama_vision.checkpoint.hub import download
from llama_vision.cli.arguments import Parser
from llama_vision.cli.terminal import EXIT_INTERRUPTED, run_command, tell, write
from llama_vision.memory.fit import human_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="download.py", description="Fetch the files of a checkpoint that loading needs."
    )
    parser.add_argument("repo", metavar="REPO", help="such as meta-llama/Llama-3.2-11B-Vision")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="where to (default: the Hugging Face cache)"
    )
    parser.add_argument(
        "--token", help="default: HF_TOKEN, or the one that `hf auth login` has stored"
    )
    return run_command("download.py", lambda: fetch(parser.parse_args(arguments)))


def fetch(options: argparse.Namespace) -> int:
    """Download what the options name, and say where it is."""
    try:
        directory = download(options.repo, to=options.to, token=options.token)
    except KeyboardInterrupt:
        tell("interrupted; the same command goes on from here", "download.py")
        return EXIT_INTERRUPTED
    find_shards(directory)  # fails if there are no weights that can be loaded
    sizes = [path.stat().st_size for path in directory.iterdir() if path.is_file()]
    write(f"{len(sizes)} files, {human_bytes(sum(sizes))}")
    write(f"--model {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
