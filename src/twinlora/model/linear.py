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
from transformers.pytorch_utils import Conv1D

from twinlora.numerics import ops
from twinlora.numerics.formats import Format

__all__ = [
    "DenseLinear",
    "FrozenLinear",
    "QuantLinear",
    "as_frozen",
    "bits_per_weight",
    "dense_weights",
    "is_linear",
    "multiply_each",
    "project",
]


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer of torch or transformers (GPT-2's Conv1D keeps its weight as [in, out])."""
    return type(module) in (nn.Linear, Conv1D)


def as_frozen(module: nn.Module) -> FrozenLinear:
    """The layer as a FrozenLinear: itself, or a DenseLinear that shares its parameters."""
    return module if isinstance(module, FrozenLinear) else DenseLinear(module)


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Each layer's own product with the same x [..., in]. A class with a method `together` does it for several."""
    together = getattr(layers[0], "together", None)
    if together is not None and len(set(map(type, layers))) == 1:
        out: tuple[Tensor, ...] = together(x, layers)
        return out
    return tuple(layer(x) for layer in layers)


class FrozenLinear(nn.Module):
    """y = x @ W.T + bias with a frozen W [out_features, in_features]."""

    bias: nn.Parameter | None
    fan_in_fan_out = False  # PEFT's name for a weight that is stored as [in, out]

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

    @property
    def takes_rows(self) -> bool:
        """Whether `multiply_with` is one product."""
        return False

    @abstractmethod
    def multiply_add_(self, y: Tensor, x: Tensor) -> None:
        """y [T, out] += multiply(x [T, in]), in the product's own pass."""

    @abstractmethod
    def multiply_transposed_add_(self, dx: Tensor, dy: Tensor) -> None:
        """dx [T, in] += multiply_transposed(dy [T, out]), in the product's own pass."""

    def multiply_with(self, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """`multiply` of x [T, in], and x @ extra [R, in].T -> [T, R]. Both may be views of one tensor."""
        return self.multiply(x), x @ extra.T

    @abstractmethod
    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """W [out, in] in `dtype`."""

    @property
    @abstractmethod
    def precision(self) -> str:
        """How W is stored, for passports and tables: `bfloat16`, `nf4-64-dq256`, `int8-64`, …"""

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
    """`multiply` of each layer with the same x, in one call where all are dense or in one NF4 format."""
    if (weights := dense_weights(layers, x.dtype)) is not None:
        return ops.dense_linears(x, weights)
    if len(layers) > 1 and (quantized := _nf4_weights(layers)) is not None:
        return ops.linears(x, quantized)
    return tuple([layer.multiply(x) for layer in layers])


def dense_weights(layers: Sequence[FrozenLinear], dtype: torch.dtype) -> list[Tensor] | None:
    """Their weights [out, in], if all are dense, of this type and without a bias."""
    weights: list[Tensor] = []
    for layer in layers:
        if not isinstance(layer, DenseLinear) or layer.bias is not None or layer.fan_in_fan_out:
            return None
        weight = layer._parameters["weight"]  # layer.weight takes ten times as long
        if weight is None or weight.dtype != dtype:
            return None
        weights.append(weight)
    return weights


def _nf4_weights(layers: Sequence[FrozenLinear]) -> list[ops.QuantTensor] | None:
    """Their weights, if all are in one NF4 format and without a bias."""
    weights: list[ops.QuantTensor] = []
    for layer in layers:
        if not isinstance(layer, QuantLinear) or layer.bias is not None or not layer.takes_rows:
            return None
        weights.append(layer.quantized)
        if layer.format != weights[0].format:
            return None
    return weights


class DenseLinear(FrozenLinear):
    """A 16- or 32-bit weight, shared with the layer it replaces; as [in, out] if that is a Conv1D."""

    def __init__(self, linear: Any) -> None:
        transposed = isinstance(linear, Conv1D)
        rows, columns = linear.weight.shape[:: -1 if transposed else 1]
        super().__init__(columns, rows, linear.bias)
        self.weight: nn.Parameter = linear.weight
        self.fan_in_fan_out = transposed

    def _matrix(self, dtype: torch.dtype) -> Tensor:
        """W [out, in], not copied unless `dtype` is another one."""
        weight = self._parameters["weight"]  # self.weight takes ten times as long
        assert weight is not None
        matrix = weight.T if self.fan_in_fan_out else weight
        return matrix if matrix.dtype == dtype else matrix.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The stock linear layer."""
        return F.linear(x, self._matrix(x.dtype), self.bias) if torch.is_grad_enabled() else self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        """See FrozenLinear."""
        if self.bias is not None:
            return F.linear(x, self._matrix(x.dtype), self.bias.to(x.dtype))
        return ops.dense_linears(x, [self._matrix(x.dtype)])[0]

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """See FrozenLinear."""
        return ops.dense_linears(dy, [self._matrix(dy.dtype).T])[0]

    def multiply_add_(self, y: Tensor, x: Tensor) -> None:
        """See FrozenLinear."""
        y.addmm_(x, self._matrix(x.dtype).T)
        if self.bias is not None:
            y.add_(self.bias)

    def multiply_transposed_add_(self, dx: Tensor, dy: Tensor) -> None:
        """See FrozenLinear."""
        dx.addmm_(dy, self._matrix(dy.dtype))

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """See FrozenLinear."""
        return self._matrix(dtype).detach()

    @property
    def precision(self) -> str:
        """See FrozenLinear."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def stored_bytes(self) -> int:
        """See FrozenLinear."""
        return self.weight.nbytes


class QuantLinear(FrozenLinear):
    """A quantised weight. Its tensors are frozen Parameters, so that they move with the model; no cast touches them.

    Where blocks do not straddle rows, codes are [N, K · bits/8] and scales [N, K/block] (rows can be sharded), else
    flat.
    """

    packed: nn.Parameter
    scales: nn.Parameter

    def __init__(self, quantized: ops.QuantTensor, bias: nn.Parameter | None) -> None:
        rows, columns = quantized.shape
        super().__init__(columns, rows, bias)
        self.format: Format = quantized.format
        by_row = columns % self.format.block_size == 0
        self.packed = _frozen(quantized.packed.view(rows, -1) if by_row else quantized.packed)
        self.scales = _frozen(quantized.scales.view(rows, -1) if by_row else quantized.scales)
        nested_scales, nested_offset = quantized.nested_scales, quantized.nested_offset
        self.nested_scales = None if nested_scales is None else _frozen(nested_scales)
        self.nested_offset = None if nested_offset is None else _frozen(nested_offset)

    @classmethod
    def from_dense(cls, linear: Any, weight: Tensor, fmt: Format, name: str) -> QuantLinear:
        """In place of `linear`, `weight` (of its shape) quantised; `name` is what an error calls it."""
        transposed = isinstance(linear, Conv1D)
        layer = cls(ops.quantize(weight.T.contiguous() if transposed else weight, fmt, name=name), linear.bias)
        layer.fan_in_fan_out = transposed
        return layer

    @property
    def takes_rows(self) -> bool:
        """See FrozenLinear: in NF4, whose ops have such products."""
        return self.format.kind == "nf4"

    @property
    def quantized(self) -> ops.QuantTensor:
        """The weight as the ops take it (a view, nothing is copied)."""
        kept: ops.QuantTensor | None = self.__dict__.get("_quantized")
        packed: Any = self._parameters["packed"]  # self.packed takes ten times as long
        if kept is None or kept.packed is not packed:
            shape = (self.out_features, self.in_features)
            kept = ops.QuantTensor(packed, self.scales, self.nested_scales, self.nested_offset, shape, self.format)
            self.__dict__["_quantized"] = kept
        return kept

    def forward(self, x: Tensor) -> Tensor:
        """Differentiable in x."""
        y = ops.linear(x, self.quantized)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """See FrozenLinear."""
        y = ops.linear(x, self.quantized)
        return y if self.bias is None else y.add_(self.bias)

    def multiply_transposed(self, dy: Tensor) -> Tensor:
        """See FrozenLinear."""
        return ops.linear_transposed(dy, self.quantized)

    def multiply_add_(self, y: Tensor, x: Tensor) -> None:
        """See FrozenLinear."""
        if self.takes_rows:
            ops.linear_add_(y, x, self.quantized)
        else:
            y.add_(ops.linear(x, self.quantized))
        if self.bias is not None:
            y.add_(self.bias)

    def multiply_transposed_add_(self, dx: Tensor, dy: Tensor) -> None:
        """See FrozenLinear."""
        if self.takes_rows:
            ops.linear_transposed_add_(dx, dy, self.quantized)
        else:
            dx.add_(ops.linear_transposed(dy, self.quantized))

    def multiply_with(self, x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
        """See FrozenLinear."""
        if not self.takes_rows:
            return super().multiply_with(x, extra)
        both = ops.linear_with(x, extra, self.quantized)
        y, h = both.split([self.out_features, extra.shape[0]], dim=-1)
        return y if self.bias is None else y.add_(self.bias), h

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


def bits_per_weight(model: Any) -> tuple[float, float]:
    """Stored bits per weight, scales included: of the layers that may be quantised, and of the whole model.

    The first counts every linear layer but the head, also those that are kept in 16 bit; embeddings, head, norms and
    biases count in the second alone, tied ones once.
    """
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if m is not head and (isinstance(m, QuantLinear) or is_linear(m))]
    quantised = [m for m in linear if isinstance(m, QuantLinear)]
    dense = [m.weight for m in linear if not isinstance(m, QuantLinear)]
    size = sum(m.stored_bytes for m in quantised)
    count = sum(m.in_features * m.out_features for m in quantised)
    hidden = {id(p) for m in quantised for name, p in m.named_parameters() if name != "bias"}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    whole = 8 * (size + sum(p.nbytes for p in rest)) / (count + sum(p.numel() for p in rest))
    linears = 8 * (size + sum(w.nbytes for w in dense)) / (count + sum(w.numel() for w in dense))
    return linears, whole
