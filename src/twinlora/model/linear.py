"""Frozen linear layers that know how to multiply: what a LoRA layer asks of its base, whatever the storage.

`multiply` and `multiply_transposed` build no autograd graph (LoRA's own backward calls them); `forward` is the ordinary
differentiable layer. DenseLinear shares the parameters of the nn.Linear it was made from.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinlora.numerics import ops
from twinlora.numerics.nf4 import NF4Format

__all__ = ["DenseLinear", "FrozenLinear", "QuantLinear", "multiply_each", "project"]


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Each layer's own product with the same x [..., in]. A class with a method `together` does it for several."""
    together = getattr(layers[0], "together", None)
    if together is not None and len({type(layer) for layer in layers}) == 1:
        out: tuple[Tensor, ...] = together(x, layers)
        return out
    return tuple(layer(x) for layer in layers)


class FrozenLinear(nn.Module):
    """y = x @ W.T + bias with a frozen W [out_features, in_features]."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """x [..., in] @ W.T + bias -> [..., out]."""

    @abstractmethod
    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """dy [..., out] @ W -> [..., in]."""

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """How W is stored, for passports and tables: `bfloat16`, `nf4-64-dq256`, …"""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes W takes, scales included."""

    @staticmethod
    def together(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
        """What each layer makes of the same x [..., in]; see `project`."""
        if torch.is_grad_enabled():
            return tuple(layer(x) for layer in layers)
        return multiply_each(x, layers)

    def extra_repr(self) -> str:
        """Shape and precision, as printed by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, precision={self.precision}"


def multiply_each(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """`multiply` of each layer with the same x, in one call where they are quantised alike."""
    quantized = [layer.quantized for layer in layers if isinstance(layer, QuantLinear) and layer.bias is None]
    if len(quantized) == len(layers) > 1 and len({weight.format for weight in quantized}) == 1:
        return ops.linears(x, quantized)
    return tuple(layer.multiply(x) for layer in layers)


class DenseLinear(FrozenLinear):
    """A 16- or 32-bit weight, shared with the nn.Linear it replaces."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias)
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """The stock linear layer."""
        return F.linear(x, self.weight, self.bias) if torch.is_grad_enabled() else self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """See FrozenLinear."""
        if self.bias is not None:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        return ops.dense_linear(x, self.weight.to(x.dtype))

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """See FrozenLinear."""
        return dy @ self.weight.to(dy.dtype)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """See FrozenLinear."""
        return self.weight.detach().to(dtype)

    @property
    def precision(self) -> str:
        """See FrozenLinear."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def stored_bytes(self) -> int:
        """See FrozenLinear."""
        return self.weight.nbytes


class QuantLinear(FrozenLinear):
    """An NF4 weight. Its tensors are frozen Parameters, so that they move with the model; no cast ever touches them.

    Where blocks do not straddle rows, codes are [N, K/2] and scales [N, K/block] (rows can be sharded), else flat.
    """

    packed: nn.Parameter
    scales: nn.Parameter

    def __init__(self, quantized: ops.NF4Tensor, bias: nn.Parameter | None) -> None:
        rows, columns = quantized.shape
        super().__init__(columns, rows, bias)
        self.format: NF4Format = quantized.format
        by_row = columns % self.format.block_size == 0
        self.packed = _frozen(quantized.packed.view(rows, -1) if by_row else quantized.packed)
        self.scales = _frozen(quantized.scales.view(rows, -1) if by_row else quantized.scales)
        nested_scales, nested_offset = quantized.nested_scales, quantized.nested_offset
        self.nested_scales = None if nested_scales is None else _frozen(nested_scales)
        self.nested_offset = None if nested_offset is None else _frozen(nested_offset)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: nn.Parameter | None, fmt: NF4Format, name: str) -> QuantLinear:
        """Quantise `weight` [N, K]; `name` is what an error calls it."""
        return cls(ops.quantize(weight, fmt, name=name), bias)

    @property
    def quantized(self) -> ops.NF4Tensor:
        """The weight as the ops take it (a view, nothing is copied)."""
        kept: ops.NF4Tensor | None = self.__dict__.get("_quantized")
        packed = self.packed
        if kept is None or kept.packed is not packed:
            shape = (self.out_features, self.in_features)
            kept = ops.NF4Tensor(packed, self.scales, self.nested_scales, self.nested_offset, shape, self.format)
            self.__dict__["_quantized"] = kept
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """Differentiable in x."""
        y = ops.linear(x, self.quantized)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor) -> Tensor:
        """See FrozenLinear."""
        y = ops.linear(x, self.quantized)
        return y if self.bias is None else y.add_(self.bias)

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """See FrozenLinear."""
        return ops.linear_transposed(dy, self.quantized)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """See FrozenLinear."""
        return self.quantized.dequantize(dtype)

    @property
    def precision(self) -> str:
        """See FrozenLinear."""
        return self.format.name

    @property
    def stored_bytes(self) -> int:
        """See FrozenLinear."""
        return self.quantized.nbytes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow device moves; undo casts, since `model.to(bfloat16)` would ruin the float32 scales."""
        kept = {name: p.dtype for name, p in self._parameters.items() if p is not None and name != "bias"}
        before = {name: self._parameters[name].data for name in kept}  # type: ignore[union-attr]
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            parameter = self._parameters[name]
            assert parameter is not None
            if parameter.dtype != dtype:
                parameter.data = before[name].to(parameter.device)
        return self


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
