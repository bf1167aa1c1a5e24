"""Quantising to NF4, dequantising it, NF3 and int8, and the double quantisation of block scales, by Triton kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinlora.numerics.nf4 import codebook, dynamic_map, midpoints
from twinlora.numerics.triton import kernels

__all__ = [
    "Weight",
    "blockwise_dequantize",
    "decode",
    "nf4_dequantize",
    "nf4_quantize",
    "on",
    "scales_quantize",
    "tables",
    "weight_of",
]

_TILE_WORDS = 1024  # words of a program: 4 KB read, 16 KB written
_TILE_WEIGHTS = 4096  # weights of a program that quantises


class Weight(NamedTuple):
    """A weight of 4 bits (NF4), 3 (NF3) or 8 (int8) as the kernels take it; tensors without nested scales stand in for
    them and are not read."""

    packed: Tensor
    scales: Tensor
    nested_scales: Tensor
    nested_offset: Tensor
    nested: bool
    shape: list[int]
    block: int
    nested_block: int
    bits: int

    @property
    def nested_shift(self) -> int:
        """Base-2 logarithm of the nested block."""
        return self.nested_block.bit_length() - 1 if self.nested else 0


def weight_of(
    packed: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    block: int,
    nested_block: int,
    bits: int = 4,
) -> Weight:
    """From the arguments of an op."""
    packed, scales = packed.contiguous(), scales.contiguous()
    if nested_scales is None or nested_offset is None:
        return Weight(packed, scales, scales, scales, False, shape, block, 1, bits)
    return Weight(packed, scales, nested_scales, nested_offset, True, shape, block, nested_block, bits)


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On `device`: levels [16], their borders [15], dynamic map [256], its borders [255]."""
    both = (codebook(), midpoints(codebook()), dynamic_map(), midpoints(dynamic_map()))
    return tuple(table.to(device) for table in both)  # type: ignore[return-value]


@cache
def _nf3_levels(device: torch.device) -> Tensor:
    """On `device`: the levels of NF3, filled up to [16]."""
    return torch.nn.functional.pad(codebook(3), (0, 8)).to(device)


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    flat = weight.reshape(-1)
    count = flat.numel()
    packed = flat.new_empty((count + 1) // 2, dtype=torch.uint8)
    scales = flat.new_empty(-(-count // block_size), dtype=torch.float32)
    together = max(1, _TILE_WEIGHTS // block_size)
    borders = tables(flat.device)[1]
    if count:
        with on(flat):
            kernels.quantize[(-(-scales.numel() // together),)](
                flat, packed, scales, borders, count, BLOCK=block_size, B=together, enable_fp_fusion=False
            )
    return packed, scales


def scales_quantize(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    absmax = absmax.contiguous()
    count = absmax.numel()
    offset = absmax.mean()  # torch's own order of summation: the reference's bits
    codes = absmax.new_empty(count, dtype=torch.uint8)
    nested = absmax.new_empty(-(-count // block_size))
    together = max(1, _TILE_WEIGHTS // block_size)
    borders = tables(absmax.device)[3]
    if count:
        with on(absmax):
            kernels.quantize_scales[(-(-nested.numel() // together),)](
                absmax, offset, codes, nested, borders, count, BLOCK=block_size, B=together, enable_fp_fusion=False
            )
    return codes, nested, offset


def nf4_dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    return _dequantized(
        weight_of(packed, scales, nested_scales, nested_offset, shape, block_size, nested_block_size), dtype
    )


def blockwise_dequantize(packed: Tensor, scales: Tensor, *rest: Any) -> Tensor:
    """See ops.py."""
    *quant, dtype = rest
    return _dequantized(weight_of(packed, scales, *quant), dtype)


def _dequantized(weight: Weight, dtype: torch.dtype) -> Tensor:
    out = weight.packed.new_empty(weight.shape, dtype=dtype)
    words = -(-prod(weight.shape) // 8)
    decode(weight, out, first=0, rows=1, width=words, stride=words)
    return out


def decode(weight: Weight, out: Tensor, *, first: int, rows: int, width: int, stride: int) -> None:
    """Words first + r · stride + c (r < rows, c < width) of the weight -> out, contiguous [rows, 8 · width] values.

    A word is 8 weights. `out` may be shorter than that where the weight ends inside a word.
    """
    odd = weight.packed.numel() % 4 != 0 or weight.packed.data_ptr() % 4 != 0
    ragged = out.numel() % 8 != 0 or (weight.bits == 4 and odd)  # the others are read byte by byte
    wide = min(_TILE_WORDS, 1 << (width - 1).bit_length()) if width else 1
    high = _TILE_WORDS // wide if rows > 1 else 1
    programs = -(-width // wide) * -(-rows // high)
    block = weight.block // 8
    whole = first % block == wide % block == 0 and (rows == 1 or stride % block == 0)
    levels, _, dynamic, _ = tables(out.device)
    levels = _nf3_levels(out.device) if weight.bits == 3 else levels  # int8 reads none
    if not programs:
        return
    with on(out):
        kernels.dequantize[(programs,)](
            weight.packed, weight.scales, weight.nested_scales, weight.nested_offset, levels, dynamic, out,
            first, rows, width, stride, weight.packed.numel(), out.numel(),
            BLOCK_WORDS=block, nested_shift=weight.nested_shift, NESTED=weight.nested, RAGGED=ragged,
            WHOLE=whole, BITS=weight.bits, R=high, W=wide, enable_fp_fusion=False,
        )  # fmt: skip
