"""Decoding in fixed shapes: the same blocks, as a step that can be compiled and captured.

`TextPass` and `VisualPass` decide in Python, for every pass anew, who sees what. While decoding,
all of that is known: every sample adds one row, which reads its own text so far and the visual
tokens that the cache holds. What changes from step to step is one small tensor: ids and positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache, VisualStore
from llama_vision.config import SettingError
from llama_vision.model.layers import attend, rotary_angles, rotary_frequencies
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.text import TextDecoder

BUCKET = 256
"""Attention reads the text cache up to a multiple of this: one shape, and on CUDA one captured
graph, for so many steps."""


class StepText:
    """What the self-attention blocks need for one row of each sample; see `passes.TextPass`."""

    chunks = (slice(0, 1),)
    causal = False

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        positions: Tensor,
        frequencies: Tensor,
        rows: int,
    ):
        self.keys, self.values, self.positions, self.rows = keys, values, positions, rows
        self.cos, self.sin = rotary_angles(frequencies, positions[:, None])
        key = torch.arange(rows, device=positions.device)
        self.mask = (key <= positions[:, None])[:, None, None]  # [B, 1, 1, L]
        self.samples = torch.arange(len(positions), device=positions.device)

    def chunk(self, _: slice) -> "StepText":
        """There is only this row."""
        return self

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the row's keys and values [B, K, 1, d]; the first `rows` that are held."""
        self.keys[layer][self.samples, :, self.positions] = keys[:, :, 0]
        self.values[layer][self.samples, :, self.positions] = values[:, :, 0]
        return self.keys[layer][:, :, : self.rows], self.values[layer][:, :, : self.rows]


@dataclass
class StepSight:
    """What the cross-attention blocks can look at; see `passes.VisualPass`."""

    keys: list[Tensor]
    """[B, K, V, d] of each layer, as far as any sample holds tokens."""
    values: list[Tensor]
    masks: list[Tensor | None]
    """[B, 1, 1, V] of each layer: which of them a sample holds; None for a single one."""
    seen: list[Tensor | None]
    """[B, 1, 1] of each layer, False for samples that hold nothing; None for a single one."""

    chunks = (slice(0, 1),)
    saliency = None

    @classmethod
    def of_store(cls, store: VisualStore, device: torch.device) -> "StepSight":
        """Views of what the store holds after prefill.

        Several samples always come with masks, needed or not: one kind of step to compile.
        """
        sight = cls([], [], [], [])
        for layer, lengths in enumerate(store.lengths):
            keys, values = store.read(layer, max(lengths))
            sight.keys.append(keys.detach())  # no views: they are compiled with their whole
            sight.values.append(values.detach())
            ends = torch.tensor(lengths, device=device)[:, None]  # [B, 1]
            tokens = torch.arange(max(lengths), device=device)
            mask = tokens < ends.clamp(min=1)  # `seen` hides the one token of those without any
            alone = len(lengths) == 1 and lengths[0] > 0
            sight.masks.append(None if alone else mask[:, None, None])
            sight.seen.append(None if alone else ends[:, None] > 0)
        return sight

    @property
    def blind(self) -> bool:
        """Whether no sample sees anything."""
        return not any(keys.shape[2] for keys in self.keys)

    def keys_values(self, layer: int, _: object) -> tuple[Tensor, Tensor]:
        """All that is held; nothing is projected while decoding."""
        return self.keys[layer], self.values[layer]

    def chunk(self, layer: int, _: slice) -> "StepLook":
        """There is only one row."""
        return StepLook(self.masks[layer], self.seen[layer])


