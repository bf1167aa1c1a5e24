"""The CUDA backend of the ops between the products: attention by torch's flash kernels, the others in Triton.

What no kernel takes is the reference's: float32 attention and head sizes that flash lacks, and everything where torch
came without Triton. Own kernels instead of liger-kernel's: its norm always computes the frozen weight's gradient, its
SwiGLU overwrites the inputs that our MLP multiplies again, its loss waits for the device and rounds losses to 16 bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from twinlora.numerics import attention as reference_attention
from twinlora.numerics import elementwise

__all__ = ["OPS", "path", "takes", "workspace_bytes"]

OPS = (
    "attention", "attention_backward", "attention_step",
    "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "cross_entropy_",
)  # fmt: skip


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """The module of Triton kernels, or None where Triton is not installed."""
    return import_module("twinlora.numerics.triton.blocks") if find_spec("triton") else None


def path() -> str:
    """What computes, in words."""
    return "triton" if _kernels() else "reference"


@lru_cache(maxsize=8)
def _capable(device: torch.device) -> bool:
    """Whether flash kernels are built for this device: Ampere or later."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def _flash_takes(q: Tensor) -> bool:
    """16 bit, heads of a multiple of 8 up to 256; its backward pass lacks 200 to 224 on consumer devices."""
    size = q.shape[-1]
    return (
        q.dtype in (torch.bfloat16, torch.float16)
        and size % 8 == 0
        and (size <= 192 or 224 < size <= 256)
        and _capable(q.device)
    )


@lru_cache(maxsize=8)  # all layers of a model ask for the same
def _bounds(starts: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Where the sequences start, int32 [S + 1] on `device`, and the length of the longest."""
    longest = max(stop - start for start, stop in itertools.pairwise(starts))
    return torch.tensor(starts, dtype=torch.int32, device=device), longest


@lru_cache(maxsize=8)
def _indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, *, back: bool = False) -> Tensor:
    """As `attention.rotate`; `back` may overwrite x."""
    kernels = _kernels()
    if cos is None or sin is None or kernels is None:
        return reference_attention.rotate(x, cos, sin, back=back)
    out: Tensor = kernels.rotate(x, cos, sin, back=back, out=x if back and x.is_contiguous() else None)
    return out


def _together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _how(window: int, scale: float) -> tuple[bool, dict[str, Any]]:
    """`is_causal` and the keywords of both flash kernels: a query sees so many keys to its left, none to its right."""
    return not window, {
        "scale": scale,
        "window_size_left": window - 1 if window else -1,
        "window_size_right": 0,
    }


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    starts: list[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    if not _flash_takes(q):
        return reference_attention.attention(q, k, v, cos, sin, starts, scale, window)
    with torch.cuda.device_of(q):
        bounds, longest = _bounds(tuple(starts), q.device)
        heads = (_together(x) for x in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        causal, how = _how(window, scale)
        found = torch.ops.aten._flash_attention_forward(
            *heads, bounds, bounds, longest, longest, 0.0, causal, False, **how
        )
        return found[0], found[1].t().contiguous()


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    out: Tensor,
    lse: Tensor,
    starts: list[int],
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    if not _flash_takes(q):
        return reference_attention.attention_backward(dout, q, k, v, cos, sin, out, lse, starts, scale, window)
    with torch.cuda.device_of(q):
        bounds, longest = _bounds(tuple(starts), q.device)
        heads = (_together(x) for x in (_rotate(q, cos, sin), _rotate(k, cos, sin), v))
        causal, how = _how(window, scale)
        # Both stand for the state of dropout, of which there is none.
        state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout.contiguous(), *heads, out, lse.t().contiguous(), bounds, bounds, longest, longest, 0.0, causal, state,
            unused, **how,
        )  # fmt: skip
        return _rotate(dq, cos, sin, back=True), _rotate(dk, cos, sin, back=True), dv


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: list[int],
    lengths: list[int],
    scale: float,
    window: int,
) -> Tensor:
    """See ops.py."""
    kernels = _kernels()
    together = keys.is_contiguous() and values.is_contiguous()
    if kernels is None or keys.dtype != q.dtype or q.dtype == torch.float64 or not together:
        return reference_attention.attention_step(q, k, v, cos, sin, keys, values, rows, lengths, scale, window)
    with torch.cuda.device_of(q):
        where, before, after = (
            _indices(tuple(numbers), q.device) for numbers in (rows, lengths, [length + 1 for length in lengths])
        )
        keys[where, :, before], values[where, :, before] = _rotate(k, cos, sin), v
        query = _rotate(q, cos, sin).contiguous()
        out: Tensor = kernels.decode(query, keys, values, where, after, max(lengths) + 1, scale, window)
        return out


def _by_kernel(name: str) -> Callable[..., Any]:
    """The op `name` by its kernel, or by the reference where Triton is missing."""

    def op(*arguments: Any) -> Any:
        kernels = _kernels()
        if kernels is None or arguments[0].dtype == torch.float64:
            return getattr(elementwise, name)(*arguments)
        with torch.cuda.device_of(arguments[0]):
            return getattr(kernels, name)(*arguments)

    op.__name__, op.__doc__ = name, "See ops.py."
    return op


rms_norm = _by_kernel("rms_norm")
rms_norm_backward = _by_kernel("rms_norm_backward")
swiglu = _by_kernel("swiglu")
swiglu_backward = _by_kernel("swiglu_backward")
cross_entropy_ = _by_kernel("cross_entropy_")


def takes(op: str, *arguments: Any) -> bool:
    """Whether a kernel runs `op` on these arguments, and not the reference, where Triton is installed."""
    if op in ("attention", "attention_backward"):
        return _flash_takes(arguments[op == "attention_backward"])
    return True


def workspace_bytes(op: str, *arguments: Any) -> int:
    """Bytes that an op of `OPS` allocates beyond its outputs, at their peak, where its kernel `takes` the arguments."""
    if op == "attention":
        q, k, _, cos = arguments[:4]
        total: int = (q.nbytes + k.nbytes if cos is not None else 0) + 4 * q.shape[0] * q.shape[1]
        return total
    if op == "attention_backward":
        dout, q, k, _, cos = arguments[:5]
        tokens, heads, size = q.shape
        padded = tokens + 128 * (len(arguments[8]) - 1)  # flash pads every sequence by up to a block of queries
        total = (q.nbytes + k.nbytes if cos is not None else 0) + (0 if dout.is_contiguous() else dout.nbytes)
        total += 4 * padded * heads * (-(-size // 32) * 32 + 1) + 4 * tokens * heads  # dq in float32, row sums, lse
        total += 2 * q.nbytes if k.shape[1] != heads else 0  # dk and dv of each query head
        return total
    return 0
