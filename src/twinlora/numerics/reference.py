"""Plain PyTorch for every op: the definition of correct, and what runs where no faster backend is built.

Works on any device. Weights are walked in panels that stay in the processor's cache, so that no float32 copy of a
whole tensor ever exists.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from twinlora.numerics.nf4 import codebook, dynamic_map, midpoints

__all__ = [
    "dense_linear",
    "grouped_lora_",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_transposed",
    "nf4_quantize",
    "scales_dequantize",
    "scales_quantize",
]

_PANEL = 1 << 18  # weights per panel: 0.5 to 1 MiB of temporaries


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """On `device`: the two levels of every byte [256, 2], NF4 borders [15], dynamic map [256], its borders [255]."""
    levels, bytes_ = codebook(), torch.arange(256)
    pairs = torch.stack([levels[bytes_ >> 4], levels[bytes_ & 15]], dim=1)
    tables = (pairs, midpoints(levels), dynamic_map(), midpoints(dynamic_map()))
    return tuple(table.to(device) for table in tables)  # type: ignore[return-value]


def _pad(flat: Tensor, multiple: int) -> Tensor:
    missing = -flat.numel() % multiple
    return torch.nn.functional.pad(flat, (0, missing)) if missing else flat


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Any float tensor -> codes uint8 [(n + 1) // 2] and block maxima float32 [ceil(n / block_size)]."""
    flat = weight.reshape(-1)
    borders = _constants(weight.device)[1]
    packed, scales = [], []
    for panel in flat.split(max(_PANEL, block_size)):
        blocks = _pad(panel.float(), block_size).view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        # The clamp keeps an all-zero block at 0 · finite = 0, the code of level 0.
        inverse = absmax.reciprocal().clamp_(max=torch.finfo(torch.float32).max)
        codes = torch.bucketize(blocks * inverse[:, None], borders, out_int32=True).view(-1)[: panel.numel()]
        pairs = _pad(codes, 2).view(-1, 2)
        if codes.numel() % 2:
            pairs[-1, 1] = 7  # the missing half of an odd tensor's last byte holds level 0
        packed.append(((pairs[:, 0] << 4) | pairs[:, 1]).to(torch.uint8))
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


def scales_quantize(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n] -> codes uint8 [n], block maxima float32 [ceil(n / block_size)], mean float32 []."""
    _, _, _, borders = _constants(absmax.device)
    offset = absmax.mean()
    blocks = _pad(absmax - offset, block_size).view(-1, block_size)
    maxima = blocks.abs().amax(dim=1)
    inverse = maxima.reciprocal().clamp_(max=torch.finfo(torch.float32).max)
    codes = torch.bucketize(blocks * inverse[:, None], borders, out_int32=True)
    return codes.view(-1)[: absmax.numel()].to(torch.uint8), maxima, offset


def scales_dequantize(
    scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None, nested_block_size: int
) -> Tensor:
    """The block maxima as float32 [n], whether stored so or as codes with `nested_scales` and `nested_offset`."""
    if nested_scales is None or nested_offset is None:
        return scales
    values = _constants(scales.device)[2][scales.int()]
    blocks = _pad(values, nested_block_size).view(-1, nested_block_size) * nested_scales[:, None]
    return (blocks.view(-1)[: scales.numel()] + nested_offset).contiguous()


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
    """level[code] * scale in float32, rounded once to `dtype` -> [*shape]."""
    absmax = scales_dequantize(scales.reshape(-1), nested_scales, nested_offset, nested_block_size)
    levels = _constants(packed.device)[0]
    codes = packed.reshape(-1)
    padded = absmax.numel() * block_size
    out = torch.empty(max(padded, 2 * codes.numel()), dtype=dtype, device=packed.device)
    step = max(_PANEL, block_size)
    for start in range(0, padded, step):
        stop = min(start + step, padded)
        pairs = torch.nn.functional.embedding(codes[start // 2 : stop // 2].int(), levels)
        blocks = _pad(pairs.view(-1), block_size).view(-1, block_size)
        panel_scales = absmax[start // block_size : stop // block_size]
        torch.mul(blocks, panel_scales[:, None], out=out[start:stop].view(-1, block_size))
    count = 1
    for size in shape:
        count *= size
    return out[:count].view(shape)


def nf4_linear(x: Tensor, packed: Tensor, *quant: Any) -> Tensor:
    """x [..., K] times the transposed weight [N, K] -> [..., N], in x's type. `quant` as in `nf4_dequantize`."""
    quant += (x.dtype,)
    return torch.nn.functional.linear(x, nf4_dequantize(packed, *quant))


Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # packed, scales, nested scales, nested offset


def by_weight(tensors: list[Tensor], count: int) -> list[Weight]:
    """`count` weights from one flat list, in which those without nested scales have two tensors."""
    each = len(tensors) // count
    parts = (tensors[i : i + each] for i in range(0, len(tensors), each))
    return [(p[0], p[1], p[2], p[3]) if each == 4 else (p[0], p[1], None, None) for p in parts]


def nf4_linears(x: Tensor, tensors: list[Tensor], rows: list[int], block: int, nested_block: int) -> list[Tensor]:
    """x [..., K] times each transposed weight [rows[i], K] -> [..., rows[i]]. `tensors` as for `by_weight`."""
    shapes = ([n, x.shape[-1]] for n in rows)
    weights = by_weight(tensors, len(rows))
    return [nf4_linear(x, *w, shape, block, nested_block) for w, shape in zip(weights, shapes, strict=True)]


def nf4_linear_transposed(dy: Tensor, packed: Tensor, *quant: Any) -> Tensor:
    """dy [..., N] times the weight [N, K] -> [..., K], in dy's type: the input gradient of `nf4_linear`."""
    quant += (dy.dtype,)
    return dy @ nf4_dequantize(packed, *quant)


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N]."""
    return torch.nn.functional.linear(x, weight)


def grouped_lora_(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], starts: list[int]
) -> None:
    """See ops.py."""
    for i, (shrink, expand, scale) in enumerate(zip(a, b, scales, strict=True)):
        start, stop = starts[i], starts[i + 1]
        if start < stop:
            y[start:stop].addmm_(x[start:stop] @ shrink.T, expand.T, alpha=scale)
