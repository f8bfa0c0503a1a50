"""Which layout a tensor is stored in, by the tensors that are present; see `stored`."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from llama_vision.checkpoint.files import FLOATS, INTEGERS, CheckpointError, Entry, Reader
from llama_vision.checkpoint.stored import Blocks, Channels, Packed, Plain, Stored
from llama_vision.errors import quote
from llama_vision.quantization import GROUPS, INT8, Format, nearest_int4
from llama_vision.values import ListOf, Number, Whole

STATES = tuple(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
BLOCK_SIZE, NESTED_SIZE = Whole(32, 4096), Whole(256, 256)
"""What bitsandbytes writes: 64 if not asked for another power of two, and always 256."""
MOST_STATE = 4096
"""Bytes of a quant_state; it has about 170."""

BITSANDBYTES_4 = (
    *STATES,
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
)
BITSANDBYTES_8 = ("SCB", "weight_format")
COMPRESSED = ("weight_scale", "weight_packed", "weight_shape", "weight_zero_point")
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
"""Of compressed-tensors: what activations were to be quantised by, which ours are not."""
ENDS = ("weight", *BITSANDBYTES_4, *BITSANDBYTES_8, *COMPRESSED, *ACTIVATIONS)

MISSING, MISSHAPEN = "missing", "misshapen"
STRANGE, DAMAGED = "of an unsupported type", "damaged"


class Misfit(CheckpointError):
    """One tensor that is not as it must be, and how: one of the four words above."""

    def __init__(self, kind: str, text: str):
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


def belonging(name: str, entries: Mapping[str, Entry]) -> list[str]:
    """All tensors in the files that may belong to the official tensor `name`."""
    module, _, leaf = name.rpartition(".")
    names = [f"{module}.{end}" for end in ENDS] if leaf == "weight" else [name]
    return [name for name in names if name in entries]


def find_stored(
    name: str, shape: tuple[int, ...], entries: Mapping[str, Entry], reader: Reader
) -> Stored:
    """How the official tensor `name` is stored; what few bytes describe it are read.

    Raises:
        Misfit: a tensor of it is missing, or of another shape or type than the others tell.
        CheckpointError: see `Reader.rows`.
    """
    there = _Tensors(name, entries)
    stored = _layout(there)(there, reader)
    if stored.shape != tuple(shape):
        raise Misfit(MISSHAPEN, f"{name} {list(stored.shape)} instead of {list(shape)}")
    return stored


class _Tensors:
    """Those that may belong to one; notes which of them were used."""

    def __init__(self, name: str, entries: Mapping[str, Entry]):
        self.name = name
        self.module = name.removesuffix("weight")
        self.entries = {key: entries[key] for key in belonging(name, entries)}
        self.used: dict[str, Entry] = {}

    def any(self, *ends: str) -> bool:
        return any(self.module + end in self.entries for end in ends)

    def take(self, end: str, types: tuple[str, ...], *shapes: tuple[int, ...]) -> Entry:
        """One of them, which has one of some types, and one of some shapes if any are given."""
        name = self.module + end
        entry = self.entries.get(name)
        if entry is None:
            raise Misfit(MISSING, name)
        if entry.dtype not in types:
            raise Misfit(STRANGE, f"{name} ({entry.dtype})")
        if shapes and entry.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise Misfit(MISSHAPEN, f"{name} {list(entry.shape)} instead of {expected}")
        self.used[name] = entry
        return entry

    def matrix(self, end: str, *types: str) -> Entry:
        entry = self.take(end, types)
        if len(entry.shape) != 2 or not all(entry.shape):
            raise Misfit(MISSHAPEN, f"{self.module}{end} {list(entry.shape)} instead of [N, K]")
        return entry

    def damaged(self, end: str, what: str) -> Misfit:
        return Misfit(DAMAGED, f"{self.module}{end} ({what})")

    def names(self, *unused: str) -> tuple[str, ...]:
        """Of all that were taken, and of those among `unused` that are present."""
        known = (self.module + end for end in unused)
        return (*self.used, *(name for name in known if name in self.entries))


def _layout(there: _Tensors) -> Any:
    """The function that reads it."""
    weight = there.entries.get(there.name)
    matrix = weight is not None and there.any("weight") and len(weight.shape) == 2
    if there.any(*BITSANDBYTES_4):
        return _blocks
    if there.any("weight_packed"):
        return _packed
    if there.any(*BITSANDBYTES_8):
        return _llm_int8
    if there.any("weight_scale") or (matrix and weight.dtype in ("I8", "F8_E4M3")):
        return _channels
    return _plain


def _plain(there: _Tensors, reader: Reader) -> Plain:
    entry = there.entries.get(there.name)
    if entry is None:
        raise Misfit(MISSING, there.name)
    if entry.dtype not in FLOATS:
        raise Misfit(STRANGE, f"{there.name} ({entry.dtype})")
    return Plain((there.name,), entry)


def _channels(there: _Tensors, reader: Reader) -> Channels:
    weight = there.matrix("weight", "I8", "F8_E4M3")
    rows = weight.shape[0]
    scale = there.take("weight_scale", tuple(FLOATS), (rows, 1), (rows,), (1, 1), (1,), ())
    scale = scale._replace(shape=(math.prod(scale.shape), 1))
    kind = "int8" if weight.dtype == "I8" else "fp8"
    return Channels(
        weight.shape, there.names(*ACTIVATIONS), f"compressed-tensors {kind}", weight, scale
    )


def _llm_int8(there: _Tensors, reader: Reader) -> Channels:
    weight = there.matrix("weight", "I8")
    scale = there.take("SCB", ("F32",), (weight.shape[0],))
    if there.any("weight_format"):
        order = there.take("weight_format", ("U8",), (), (1,))
        if reader.whole(order).item() != 0:
            raise there.damaged("weight_format", "an order of tiles, expected rows: save it anew")
    return Channels(
        weight.shape,
        there.names(),
        "bitsandbytes int8",
        weight,
        scale._replace(shape=(weight.shape[0], 1)),
        unit=1 / 127,
    )


def _packed(there: _Tensors, reader: Reader) -> Packed:
    packed = there.matrix("weight_packed", "I32")
    height, words = packed.shape
    shape = reader.whole(there.take("weight_shape", ("I64", "I32"), (2,))).tolist()
    bits = next((b for b in (4, 8) if [height, words] == [shape[0], -(-shape[1] * b // 32)]), None)
    if bits is None:
        what = f"{list(packed.shape)} instead of 4 or 8 bits of each of {shape}"
        raise Misfit(MISSHAPEN, f"{there.module}weight_packed {what}")
    scale = there.take("weight_scale", tuple(FLOATS))
    if scale.shape in ((), (1,)):
        scale = scale._replace(shape=(1, 1))
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if not groups or scale.shape[0] not in (height, 1) or shape[1] % groups:
        expected = f"[{height}, a divisor of {shape[1]}]"
        raise Misfit(
            MISSHAPEN, f"{there.module}weight_scale {list(scale.shape)} instead of {expected}"
        )
    zero = None
    if there.any("weight_zero_point"):
        fits = (-(-height * bits // 32), groups)
        zero = there.take("weight_zero_point", ("I32",), fits)
    group = shape[1] // groups
    return Packed(
        tuple(shape),
        there.names(*ACTIVATIONS),
        f"compressed-tensors int{bits}",
        INT8 if bits == 8 else _int4(group, shape[1]),
        packed._replace(dtype="U8", shape=(height, words * 4)),
        scale,
        zero,
        bits,
        group,
    )


def _int4(group: int, width: int) -> Format:
    """The nearest int4, or int8 where no group of ours divides a row."""
    return nearest_int4(group) if width % GROUPS[0] == 0 else INT8


def _blocks(there: _Tensors, reader: Reader) -> Blocks:
    end = next((end for end in STATES if there.any(end)), STATES[0])
    weight = there.take("weight", tuple(FLOATS | INTEGERS))  # any type may hold the bytes
    shape, size, nested_size, offset = _quant_state(there, end, reader)
    count = math.prod(shape)
    stored = math.prod(weight.shape) * (FLOATS | INTEGERS)[weight.dtype].itemsize
    if stored != -(-count // 2):
        what = f"{list(weight.shape)} ({weight.dtype}) instead of {-(-count // 2)} bytes"
        raise Misfit(MISSHAPEN, f"{there.name} {what}, two of {list(shape)} in each")
    blocks = -(-count // size)
    absmax = there.take("weight.absmax", ("U8", "F32"), (blocks,))
    nested: tuple = ()
    if absmax.dtype == "U8":
        if not nested_size:
            raise there.damaged(end, "nested_blocksize is missing, which bytes of absmax need")
        nested = (
            there.take("weight.nested_quant_map", ("F32",), (256,)),
            there.take("weight.nested_absmax", ("F32",), (-(-blocks // nested_size),)),
            nested_size,
            offset,
        )
    code = there.take("weight.quant_map", ("F32",), (16,))
    form = _int4(GROUPS[0], shape[1])
    weight = weight._replace(dtype="U8", shape=(stored, 1))
    library = f"bitsandbytes {end[-3:]}"
    return Blocks(shape, there.names(), library, form, weight, code, absmax, size, *nested)


def _quant_state(
    there: _Tensors, end: str, reader: Reader
) -> tuple[tuple[int, int], int, int, float]:
    """Shape, weights of a block, and blocks of a nested one (0 for none) with the mean of all."""
    state = _json(there, end, reader)

    def field(name: str, read: Callable[[Any], Any], expected: str) -> Any:
        try:
            return read(state.get(name))
        except ValueError:
            what = f"{name} is {quote(state.get(name), 40)}, expected {expected}"
            raise there.damaged(end, what) from None

    shape = field("shape", _sizes, "[N, K]")
    size = field("blocksize", BLOCK_SIZE.read, "a power of two from 32 to 4096")
    if size & (size - 1):
        raise there.damaged(end, f"blocksize is {size}, expected a power of two")
    if "nested_blocksize" not in state:
        return shape, size, 0, 0.0
    nested_size = field("nested_blocksize", NESTED_SIZE.read, "256")
    return shape, size, nested_size, field("nested_offset", Number().read, "a finite number")


def _sizes(value: Any) -> tuple[int, int]:
    rows, columns = ListOf(Whole(1, 2**31), 2).read(value)
    return rows, columns


def _json(there: _Tensors, end: str, reader: Reader) -> dict[str, Any]:
    entry = there.take(end, ("U8",))
    if len(entry.shape) != 1 or entry.shape[0] > MOST_STATE:
        raise there.damaged(end, f"{list(entry.shape)} bytes, expected up to {MOST_STATE}")
    text = bytes(reader.whole(entry).tolist())
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        raise there.damaged(end, f"{quote(text, 40)} is no JSON") from None
    if not isinstance(state, dict):
        raise there.damaged(end, f"{quote(state, 40)} is no object")
    return state
