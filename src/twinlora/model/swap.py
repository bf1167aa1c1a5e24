"""Which blocks of a model are replaced by ours, and the numeric probe that admits each kind.

A candidate is found by its parts, never by its model's name. It is admitted if, on random input, its output and its
input gradient are the stock block's within a few units in the last place of the model's type.
Nothing outside of the model's instances is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinlora.model.blocks import RMSNorm, SwiGLU

__all__ = ["replace_blocks"]

_ROWS = 5
_GATED = ("gate_proj", "up_proj", "down_proj")


def _candidates(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """Input width and replacement, for each that `module` might be equal to."""
    if isinstance(module, (RMSNorm, SwiGLU)):
        return
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        yield weight.numel(), RMSNorm(weight, eps)
        yield weight.numel(), RMSNorm(weight, eps, offset=1.0, wide=True)
    parts = dict(module.named_children())
    if {*_GATED} <= set(parts) <= {*_GATED, "act_fn"}:
        gate: Any = parts["gate_proj"]
        yield int(getattr(gate, "base", gate).in_features), SwiGLU(*(parts[name] for name in _GATED))


def _run(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = module(x)
        (dx,) = torch.autograd.grad(y, x, dy.to(y.dtype))
    return y.detach().float(), dx.float()


def _admitted(stock: nn.Module, ours: nn.Module, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(_ROWS, width, generator=generator).to(device, dtype) for _ in range(2))
    # Both round to `dtype`: they may differ by a few units in its last place, relative to the whole output.
    bound = 4 * torch.finfo(dtype).eps
    pairs = zip(_run(ours, x, dy), _run(stock, x, dy), strict=True)
    return all(a.shape == b.shape and bool((a - b).norm() <= bound * b.norm()) for a, b in pairs)


def replace_blocks(model: PreTrainedModel, note: Callable[[str], None] | None = None) -> dict[str, int]:
    """Replace what the probe admits, in place; returns how many instances of each kind, `Stock → Ours`.

    `note` gets a line for each kind of stock block whose candidates were declined.
    """
    embedding = model.get_input_embeddings().weight
    replaced: dict[str, int] = {}
    declined: set[str] = set()
    for name, module in list(model.named_modules()):
        candidates = list(_candidates(module))
        for width, candidate in candidates:
            if _admitted(module, candidate, width, embedding.device, embedding.dtype):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, candidate.train(module.training))
                kind = f"{type(module).__name__} → {type(candidate).__name__}"
                replaced[kind] = replaced.get(kind, 0) + 1
                break
        else:
            if candidates:
                declined.add(type(module).__name__)
    if note is not None:
        for kind in sorted(declined):
            note(f"{kind}: stock block kept, the probe declined ours")
    return replaced
