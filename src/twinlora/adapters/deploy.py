"""Training what will be deployed: layers multiply by Q(W + s·B·A), the merged weight as a low-bit format stores it.

The gradient goes straight through the rounding Q: A and B get what they would get without it. After training the
exported weights are, to the bit, those that the last forward pass used; `digests` proves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twinlora.adapters.lora import LoraLinear, lora_layers
from twinlora.adapters.merge import folded
from twinlora.model.linear import is_linear
from twinlora.model.quantizer import quantizable
from twinlora.numerics import ggml, ops
from twinlora.numerics.formats import Format, parse

__all__ = ["Storage", "Stored", "deploy", "digests", "storage_named"]


@dataclass(frozen=True)
class Stored:
    """A weight [out, in] in a low-bit format."""

    tensors: list[Tensor]
    dequantize: Callable[[torch.dtype], Tensor]

    def digest(self) -> str:
        """16 hex digits of the SHA-256 of what is stored."""
        sha = hashlib.sha256()
        for tensor in self.tensors:
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Storage:
    """A format by its name in passports: q4_0, q8_0, or NF4's such as nf4-64-dq256."""

    name: str

    @property
    def nf4(self) -> Format | None:
        """The NF4 format, if it is one."""
        return parse(self.name) if self.name.startswith("nf4-") else None

    def store(self, weight: Tensor, name: str = "weight") -> Stored:
        """Float32 `weight` [out, in] as it will be deployed. Raises ModelError if it cannot be."""
        fmt = self.nf4
        if fmt is not None:
            quantized = ops.quantize(weight, fmt, name=name)
            return Stored(quantized.tensors, quantized.dequantize)
        block: Any = self.name
        data = ggml.quantize(weight, block, name=name)
        return Stored([data], lambda dtype: ggml.dequantize(data, block, dtype))


def storage_named(option: str, fmt: Format) -> Storage:
    """The format of `--deploy`: nf4 with the sizes of `fmt`, q4_0 or q8_0."""
    return Storage(fmt.name if option == "nf4" else option)


class _Deployed(torch.autograd.Function):
    """x [..., in] -> x @ Q(W + s·B·A).T; the gradients of A and B as if Q were not there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DeployedLora, a: Tensor, b: Tensor) -> Tensor:
        ctx.layer, ctx.stored = layer, layer.stored()
        ctx.save_for_backward(x, a, b)
        weight: Tensor = ctx.stored.dequantize(x.dtype)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        weight = ctx.stored.dequantize(x.dtype)  # not kept since the forward pass: that would be a whole 16-bit model
        ctx.layer.forget()
        dy, flat = grads[0].reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        narrow_a, narrow_b = a.to(x.dtype), b.to(x.dtype)
        db = (dy.T @ (flat @ narrow_a.T)).float().mul_(ctx.layer.scale)
        da = ((dy @ narrow_b).mul_(ctx.layer.scale).T @ flat).float()
        dx = (dy @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, da, db


class DeployedLora(LoraLinear):
    """A LoraLinear whose forward pass is the merged weight in `storage`. Made of one by `deploy`."""

    storage: Storage
    name: str

    def stored(self) -> Stored:
        """The merged weight as it will be deployed; made anew when A or B changed, or may have since a backward pass
        (fused optimisers change parameters without counting it)."""
        key = (self.lora_A._version, self.lora_B._version)
        kept: tuple[Any, Stored] | None = self.__dict__.get("_stored")
        if kept is None or kept[0] != key:
            with torch.no_grad():
                weight = folded(self.base.dense_weight(torch.float32), *self.factors(), self.scale)
                kept = self.__dict__["_stored"] = key, self.storage.store(weight, self.name)
        return kept[1]

    def forget(self) -> None:
        """Let the stored weight be made anew."""
        self.__dict__.pop("_stored", None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out: Tensor = _Deployed.apply(x, self, *self.factors())
        return out if self.base.bias is None else out + self.base.bias.to(out.dtype)

    @staticmethod
    def together(x: Tensor, layers: Any) -> tuple[Tensor, ...]:
        """What each layer makes of the same x."""
        return tuple(layer(x) for layer in layers)


@torch.no_grad()
def deploy(model: Any, storage: Storage) -> None:
    """Let every linear layer but the head compute with weights in `storage`; embedding and head in Q8_0 where that is
    how GGUF files of this format keep them. Raises ModelError for a layer that the format cannot hold."""
    names = set(quantizable(model))
    for name, layer in lora_layers(model).items():
        layer.__class__ = DeployedLora  # the parameters are the same, also for whoever holds them
        assert isinstance(layer, DeployedLora)
        layer.storage, layer.name = storage, name
        layer.stored()
    for name in sorted(names):
        module = model.get_submodule(name)
        if is_linear(module):
            module.weight.copy_(storage.store(module.weight.float(), name).dequantize(module.weight.dtype))
    if storage.nf4 is None:
        ends: dict[int, nn.Parameter] = {}
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            ends[id(part.weight)] = part.weight
        for weight in ends.values():  # one, where they are tied
            weight.copy_(Storage("q8_0").store(weight.float(), "embedding").dequantize(weight.dtype))


def digests(model: nn.Module) -> dict[str, str]:
    """What each deployed layer's weight is, by name."""
    return {n: layer.stored().digest() for n, layer in lora_layers(model).items() if isinstance(layer, DeployedLora)}
