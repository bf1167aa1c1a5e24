"""16-bit copies of quantised weights, for as many layers as there is memory for: such a layer decodes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinlora.model.linear import FrozenLinear, QuantLinear

__all__ = ["CopiedLinear", "Copies", "copy_layers", "drop_copies"]

_FEW_ROWS = 64  # up to here backends multiply NF4 as it is, reading a quarter of the bytes


class CopiedLinear(FrozenLinear):
    """A quantised layer with its weight decoded beside it: the same products, bit for bit."""

    weight: Tensor

    def __init__(self, stored: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__(stored.in_features, stored.out_features, stored.bias)
        self.stored, self.fan_in_fan_out = stored, stored.fan_in_fan_out
        self.register_buffer("weight", stored.dense_weight(dtype), persistent=False)

    def _copy_serves(self, x: Tensor) -> bool:
        return x.dtype == self.weight.dtype and x.numel() > _FEW_ROWS * x.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Differentiable in x."""
        if not self._copy_serves(x):
            out: Tensor = self.stored(x)
            return out
        y = F.linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """See FrozenLinear."""
        if not self._copy_serves(x):
            return self.stored.multiply(x)
        y = F.linear(x, self.weight)
        return y if self.bias is None else y.add_(self.bias)

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """See FrozenLinear."""
        return dy @ self.weight if self._copy_serves(dy) else self.stored.multiply_transposed(dy)

    def multiply_add_(self, y: Tensor, x: Tensor) -> None:
        """y [T, out] += multiply(x [T, in])."""
        if not self._copy_serves(x):
            y.add_(self.stored.multiply(x))
            return
        y.addmm_(x, self.weight.T)
        if self.bias is not None:
            y.add_(self.bias)

    def multiply_transposed_add_(self, dx: Tensor, dy: Tensor) -> None:
        """dx [T, in] += multiply_transposed(dy [T, out])."""
        if self._copy_serves(dy):
            dx.addmm_(dy, self.weight)
        else:
            dx.add_(self.stored.multiply_transposed(dy))

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """See FrozenLinear."""
        return self.stored.dense_weight(dtype)

    @property
    def precision(self) -> str:
        """See FrozenLinear; what is stored, the copy only saves work."""
        return self.stored.precision

    @property
    def stored_bytes(self) -> int:
        """See FrozenLinear."""
        return self.stored.stored_bytes + self.weight.nbytes


@dataclass(frozen=True)
class Copies:
    """How many of `layers` quantised layers have a copy, bytes of these copies, and their share of all weights."""

    copied: int
    layers: int
    nbytes: int
    share: float


def copy_layers(model: nn.Module, budget: int, dtype: torch.dtype) -> Copies:
    """Put copies in `dtype` beside quantised weights, in the model's order, while they fit into `budget` bytes."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    copied = spent = 0
    for name, layer in layers.items():
        size = layer.in_features * layer.out_features * dtype.itemsize
        if spent + size <= budget:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, CopiedLinear(layer, dtype))
            spent, copied = spent + size, copied + 1
    total = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
    return Copies(copied, len(layers), spent, spent / total if total else 0.0)


def drop_copies(model: nn.Module) -> None:
    """Take all copies away again."""
    for name, layer in [(name, m) for name, m in model.named_modules() if isinstance(m, CopiedLinear)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.stored)
