"""LoRA (arXiv 2106.09685): y = base(x) + scale · B A x; A [r, in] and B [out, r] are trained, the base frozen.

QLoRA is this class over a QuantLinear. A and B are float32 masters; products run in x's type. Two variants live in the
same layer: DoRA (arXiv 2402.09353) has a trained length for each row of the updated weight, PiSSA (arXiv 2404.02948)
a frozen pair of factors that is subtracted.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinlora.adapters.targets import LayerConfig, LoraConfig, resolve_modules, resolve_targets
from twinlora.errors import AdapterError
from twinlora.model.linear import FrozenLinear, QuantLinear, as_frozen, multiply_each
from twinlora.numerics import ops

__all__ = ["LoraLinear", "attach", "lora_layers", "trainable_parameters", "whole_modules", "wrap"]


class _Lora(torch.autograd.Function):
    """Layers that share an input: x [..., in], z (x after dropout, or None for x itself), A and B of each layer
    -> base(x) + scale · z Aᵀ Bᵀ [..., out] of each.

    One product for all A, and one for all of their gradients. A and B are rounded to x's type once a call; the base is
    multiplied again, not stored, for the input gradient. Where a product can be added to what is there at no cost, the
    adapter rides in the base's products (`_ride`, `_input_gradient`).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, layers: Sequence[LoraLinear], *ab: Tensor) -> tuple[Tensor, ...]:
        ctx.same = z is None
        a = torch.cat(ab[: len(layers)]).to(x.dtype)
        bs = [b.to(x.dtype) for b in ab[len(layers) :]]
        if ops.adds_products(x.device):
            ys, h = _ride(x, z, layers, a, bs)
            z = x if z is None else z
        else:
            z = x if z is None else z
            h = z.reshape(-1, z.shape[-1]) @ a.T
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
        dh, dbs = _adapter_gradients(ctx.layers, dys, h, bs)
        dx = _input_gradient(ctx.layers, dys, (dh, a) if ctx.same else None) if ctx.needs_input_grad[0] else None
        das = (dh.T @ z.reshape(-1, z.shape[-1])).float().split([b.shape[1] for b in bs])
        dz = (dh @ a).view(ctx.x_shape) if not ctx.same and ctx.needs_input_grad[1] else None
        return None if dx is None else dx.view(ctx.x_shape), dz, None, *das, *dbs


