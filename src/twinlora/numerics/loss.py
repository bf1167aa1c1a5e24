"""Linear cross-entropy: hidden rows against the output head, without ever storing the logits.

The gradient with respect to the hidden rows is computed in the forward pass, chunk by chunk, while the logits of the
chunk are in hand (as in Cut Cross-Entropy, arXiv 2411.09009, and liger-kernel; here in plain PyTorch).

Shape legend: R rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twinlora.numerics import ops  # noqa: F401  (declares the ops)
from twinlora.numerics.target import kind_of

__all__ = ["chunk_rows", "linear_cross_entropy"]

# Logits of a chunk. On a CPU 16 MiB in 16 bit, which stay in its cache; on a GPU 256 MiB: each chunk reads the whole
# head twice, and only some hundred rows are worth that.
_CHUNK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows whose logits are in hand at once, on a device of type `device`."""
    return max(1, _CHUNK_ELEMENTS.get(device, _CHUNK_ELEMENTS["cpu"]) // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        step = chunk_rows(weight.shape[0], kind_of(hidden.device))
        for start in range(0, hidden.shape[0], step):
            h, y = hidden[start : start + step], labels[start : start + step]
            logits = h @ weight.T
            losses[start : start + step] = torch.ops.twinlora.cross_entropy_(logits, y)
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[start : start + step])
            if dweight is not None:
                dweight += logits.T @ h
        ctx.save_for_backward(dhidden)
        ctx.dweight, ctx.weight_dtype = dweight, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dhidden,) = ctx.saved_tensors
        dhidden = None if dhidden is None else dhidden * grads[0].to(dhidden.dtype)
        # The loss, and with it this context, outlives its backward pass: the largest gradient must not.
        dweight, ctx.dweight = ctx.dweight, None
        dweight = None if dweight is None else dweight.mul_(grads[0]).to(ctx.weight_dtype)
        return dhidden, dweight, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(hidden [R, D] @ weight [V, D].T)[labels [R]], float32 [].

    Products and logits in hidden's type, everything else in float32. Differentiable in `hidden`, and in `weight` if it
    trains.
    """
    out: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels)
    return out
