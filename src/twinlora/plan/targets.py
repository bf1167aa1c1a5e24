"""The device that a step is simulated for: which ops have a kernel there, what those hold, how sizes are rounded.

Everything runs on fake CPU tensors; the target decides where the code asks for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from twinlora.numerics import attention as reference_attention
from twinlora.numerics import elementwise, reference
from twinlora.numerics.workspace import has_kernel, workspace

__all__ = ["Target", "TargetName", "without_data"]

TargetName = Literal["cpu", "cuda"]
_REFERENCE: dict[str, Any] = vars(reference) | vars(reference_attention) | vars(elementwise)
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1}  # and where its factors begin
_ROUNDING = {"cpu": 1, "cuda": 512}  # torch's CPU allocator takes what it is asked for, the CUDA one blocks of 512


class Target:
    """A kind of device."""

    def __init__(self, name: TargetName) -> None:
        self.name = name

    def rounded(self, size: int) -> int:
        """Bytes that the allocator takes for `size`."""
        step = _ROUNDING[self.name]
        return -(-size // step) * step

    def composed(self, func: Any, args: Sequence[Any]) -> Callable[..., Any] | None:
        """The Python function that an op of ours is there, or None if it is a kernel (or not ours)."""
        if func.namespace != "twinlora":
            return None
        name = func._schema.name.rpartition("::")[2]
        if name.startswith(("nf4_", "blockwise_", "scales_")) or has_kernel(name, *args, target=self.name):
            return None
        _warm(name, args)
        function: Callable[..., Any] = _REFERENCE[name]
        return function

    def compiles(self, func: Any, args: Sequence[Any]) -> Any:
        """What makes a product one that oneDNN compiles a kernel for and keeps it, or None if it does not."""
        name = func._schema.name.rpartition("::")[2]
        if self.name != "cpu":
            return None
        if name in _PRODUCTS:
            x, w = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            shape: tuple[Any, ...] = (tuple(x.shape), tuple(w.shape), x.is_contiguous(), w.is_contiguous())
        elif name in ("nf4_linear", "nf4_linear_transposed"):
            x = args[0]
            shape = ((x.numel() // x.shape[-1], x.shape[-1]), tuple(args[5]), name == "nf4_linear_transposed")
        elif name == "nf4_linears":
            x = args[0]
            shape = ((x.numel() // x.shape[-1], x.shape[-1]), tuple(args[2]))
        else:
            return None
        return shape if x.dtype in (torch.bfloat16, torch.float16) else None

    def workspace(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Sequence[Any]
    ) -> tuple[int, dict[str, int]]:
        """What a kernel holds beside its results: bytes while it runs, and buffers that it keeps, by name."""
        if func.namespace != "twinlora":
            return (_promoted(args, made) if self.name == "cpu" and torch.Tag.pointwise in func.tags else 0), {}
        found = workspace(func._schema.name.rpartition("::")[2], *args, target=self.name)
        return found.passing, found.kept


def without_data(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an op on fake tensors. torch's fake grouped product takes bfloat16 alone, the real one every type."""
    if func is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    x, w, *rest = args
    return func(x.to(torch.bfloat16), w.to(torch.bfloat16), *rest, **kwargs).to(x.dtype)


def _promoted(args: Sequence[Any], made: Sequence[Any]) -> int:
    """torch's CPU kernels copy operands of another type than the common one, element by element operations alike."""
    # Conditions stay what they are.
    tensors = [x for x in args if isinstance(x, Tensor) and x.dim() > 0 and x.dtype != torch.bool]
    common = reduce(torch.promote_types, {x.dtype for x in tensors}, tensors[0].dtype) if tensors else None
    if common is None:
        return 0
    written = [x for x in made if isinstance(x, Tensor) and any(x is y for y in tensors)]  # in place
    return sum(x.numel() * common.itemsize for x in (*tensors, *written) if x.dtype != common)


def _warm(name: str, args: Sequence[Any]) -> None:
    """Fill the caches that a reference function reads with real tensors, before it fills them with fake ones."""
    if name not in ("attention", "attention_backward"):
        return
    q, k = args[:2] if name == "attention" else args[1:3]
    with unset_fake_temporarily():
        for heads, group in ((q.shape[1], q.shape[1] // k.shape[1]), (k.shape[1], 1)):
            reference_attention._grids(tuple(args[-3]), heads, group, torch.device("cpu"))
