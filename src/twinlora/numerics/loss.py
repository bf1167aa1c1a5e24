"""Linear cross-entropy: hidden rows against the output head, without ever storing the logits.

The gradient with respect to the hidden rows is computed in the forward pass, chunk by chunk, while the logits of the
chunk are in hand (as in Cut Cross-Entropy, arXiv 2411.09009, and liger-kernel; here in plain PyTorch).

Shape legend: R rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]

_CHUNK_ELEMENTS = 1 << 23  # logits of a chunk: 32 MiB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        step = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], step):
            h, y = hidden[start : start + step], labels[start : start + step, None]
            logits = (h @ weight.T).float()
            top = logits.amax(dim=1, keepdim=True)
            target = logits.gather(1, y)
            p = logits.sub_(top).exp_()
            total = p.sum(dim=1, keepdim=True)
            losses[start : start + step] = (total.log() + top - target).squeeze(1)
            if dhidden is None and dweight is None:
                continue
            p.div_(total)
            p.scatter_add_(1, y, torch.full_like(target, -1.0))
            p16 = p.to(hidden.dtype)
            if dhidden is not None:
                torch.mm(p16, weight, out=dhidden[start : start + step])
            if dweight is not None:
                dweight += p16.T @ h
        ctx.save_for_backward(dhidden)
        ctx.dweight, ctx.weight_dtype = dweight, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * grads[0].to(dhidden.dtype)
        dweight = None if ctx.dweight is None else (ctx.dweight * grads[0]).to(ctx.weight_dtype)
        return dhidden, dweight, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden [R, D] @ weight [V, D].T)[labels [R]], float32 [].

    Products in hidden's type, everything else in float32. Differentiable in `hidden`, and in `weight` if it trains.
    """
    out: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)
    return out
