"""Compiling a step, and capturing it as CUDA graphs: both wrap it from outside."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from llama_vision.errors import SettingError
from llama_vision.model import parallel


@cache
def compiled(step: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    """A step, compiled when it is first called; sizes stay open, so it serves every run.

    On a CPU the kernels are called from C++ rather than from Python, a fifth of a small model's
    time; on CUDA graphs do away with the calls. The norms' eps are constants: left open, each would
    be one more input, together a sixth. What is sent to other devices cannot be called from C++.
    """
    options = {"cpp_wrapper": device == "cpu" and not parallel.is_shared()}
    program = torch.compile(step, dynamic=True, fullgraph=True, options=options)

    def run(*arguments: object) -> Tensor:
        patched = torch._dynamo.config.patch(specialize_float=True)
        with parallel.told(), _compiler_problems_told(), patched:
            return program(*arguments)

    return run


@cache
def check_compiler(device: str) -> None:
    """Compile next to nothing, to know before anything is waited for.

    Raises:
        SettingError: there is no compiler for a kind of device, or it does not work.
    """
    with _compiler_problems_told():
        torch.compile(torch.neg)(torch.zeros(2, device=device))


@contextmanager
def _compiler_problems_told() -> Iterator[None]:
    """As one line that says what to do."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        first_line = str(error).strip().splitlines()[0]
        raise SettingError(
            f"decoding cannot be compiled here ({first_line}); --compile (compiled=True) needs "
            "a C++ compiler, on CUDA Triton: install it, or leave it out"
        ) from None


class Graphs:
    """CUDA graphs of work on tensors that stay where they are, one for each of its shapes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Forget all of them: tensors have moved."""
        self.captured.clear()

    def replay(self, shape: Hashable, run: Callable[[], object]) -> None:
        """Do again what `run` did the first time.

        It is captured then, after a run that compiles and warms up: it must do no harm to run it
        twice.
        """
        if shape not in self.captured:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            pool = next((other.pool() for other in self.captured.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                run()
            self.captured[shape] = graph
        self.captured[shape].replay()
