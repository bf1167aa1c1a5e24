"""Which blocks of a model are replaced by ours, and the numeric probe that admits each kind.

A candidate is found by its parts, never by its model's name. It is admitted if, on random input, its output and its
input gradient are the stock block's within a few units in the last place of the model's type.
Nothing outside of the model's instances is touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from twinlora.model.attention import NAME, NO_MASK_SHAPE, Layout
from twinlora.model.blocks import Attention, RMSNorm, SwiGLU
from twinlora.model.linear import DenseLinear, is_linear

__all__ = ["Admit", "Candidate", "probed", "replace_blocks"]

_ROWS, _WIDTH = 5, 32  # of a probe's input; a block with weights of its own takes what they take
_GATED = ("gate_proj", "up_proj", "down_proj")
_HEADS = {"q_proj", "k_proj", "v_proj", "o_proj"}


@dataclass(frozen=True)
class Candidate:
    """What might stand for a stock block, and how both act on an input [rows, width] of type `dtype`."""

    block: nn.Module
    width: int
    dtype: torch.dtype
    ours: Callable[[Tensor], Tensor]
    stock: Callable[[Tensor], Tensor]


def _candidates(module: nn.Module, rotary: nn.Module | None, dtype: torch.dtype) -> Iterator[Candidate]:
    """Replacements, for each kind that `module` might be equal to. `dtype` is the model's."""
    if isinstance(module, (Attention, RMSNorm, SwiGLU)):
        return
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if is_linear(module) and isinstance(weight, nn.Parameter) and not weight.requires_grad:
        dense = DenseLinear(module)
        yield Candidate(dense, dense.in_features, dtype, dense, module)
    parts: dict[str, Any] = dict(module.named_children())
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and isinstance(eps, float):
        for norm in (RMSNorm(weight, eps), RMSNorm(weight, eps, offset=1.0, wide=True)):
            yield Candidate(norm, weight.numel(), dtype, norm, module)
    if {*_GATED} <= set(parts) <= {*_GATED, "act_fn"}:
        gated = SwiGLU(*(parts[name] for name in _GATED))
        yield Candidate(gated, _base(parts["gate_proj"]).in_features, dtype, gated, module)
    if _HEADS <= set(parts) <= {*_HEADS, "q_norm", "k_norm"} and rotary is not None:
        yield from _attention_candidate(module, rotary)


def _base(layer: Any) -> Any:
    return getattr(layer, "base", layer)


def _attention_candidate(stock: nn.Module, rotary: nn.Module) -> Iterator[Candidate]:
    """Both are probed in float32 over random projections: on trained ones, 16-bit rounding is as large as an error.

    The stock block runs once before, to show which scale and window it gives to its attention.
    """
    if getattr(getattr(stock, "config", None), "_attn_implementation", None) != NAME:
        return  # the model does not attend by our function
    device = next(stock.parameters()).device
    layout, mask = Layout([_ROWS - 2, 2], device), torch.empty(NO_MASK_SHAPE, device=device)
    twin = copy.copy(stock)
    generator = torch.Generator().manual_seed(0)
    twin._modules = {name: _float32(name, child, generator, device) for name, child in stock.named_children()}

    def call(block: nn.Module, x: Tensor) -> Tensor:
        rotation = rotary(x[None], layout.positions())
        out: Tensor = block(x[None], position_embeddings=rotation, attention_mask=mask, layout=layout)[0][0]
        return out

    x = torch.zeros(_ROWS, _WIDTH, device=device)
    try:
        rotated = rotary(x[None], layout.positions())[0].shape[-1]
        call(twin, x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return  # called otherwise: a kind of block that ours does not stand for
    # Nothing is seen if the block calls no function of transformers' registry.
    if layout.seen and rotated == getattr(stock, "head_dim", None):
        ours = Attention(twin, **layout.seen)
        block = Attention(stock, **layout.seen)
        yield Candidate(block, _WIDTH, torch.float32, lambda x: call(ours, x), lambda x: call(twin, x))


def _float32(name: str, child: nn.Module, generator: torch.Generator, device: torch.device) -> nn.Module:
    """A copied norm; or a random projection with `child`'s heads and a small hidden size, which neither block reads."""
    if name not in _HEADS:
        norm = copy.copy(child)
        norm._parameters = {
            key: p if p is None else nn.Parameter(p.detach().float()) for key, p in child._parameters.items()
        }
        return norm
    out, width = (_WIDTH, _base(child).in_features) if name == "o_proj" else (_base(child).out_features, _WIDTH)
    linear = nn.Linear(width, out, bias=False)
    weight = torch.empty(out, width).normal_(std=width**-0.5, generator=generator)
    linear.weight = nn.Parameter(weight.to(device))
    return linear


def _run(block: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        y = block(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach().float(), dx.float()


Admit = Callable[[nn.Module, int, Candidate], bool]  # stock block, number among its candidates, candidate


def probed(stock: nn.Module, number: int, candidate: Candidate) -> bool:
    """Whether output and input gradient of the candidate are the stock block's."""
    device = next(stock.parameters()).device
    x = torch.randn(_ROWS, candidate.width, generator=torch.Generator().manual_seed(0)).to(device, candidate.dtype)
    # Both round to `dtype`: they may differ by a few units in its last place, relative to the whole output.
    bound = max(4 * torch.finfo(candidate.dtype).eps, 1e-5)
    pairs = zip(_run(candidate.ours, x), _run(candidate.stock, x), strict=True)
    return all(a.shape == b.shape and bool((a - b).norm() <= bound * b.norm()) for a, b in pairs)


def replace_blocks(
    model: PreTrainedModel, note: Callable[[str], None] | None = None, admit: Admit = probed
) -> dict[str, int]:
    """Replace what `admit` (the probe) admits, in place; returns how many instances of each kind, `Stock → Ours`.

    `note` gets a line for each kind of stock block whose candidates were declined.
    """
    embedding = model.get_input_embeddings().weight
    rotary = getattr(model.base_model, "rotary_emb", None)
    replaced: dict[str, int] = {}
    declined: set[str] = set()
    for name, module in list(model.named_modules()):
        candidates = list(_candidates(module, rotary, embedding.dtype))
        for number, candidate in enumerate(candidates):
            if admit(module, number, candidate):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, candidate.block.train(module.training))
                kind = f"{type(module).__name__} → {type(candidate.block).__name__}"
                replaced[kind] = replaced.get(kind, 0) + 1
                break
        else:
            if candidates:
                declined.add(type(module).__name__)
    if note is not None:
        for kind in sorted(declined):
            note(f"{kind}: stock block kept, the probe declined ours")
    return replaced
