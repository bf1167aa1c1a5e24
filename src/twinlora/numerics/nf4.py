"""The NF4 format: its codebook and where it comes from, its blocks, and the double quantisation of their scales.

NF4 (QLoRA, arXiv 2305.14314, section 3) stores a weight as the nearest of 16 levels times the absolute maximum of its
block. Blocks run over the row-major flattened tensor, the last one may be short. Two codes share a byte, the first in
the high nibble. With double quantisation the block scales lose their mean and are stored as 8-bit codes of a
signed dynamic map, in blocks of their own: 4 + 8/64 + 32/(64·256) = 4.127 bits per weight.

The bytes are those of bitsandbytes, so that its checkpoints can be read and written.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from twinlora.errors import ConfigError

__all__ = ["BLOCK_SIZES", "NF4Format", "codebook", "dynamic_map", "midpoints"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Probability mass that the outermost level of NF4 leaves beyond itself (QLoRA, appendix E; the value of bitsandbytes).
_OFFSET = 0.9677083


@dataclass(frozen=True)
class NF4Format:
    """How a weight is stored: `block_size` weights share a scale, `nested_block_size` scales a scale of theirs.

    `nested_block_size` 0 means that scales stay float32. Raises ConfigError for a size that is not allowed.
    """

    block_size: int = 64
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"NF4 block size {self.block_size}: expected one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.nested_block_size not in (0, *BLOCK_SIZES):
            raise ConfigError(
                f"NF4 nested block size {self.nested_block_size}: expected 0 (off) or one of {BLOCK_SIZES}"
            )

    @property
    def name(self) -> str:
        """Short name for tables and passports, for example `nf4-64-dq256`."""
        return f"nf4-{self.block_size}" + (f"-dq{self.nested_block_size}" if self.nested_block_size else "")

    @classmethod
    def from_name(cls, name: str) -> NF4Format:
        """The format that `name` stands for. Raises ConfigError."""
        match = re.fullmatch(r"nf4-(\d+)(?:-dq(\d+))?", name)
        if match is None:
            raise ConfigError(f"NF4 format {name!r}: expected a name such as nf4-64-dq256")
        return cls(int(match[1]), int(match[2] or 0))

    def stored_bytes(self, count: int) -> int:
        """Bytes that `count` weights take, scales included."""
        blocks = -(-count // self.block_size)
        if not self.nested_block_size:
            return (count + 1) // 2 + 4 * blocks
        return (count + 1) // 2 + blocks + 4 * -(-blocks // self.nested_block_size) + 4


@cache
def codebook() -> Tensor:
    """The 16 levels, float32, ascending: quantiles of the normal distribution scaled to [-1, 1], with an exact 0.

    Derivation (bitsandbytes `create_normal_map`): nine quantiles for the positive half and eight for the negative one,
    evenly spaced in probability from `_OFFSET` to 1/2, whose last (the median, 0) is dropped from both; then 0 itself.
    The probabilities are float32 and the inverse CDF float64: other mixtures miss published digits.
    """

    def half(count: int) -> Tensor:
        probabilities = torch.linspace(_OFFSET, 0.5, count, dtype=torch.float32)[:-1]
        quantiles: Tensor = torch.special.ndtri(probabilities.double())
        return quantiles.float()

    levels = torch.cat([half(9), torch.zeros(1), -half(8)]).sort().values
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
