"""Products with a quantised weight on a GPU.

NF4, up to 64 rows: the weight is decoded into the product, half a byte a weight is read. More, and other
formats: panels of the weight are
decoded into one reused buffer that stays in L2, and cuBLAS multiplies each at once. For a transposed product of few
rows a kernel of its own is not worth it: training steps have more rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twinlora.numerics.reference import by_weight
from twinlora.numerics.triton import kernels
from twinlora.numerics.triton.codes import Weight, decode, on, tables, weight_of
from twinlora.numerics.triton.shapes import ROWS_TILE, has_few_rows, panel, row_parts, transposed_panel

__all__ = [
    "blockwise_linear",
    "blockwise_linear_transposed",
    "nf4_linear",
    "nf4_linear_add_",
    "nf4_linear_transposed",
    "nf4_linear_transposed_add_",
    "nf4_linear_with",
    "nf4_linears",
    "workspace",
]

_buffers: dict[tuple[torch.device, int], Tensor] = {}


def workspace(device: torch.device, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values in the buffer of this device and its current stream: the stream's next user overwrites them.

    One stream runs one kernel after the other, so a buffer is free again when the next call has been queued.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    kept, needed = _buffers.get((device, stream)), count * dtype.itemsize
    if kept is None or kept.numel() < needed:
        kept = _buffers[device, stream] = torch.empty(needed, dtype=torch.uint8, device=device)
    return kept[:needed].view(dtype)


def nf4_linear(x: Tensor, *quant: Any) -> Tensor:
    """See ops.py."""
    return _linear(x, weight_of(*quant))


def blockwise_linear(x: Tensor, *quant: Any) -> Tensor:
    """See ops.py."""
    return _linear(x, weight_of(*quant))


def _linear(x: Tensor, weight: Weight) -> Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    _multiply(_rows(y), _rows(x), weight, add=False)
    return y


def nf4_linears(x: Tensor, tensors: list[Tensor], rows: list[int], block: int, nested_block: int) -> list[Tensor]:
    """See ops.py."""
    weights = zip(by_weight(tensors, len(rows)), rows, strict=True)
    return [_linear(x, weight_of(*stored, [n, x.shape[-1]], block, nested_block)) for stored, n in weights]


def nf4_linear_with(x: Tensor, extra: Tensor, *quant: Any) -> Tensor:
    """See ops.py. The extra rows stand behind the last panel of the weight, so that they share its product."""
    weight = weight_of(*quant)
    out = x.new_empty(*x.shape[:-1], weight.shape[0] + extra.shape[0])
    _multiply(_rows(out), _rows(x), weight, add=False, extra=extra)
    return out


def nf4_linear_add_(y: Tensor, x: Tensor, *quant: Any) -> None:
    """See ops.py. The sum happens where cuBLAS writes its result."""
    _multiply(y.view(-1, y.shape[-1]), _rows(x), weight_of(*quant), add=True)


def nf4_linear_transposed(dy: Tensor, *quant: Any) -> Tensor:
    """See ops.py."""
    return _linear_transposed(dy, weight_of(*quant))


def blockwise_linear_transposed(dy: Tensor, *quant: Any) -> Tensor:
    """See ops.py."""
    return _linear_transposed(dy, weight_of(*quant))


def _linear_transposed(dy: Tensor, weight: Weight) -> Tensor:
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
    _multiply_transposed(_rows(dx), _rows(dy), weight, add=False)
    return dx


def nf4_linear_transposed_add_(dx: Tensor, dy: Tensor, *quant: Any) -> None:
    """See ops.py."""
    _multiply_transposed(dx.view(-1, dx.shape[-1]), _rows(dy), weight_of(*quant), add=True)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _multiply(y: Tensor, x: Tensor, weight: Weight, *, add: bool, extra: Tensor | None = None) -> None:
    """x [T, k] @ [weight [n, k]; extra].T into y [T, n + extra], or onto what it holds."""
    n, k = weight.shape
    if weight.bits == 4 and has_few_rows(x, k, weight.block):
        _multiply_few(y[:, :n], x, weight, add=add)
        if extra is not None:
            y[:, n:].addmm_(x, extra.T, beta=0)
        return
    more = 0 if extra is None else extra.shape[0]
    length = panel(n, k, x.shape[0], x.dtype.itemsize, x.device)
    buffer = workspace(x.device, (length + more) * k, x.dtype).view(-1, k)
    for start in range(0, n, length):
        rows = min(length, n - start)
        words = -(-rows * k // 8)  # a panel starts at a multiple of 128 rows, hence of 8 weights
        decode(weight, buffer[:rows].view(-1), first=start * k // 8, rows=1, width=words, stride=words)
        stop = start + rows
        if extra is not None and stop == n:
            buffer[rows : rows + more] = extra
            rows, stop = rows + more, stop + more
        y[:, start:stop].addmm_(x, buffer[:rows].T, beta=int(add))


def _multiply_transposed(dx: Tensor, dy: Tensor, weight: Weight, *, add: bool) -> None:
    """dy [T, n] @ weight [n, k] into dx [T, k], or onto what it holds.

    Panels are columns: cut along n, partial results would be rounded to 16 bit and summed.
    """
    n, k = weight.shape
    length = transposed_panel(weight.shape, dy.shape[0], dy.dtype.itemsize, dy.device)
    buffer = workspace(dy.device, n * length, dy.dtype)
    for start in range(0, k, length):
        columns = min(length, k - start)
        part = buffer[: n * columns].view(n, columns)
        if columns == k:
            words = -(-n * k // 8)
            decode(weight, part, first=0, rows=1, width=words, stride=words)
        else:
            decode(weight, part, first=start // 8, rows=n, width=columns // 8, stride=k // 8)
        dx[:, start : start + columns].addmm_(dy, part, beta=int(add))


def _multiply_few(y: Tensor, x: Tensor, weight: Weight, *, add: bool) -> None:
    n, k = weight.shape
    rows, step = x.shape[0], min(weight.block, 128)
    parts, span = row_parts(n, k, step, x.device)
    target = y if parts == 1 else workspace(x.device, parts * rows * n, torch.float32).view(parts, rows, n)
    levels, _, dynamic, _ = tables(x.device)
    with on(x):
        kernels.multiply_rows[(-(-n // ROWS_TILE), parts)](
            x.contiguous(), weight.packed, weight.scales, weight.nested_scales, weight.nested_offset, levels, dynamic,
            target, rows, n, k, span, target.stride(-2), rows * n,
            block_shift=weight.block.bit_length() - 1, nested_shift=weight.nested_shift, NESTED=weight.nested,
            ADD=add and parts == 1, WIDE=not x.is_cuda, BM=max(16, 1 << (rows - 1).bit_length()), BN=ROWS_TILE, BK=step,
            enable_fp_fusion=False,
        )  # fmt: skip
        if parts > 1:
            kernels.sum_parts[(-(-rows * n // 1024),)](
                target, y, rows * n, n, y.stride(0), PARTS=parts, ADD=add, B=1024
            )
