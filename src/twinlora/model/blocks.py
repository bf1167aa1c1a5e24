"""Our own blocks. They share the parameters of the stock ones and do the same arithmetic with fewer passes and copies.

What they save for the backward pass is 16-bit inputs and one float per row, not float32 copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from twinlora.model.attention import Layout
from twinlora.model.linear import project
from twinlora.numerics import ops

__all__ = ["Attention", "RMSNorm", "SwiGLU"]


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
        weight: Any = self._parameters["weight"]  # self.weight takes ten times as long
        if not torch.is_grad_enabled():
            return ops.rms_norm(x, weight, self.eps, self.offset, self.wide)
        out: Tensor = _RMSNorm.apply(x, weight, self.eps, self.offset, self.wide)
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
        parts: dict[str, Any] = self._modules  # attributes take ten times as long
        down: Callable[[Tensor], Tensor] = parts["down_proj"]
        g, u = project(x, parts["gate_proj"], parts["up_proj"])
        if not torch.is_grad_enabled():
            return down(ops.swiglu(g, u))
        y = _SwiGLU.apply(g, u)
        # Where others decide what is kept (checkpointing keeps nothing), hooks of ours would overrule theirs.
        if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            return down(y)
        gate, up, place, count = g.detach(), u.detach(), y.untyped_storage()._cdata, y.numel()

        # What down_proj keeps of its input is computed again: it is the widest activation of a layer.
        def pack(saved: Tensor) -> Tensor | torch.Size:
            return saved.shape if saved.untyped_storage()._cdata == place and saved.numel() == count else saved

        def unpack(saved: Tensor | torch.Size) -> Tensor:
            return saved if isinstance(saved, Tensor) else torch.ops.twinlora.swiglu(gate, up).view(saved)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return down(y)


class Attention(nn.Module):
    """Projections, rotation and attention over a `Layout`; calls without one go to the stock block it stands for.

    Both see the same children. `scale` and `window` are those the stock block gives to its attention.
    """

    stock: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    o_proj: nn.Module

    def __init__(self, stock: nn.Module, scale: float, window: int | None) -> None:
        super().__init__()
        self._modules = stock._modules  # one dict: a layer wrapped later is wrapped in both
        self.__dict__["stock"] = stock  # not a child: its parameters are ours
        self.size, self.layer = int(getattr(stock, "head_dim")), int(getattr(stock, "layer_idx"))  # noqa: B009
        self.scale, self.window = scale, window

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [1, T, hidden] -> [1, T, hidden], and no weights; arguments as transformers gives them."""
        layout: Layout | None = kwargs.get("layout")
        if layout is None or position_embeddings is None or position_embeddings[0].shape[-1] != self.size:
            self.stock.training = self.training
            out: tuple[Tensor, Tensor | None] = self.stock(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **kwargs
            )
            return out
        parts: dict[str, Any] = self._modules  # attributes take ten times as long
        projected = project(hidden_states, parts["q_proj"], parts["k_proj"], parts["v_proj"])
        tokens, size = layout.tokens, self.size
        q, k, v = [x.view(tokens, -1, size) for x in projected]
        if "q_norm" in parts:
            q, k = parts["q_norm"](q), parts["k_norm"](k)
        rotation = layout.rotation(position_embeddings)
        attended = layout.attend(self.layer, q, k, v, rotation, self.scale, self.window)
        return parts["o_proj"](attended.reshape(1, tokens, -1)), None
