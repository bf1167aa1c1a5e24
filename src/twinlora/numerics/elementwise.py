"""Plain PyTorch for the ops between the products of a transformer block; arithmetic in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cross_entropy_", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward"]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    values = _wide(x)
    rstd = torch.rsqrt(values.square().mean(-1, keepdim=True).add_(eps))
    normal = values * rstd
    if not wide:
        normal = normal.to(x.dtype)
    return (_wide(normal) * (_wide(weight) + offset)).to(x.dtype), rstd.squeeze(-1).float()


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """See ops.py. d/dx of x · rstd(x): rstd · (g - normal · mean(g · normal)), where g = dy · (weight + offset)."""
    scale = rstd[..., None].to(_wide(x).dtype)
    normal = _wide(x) * scale
    g = dy * (_wide(weight) + offset)
    mean = (g * normal).mean(-1, keepdim=True)
    return g.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ops.py."""
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    d_gate: Tensor = torch.ops.aten.silu_backward(dy * up, gate)
    return d_gate, torch.nn.functional.silu(gate).mul_(dy)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """See ops.py."""
    values, label = _wide(logits), labels[:, None]
    top = values.amax(dim=1, keepdim=True)
    target = values.gather(1, label)
    p = (values - top).exp_()
    total = p.sum(dim=1, keepdim=True)
    losses = (total.log() + top - target).squeeze(1).float()
    p.div_(total).scatter_add_(1, label, torch.full_like(target, -1.0))
    logits.copy_(p)
    return losses
