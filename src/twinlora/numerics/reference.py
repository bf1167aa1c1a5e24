"""Plain PyTorch for every op: the definition of correct, and what runs where no faster backend is built.

Works on any device. Weights are walked in panels that stay in the processor's cache, so that no float32 copy of a
whole tensor ever exists.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twinlora.numerics.nf4 import codebook, dynamic_map, midpoints

__all__ = [
    "blockwise_dequantize",
    "blockwise_linear",
    "blockwise_linear_transposed",
    "blockwise_quantize",
    "dense_linears",
    "grouped_lora_",
    "nf4_dequantize",
    "nf4_linear",
    "nf4_linear_add_",
    "nf4_linear_transposed",
    "nf4_linear_transposed_add_",
    "nf4_linear_with",
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


def nf4_linear_with(x: Tensor, extra: Tensor, packed: Tensor, *quant: Any) -> Tensor:
    """x [..., K] times the transposed rows of the weight [N, K] and then of `extra` [R, K] -> [..., N + R]."""
    return torch.cat([nf4_linear(x, packed, *quant), torch.nn.functional.linear(x, extra)], dim=-1)


def nf4_linear_add_(y: Tensor, x: Tensor, packed: Tensor, *quant: Any) -> None:
    """`nf4_linear`, added to y [..., N]."""
    quant += (x.dtype,)
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), nf4_dequantize(packed, *quant).T)


def nf4_linear_transposed_add_(dx: Tensor, dy: Tensor, packed: Tensor, *quant: Any) -> None:
    """`nf4_linear_transposed`, added to dx [..., K]."""
    quant += (dy.dtype,)
    dx.view(-1, dx.shape[-1]).addmm_(dy.reshape(-1, dy.shape[-1]), nf4_dequantize(packed, *quant))


def grouped_lora_(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], starts: list[int]
) -> None:
    """y [R, N] += scale_i · (x A_iᵀ) B_iᵀ in rows starts[i] .. starts[i + 1]; x [R, K], A_i [r_i, K], B_i [N, r_i]."""
    for i, (start, stop) in enumerate(itertools.pairwise(starts)):
        h = x[start:stop] @ a[i].to(x.dtype).T
        y[start:stop].addmm_(h, b[i].to(x.dtype).T, alpha=scales[i])


@cache
def _nf3_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """On `device`: the four levels of every 12 bits [4096, 4], NF3 borders [7]."""
    levels, words = codebook(3), torch.arange(4096)
    table = torch.stack([levels[(words >> 3 * i) & 7] for i in range(4)], dim=1)
    return table.to(device), midpoints(levels).to(device)


def blockwise_quantize(weight: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Any float tensor -> codes (`bits` 8: int8 [n]; 3: uint8 [3 · ceil(n / 8)]) and block maxima float32."""
    flat = weight.reshape(-1)
    packed, scales = [], []
    for panel in flat.split(max(_PANEL, block_size)):
        blocks = _pad(panel.float(), block_size).view(-1, block_size)
        absmax = blocks.abs().amax(dim=1)
        inverse = absmax.reciprocal().clamp_(max=torch.finfo(torch.float32).max)
        normal = (blocks * inverse[:, None]).view(-1)[: panel.numel()]
        if bits == 8:
            packed.append((normal * 127).round_().to(torch.int8))
        else:
            packed.append(_pack_nf3(torch.bucketize(normal, _nf3_constants(weight.device)[1], out_int32=True)))
        scales.append(absmax)
    return torch.cat(packed), torch.cat(scales)


def _pack_nf3(codes: Tensor) -> Tensor:
    """int32 codes [n] -> uint8 [3 · ceil(n / 8)]: code i of eight lies in bits 3i to 3i + 2, least byte first."""
    missing = -codes.numel() % 8
    codes = torch.nn.functional.pad(codes, (0, missing), value=3)  # level 0
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=codes.device)
    words = (codes.view(-1, 8) << shifts).sum(dim=1, dtype=torch.int32)
    return torch.stack([words & 255, (words >> 8) & 255, words >> 16], dim=1).to(torch.uint8).view(-1)


def _unpack_nf3(packed: Tensor) -> Tensor:
    """uint8 [3 m] -> levels float32 [8 m]."""
    low, middle, high = packed.view(-1, 3).int().unbind(1)
    halves = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=1)
    return torch.nn.functional.embedding(halves, _nf3_constants(packed.device)[0]).view(-1)


def blockwise_dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    block_size: int,
    nested_block_size: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """int8: code · (scale / 127); NF3: level[code] · scale; in float32, rounded once to `dtype` -> [*shape]."""
    steps = scales_dequantize(scales.reshape(-1), nested_scales, nested_offset, nested_block_size)
    if bits == 8:
        steps = steps / 127
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    flat, codes = out.view(-1), packed.reshape(-1)
    step = max(_PANEL, block_size)  # a multiple of the block and of 8
    for start in range(0, flat.numel(), step):
        stop = min(start + step, flat.numel())
        values = codes[start:stop].float() if bits == 8 else _unpack_nf3(codes[start // 8 * 3 : -(-stop // 8) * 3])
        blocks = _pad(values[: stop - start], block_size).view(-1, block_size)
        blocks = blocks * steps[start // block_size : -(-stop // block_size), None]
        flat[start:stop] = blocks.view(-1)[: stop - start]
    return out


def blockwise_linear(x: Tensor, packed: Tensor, *quant: Any) -> Tensor:
    """x [..., K] times the transposed weight [N, K] -> [..., N], in x's type. `quant` as in `blockwise_dequantize`."""
    quant += (x.dtype,)
    return torch.nn.functional.linear(x, blockwise_dequantize(packed, *quant))


def blockwise_linear_transposed(dy: Tensor, packed: Tensor, *quant: Any) -> Tensor:
    """dy [..., N] times the weight [N, K] -> [..., K], in dy's type: the input gradient of `blockwise_linear`."""
    quant += (dy.dtype,)
    return dy @ blockwise_dequantize(packed, *quant)


def dense_linears(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x [..., K] @ weight [N, K].T of each weight -> [..., N] of each."""
    return [torch.nn.functional.linear(x, weight) for weight in weights]
