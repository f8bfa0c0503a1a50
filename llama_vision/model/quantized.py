"""Matrices of integers: what `QuantizedLinear` keeps, how it is made, and the product with it.

Two forms of the same numbers: *plain* integers with their scales, which is what is made of weights
and what files hold; and what a device's product takes, into which they are packed once.
"""

from functools import cache

import torch
from torch import Tensor, nn

from llama_vision.errors import SettingError
from llama_vision.quantization import Format, Quantization

COMPUTED_IN = torch.bfloat16
"""The type of activations and scales: the only one that torch's products are fast with."""

ROWS_OF_PRODUCT = {8: 12, 4: 32}
"""By bits, the rows of x up to which torch's product with integers is the faster way: it reads few
bytes, and its time grows with the rows. Above, the integers become bfloat16 again."""

UNPACKED_ROWS = 512
"""Rows that are bfloat16 at the same time: so few stay in a processor's cache, and fewer would be
too few for a product to be fast."""

PACKED_ROWS = 64
"""Rows that are packed together, at most: other rows may be packed apart."""

LOW_BITS = 0x0F0F0F0F0F0F0F0F
"""Of eight bytes."""

Integers = tuple[Tensor, Tensor]
"""int8 [N, K], of int4 in -8 … 7; and scales bfloat16 [N, K / group], of int8 [N, 1]."""


def quantise(weight: Tensor, form: Format) -> Integers:
    """Round weights [N, K] to the nearest multiple of their scale.

    int8: the largest of a row becomes ±127. int4: of a group's weights the largest becomes -8, its
    scale's sign being the opposite of its own, for there is no +8 beside it.
    """
    groups = weight.float().unflatten(-1, (-1, form.group or weight.shape[-1]))  # [N, K/g, g]
    index = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, index)  # [N, K/g, 1]
    steps = 127.0 if form.bits == 8 else -8.0
    scale = ((largest.abs() if form.bits == 8 else largest) / steps).to(COMPUTED_IN)
    divisor = scale.float().where(scale != 0, 1)
    most = 2 ** (form.bits - 1) - 1
    least = -most if form.bits == 8 else -most - 1
    q = (groups / divisor).round_().clamp_(least, most)
    return q.to(torch.int8).flatten(-2), scale.squeeze(-1)


def dequantise(integers: Integers) -> Tensor:
    """The weights [N, K] that they stand for, float32."""
    q, scale = integers
    groups = q.float().unflatten(-1, (scale.shape[-1], -1))  # [N, K/g, g]
    return (groups * scale.float()[..., None]).flatten(-2)


