"""llama.cpp's block formats Q8_0, Q4_0 and IQ4_NL: 32 weights of a row share a float16 scale.

A block's bytes are the scale, little-endian, then the codes: 32 signed bytes (Q8_0), or 16 bytes with the code of
weight i in the low and of weight i + 16 in the high nibble. Q8_0 and Q4_0 are, to the bit, what ggml's own reference
quantisers write. IQ4_NL has 16 uneven levels; its scale is searched here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from twinlora.errors import ModelError

__all__ = ["BLOCK", "BLOCK_BYTES", "IQ4_LEVELS", "BlockFormat", "dequantize", "fits", "quantize"]

BlockFormat = Literal["q8_0", "q4_0", "iq4_nl"]
BLOCK = 32
BLOCK_BYTES: dict[BlockFormat, int] = {"q8_0": 34, "q4_0": 18, "iq4_nl": 18}
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_PANEL = 1 << 15  # blocks quantised at once


def fits(columns: int) -> bool:
    """Whether rows of so many weights can be stored in blocks."""
    return columns % BLOCK == 0


def quantize(weight: Tensor, fmt: BlockFormat, *, name: str = "weight") -> Tensor:
    """`weight` [..., K] of any float type -> uint8 [..., K / 32 · bytes of a block].

    Raises ModelError if K is no multiple of 32 or a value is not finite.
    """
    if not fits(weight.shape[-1]):
        raise ModelError(f"{name}: rows of {weight.shape[-1]} weights cannot be {fmt}: expected a multiple of {BLOCK}")
    blocks = weight.reshape(-1, BLOCK)
    stored = torch.empty(len(blocks), BLOCK_BYTES[fmt], dtype=torch.uint8, device=weight.device)
    encode = {"q8_0": _q8_0, "q4_0": _q4_0, "iq4_nl": _iq4_nl}[fmt]
    for begin in range(0, len(blocks), _PANEL):
        part = blocks[begin : begin + _PANEL].float()
        scales, codes = encode(part)
        stored[begin : begin + _PANEL, :2] = scales.to(torch.float16).view(torch.uint8)
        stored[begin : begin + _PANEL, 2:] = codes
    if not bool(torch.isfinite(stored[:, :2].contiguous().view(torch.float16)).all()):
        raise ModelError(f"{name}: a value is NaN, Inf or too large for the float16 scales of {fmt}")
    return stored.view(*weight.shape[:-1], -1)


def dequantize(stored: Tensor, fmt: BlockFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [..., blocks · bytes of a block] -> [..., blocks · 32] in `dtype`: scale times level, rounded once."""
    blocks = stored.reshape(-1, BLOCK_BYTES[fmt])
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    codes = blocks[:, 2:]
    if fmt == "q8_0":
        levels = codes.view(torch.int8).float()
    else:
        nibbles = torch.cat([codes & 15, codes >> 4], dim=1)
        levels = nibbles.float() - 8 if fmt == "q4_0" else _iq4_levels(stored.device)[nibbles.int()]
    return (scales * levels).to(dtype).view(*stored.shape[:-1], -1)


def _inverse(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 0, 1 / scales)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes [n, 32] from 0 to 15 -> bytes [n, 16]."""
    codes = codes.to(torch.uint8)
    return codes[:, : BLOCK // 2] | (codes[:, BLOCK // 2 :] << 4)


def _q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scales = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(scales)
    rounded = torch.sign(scaled) * _half_up(scaled.abs())
    return scales, rounded.to(torch.int8).view(torch.uint8)


def _half_up(x: Tensor) -> Tensor:
    """x >= 0 rounded, halves upwards; x + 0.5 itself would round 0.49999997 up."""
    whole = torch.floor(x)
    return whole + torch.floor(2 * (x - whole))


def _q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    furthest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    scales = furthest / -8
    codes = torch.trunc(blocks * _inverse(scales) + 8.5).clamp_(max=15)
    return scales, _nibbles(codes)


def _iq4_levels(device: torch.device) -> Tensor:
    return torch.tensor(IQ4_LEVELS, dtype=torch.float32, device=device)


def _iq4_nl(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scale, of 15 that put the furthest weight on or near an outer level, with the least error weighted by x².

    For given levels q the best scale is Σ x²·q·x / Σ x²·q²; then the levels are chosen anew for it.
    """
    levels = _iq4_levels(blocks.device)
    borders = (levels[:-1] + levels[1:]) / 2
    weights = blocks.square()
    furthest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    best_scale, best_gain = torch.zeros_like(furthest), torch.zeros_like(furthest)
    for step in range(-7, 8):
        inverse = torch.where(furthest == 0, 0, (levels[0] + step) / furthest)
        chosen = levels[torch.bucketize(blocks * inverse, borders)]
        crossed = (weights * chosen * blocks).sum(dim=1, keepdim=True)
        squared = (weights * chosen.square()).sum(dim=1, keepdim=True)
        gain = torch.where(squared > 0, crossed.square() / squared, 0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, crossed / squared, best_scale)
    codes = torch.bucketize(blocks * _inverse(best_scale), borders)
    return best_scale, _nibbles(codes)
