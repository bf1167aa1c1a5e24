"""Low-rank updates of many adapters in one batch: two launches, however many adapters there are."""

from __future__ import annotations

import itertools
import struct
from functools import lru_cache

import torch
from torch import Tensor

from twinlora.numerics.triton import kernels
from twinlora.numerics.triton.codes import on
from twinlora.numerics.triton.products import workspace
from twinlora.numerics.triton.shapes import grouped_cut, grouped_step, grouped_tile_rows, padded_rank

__all__ = ["grouped_lora_"]


def grouped_lora_(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], starts: list[int]
) -> None:
    """See ops.py. Factors of another type than x's are converted, each time."""
    assert y.dtype == x.dtype
    a, b = ([factor.to(x.dtype) for factor in factors] for factors in (a, b))
    a, x, transposed = [factor.contiguous() for factor in a], x.contiguous(), all(f.T.is_contiguous() for f in b)
    if not transposed:
        b = [factor.contiguous() for factor in b]
    rows, k, n = starts[-1], x.shape[-1], y.shape[-1]
    adapters = tuple((p.data_ptr(), q.data_ptr(), p.shape[0], scale) for p, q, scale in zip(a, b, scales, strict=True))
    height = grouped_tile_rows(starts)
    table = _table(adapters, tuple(starts), height, x.device)
    if not table.shape[0]:
        return
    ranks, tiles = padded_rank(max(p.shape[0] for p in a)), table.shape[0]
    step, columns = grouped_step(ranks, x.dtype.itemsize), 128 if ranks <= 64 else 64
    parts, span = grouped_cut(k, step, tiles, x.device)
    h = workspace(x.device, parts * rows * ranks, torch.float32)
    aligned = all(p % 16 == q % 16 == rank % 8 == 0 for p, q, rank, _ in adapters)
    wide = not x.is_cuda
    with on(x):
        kernels.lora_shrink[(tiles, parts)](
            table, x, h, rows, k, span, ALIGNED=aligned, WIDE=wide, BM=height, BR=ranks, BK=step
        )
        kernels.lora_expand[(tiles, -(-n // columns))](
            table,
            h,
            y,
            rows,
            n,
            y.stride(0),
            PARTS=parts,
            ALIGNED=aligned,
            TRANSPOSED=transposed,
            WIDE=wide,
            BM=height,
            BR=ranks,
            BN=columns,
        )


@lru_cache(maxsize=4096)  # the same for all steps of a batch; keyed by the addresses themselves, so never stale
def _table(
    adapters: tuple[tuple[int, int, int, float], ...], starts: tuple[int, ...], height: int, device: torch.device
) -> Tensor:
    """The kernels' table of tiles: int64 [tiles, 6], see `kernels.lora_shrink`."""
    tiles = []
    for (a, b, rank, scale), (start, stop) in zip(adapters, itertools.pairwise(starts), strict=True):
        (bits,) = struct.unpack("i", struct.pack("f", scale))
        tiles += [[a, b, rank, bits, first, min(height, stop - first)] for first in range(start, stop, height)]
    return torch.tensor(tiles, dtype=torch.int64, device=device).view(-1, 6)
