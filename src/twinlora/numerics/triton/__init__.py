"""The GPU backend: the ops of ops.py that have Triton kernels, for CUDA tensors.

Importing this package imports neither Triton nor a kernel: that happens at an op's first call. Quantising and
dequantising give the reference's bits. The kernels also run in Triton's interpreter (TRITON_INTERPRET=1, set before
triton is imported) on CPU tensors, by calling `implementation(name)` with them.

    kernels.py   the device code
    shapes.py    how work is cut, as arithmetic
    codes.py     quantise to NF4, dequantise every format
    products.py  their products: few rows by a kernel of their own, many through a reused buffer and cuBLAS
    grouped.py   low-rank updates of many adapters in one batch
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from twinlora.numerics.triton.shapes import workspace_bytes

__all__ = ["OPS", "available", "implementation", "on_first_use", "workspace_bytes"]

_MODULES = {
    "nf4_quantize": "codes",
    "scales_quantize": "codes",
    "nf4_dequantize": "codes",
    "blockwise_dequantize": "codes",
    "blockwise_linear": "products",
    "blockwise_linear_transposed": "products",
    "nf4_linear": "products",
    "nf4_linears": "products",
    "nf4_linear_with": "products",
    "nf4_linear_add_": "products",
    "nf4_linear_transposed": "products",
    "nf4_linear_transposed_add_": "products",
    "grouped_lora_": "grouped",
}
OPS = tuple(_MODULES)


@cache
def available() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def implementation(name: str) -> Callable[..., Any]:
    """The function behind the op `name`; imports Triton."""
    found: Callable[..., Any] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return found


def on_first_use(name: str) -> Callable[..., Any]:
    """The op `name` as a function that imports Triton when it is called."""

    def call(*arguments: Any) -> Any:
        return implementation(name)(*arguments)

    return call
