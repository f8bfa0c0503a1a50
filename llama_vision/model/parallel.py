"""Several devices, a process for each: every one holds a slice of the matrices.

Attention divides its heads among them and an MLP its hidden width, so that each computes a part of
a block's sum and one addition over all of them ends it. Everything else is done alike by all; what
might come out differently, the first process decides. With one device nothing here does anything.

Source: Megatron-LM, arXiv 1909.08053, section 3.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llama_vision.errors import LlamaVisionError, quote

Answer = TypeVar("Answer")

PATIENCE = timedelta(days=1)
"""A process that waits is no fault: another one may load for long, or wait for its reader. One that
has ended is noticed at once, for its connections close."""

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` tells each process, in its environment."""


class ParallelError(LlamaVisionError):
    """Processes that cannot find one another, or one of them that has ended."""


def start(environment: Mapping[str, str] = os.environ) -> int:
    """Meet the other processes that `torchrun` started; how many there are: 1 without it.

    Raises:
        ParallelError: the environment is not that of torchrun, or the others are not to be found.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        return 1
    size, number, local = _places(environment)
    if not dist.is_available():
        raise ParallelError(
            f"WORLD_SIZE is {size} and this build of torch {torch.__version__} has no "
            "torch.distributed; install another build, or leave out torchrun"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        if local >= (count := torch.cuda.device_count()):
            raise ParallelError(
                f"LOCAL_RANK is {local} and there are {count} CUDA devices; "
                f"expected --nproc-per-node {count} at most"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE, world_size=size, rank=number)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ParallelError(
            f"the processes of this run do not find one another ({first_line}); start them with "
            f"torchrun --nproc-per-node {size}"
        ) from None
    return size


def _places(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """WORLD_SIZE, RANK and LOCAL_RANK."""
    given = {name: environment.get(name, "") for name in LAUNCHER}
    wrong = [name for name in LAUNCHER if not given[name]]
    wrong += [n for n in LAUNCHER if n != "MASTER_ADDR" and not given[n].isdecimal()]
    if not wrong:
        size, number, local = (int(given[name]) for name in LAUNCHER[:3])
        wrong = ["RANK"] * (number >= size) + ["LOCAL_RANK"] * (local > number)
    if wrong:
        name = wrong[0]
        what = f"{name} is {quote(given[name])}" if given[name] else f"there is no {name}"
        raise ParallelError(
            f"{what} in the environment, which has a WORLD_SIZE; expected what torchrun "
            "--nproc-per-node N sets: start with it, or unset WORLD_SIZE"
        )
    return size, number, local


_broken = False
"""Whether another process has gone."""


def stop() -> None:
    """Part from the others, if there are any."""
    if is_shared() and not _broken:
        dist.destroy_process_group()


def leave(code: int) -> int:
    """The exit code; where another process has gone, end at once with it.

    Threads of gloo that wait for the other one are never joined then, and C++ aborts a program that
    ends in the usual way with them. Flush what was printed first.
    """
    if _broken:
        os._exit(code)
    return code


def rank() -> int:
    """Number of this process; 0 is the first one, and the one that talks."""
    return dist.get_rank() if is_shared() else 0


def total(x: Tensor, devices: int) -> Tensor:
    """The sum of what all devices give: the same shape, in place where it can be.

    Of tensors without bytes, as a plan has, nothing is sent.
    """
    if devices == 1 or x.is_meta:
        return x
    with told():
        dist.all_reduce(x)
    return x


def gather(x: Tensor, devices: int) -> Tensor:
    """What each device gives, one after the other: [...] -> [devices, ...]."""
    if devices == 1:
        return x[None]
    out = x.new_empty(devices, *x.shape)
    if x.is_meta:
        return out
    with told():
        dist.all_gather(list(out.unbind(0)), x.contiguous())
    return out


def agree(decide: Callable[[], Answer], devices: int) -> Answer:
    """What the first process decides; the others do not, for chance or a user may be asked.

    Args:
        decide: what it answers, or raises, goes to the others; tensors on the host.

    Raises:
        LlamaVisionError: what `decide` raised, in every process.
    """
    if devices == 1 or not is_shared():
        return decide()
    message: list[Any] = [None, None]
    if rank() == 0:
        try:
            message[0] = decide()
        except LlamaVisionError as error:
            message[1] = error
    with told():
        dist.broadcast_object_list(message, src=0, device=torch.device("cpu"))
    if message[1] is not None:
        raise message[1]
    return message[0]


def least(number: int, devices: int) -> int:
    """The least of the numbers that the processes give, such as of bytes that are free."""
    if devices == 1 or not is_shared():
        return number
    return int(gather(torch.tensor(number), devices).min())


def is_shared() -> bool:
    """Whether there are other processes; a plan for several devices is made by one alone."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def told() -> Iterator[None]:
    """One line for what a library says when another process has gone."""
    try:
        yield
    except RuntimeError as error:
        if not is_shared() or isinstance(error, torch.OutOfMemoryError):
            raise
        global _broken
        _broken = True
        raise ParallelError(
            "another process of this run has ended, or cannot be reached, and so this one ends; "
            "see what the other one said, and start all of them again"
        ) from error
