"""Codebooks: NF4 and its 3-bit sibling, where their levels come from, and the dynamic map of the scales.

A NormalFloat (QLoRA, arXiv 2305.14314, section 3) stores a weight as the nearest of its levels times the absolute
maximum of the weight's block. The levels of NF4 are those of bitsandbytes, so that its checkpoints can be read and
written; numerics/formats.py says how codes and scales are laid out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK_SIZES", "codebook", "dynamic_map", "midpoints"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Probability mass that is not beyond the outermost level: 1 - (1/2n + 1/2(n - 1)) / 2 of n levels (QLoRA, appendix E);
# for NF4 the rounded value of bitsandbytes.
_OFFSETS = {4: 0.9677083, 3: 1 - (1 / 16 + 1 / 14) / 2}


@cache
def codebook(bits: int = 4) -> Tensor:
    """The 2^bits levels, float32, ascending: quantiles of the normal distribution scaled to [-1, 1], with an exact 0.

    Derivation (bitsandbytes `create_normal_map`), for NF4: nine quantiles for the positive half and eight for the
    negative one, evenly spaced in probability from the offset to 1/2, whose last (the median, 0) is dropped from both;
    then 0 itself. The probabilities are float32 and the inverse CDF float64: other mixtures miss published digits.
    """

    def half(count: int) -> Tensor:
        probabilities = torch.linspace(_OFFSETS[bits], 0.5, count, dtype=torch.float32)[:-1]
        quantiles: Tensor = torch.special.ndtri(probabilities.double())
        return quantiles.float()

    count = 2 ** (bits - 1)
    levels = torch.cat([half(count + 1), torch.zeros(1), -half(count)]).sort().values
    return levels / levels.max()


@cache
def dynamic_map() -> Tensor:
    """The 256 values of the signed 8-bit dynamic map, float32, ascending (Dettmers, arXiv 1511.04561, section 4).

    For each exponent i = 0..6 the midpoints of 2^i even steps over [0.1, 1], times 10^(i-6), with both signs; then
    0 and 1. There is no -1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (exponent - 6)) * means
        values += scaled.tolist() + (-scaled).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def midpoints(levels: Tensor) -> Tensor:
    """Decision borders between ascending `levels` [n] -> [n - 1]; a value on a border takes the lower code."""
    return (levels[:-1] + levels[1:]) / 2