def _adapter_gradients(
    layers: Sequence[LoraLinear], dys: list[Tensor], h: Tensor, bs: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of h [T, R], in its type, and of each B, float32."""
    rides, ranks = ops.adds_products(h.device), [b.shape[1] for b in bs]
    dh, dbs = torch.empty_like(h), []
    for layer, dy, b, part, dpart in zip(layers, dys, bs, h.split(ranks, 1), dh.split(ranks, 1), strict=True):
        if rides:
            dpart.addmm_(dy, b, beta=0, alpha=layer.scale)
            dbs.append(torch.empty_like(b).addmm_(dy.T, part, beta=0, alpha=layer.scale).float())
        else:
            dpart.copy_(torch.mul(dy @ b, layer.scale))
            dbs.append((dy.T @ part).float().mul_(layer.scale))
    return dh, dbs


def _input_gradient(layers: Sequence[LoraLinear], dys: list[Tensor], through_a: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient of x [T, in]; `through_a` is dh and A where A multiplies x itself."""
    bases, rides = [layer.base for layer in layers], ops.adds_products(dys[0].device)
    if rides and through_a is not None:
        dx = torch.mm(*through_a)
        for base, dy in zip(bases, dys, strict=True):
            base.multiply_transposed_add_(dx, dy)
        return dx
    dx = bases[0].multiply_transposed(dys[0])
    for base, dy in zip(bases[1:], dys[1:], strict=True):
        if rides:
            base.multiply_transposed_add_(dx, dy)
        else:
            dx += base.multiply_transposed(dy)
    return dx if through_a is None else dx.addmm_(*through_a)


def _ride(
    x: Tensor, z: Tensor | None, layers: Sequence[LoraLinear], a: Tensor, bs: list[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What `_Lora` returns, and h = z Aᵀ [T, R], with the least reading and writing of x and y.

    h comes out of the first base's product, A's rows behind W's, where the base can do that and its outputs are no
    more than its inputs: reading x again would cost more than B's part added to y afterwards. (That y has gaps of R
    between its rows.) All other y begin as the adapter's part, and the base's product is added as it is written.
    """
    flat, first = x.reshape(-1, x.shape[-1]), layers[0].base
    ranks, ys = [b.shape[1] for b in bs], []
    if z is None and first.takes_rows and first.out_features <= first.in_features:
        y, h = first.multiply_with(flat, a)
        h = h.contiguous()  # a view would keep all of y until the backward pass
        ys.append(y.addmm_(h[:, : ranks[0]], bs[0].T, alpha=layers[0].scale))
    else:
        h = (flat if z is None else z.reshape(flat.shape)) @ a.T
    for layer, b, part in list(zip(layers, bs, h.split(ranks, dim=1), strict=True))[len(ys) :]:
        y = part.new_empty(part.shape[0], b.shape[0]).addmm_(part, b.T, beta=0, alpha=layer.scale)
        layer.base.multiply_add_(y, flat)
        ys.append(y)
    return tuple(y.view(*x.shape[:-1], -1) for y in ys), h


def _as_autocast(x: Tensor) -> Tensor:
    """x in the type in which autocast wants products, where a trainer of others has switched it on."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class LoraLinear(nn.Module):
    """A frozen base layer and its trained low-rank update."""

    def __init__(self, base: FrozenLinear, config: LayerConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout, self.enabled = config.scale, config.dropout, True
        device = next(base.parameters()).device
        # Kaiming-uniform with a = √5 as in peft: bound 1 / √in. Drawn on the CPU: the same on every device.
        bound = 1 / math.sqrt(base.in_features)
        a = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        # PiSSA: where training started; what has been learnt is the difference.
        self.start_A: nn.Parameter | None = None
        self.start_B: nn.Parameter | None = None
        # DoRA: the length of each row of the updated weight, [out].
        self.magnitude = nn.Parameter(self._base_norms().sqrt()) if config.dora else None

    @property
    def rank(self) -> int:
        """r, the rows of A that train."""
        return self.lora_A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] of the whole update, as a plain LoRA has them; r is twice the rank with PiSSA."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        if not self.enabled:
            out: Tensor = self.base(x)
            return out
        x, kind = _as_autocast(x), x.device.type
        with torch.autocast(kind, enabled=False):
            z = F.dropout(x, self.dropout) if self.training and self.dropout else None
            result: tuple[Tensor] = _Lora.apply(x, z, (self,), *self.factors())
            return self._with_magnitude(result[0])

    @staticmethod
    def together(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
        """What each layer makes of the same x [..., in]; see `model.linear.project`."""
        if any(not layer.enabled or (layer.training and layer.dropout) for layer in layers):
            return tuple(layer(x) for layer in layers)
        a, b = zip(*(layer.factors() for layer in layers), strict=True)
        x, kind = _as_autocast(x), x.device.type
        with torch.autocast(kind, enabled=False):
            results: tuple[Tensor, ...] = _Lora.apply(x, None, tuple(layers), *a, *b)
            return tuple(layer._with_magnitude(y) for layer, y in zip(layers, results, strict=True))

    def update(self) -> Tensor:
        """What is added to the base's weight, float32 [out, in]."""
        a, b = self.factors()
        added = self.scale * (b @ a)
        if self.magnitude is None:
            return added
        dense = self.base.dense_weight(torch.float32)
        return self.gain(torch.float32)[:, None] * (dense + added) - dense

    def _base_norms(self) -> Tensor:
        """Squared length of each row of the base's weight, float32 [out]; computed once."""
        kept: Tensor | None = self.__dict__.get("_norms")
        if kept is None:
            kept = self.__dict__["_norms"] = self.base.dense_weight(torch.float32).square().sum(1)
        return kept

    @torch.no_grad()
    def _row_norms(self, dtype: torch.dtype) -> Tensor:
        """Length of each row of the updated weight, float32 [out]: |W + sBA|², without making it.

        = |W|² + 2 s (W Aᵀ)·B + s² (B A Aᵀ)·B. The paper treats it as a constant in the backward pass.
        """
        a, b = self.factors()
        projected = self.base.multiply(a.to(dtype)).float()  # (W Aᵀ)ᵀ, [r, out]
        if self.base.bias is not None:
            projected -= self.base.bias
        crossed = 2 * self.scale * (projected.T * b).sum(1)
        squared = self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
        return (self._base_norms() + crossed + squared).clamp_(min=1e-12).sqrt_()

    def gain(self, dtype: torch.dtype) -> Tensor:
        """What DoRA multiplies each row of the product by, float32 [out]."""
        assert self.magnitude is not None
        return self.magnitude / self._row_norms(dtype)

    def _with_magnitude(self, y: Tensor) -> Tensor:
        if self.magnitude is None:
            return y
        gain, bias = self.gain(y.dtype).to(y.dtype), self.base.bias
        return y * gain if bias is None else (y - bias) * gain + bias

    def extra_repr(self) -> str:
        """Rank and scale, as printed by `print(model)`."""
        kind = ", dora" if self.magnitude is not None else ", pissa" if self.start_A is not None else ""
        return f"rank={self.rank}, scale={self.scale:g}{kind}"


def attach(
    model: nn.Module,
    config: LoraConfig,
    *,
    seed: int = 0,
    per_layer: Mapping[str, LayerConfig] | None = None,
    initial: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> list[str]:
    """Freeze `model`, put a LoraLinear over every target, make copies of `modules_to_save` train; returns the targets.

    `per_layer` gives the layers and their configurations itself; `initial` the A and B to start from.
    The initial A depends on `seed`, the layers' order and shapes alone, so that every base precision starts equal.
    Raises AdapterError if a target matches nothing or the model already has adapters.
    """
    if lora_layers(model):
        raise AdapterError("the model already has adapters: load it afresh")
    names = resolve_targets(model, config) if per_layer is None else list(per_layer)
    whole = resolve_modules(model, config)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = wrap(model, name, per_layer[name] if per_layer else config.layer(name), generator)
        if initial is not None and name in initial:  # a layer that stays in 16 bit lost nothing
            with torch.no_grad():
                layer.lora_A.copy_(initial[name][0])
                layer.lora_B.copy_(initial[name][1])
    for name in whole:
        _train_whole(model, name)
    return names


def wrap(model: nn.Module, name: str, config: LayerConfig, generator: torch.Generator | None = None) -> LoraLinear:
    """Put a fresh LoraLinear over the linear layer `name`."""
    parent, _, child = name.rpartition(".")
    layer = LoraLinear(as_frozen(model.get_submodule(name)), config, generator)
    setattr(model.get_submodule(parent), child, layer)
    return layer


def _train_whole(model: nn.Module, name: str) -> None:
    """A trained copy in place of the module: what was tied to it stays as it was, as in PEFT."""
    module = model.get_submodule(name)
    if isinstance(module, QuantLinear):
        raise AdapterError(f"modules_to_save {name}: its weight is quantised and cannot train; use --method lora")
    trained = copy.deepcopy(module).requires_grad_(True)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, trained)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every LoraLinear by the name of the layer it stands for."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}


def whole_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that train as a whole beside the adapters, by name."""
    owners = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    layers = lora_layers(model)
    return {name: model.get_submodule(name) for name in sorted(owners) if name not in layers}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in a fixed order; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
