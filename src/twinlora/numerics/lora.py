"""The adapters of a layer by number, so that those of a whole pass are added in one call where the CPU has a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twinlora.numerics import cpu

__all__ = ["FEW_ROWS", "LoraTable", "add", "has_tables", "multiply"]

FEW_ROWS = cpu.FEW_LORA_ROWS  # of one adapter; more are for `ops.grouped_lora_`


def has_tables(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `add` works there."""
    return device.type == "cpu" and dtype == torch.bfloat16 and bool(cpu.paths()) and cpu.has_blocks()


class LoraTable:
    """A layer's adapters by number; their tensors must live as long as they are in it."""

    def __init__(self) -> None:
        self.rows = torch.zeros(0, 4, dtype=torch.int64)
        self.place = (0, 0)  # of the rows in memory: address and number, asked for once and not in every pass

    def put(self, number: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Enter A [r, K], contiguous, and B [N, r], the transpose of something contiguous."""
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        if number >= len(self.rows):
            self.rows = torch.cat([self.rows, self.rows.new_zeros(number + 1 - len(self.rows), 4)])
            self.place = self.rows.data_ptr(), len(self.rows)
        self.rows[number] = torch.tensor(cpu.lora_entry(a, b, scale))

    def drop(self, number: int) -> None:
        """Forget an adapter."""
        self.rows[number] = 0


def add(ys: Sequence[Tensor], x: Tensor, tables: Sequence[LoraTable], route: Tensor) -> None:
    """Add to each layer's contiguous y [..., N] what its adapters make of x [..., K].

    route [n, 3] has adapters' numbers and the start and stop of their rows, at most FEW_ROWS each. A layer that lacks
    an adapter leaves its rows alone.
    """
    cpu.add_lora(ys, x, [table.place for table in tables], route)


def multiply(
    x: Tensor, weights: Sequence[Tensor], tables: Sequence[LoraTable], route: Tensor
) -> tuple[Tensor, ...] | None:
    """x [..., K] times each layer's dense weight [N, K], and what `add` adds; None where no kernel does that."""
    ys = cpu.multiply_adapted(x, weights, [table.place for table in tables], route)
    return None if ys is None else tuple(ys)
