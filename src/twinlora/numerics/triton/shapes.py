"""How the GPU backend cuts its work, and the memory that takes: arithmetic alone, for launches and for the planner.

Constants follow from a Hopper GPU's data sheet (132 multiprocessors, 50 MB of L2); none of them has been measured yet.
"""

from __future__ import annotations

import itertools
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FEW_ROWS",
    "ROWS_TILE",
    "grouped_cut",
    "grouped_step",
    "grouped_tile_rows",
    "has_few_rows",
    "multiprocessors",
    "padded_rank",
    "panel",
    "row_parts",
    "transposed_panel",
    "workspace_bytes",
]

FEW_ROWS = 64  # up to here a product is bound by reading codes, and decoding into registers wins
_PANEL_BYTES = 24 << 20  # half of L2: a panel is read by the product while it is still there
_LARGEST_PANEL_BYTES = 96 << 20
_TILE = (128, 256)  # rows and columns of a cuBLAS tile; fewer tiles than multiprocessors leave some idle
ROWS_TILE = 64  # rows of the weight of a program of `multiply_rows`


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; those of a Hopper GPU for another device (fake tensors, the interpreter)."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_few_rows(x: Tensor, k: int, block: int) -> bool:
    """Whether x [..., k] goes through `multiply_rows`: up to 64 rows, no block straddles two rows of the weight."""
    return 0 < x.numel() <= FEW_ROWS * k and k % block == 0


def row_parts(n: int, k: int, step: int, device: torch.device) -> tuple[int, int]:
    """In how many parts `multiply_rows` cuts k, and how long one is: enough programs for two a multiprocessor."""
    wanted = -(-2 * multiprocessors(device) // -(-n // ROWS_TILE))
    steps = k // step
    each = -(-steps // min(wanted, steps, 16))
    return -(-steps // each), each * step


def panel(cut: int, depth: int, rows: int, itemsize: int, device: torch.device) -> int:
    """How much of the dimension `cut` of a weight [cut, depth] is decoded at once, for x of `rows` rows.

    About 24 MB, so that the panel stays in L2; more where the product would have fewer tiles than there are
    multiprocessors. A multiple of 128, unless it is all of `cut`.
    """
    tiles_down = -(-max(rows, 1) // _TILE[0])
    busy = -(-multiprocessors(device) // tiles_down) * _TILE[1]
    in_cache, largest = (size // (depth * itemsize) for size in (_PANEL_BYTES, _LARGEST_PANEL_BYTES))
    length = max(128, in_cache, min(busy, largest))
    if length >= cut:
        return cut
    pieces = -(-cut // length)
    return min(cut, -(-cut // (pieces * 128)) * 128)


def grouped_step(ranks: int, itemsize: int) -> int:
    """Values of k that `lora_shrink` takes at once: at most 16 KB of A, since a few of them wait in shared memory."""
    return max(16, min(128, (16 << 10) // (ranks * itemsize)))


def grouped_cut(k: int, step: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """In how many parts `lora_shrink` cuts k, a multiple of `step` each, and how long one is; for `tiles` of rows."""
    steps = -(-k // step)
    each = -(-steps // max(1, min(multiprocessors(device) // max(tiles, 1), steps, 16)))
    return -(-steps // each), each * step


def workspace_bytes(op: str, *args: Any) -> int:
    """Bytes that `op` takes at its peak beside its outputs, on a CUDA device; fake tensors will do.

    The buffer is kept for the next call: a process has one for each stream, as large as the largest call needed.
    0 for an op without a kernel of ours. What cuBLAS takes for itself is not counted.
    """
    if op == "nf4_linear":
        return _product_bytes(args[0], 0, *args[5:7])
    if op == "nf4_linear_with":
        return _product_bytes(args[0], args[1].shape[0], *args[6:8])
    if op == "nf4_linears":
        x, _, rows, block, _ = args
        return max(_product_bytes(x, 0, [n, x.shape[-1]], block) for n in rows)
    if op == "nf4_linear_add_":
        return _product_bytes(args[1], 0, *args[6:8])
    if op == "blockwise_linear":
        return _panel_bytes(args[0], 0, *args[5])
    if op in ("nf4_linear_transposed", "nf4_linear_transposed_add_", "blockwise_linear_transposed"):
        dy, shape = (args[1], args[6]) if op.endswith("add_") else (args[0], args[5])
        rows = dy.numel() // dy.shape[-1]
        count: int = shape[0] * transposed_panel(shape, rows, dy.dtype.itemsize, dy.device) * dy.dtype.itemsize
        return count
    if op == "grouped_lora_":
        _, x, a, _, _, starts = args
        return _grouped_bytes(x, max((f.shape[0] for f in a), default=1), starts)
    return 0


def transposed_panel(shape: list[int], rows: int, itemsize: int, device: torch.device) -> int:
    """Columns of a weight [n, k] that are decoded at once for dy @ W; all of them where words straddle rows."""
    n, k = shape
    return panel(k, n, rows, itemsize, device) if k % 8 == 0 else k


def _product_bytes(x: Tensor, extra: int, shape: list[int], block: int) -> int:
    n, k = shape
    rows = x.numel() // k
    if has_few_rows(x, k, block):
        parts, _ = row_parts(n, k, min(block, 128), x.device)
        return 4 * parts * rows * n if parts > 1 else 0
    return _panel_bytes(x, extra, n, k)


def _panel_bytes(x: Tensor, extra: int, n: int, k: int) -> int:
    length = panel(n, k, x.numel() // k, x.dtype.itemsize, x.device)
    return (length + extra) * k * x.dtype.itemsize


def grouped_tile_rows(starts: list[int]) -> int:
    """Rows of a tile of `grouped_lora_`: 16, the least that tensor cores take, unless some adapter has many rows."""
    longest = max((stop - start for start, stop in itertools.pairwise(starts)), default=0)
    return 16 if longest <= 16 else 64


def _grouped_bytes(x: Tensor, rank: int, starts: list[int]) -> int:
    rows, ranks = starts[-1], padded_rank(rank)
    height = grouped_tile_rows(starts)
    tiles = sum(-(-(stop - start) // height) for start, stop in itertools.pairwise(starts))
    parts, _ = grouped_cut(x.shape[-1], grouped_step(ranks, x.dtype.itemsize), tiles, x.device)
    return 4 * parts * rows * ranks if prod(x.shape) else 0


def padded_rank(rank: int) -> int:
    """The next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())
