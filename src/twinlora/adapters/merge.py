"""An adapter folded into its base: W + s·B·A, or DoRA's rows of given length, a tensor at a time.

The base may be its own 16-bit weights, or those that were trained on: quantised, all
alike or layer by layer, and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinlora.adapters.read import AdapterFile, base_problem
from twinlora.errors import AdapterError
from twinlora.model.checkpoint import Checkpoint
from twinlora.numerics import ops
from twinlora.numerics.formats import Format, Precision, by_layer
from twinlora.numerics.ops import QuantTensor

__all__ = ["Merged", "folded"]


def folded(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """Float32 weight [out, in], A [r, in], B [out, r] -> the updated weight; `magnitude` [out] is DoRA's."""
    updated = torch.addmm(weight, b, a, alpha=scale)
    if magnitude is None:
        return updated
    gain: Tensor = magnitude / torch.linalg.vector_norm(updated, dim=1).clamp_(min=1e-6)
    return updated * gain[:, None]


class Merged:
    """The tensors of a base with an adapter folded in, each made when it is asked for.

    With `quantized` the base is Q(W) in its formats, else W; `rounded`: W is first rounded to that type, as a run
    loads it. Without an adapter they are the base's own. Raises AdapterError that lists every part of the adapter that
    the base lacks, has in another shape, or with another weight than the adapter brings of its base.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: AdapterFile | None,
        quantized: Precision | None = None,
        rounded: torch.dtype | None = None,
    ) -> None:
        self.base, self._rounded = base, rounded
        self._formats = by_layer(quantized, base.quantizable)
        self._layers = {f"{name}.weight": name for name in adapter.tensors} if adapter else {}
        self._adapter = adapter
        modules = adapter.modules if adapter else {}
        self._whole = {f"{name}.{key}": tensor for name, parts in modules.items() for key, tensor in parts.items()}
        self.names = list(base.names)
        ends = [f"{base.embedding}.weight", f"{base.head}.weight"]
        self._retied: str | None = None
        changed = self._whole.keys() | self._layers.keys()
        self.tied = base.tied and not any(end in changed for end in ends)
        if base.tied and not self.tied:  # one of them changed; the other stays as it was
            self.names.append(ends[1])
            self._retied = ends[1]
        if adapter:
            self._require_fit(adapter)

    def _require_fit(self, adapter: AdapterFile) -> None:
        problems = []
        for name, layer in self._layers.items():
            a, b = adapter.tensors[layer]
            expected = (b.shape[0], a.shape[1])
            if name not in self.names or layer not in self.base.linears:
                problems.append(f"{layer}: the model has no such linear layer")
            elif (found := self._rows_by_columns(layer)) != expected:
                problems.append(f"{layer}: adapter is for {list(expected)}, the model has {list(found)}")
        for name, tensor in self._whole.items():
            if name not in self.names:
                problems.append(f"{name}: the model has no such parameter")
            elif name != self._retied and self.base.shape(name) != tuple(tensor.shape):
                problems.append(f"{name}: adapter has {list(tensor.shape)}, the model {list(self.base.shape(name))}")
        for name, saved in adapter.bases.items():
            if name not in self.names:
                problems.append(f"{name}: the model has no such parameter")
            elif problem := base_problem(name, saved, self._from_base(name)):
                problems.append(problem)
        if problems:
            shown = "\n  ".join(problems[:20])
            raise AdapterError(f"adapter {adapter.directory}: {len(problems)} part(s) do not fit this model\n  {shown}")

    def _rows_by_columns(self, layer: str) -> tuple[int, ...]:
        shape = self._base_shape(f"{layer}.weight")
        return shape[::-1] if layer in self.base.transposed else shape

    def read(self, name: str) -> Tensor:
        """The parameter: float32 where it changed, else as it is stored."""
        if name in self._whole:
            return self._whole[name]
        layer = name.removesuffix(".weight")
        if name not in self._layers and layer not in self._formats:
            return self._from_base(name)
        weight = self.read_rows(name)
        return weight.T.contiguous() if layer in self.base.transposed else weight

    def read_rows(self, name: str) -> Tensor:
        """The weight of a linear layer as [out, in], float32."""
        layer = name.removesuffix(".weight")
        weight = self._base_weight(name, layer, layer in self.base.transposed)
        if name in self._layers:
            assert self._adapter is not None
            a, b = (t.float() for t in self._adapter.tensors[layer])
            magnitude = self._adapter.magnitudes.get(layer)
            weight = folded(weight, a, b, self._adapter.configs[layer].scale, magnitude)
        return weight

    def _from_base(self, name: str) -> Tensor:
        weight = self.base.read(self._name_there(name))
        return weight if self._rounded is None or not weight.is_floating_point() else weight.to(self._rounded)

    def _base_weight(self, name: str, layer: str, transposed: bool) -> Tensor:
        """[out, in], float32."""
        if layer not in self._formats:
            weight = self._from_base(name).float()
            return weight.T if transposed else weight
        return self._trained_on(name, self._formats[layer], transposed).dequantize(torch.float32)

    def _trained_on(self, name: str, fmt: Format, transposed: bool) -> QuantTensor:
        stored = self.base.stored(name)
        if stored is not None:
            return stored
        weight = self._from_base(name)
        return ops.quantize(weight.T.contiguous() if transposed else weight, fmt, name=name)

    def nf4(self, name: str, fmt: Format) -> QuantTensor:
        """A linear layer's weight in 4 bits; where it did not change, the codes of the base that was trained on."""
        trained = self._formats.get(name.removesuffix(".weight"), fmt)
        if name not in self._layers and name not in self._whole and trained == fmt:
            kept = self._trained_on(name, fmt, transposed=False)
            if kept.format == fmt:
                return kept
        return ops.quantize(self.read(name), fmt, name=name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self._whole[name].shape) if name in self._whole else self._base_shape(name)

    def _base_shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._name_there(name))

    def _name_there(self, name: str) -> str:
        """What the base calls a parameter: a head that is no longer tied was its embedding."""
        return f"{self.base.embedding}.weight" if name == self._retied else name

    def low_bit(self, name: str) -> bool:
        """Whether it is the weight of a linear layer that 4-bit formats are for: any but the head's."""
        return name.endswith(".weight") and name.removesuffix(".weight") in self.base.quantizable
