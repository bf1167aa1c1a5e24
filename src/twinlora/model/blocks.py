"""Our own blocks. They share the parameters of the stock ones and do the same arithmetic with fewer passes and copies.

What they save for the backward pass is 16-bit inputs and one float per row, not float32 copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from twinlora.numerics import ops  # noqa: F401  (declares the ops)

__all__ = ["RMSNorm", "SwiGLU"]


class _RMSNorm(torch.autograd.Function):
    """x [..., D], w [D] -> x / rms(x) · w. The normalised x is rounded to x's type before w, unless `wide`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
        y: Tensor
        y, rstd = torch.ops.twinlora.rms_norm(x, w, eps, offset, wide)
        ctx.save_for_backward(x, w, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, rstd = ctx.saved_tensors
        dw = None
        if ctx.needs_input_grad[1]:
            normal = x.float() * rstd[..., None]
            dw = (grads[0].float() * normal).flatten(0, -2).sum(0).to(w.dtype)
        dx = torch.ops.twinlora.rms_norm_backward(grads[0], x, w, rstd, ctx.offset)
        return dx, dw, None, None, None


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467). Llama's (`wide=False, offset=0`) or Gemma's (`wide=True, offset=1`)."""

    def __init__(self, weight: nn.Parameter, eps: float, *, offset: float = 0.0, wide: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.eps, self.offset, self.wide = eps, offset, wide

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.offset, self.wide)
        return out


class _SwiGLU(torch.autograd.Function):
    """g, u [..., F] -> silu(g) · u; silu is computed again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        out: Tensor = torch.ops.twinlora.swiglu(g, u)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        dg, du = torch.ops.twinlora.swiglu_backward(grads[0], g, u)
        return dg, du


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate(x)) · up(x)) (arXiv 2002.05202)."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        g, u = self.gate_proj(x), self.up_proj(x)
        y = _SwiGLU.apply(g, u)
        if not torch.is_grad_enabled():
            return self._down(y)
        gate, up, place, count = g.detach(), u.detach(), y.data_ptr(), y.numel()

        # What down_proj keeps of its input is computed again: it is the widest activation of a layer.
        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if saved.data_ptr() == place and saved.numel() == count else saved

        def unpack(saved: Tensor | torch.Size) -> Tensor:
            return saved if isinstance(saved, Tensor) else torch.ops.twinlora.swiglu(gate, up).view(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self._down(y)

    def _down(self, y: Tensor) -> Tensor:
        out: Tensor = self.down_proj(y)
        return out
