"""Several layers with one input get their adapters in one call where the CPU has a kernel for it, else one by one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twinlora.numerics import cpu, ops

__all__ = ["LoraGroup"]


class LoraGroup:
    """What `grouped_lora_` shall do for each of several layers: `runs` are (layer, a, b, scales, starts)."""

    def __init__(self, runs: list[cpu.LoraRun]) -> None:
        self.runs = runs
        self._packed: Tensor | None = None
        if runs and runs[0][1][0].device.type == "cpu" and cpu.paths():
            # Once for many passes: what Python does for each tensor would take longer than the products.
            self._packed, runs = cpu.pack_lora(runs)
        self._one_by_one = runs

    def add(self, ys: Sequence[Tensor], x: Tensor) -> None:
        """Add to each layer's contiguous y [..., N] what its adapters make of x [..., K]."""
        if self._packed is not None and len(self._packed):
            cpu.add_lora(ys, x, self._packed)
        for layer, a, b, scales, starts in self._one_by_one:
            y = ys[layer].view(-1, ys[layer].shape[-1])
            ops.grouped_lora_(y, x.reshape(-1, x.shape[-1]), a, b, scales, starts)
