"""How a weight is stored: the one place that knows a format's name, bits, packing and size.

Every format is blockwise: `block_size` weights of the row-major flattened tensor (the last block may be short) share
their absolute maximum as a scale.

    nf4    16 levels of numerics/nf4.py; two codes a byte, the first in the high nibble (the bytes of bitsandbytes)
    nf3    8 levels, derived alike; eight codes in three bytes, code i in bits 3i to 3i + 2, the least byte first
    int8   whole numbers -127 to 127, one a byte; a step is the block's maximum / 127

With double quantisation the scales lose their mean and are stored as 8-bit codes of a signed dynamic map, in blocks of
their own; int8 leaves them as they are unless told otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from twinlora.errors import ConfigError, ModelError
from twinlora.numerics.nf4 import BLOCK_SIZES

__all__ = [
    "DENSE",
    "Format",
    "Int8Format",
    "NF3Format",
    "NF4Format",
    "Precision",
    "by_layer",
    "is_format",
    "of_kind",
    "parse",
]

DENSE = "16bit"  # the name of a layer that is not quantised, in maps from layers to formats


@dataclass(frozen=True)
class Format:
    """`block_size` weights share a scale, `nested_block_size` scales a scale of theirs; 0: scales stay float32.

    Raises ConfigError for a size that is not allowed.
    """

    kind: ClassVar[str]
    bits: ClassVar[int]  # of a code
    group: ClassVar[int]  # codes that are packed together, into group · bits / 8 bytes

    block_size: int = 64
    nested_block_size: int = 256

    def __post_init__(self) -> None:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"{self.kind} block size {self.block_size}: expected one of {sizes}")
        if self.nested_block_size not in (0, *BLOCK_SIZES):
            raise ConfigError(f"{self.kind} nested block size {self.nested_block_size}: expected 0 (off) or {sizes}")

    @property
    def name(self) -> str:
        """Short name for tables and passports, for example `nf4-64-dq256`."""
        return f"{self.kind}-{self.block_size}" + (f"-dq{self.nested_block_size}" if self.nested_block_size else "")

    def packed_bytes(self, count: int) -> int:
        """Bytes of the codes of `count` weights."""
        return -(-count // self.group) * self.group * self.bits // 8

    def stored_bytes(self, count: int) -> int:
        """Bytes that `count` weights take, scales included."""
        blocks = -(-count // self.block_size)
        if not self.nested_block_size:
            return self.packed_bytes(count) + 4 * blocks
        return self.packed_bytes(count) + blocks + 4 * -(-blocks // self.nested_block_size) + 4


@dataclass(frozen=True)
class NF4Format(Format):
    """4-bit NormalFloat: 4 + 8/64 + 32/(64·256) = 4.127 bits per weight."""

    kind, bits, group = "nf4", 4, 2


@dataclass(frozen=True)
class NF3Format(Format):
    """3-bit NormalFloat: 3.127 bits per weight."""

    kind, bits, group = "nf3", 3, 8


@dataclass(frozen=True)
class Int8Format(Format):
    """Absolute-maximum integers: 8.5 bits per weight."""

    kind, bits, group = "int8", 8, 1

    nested_block_size: int = 0


Precision = Format | Mapping[str, str]  # one format for all linear layers, or for each a format's name or DENSE

_KINDS: dict[str, type[Format]] = {cls.kind: cls for cls in (NF4Format, NF3Format, Int8Format)}
_NAME = re.compile(rf"({'|'.join(_KINDS)})-(\d+)(?:-dq(\d+))?")


def is_format(name: str) -> bool:
    """Whether `name`, as passports have it, is a format's and not a type's such as bfloat16."""
    return _NAME.fullmatch(name) is not None


def parse(name: str) -> Format:
    """`nf4-64-dq256` -> its format. Raises ConfigError."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigError(f"format {name!r}: expected a name such as nf4-64-dq256, nf3-64-dq256 or int8-64")
    return _KINDS[match[1]](int(match[2]), int(match[3] or 0))


def of_kind(kind: str, block_size: int, *, double_quant: bool) -> Format:
    """The format `nf4`, `nf3` or `int8`; the scales of int8 are never quantised."""
    cls = _KINDS[kind]
    return cls(block_size, 256 if double_quant and cls is not Int8Format else 0)


def by_layer(precision: Precision | None, names: Collection[str]) -> dict[str, Format]:
    """The formats of those of the linear layers `names` that are quantised. Raises ModelError for a map of others."""
    if precision is None or isinstance(precision, Format):
        return dict.fromkeys(names, precision) if precision else {}
    wrong = [f"{name}: no such layer" for name in precision if name not in names]
    wrong += [f"{name}: has no precision" for name in names if name not in precision]
    if wrong:
        shown = "\n  ".join(wrong[:20])
        raise ModelError(f"precision by layer: {len(wrong)} name(s) do not fit this model\n  {shown}")
    return {name: parse(kept) for name, kept in precision.items() if kept != DENSE}