@dataclass
class StepLook:
    """One layer's look at the visual tokens."""

    mask: Tensor | None
    seen: Tensor | None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, 1, d] -> [B, H, 1, d]; zero for samples that see nothing."""
        if k.shape[2] == 0:
            return torch.zeros_like(q)
        out = attend(q, k, v, mask=self.mask)
        return out if self.seen is None else out * self.seen[:, None]


def step(
    text: TextDecoder,
    inputs: Tensor,
    frequencies: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    sight: StepSight,
    rows: int,
) -> Tensor:
    """One row more for each sample.

    Args:
        inputs: [2, B], the tokens' ids and their positions, on the device.
        keys, values: the text store's, of each layer.
        rows: how many of its rows to read, at least the largest position and one.

    Returns:
        Logits [B, vocabulary], float32.
    """
    token_ids, positions = inputs
    words = StepText(keys, values, positions, frequencies, rows)
    h = text.run(text.embed_tokens(token_ids[:, None]), words, sight)
    return text.logits(h[:, 0])


@cache
def compiled_step(device: str) -> Callable[..., Tensor]:
    """`step`, compiled when it is first called; shapes stay open, so that it serves every run.

    On a CPU the kernels are called from C++ rather than from Python, a fifth of a small model's
    time; on CUDA graphs do away with the calls. The norms' eps are constants: left open, each would
    be one more input, together a sixth.
    """
    torch._dynamo.config.specialize_float = True
    options = {"cpp_wrapper": device == "cpu"}
    return torch.compile(step, dynamic=True, fullgraph=True, options=options)


@cache
def check_compiler(device: str) -> None:
    """Compile next to nothing, to know before anything is waited for.

    Raises:
        SettingError: there is no compiler for a kind of device, or it does not work.
    """
    with compiler_problems_told():
        torch.compile(torch.neg)(torch.zeros(2, device=device))


@contextmanager
def compiler_problems_told() -> Iterator[None]:
    """As one line that says what to do."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        first_line = str(error).strip().splitlines()[0]
        raise SettingError(
            f"decoding cannot be compiled here ({first_line}); --compile (compiled=True) needs "
            "a C++ compiler, on CUDA Triton: install it, or leave it out"
        ) from None


class Stepper:
    """Decodes one batch after its prefill, with the cache that prefill has filled."""

    def __init__(self, model: LlamaVisionModel, cache: Cache):
        self.text, self.cache, self.device = model.text, cache, model.device
        self.inputs = torch.zeros(2, len(cache.position), dtype=torch.int64, device=self.device)
        self.frequencies = rotary_frequencies(model.config.text, self.device)
        self.sight = StepSight.of_store(cache.visual, self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._mark_static()

    def _mark_static(self) -> None:
        """Tell the compiler which sizes are the model's own.

        It would take those of a batch that are equal to them by chance for the same, and compile
        again for the next batch.
        """
        torch._dynamo.mark_static(self.inputs, 0)
        torch._dynamo.mark_static(self.frequencies)
        for store in (self.cache.text, self.sight):
            for tensor in (*store.keys, *store.values):
                torch._dynamo.mark_static(tensor, [1, 3])  # key/value heads and their width

    def __call__(self, token_ids: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """One step: logits [B, vocabulary], valid until the next.

        Args:
            token_ids: of each sample; anything for one that has finished.
            lengths: 1 for samples that go on, 0 for those that have finished.
        """
        self.cache.text.check_room(1)
        rows = self._rows(max(self.cache.position) + 1)
        self.inputs.copy_(torch.tensor([token_ids, self.cache.position]))
        logits = self._replay(rows) if self.device.type == "cuda" else self._run(rows)
        self.cache.advance(lengths)
        return logits

    def _rows(self, need: int) -> int:
        """How many rows of the text cache to read: whole buckets, but not all that it can hold.

        An answer's last token is never fed back, so the last row is hardly ever needed; and reading
        everything would compile a second time, as tensors without gaps are another kind.
        """
        return max(need, min(self.cache.text.capacity - 1, -(-need // BUCKET) * BUCKET))

    def _run(self, rows: int) -> Tensor:
        store = self.cache.text
        state = (self.inputs, self.frequencies, store.keys, store.values, self.sight)
        with compiler_problems_told():
            return compiled_step(self.device.type)(self.text, *state, rows)

    def _replay(self, rows: int) -> Tensor:
        """The bucket's graph; captured the first time, after a run that compiles and warms up.

        Running a step twice does no harm: it writes the same row again.
        """
        if rows not in self.graphs:
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._run(rows)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._run(rows)
            self.graphs[rows] = graph, logits
        graph, logits = self.graphs[rows]
        graph.replay()
        return logits
