"""Memory that the kernels of numerics/cpu.py and csrc/ hold beside their results, from their arguments' shapes.

Two kinds: buffers that a kernel keeps for its next call (they grow to the largest call and stay), and copies that live
as long as the call.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from twinlora.numerics import cpu, reference

__all__ = ["WEIGHT", "kept_bytes", "reference_bytes", "workspace_bytes"]

WEIGHT = "weight "  # the buffers that a weight is decoded into, one for each type, are torch's; the others C++'s

# Of csrc/attention.cpp, tiles.hpp and avx512.cpp.
_BLOCK, _QUERIES, _STEP_DEPTH, _STEP_PAIRS, _PANEL, _FROM_DECODED = 32, 256, 32, 512, 16, 17


def workspace_bytes(op: str, *args: Any) -> int:
    """Bytes that a call of the CPU kernel `op` allocates beyond its results and frees again: contiguous copies."""
    if op in ("attention", "attention_backward"):
        back = op == "attention_backward"
        q, k, v, cos, sin = args[1:6] if back else args[:5]
        heads: list[Tensor] = [x for x in (q, k, v) if x.stride(2) != 1 or x.stride(1) != x.shape[2]]
        return sum(x.nbytes for x in heads) + _copied(cos, sin, *(args[:1] if back else ()))
    if op in ("rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"):
        return _copied(*args)
    if op == "cross_entropy_":
        return _copied(args[1])
    if op in ("dense_linear", "nf4_linears") or (op == "nf4_linear" and cpu._few_rows(args[0], args[5][1], args[6])):
        return _copied(args[0])
    return 0


def reference_bytes(op: str, *args: Any) -> int:
    """What the reference of an NF4 product makes and frees: the weight in x's type, its scales, and one panel."""
    x: Tensor = args[0]
    count: int
    block: int
    if op in ("nf4_linear", "nf4_linear_transposed"):
        count, block = args[5][0] * args[5][1], args[6]
    elif op == "nf4_linears":
        count, block = max(args[2]) * x.shape[-1], args[3]
    else:
        return 0
    scales = 3 * 4 * -(-count // block)  # float32: looked up, scaled, shifted
    panel = min(count, reference._PANEL) * (2 + 4)  # int32 codes of pairs, float32 values
    return count * x.dtype.itemsize + scales + panel


def _copied(*values: Any) -> int:
    return sum(x.nbytes for x in values if isinstance(x, Tensor) and not x.is_contiguous())


def kept_bytes(op: str, *args: Any) -> dict[str, int]:
    """Bytes of the buffers that a call of the CPU kernel `op` keeps, by the buffer's name; all threads together."""
    if op == "attention":
        return {op: _by_thread(args[0], args[1], args[-3], _forward)}
    if op == "attention_backward":
        return {op: _by_thread(args[1], args[2], args[-3], _backward)}
    if op in ("nf4_linear", "nf4_linear_transposed"):
        x, shape, block = args[0], args[5], args[6]
        if op == "nf4_linear" and cpu._few_rows(x, shape[1], block):
            return _rows(x, shape[1], block)
        return {f"{WEIGHT}{x.dtype}": shape[0] * shape[1] * x.dtype.itemsize}
    if op == "nf4_linears":
        x, rows, block = args[0], args[2], args[3]
        if cpu._few_rows(x, x.shape[-1], block):
            return _rows(x, x.shape[-1], block)
        return {f"{WEIGHT}{x.dtype}": max(rows) * x.shape[-1] * x.dtype.itemsize}
    if op == "dense_linear" and args[0].numel() <= cpu._FEW_DENSE_ROWS * args[0].shape[-1]:
        return {op: 2 * args[0].numel() * torch.get_num_threads()}
    return {}


def _rows(x: Tensor, k: int, block: int) -> dict[str, int]:
    """multiply_rows: a panel's scales, x in another order, and from 17 rows on a panel of the weight."""
    rows = x.numel() // k
    panel = 2 * _PANEL * (k + 64) if rows >= _FROM_DECODED else 0
    return {"multiply_rows": torch.get_num_threads() * (4 * _PANEL * (k // block) + 2 * rows * k + panel)}


def _by_thread(q: Tensor, k: Tensor, starts: list[int], one: Any) -> int:
    """Each thread keeps what its longest sequence needs; heads of one sequence are shared out."""
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    padded = -(-max(lengths) // _BLOCK) * _BLOCK
    threads = min(torch.get_num_threads(), len(lengths) * k.shape[1])
    return threads * int(one(padded, q.shape[-1]))


def _forward(padded: int, size: int) -> int:
    steps = size // _STEP_DEPTH
    rows = 3 * padded * size * 2  # keys, values, and rows on their way
    probabilities = padded // _BLOCK * _STEP_PAIRS * 4
    return rows + steps * _STEP_PAIRS * 4 + probabilities + padded * _BLOCK * 4 + _BLOCK * size * 4


def _backward(padded: int, size: int) -> int:
    most = min(padded, _QUERIES)
    panel = size // _STEP_DEPTH * _STEP_PAIRS
    rows = 3 * padded * size * 2 + 2 * most * size * 2
    panels = 4 * (most // _BLOCK) * panel * 4
    strips = 2 * _BLOCK * most * 2 + most // _BLOCK * (padded // _BLOCK) * _STEP_PAIRS * 4
    return rows + panels + strips + 2 * padded * size * 4 + _BLOCK * size * 4
