"""LoRA (arXiv 2106.09685): y = base(x) + (alpha / r) · B A x; A [r, in] and B [out, r] are trained, the base frozen.

QLoRA is this class over a QuantLinear. A and B are float32 masters; products run in x's type.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinlora.errors import AdapterError
from twinlora.model.linear import DenseLinear, FrozenLinear, multiply_each

__all__ = [
    "ALL_LINEAR",
    "LoraConfig",
    "LoraLinear",
    "attach",
    "lora_layers",
    "resolve_targets",
    "trainable_parameters",
    "wrap",
]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and place of an adapter."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: tuple[str, ...] = (ALL_LINEAR,)

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank


class _Lora(torch.autograd.Function):
    """Layers that share an input: x [..., in], z (x after dropout, or None for x itself), A and B of each layer
    -> base(x) + scale · z Aᵀ Bᵀ [..., out] of each.

    One product for all A, and one for all of their gradients. A and B are rounded to x's type once a call; the base is
    multiplied again, not stored, for the input gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, layers: Sequence[LoraLinear], *ab: Tensor) -> tuple[Tensor, ...]:
        ctx.same = z is None
        z = x if z is None else z
        a = torch.cat(ab[: len(layers)]).to(x.dtype)
        h = z.reshape(-1, z.shape[-1]) @ a.T
        bs = [b.to(x.dtype) for b in ab[len(layers) :]]
        ys = multiply_each(x, [layer.base for layer in layers])
        for layer, y, b, part in zip(layers, ys, bs, h.split([b.shape[1] for b in bs], dim=1), strict=True):
            y.view(-1, y.shape[-1]).addmm_(part, b.T, alpha=layer.scale)
        ctx.save_for_backward(z, h, a, *bs)
        ctx.layers, ctx.x_shape = layers, x.shape
        return ys

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, h, a, *bs = ctx.saved_tensors
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grads]
        ranks = [b.shape[1] for b in bs]
        dh, dbs = torch.empty_like(h), []
        for layer, dy, b, part, dpart in zip(ctx.layers, dys, bs, h.split(ranks, 1), dh.split(ranks, 1), strict=True):
            dpart.copy_(torch.mul(dy @ b, layer.scale))
            dbs.append((dy.T @ part).float().mul_(layer.scale))
        das = (dh.T @ z.reshape(-1, z.shape[-1])).float().split(ranks)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = ctx.layers[0].base.multiply_transposed(dys[0])
            for layer, dy in zip(ctx.layers[1:], dys[1:], strict=True):
                dx += layer.base.multiply_transposed(dy)
            if ctx.same:
                dx.addmm_(dh, a)
            dx = dx.view(ctx.x_shape)
        if not ctx.same and ctx.needs_input_grad[1]:
            dz = (dh @ a).view(ctx.x_shape)
        return dx, dz, None, *das, *dbs


class LoraLinear(nn.Module):
    """A frozen base layer and its trained low-rank update."""

    def __init__(self, base: FrozenLinear, config: LoraConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout, self.enabled = config.scale, config.dropout, True
        device = next(base.parameters()).device
        # Kaiming-uniform with a = √5 as in peft: bound 1 / √in. Drawn on the CPU: the same on every device.
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    @property
    def rank(self) -> int:
        """r, the rows of A."""
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if not self.enabled:
            out: Tensor = self.base(x)
            return out
        z = F.dropout(x, self.dropout) if self.training and self.dropout else None
        result: tuple[Tensor] = _Lora.apply(x, z, (self,), self.lora_A, self.lora_B)
        return result[0]

    @staticmethod
    def together(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
        """What each layer makes of the same x [..., in]; see `model.linear.project`."""
        if any(not layer.enabled or (layer.training and layer.dropout) for layer in layers):
            return tuple(layer(x) for layer in layers)
        factors = [layer.lora_A for layer in layers] + [layer.lora_B for layer in layers]
        results: tuple[Tensor, ...] = _Lora.apply(x, None, tuple(layers), *factors)
        return results

    def update(self) -> Tensor:
        """scale · B A, float32 [out, in]."""
        return self.scale * (self.lora_B @ self.lora_A)

    def extra_repr(self) -> str:
        """Rank and scale, as printed by `print(model)`."""
        return f"rank={self.rank}, scale={self.scale:g}"


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by name, the output head excluded."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds = (nn.Linear, FrozenLinear)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m is not head}


def resolve_targets(model: nn.Module, target: tuple[str, ...]) -> list[str]:
    """Names of the layers that `target` means: `all-linear`, last name parts (`q_proj`) or whole names.

    Raises AdapterError for an entry that matches nothing, with the nearest names.
    """
    linears = _linears(model)
    chosen: set[str] = set()
    for entry in target:
        if entry == ALL_LINEAR:
            chosen.update(linears)
            continue
        found = [name for name in linears if name == entry or name.endswith("." + entry)]
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            near = difflib.get_close_matches(entry, kinds, n=3) or kinds
            raise AdapterError(
                f"target {entry!r} matches no linear layer; did you mean {', '.join(near)}? (or all-linear)"
            )
        chosen.update(found)
    return [name for name in linears if name in chosen]


def attach(
    model: nn.Module, config: LoraConfig, *, seed: int = 0, per_layer: dict[str, LoraConfig] | None = None
) -> list[str]:
    """Freeze `model`, put a LoraLinear over every target and return their names.

    `per_layer` overrides `config` for the layers it names.

    The initial A depends on `seed`, the layers' order and shapes alone, so that every base precision starts equal.
    Raises AdapterError if a target matches nothing or the model already has adapters.
    """
    if lora_layers(model):
        raise AdapterError("the model already has adapters: load it afresh")
    names = resolve_targets(model, config.target)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        wrap(model, name, (per_layer or {}).get(name, config), generator)
    return names


def wrap(model: nn.Module, name: str, config: LoraConfig, generator: torch.Generator | None = None) -> LoraLinear:
    """Put a fresh LoraLinear over the linear layer `name`."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(name)
    base = DenseLinear(module) if isinstance(module, nn.Linear) else module
    assert isinstance(base, FrozenLinear)
    layer = LoraLinear(base, config, generator)
    setattr(model.get_submodule(parent), child, layer)
    return layer


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoraLinear by the name of the layer it stands for."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
