"""The ledger: what a run really took, beside its plan."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Tracker(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive among those that operations under it make.

    Args:
        devices: kinds of device whose tensors count.
    """

    def __init__(self, *devices: str):
        super().__init__()
        self.devices = devices
        self.now = self.peak = 0
        self._alive: dict[int, tuple[ref, int]] = {}

    def add(self, *tensors: Tensor) -> None:
        """Count the storage of each, once, until it is freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if tensor.device.type in self.devices and key not in self._alive:
                size = storage.nbytes()
                self._alive[key] = ref(storage, lambda _, key=key: self._drop(key)), size
                self.now += size
                self.peak = max(self.peak, self.now)

    def _drop(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise torch imports its whole compiler, for a second, just to stay out of here."""
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        self.add(*(tensor for tensor in made if isinstance(tensor, Tensor)))
        return out


class Ledger:
    """What the phases of a run took: their peaks, in bytes on the device.

    On CUDA the allocator's own counters are read. On the CPU, which has none, the tensors are
    tracked: what a library takes for itself inside an operation is not seen, as in the plan.
    Tracking costs some microseconds an operation; of steps of decoding, which are all alike, only
    the first is watched. Elsewhere nothing is known.

    Args:
        there: tensors that are there from the start.
    """

    def __init__(self, device: torch.device, *there: Tensor):
        self.device = device
        self.peaks: dict[str, int] = {}
        self.tracker = Tracker("cpu") if device.type == "cpu" else None
        if self.tracker is not None:
            self.tracker.add(*there)

    @property
    def peak(self) -> int | None:
        """Of the whole run."""
        return max(self.peaks.values(), default=None)

    @contextmanager
    def watch(self, phase: str) -> Iterator[None]:
        """Note the peak of what happens inside."""
        peak = 0
        if self.tracker is not None and not (phase == "decode" and phase in self.peaks):
            self.tracker.peak = self.tracker.now
            with self.tracker:
                yield
            peak = self.tracker.peak
        elif self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            yield
        if peak:
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
