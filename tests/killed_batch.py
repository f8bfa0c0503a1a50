"""Runs one batch again and again, each time killed, until it ends; `test_batch` starts it.

python killed_batch.py SEED KILLS SIZE ARGUMENTS…, where SIZE is that of the answers at the end

Torch is imported once; each run is a fork, killed when its journal has grown by a random length and
some milliseconds have passed. The last but one dies where the ordered answers take their place.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from llama_vision.cli.main import main


def run(arguments: list[str], *, dies_at_the_end: bool = False) -> int:
    """A child that runs the command; its process id."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        if dies_at_the_end:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        os._exit(main(arguments))
    return child


def end_of(child: int) -> int:
    """The exit code; that of a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(child: int, part: Path, size: int, wait: float) -> int:
    """Kill a child some time after a file has grown to a size; how it ended."""
    while not (part.exists() and part.stat().st_size >= size):
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("a run has ended before it was killed")
        time.sleep(0.0005)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    return end_of(child)


def killed_again_and_again(seed: int, kills: int, size: int, arguments: list[str]) -> None:
    draw, ends = random.Random(seed), []
    part = Path(arguments[arguments.index("--out") + 1] + ".part")
    for left in range(kills, 0, -1):
        now = part.stat().st_size if part.exists() else 0
        most = max(now + 1, now + (size - now) // (left + 1))
        ends.append(kill_at(run(arguments), part, draw.randint(now, most), draw.uniform(0, 0.02)))
    ends.append(end_of(run(arguments, dies_at_the_end=True)))
    ids = [line.partition(b",")[0] for line in part.read_bytes().splitlines() if line[-1:] == b"}"]
    ends.append(end_of(run(arguments)))
    print(*ends, len(ids), len(set(ids)))


if __name__ == "__main__":
    killed_again_and_again(*map(int, sys.argv[1:4]), sys.argv[4:])