class QuantizedLinear(nn.Module):
    """A linear layer [K] -> [N] with its matrix in int8 or int4; see `layers.Linear`.

    Raises:
        SettingError: its size is none that the product of the format takes.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, form: Format):
        super().__init__()
        self.in_features, self.out_features, self.form = inputs, outputs, form
        if form.group and inputs % form.group:
            raise SettingError(
                f"rows of {inputs} weights, which groups of {form.group} do not divide"
            )
        if form.bits == 4 and outputs % 16:
            raise SettingError(f"{outputs} output channels, not a multiple of 16")
        weights, scales = self._shapes()
        kind = torch.int8 if form.bits == 8 else torch.uint8
        self.weight = _frozen(torch.empty(weights, dtype=kind))
        self.scale = _frozen(torch.empty(scales, dtype=COMPUTED_IN))
        self.bias = _frozen(torch.empty(outputs, dtype=COMPUTED_IN)) if bias else None

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the integers and of the scales; in int4 beside each scale is what zero stands for."""
        if self.form.bits == 8:
            return (self.out_features, self.in_features), (self.out_features,)
        groups = self.in_features // self.form.group
        return (self.out_features, self.in_features // 2), (groups, self.out_features, 2)

    def allocate(self, device: torch.device) -> None:
        """Make room on a device for `fill`."""
        weights, scales = self._shapes()
        kind = self.weight.dtype
        if self.form.bits == 4 and device.type == "cuda":
            inner = inner_tiles(self.in_features)
            weights = (weights[0] // 8, self.in_features // (16 * inner), 32, inner // 2)
            kind = torch.int32
        self.weight = _frozen(torch.empty(weights, dtype=kind, device=device))
        self.scale = _frozen(torch.zeros(scales, dtype=COMPUTED_IN, device=device))

    def fill(self, start: int, integers: Integers) -> None:
        """Pack rows from `start` on, a multiple of `PACKED_ROWS`."""
        q, scale = (tensor.to(self.weight.device) for tensor in integers)
        rows = slice(start, start + len(q))
        if self.form.bits == 8:
            self.weight[rows], self.scale[rows] = q, scale[:, 0]
            return
        self.scale[:, rows, 0] = scale.T
        if q.device.type != "cuda":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int() + 8, 2)
            self.weight[rows] = packed
        else:
            nibbles = (q + 8).to(torch.uint8)
            pairs = nibbles[:, ::2] << 4 | nibbles[:, 1::2]  # [n, K / 2]
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles(q.shape[1]))
            self.weight[start // 8 : start // 8 + len(packed)] = packed

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], bfloat16."""
        flat = x.reshape(-1, self.in_features).contiguous()
        few = len(flat) <= ROWS_OF_PRODUCT[self.form.bits]
        if self.form.bits == 4 and x.device.type == "cuda":
            out = torch.ops.aten._weight_int4pack_mm(flat, self.weight, self.form.group, self.scale)
        elif few and self.form.bits == 4:
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
            out = product(flat, self.weight, self.form.group, self.scale)
        elif few:
            out = torch.ops.aten._weight_int8pack_mm(flat, self.weight, self.scale)
        else:
            out = self._unpacked_product(flat)
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def _unpacked_product(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out], with the matrix as bfloat16 some rows at a time."""
        out = x.new_empty(len(x), self.out_features)
        buffer = x.new_empty(min(UNPACKED_ROWS, self.out_features) * self.in_features)
        for start in range(0, self.out_features, UNPACKED_ROWS):
            rows = slice(start, min(start + UNPACKED_ROWS, self.out_features))
            part = buffer[: (rows.stop - start) * self.in_features]
            if self.form.bits == 8:
                weights = part.view(-1, self.in_features).copy_(self.weight[rows]).T
            else:
                weights = self._unpack(rows, part.view(self.in_features, -1))
            torch.mm(x, weights, out=out[:, rows])
        return out.mul_(self.scale) if self.form.bits == 8 else out

    def _unpack(self, rows: slice, weights: Tensor) -> Tensor:
        """Fill weights [in, n] with some rows of int4, from what `fill` packed on a CPU.

        A block of rows is packed column by column. In whole blocks the low bits of the bytes hold
        the first half of a column, or as in a smaller last block every other row.
        """
        block, in_halves = packed_block()
        inputs, count = weights.shape
        whole = count // block * block
        for start, end, size in ((0, whole, block), (whole, count, count - whole)):
            if start == end:
                continue
            packed = self.weight[rows.start + start : rows.start + end]
            packed = packed.reshape(-1, inputs, size // 2)  # [blocks, in, size / 2]
            q = nibbles(packed, in_halves and size == block).view(torch.int8).sub_(8)
            weights[:, start:end].unflatten(1, (-1, size)).copy_(q.transpose(0, 1))
        scale = self.scale[:, rows, 0].contiguous()  # [in / g, n]; side by side they are fast
        weights.unflatten(0, (-1, self.form.group)).mul_(scale[:, None])
        return weights


def nibbles(packed: Tensor, in_halves: bool) -> Tensor:
    """Bytes [..., n] as the numbers in their low and high bits, uint8 [..., 2 n]."""
    if not in_halves:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    count = packed.shape[-1]
    out = packed.new_empty(*packed.shape[:-1], 2 * count)
    wide, wide_out = packed.view(torch.int64), out.view(torch.int64)  # eight bytes at once
    torch.bitwise_and(wide, LOW_BITS, out=wide_out[..., : count // 8])
    torch.bitwise_and(wide >> 4, LOW_BITS, out=wide_out[..., count // 8 :])
    return out


@cache
def packed_block() -> tuple[int, bool]:
    """How this processor's packing orders rows: of a block, and whether by halves.

    It is found by packing a matrix, for it depends on the instructions that there are: 64 rows with
    AVX-512, 32 with AVX2 and elsewhere.
    """
    q = torch.arange(PACKED_ROWS * 32).mul_(2654435761).bitwise_right_shift_(12).bitwise_and_(15)
    q = q.view(PACKED_ROWS, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 2)
    for block in (64, 32, 16):
        for in_halves in (True, False):
            blocks = nibbles(packed.view(-1, 32, block // 2), in_halves)  # [blocks, 32, block]
            if torch.equal(blocks.transpose(1, 2).reshape(q.shape).long(), q):
                return block, in_halves
    raise AssertionError("torch packs int4 in an order that is not known here")


def quantise_modules(model: nn.Module, quantization: Quantization, cross: tuple[int, ...]) -> None:
    """Put a `QuantizedLinear` in the place of each linear layer that has a format.

    Args:
        cross: which of the decoder's blocks are cross-attention blocks.

    Raises:
        SettingError: names a layer whose size does not suit its format.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        form = quantization.form_of(name, cross)
        if form is None:
            continue
        inputs, outputs, bias = module.in_features, module.out_features, module.bias is not None
        try:
            model.set_submodule(name, QuantizedLinear(inputs, outputs, bias, form))
        except SettingError as error:
            raise SettingError(
                f"{name} cannot be {form}: it has {error}; use --quantize-group (quantize_group) "
                "of 32, or --quantize int8"
            ) from None


def check_device(quantization: Quantization, device: torch.device) -> None:
    """Raise SettingError where a device has no product for the formats."""
    forms = [form for form in quantization.forms if form.bits == 4]
    if not forms or device.type == "cpu":
        return
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return
        device = f"{device}, of compute capability {major}.{minor},"
    raise SettingError(
        f"torch has no product of int4 matrices on {device}; use --quantize int8, or a CPU, or "
        "CUDA from compute capability 8.0 on"
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def inner_tiles(inputs: int) -> int:
    """How many tiles of 16 columns CUDA's product takes at once: the most that it can."""
    return next(tiles for tiles in (8, 4, 2) if inputs % (16 * tiles) == 0)
