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
from llama_vision.cli.main import EXIT_INTERRUPTED, EXIT_USAGE
from llama_vision.errors import LlamaVisionError
from llama_vision.memory.fit import human_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="download.py", description="Fetch the files of a checkpoint that loading needs."
    )
    parser.add_argument("repo", metavar="REPO", help="such as meta-llama/Llama-3.2-11B-Vision")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help="where to (default: the Hugging Face cache)"
    )
    parser.add_argument(
        "--token", help="default: HF_TOKEN, or the one that `hf auth login` has stored"
    )
    options = parser.parse_args(arguments)
    try:
        directory = download(options.repo, to=options.to, token=options.token)
        find_shards(directory)  # fails if there are no weights that can be loaded
    except LlamaVisionError as error:
        print(f"download.py: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("download.py: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    sizes = [path.stat().st_size for path in directory.iterdir() if path.is_file()]
    print(f"{len(sizes)} files, {human_bytes(sum(sizes))}")
    print(f"--model {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
