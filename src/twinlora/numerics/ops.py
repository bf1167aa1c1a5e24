"""Every op, declared once: schema, meaning, shapes (the fake) and gradient; `QuantTensor`, what they work on.

`torch.ops.twinlora.*` dispatches on the tensors' device: a backend registers itself for its device's key, and the
reference serves every device without one. Shapes: `weight` [N, K] in general any shape of n elements.

    nf4_quantize(weight, block_size)                   -> packed u8 [(n+1)//2], scales f32 [ceil(n/block_size)]
    scales_quantize(scales, block_size)                -> codes u8 [m], nested_scales f32 [ceil(m/bs)], offset f32 []
    nf4_dequantize(packed, scales, …, shape, …, dtype) -> [*shape]
    nf4_linear(x, packed, …)                           -> x [..., K] @ W.T -> [..., N]; differentiable in x
    nf4_linears(x, tensors, rows, …)                   -> nf4_linear of several weights of one format; no gradient
    nf4_linear_with(x, extra, packed, …)               -> x times the rows of W and of extra [R, K] -> [..., N + R]
    nf4_linear_add_(y, x, packed, …)                   -> y [..., N] += x @ W.T
    nf4_linear_transposed(dy, packed, …)               -> dy [..., N] @ W  -> [..., K]
    nf4_linear_transposed_add_(dx, dy, packed, …)      -> dx [..., K] += dy @ W
    grouped_lora_(y, x, a, b, scales, starts)          -> y [R, N] += scale · x Aᵀ Bᵀ, an adapter for each group of rows
    blockwise_quantize(weight, bits, block_size)       -> codes of int8 (bits 8) or NF3 (3), scales f32; see formats.py
    blockwise_dequantize, blockwise_linear, blockwise_linear_transposed: as those of NF4, with `bits` after the rest
    dense_linears(x, weights)                          -> x [..., K] @ weight [N, K].T -> [..., N] of each; no gradient
    attention(q, k, v, cos, sin, starts, …)            -> out [T, H, D], lse f32 [T, H]; differentiable in q, k, v
    attention_backward(dout, q, …, out, lse, …)        -> dq, dk, dv
    attention_step(q, k, v, …, keys, values, …)        -> out [n, H, D]; new tokens of sequences, see below
    attention_extend(q, k, v, …, keys, values, …)      -> out [T, H, D]; T new tokens of one sequence, see below
    rms_norm(x, weight, eps, offset, wide)             -> y [..., D], rstd f32 [...]
    rms_norm_backward(dy, x, weight, rstd, offset)     -> dx [..., D]
    swiglu(gate, up)                                   -> silu(gate) * up
    swiglu_backward(dy, gate, up)                      -> d_gate, d_up
    cross_entropy_(logits, labels)                     -> losses f32 [R]; logits [R, V] become their gradient

grouped_lora_: rows starts[i] .. starts[i + 1] of x [R, K] use adapter i, a[i] [r_i, K] and b[i] [N, r_i]; other rows of
y stay. Factors of x's type are read as they lie, also a b that is the transpose of a tensor.

Attention is causal within each sequence starts[i] .. starts[i + 1] of the T tokens: q [T, H, D], k, v [T, K, D], head h
with key/value head h // (H / K). Given cos and sin [T, D], q and k are rotated first (rotate-half). A query sees its
last `window` keys, itself included; 0 means all. lse is the log of the sum of exponentials of its scores.

attention_step appends k (rotated) and v to the caches `keys` and `values` [rows, K, capacity, D], at row rows[i] behind
the lengths[i] tokens that it holds, and attends from q [n, H, D] to that row up to there. Tokens of one row follow each
other, at most `step_tokens` of them. attention_extend does so for T tokens of one row, however many.

rms_norm is x / rms(x) · (weight + offset); unless `wide`, the normalised x is rounded to x's type before that product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from twinlora.errors import ModelError
from twinlora.numerics import attention as reference_attention
from twinlora.numerics import cpu, cuda, elementwise, reference, triton
from twinlora.numerics.formats import Format, NF4Format
from twinlora.numerics.target import kind_of

__all__ = [
    "QuantTensor",
    "adds_products",
    "attention",
    "attention_extend",
    "attention_step",
    "backend",
    "dense_linears",
    "grouped_lora_",
    "linear",
    "linear_add_",
    "linear_transposed",
    "linear_transposed_add_",
    "linear_with",
    "linears",
    "quantize",
    "rms_norm",
    "step_tokens",
    "swiglu",
]

_QUANT = (
    "Tensor packed, Tensor scales, Tensor? nested_scales, Tensor? nested_offset, "
    "int[] shape, int block_size, int nested_block_size"
)
_HEADS = "Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin"
_SEEN = "int[] starts, float scale, int window"
_SCHEMAS = {
    "nf4_quantize": "(Tensor weight, int block_size) -> (Tensor, Tensor)",
    "scales_quantize": "(Tensor scales, int block_size) -> (Tensor, Tensor, Tensor)",
    "nf4_dequantize": f"({_QUANT}, ScalarType dtype) -> Tensor",
    "nf4_linear": f"(Tensor x, {_QUANT}) -> Tensor",
    "nf4_linears": "(Tensor x, Tensor[] tensors, int[] rows, int block_size, int nested_block_size) -> Tensor[]",
    "nf4_linear_with": f"(Tensor x, Tensor extra, {_QUANT}) -> Tensor",
    "nf4_linear_add_": f"(Tensor(a!) y, Tensor x, {_QUANT}) -> ()",
    "nf4_linear_transposed": f"(Tensor dy, {_QUANT}) -> Tensor",
    "nf4_linear_transposed_add_": f"(Tensor(a!) dx, Tensor dy, {_QUANT}) -> ()",
    "grouped_lora_": "(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float[] scales, int[] starts) -> ()",
    "blockwise_quantize": "(Tensor weight, int bits, int block_size) -> (Tensor, Tensor)",
    "blockwise_dequantize": f"({_QUANT}, int bits, ScalarType dtype) -> Tensor",
    "blockwise_linear": f"(Tensor x, {_QUANT}, int bits) -> Tensor",
    "blockwise_linear_transposed": f"(Tensor dy, {_QUANT}, int bits) -> Tensor",
    "dense_linears": "(Tensor x, Tensor[] weights) -> Tensor[]",
    "attention": f"({_HEADS}, {_SEEN}) -> (Tensor, Tensor)",
    "attention_backward": f"(Tensor dout, {_HEADS}, Tensor out, Tensor lse, {_SEEN}) -> (Tensor, Tensor, Tensor)",
    "attention_step": (
        f"({_HEADS}, Tensor(a!) keys, Tensor(b!) values, int[] rows, int[] lengths, float scale, int window) -> Tensor"
    ),
    "attention_extend": (
        f"({_HEADS}, Tensor(a!) keys, Tensor(b!) values, int row, int length, float scale, int window) -> Tensor"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps, float offset, bool wide) -> (Tensor, Tensor)",
    "rms_norm_backward": "(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset) -> Tensor",
    "swiglu": "(Tensor gate, Tensor up) -> Tensor",
    "swiglu_backward": "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "cross_entropy_": "(Tensor(a!) logits, Tensor labels) -> Tensor",
}
_REFERENCE = vars(reference) | vars(reference_attention) | vars(elementwise)

_library = torch.library.Library("twinlora", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _REFERENCE[_name], "CompositeExplicitAutograd")
_COMPILED = bool(cpu.paths())
if _COMPILED:
    for _name in cpu.OPS:
        _library.impl(_name, getattr(cpu, _name), "CPU")
for _name in cuda.OPS:
    _library.impl(_name, getattr(cuda, _name), "CUDA")
if triton.available():
    for _name in triton.OPS:
        _library.impl(_name, triton.on_first_use(_name), "CUDA")


@torch.library.register_fake("twinlora::nf4_quantize")
def _(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty(-(-count // block_size), dtype=torch.float32)


@torch.library.register_fake("twinlora::scales_quantize")
def _(scales: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    count = scales.numel()
    codes = scales.new_empty(count, dtype=torch.uint8)
    return codes, scales.new_empty(-(-count // block_size)), scales.new_empty(())


@torch.library.register_fake("twinlora::blockwise_quantize")
def _(weight: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    size, dtype = (count, torch.int8) if bits == 8 else (-(-count // 8) * 3, torch.uint8)
    return weight.new_empty(size, dtype=dtype), weight.new_empty(-(-count // block_size), dtype=torch.float32)


for _family in ("nf4", "blockwise"):

    @torch.library.register_fake(f"twinlora::{_family}_dequantize")
    def _(packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], *rest: Any) -> Tensor:
        return packed.new_empty(shape, dtype=rest[-1])

    @torch.library.register_fake(f"twinlora::{_family}_linear")
    def _(x: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], *_: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], shape[0])

    @torch.library.register_fake(f"twinlora::{_family}_linear_transposed")
    def _(dy: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], *_: Any) -> Tensor:
        return dy.new_empty(*dy.shape[:-1], shape[1])


@torch.library.register_fake("twinlora::nf4_linears")
def _(x: Tensor, tensors: list[Tensor], rows: list[int], block: int, nested_block: int) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], n) for n in rows]


@torch.library.register_fake("twinlora::nf4_linear_with")
def _(x: Tensor, extra: Tensor, p: Tensor, s: Tensor, ns: Any, no: Any, shape: list[int], b: int, nb: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0] + extra.shape[0])


@torch.library.register_fake("twinlora::nf4_linear_add_")
@torch.library.register_fake("twinlora::nf4_linear_transposed_add_")
@torch.library.register_fake("twinlora::grouped_lora_")
def _(y: Tensor, *_: Any) -> None:
    return None


@torch.library.register_fake("twinlora::dense_linears")
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


@torch.library.register_fake("twinlora::attention")
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("twinlora::attention_backward")
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("twinlora::attention_step")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("twinlora::attention_extend")
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("twinlora::rms_norm")
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("twinlora::rms_norm_backward")
def _(dy: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("twinlora::swiglu")
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.register_fake("twinlora::swiglu_backward")
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


@torch.library.register_fake("twinlora::cross_entropy_")
def _(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.new_empty(labels.shape, dtype=torch.float32)


def _save_quant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, nested_scales, nested_offset, *ctx.layout = inputs
    ctx.save_for_backward(packed, scales, nested_scales, nested_offset)


def _gradient_by(transposed: Any) -> Any:
    """The input gradient of a product, which is the product with the transposed weight."""

    def gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight = (*ctx.saved_tensors, *ctx.layout)  # of what is recomputed, saved tensors can be had once
        return transposed(dy, *weight), *(None,) * len(weight)

    return gradient


for _name in ("nf4_linear", "blockwise_linear"):
    _backward = _gradient_by(getattr(torch.ops.twinlora, f"{_name}_transposed"))
    torch.library.register_autograd(f"twinlora::{_name}", _backward, setup_context=_save_quant)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *heads, ctx.starts, ctx.scale, ctx.window = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*heads, *output)


def _heads_gradient(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    gradients = torch.ops.twinlora.attention_backward(dout, *saved, ctx.starts, ctx.scale, ctx.window)
    return *gradients, *(None,) * 5


torch.library.register_autograd("twinlora::attention", _heads_gradient, setup_context=_save_heads)


@dataclass(frozen=True)
class QuantTensor:
    """A weight of `shape` in `format`: codes, block scales (float32, or uint8 codes with nested scale and offset)."""

    packed: Tensor
    scales: Tensor
    nested_scales: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, ...]
    format: Format = field(default_factory=NF4Format)

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """The op arguments from `packed` on."""
        tensors = (self.packed, self.scales, self.nested_scales, self.nested_offset)
        sizes = (self.format.block_size, self.format.nested_block_size)
        return *tensors, list(self.shape), *sizes, *(() if self.family == "nf4" else (self.format.bits,))

    @property
    def family(self) -> str:
        """First word of the names of the ops that take it: NF4 has its own, with kernels for few rows."""
        return "nf4" if self.format.kind == "nf4" else "blockwise"

    @cached_property
    def tensors(self) -> list[Tensor]:
        """What is stored: two tensors, or four with nested scales."""
        stored = (self.packed, self.scales, self.nested_scales, self.nested_offset)
        return [tensor for tensor in stored if tensor is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The weight [*shape] in `dtype`."""
        out: Tensor = getattr(torch.ops.twinlora, f"{self.family}_dequantize")(*self.arguments, dtype)
        return out


def _ops_on(x: Tensor, weight: Tensor) -> Any:
    """Where the ops on x and a weight are: `torch.ops.twinlora`, or the CPU's kernels if nobody derives or looks.

    In a pass over few tokens the dispatcher would take as long as the kernels between the products.
    """
    plain = (
        type(x) is Tensor
        and x.is_cpu
        and weight.is_cpu
        and _COMPILED
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
    )
    return cpu if plain else torch.ops.twinlora


def quantize(weight: Tensor, fmt: Format | None = None, *, name: str = "weight") -> QuantTensor:
    """Quantise `weight` (float32, bfloat16 or float16, any shape), by default to NF4.

    Raises ModelError if a value is not finite.
    """
    fmt = fmt or NF4Format()
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"{name}: cannot quantise {weight.dtype}; expected float32, bfloat16 or float16")
    if fmt.kind == "nf4":
        packed, scales = torch.ops.twinlora.nf4_quantize(weight, fmt.block_size)
    else:
        packed, scales = torch.ops.twinlora.blockwise_quantize(weight, fmt.bits, fmt.block_size)
    # A NaN or Inf anywhere in a block shows in its maximum.
    if weight.device.type != "meta" and not isinstance(weight, FakeTensor) and not bool(torch.isfinite(scales).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ModelError(
            f"{name}: {bad} of {weight.numel()} values are NaN or Inf; the checkpoint is damaged, fetch it again"
        )
    if not fmt.nested_block_size:
        return QuantTensor(packed, scales, None, None, tuple(weight.shape), fmt)
    codes, nested_scales, offset = torch.ops.twinlora.scales_quantize(scales, fmt.nested_block_size)
    return QuantTensor(packed, codes, nested_scales, offset, tuple(weight.shape), fmt)


def linear(x: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N]; differentiable in x."""
    out: Tensor = getattr(_ops_on(x, weight.packed), f"{weight.family}_linear")(x, *weight.arguments)
    return out


def linears(x: Tensor, weights: Sequence[QuantTensor]) -> tuple[Tensor, ...]:
    """x [..., K] times each weight [N, K].T, all of one NF4 format, -> [..., N] of each; no gradient."""
    tensors = [tensor for weight in weights for tensor in weight.tensors]
    fmt = weights[0].format
    rows = [weight.shape[0] for weight in weights]
    return tuple(_ops_on(x, tensors[0]).nf4_linears(x, tensors, rows, fmt.block_size, fmt.nested_block_size))


def linear_transposed(dy: Tensor, weight: QuantTensor) -> Tensor:
    """dy [..., N] @ weight [N, K] -> [..., K]."""
    out: Tensor = getattr(torch.ops.twinlora, f"{weight.family}_linear_transposed")(dy, *weight.arguments)
    return out


def linear_with(x: Tensor, extra: Tensor, weight: QuantTensor) -> Tensor:
    """x [..., K] times the rows of the weight [N, K] and then of extra [R, K] -> [..., N + R]; no gradient."""
    out: Tensor = torch.ops.twinlora.nf4_linear_with(x, extra, *weight.arguments)
    return out


def linear_add_(y: Tensor, x: Tensor, weight: QuantTensor) -> None:
    """y [..., N] += x [..., K] @ weight [N, K].T; no gradient."""
    torch.ops.twinlora.nf4_linear_add_(y, x, *weight.arguments)


def linear_transposed_add_(dx: Tensor, dy: Tensor, weight: QuantTensor) -> None:
    """dx [..., K] += dy [..., N] @ weight [N, K]; no gradient."""
    torch.ops.twinlora.nf4_linear_transposed_add_(dx, dy, *weight.arguments)


def adds_products(device: torch.device) -> bool:
    """Whether a product is added to what is there in its own pass, as a GPU's GEMM does; a CPU takes a second one."""
    return kind_of(device) == "cuda"


def dense_linears(x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    """x [..., K] @ weight [N, K].T of each weight -> [..., N] of each, in x's type; no gradient."""
    return tuple(_ops_on(x, weights[0]).dense_linears(x, weights))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
    """x [..., D] -> [..., D]; no gradient."""
    out: Tensor = _ops_on(x, weight).rms_norm(x, weight, eps, offset, wide)[0]
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up [..., F]; no gradient."""
    out: Tensor = _ops_on(gate, up).swiglu(gate, up)
    return out


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: list[int],
    scale: float,
    window: int | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention within each sequence: q [T, H, D], k and v [T, K, D] -> [T, H, D]; differentiable in q, k and v.

    `rotation`: cos and sin [T, D], by which q and k are rotated first.
    """
    cos, sin = rotation or (None, None)
    out: Tensor = torch.ops.twinlora.attention(q, k, v, cos, sin, starts, scale, window or 0)[0]
    return out


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    rows: list[int],
    lengths: list[int],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """New tokens of sequences, at most `step_tokens` of each: q [n, H, D], k and v [n, K, D] -> [n, H, D].

    Appends to `keys` and `values`.
    """
    arguments = (q, k, v, *rotation, keys, values, rows, lengths, scale, window or 0)
    out: Tensor = _ops_on(q, keys).attention_step(*arguments)
    return out


def step_tokens(q: Tensor, rotation: tuple[Tensor, Tensor], keys: Tensor) -> int:
    """Up to how many new tokens of one sequence go best through `attention_step`."""
    return cpu.step_tokens(q, rotation[0], keys) if q.device.type == "cpu" and _COMPILED else 1


def attention_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    keys: Tensor,
    values: Tensor,
    row: int,
    length: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """T new tokens of the sequence in `row`: q [T, H, D], k and v [T, K, D] -> [T, H, D]. Appends to the caches."""
    arguments = (q, k, v, *rotation, keys, values, row, length, scale, window or 0)
    out: Tensor = torch.ops.twinlora.attention_extend(*arguments)
    return out


def grouped_lora_(
    y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scales: list[float], starts: list[int]
) -> None:
    """Add to y [R, N] what the adapter of each row makes of x [R, K]; no gradient."""
    torch.ops.twinlora.grouped_lora_(y, x, a, b, scales, starts)


def backend(device: torch.device | str = "cpu") -> str:
    """The backend that serves `device`, as printed and recorded with every result, for example `cpu (avx512-bf16)`."""
    kind = torch.device(device).type
    if kind == "cuda":
        return f"cuda ({cuda.path()})"
    return f"{kind} ({cpu.path()})" if kind == "cpu" and cpu.paths() else f"{kind} (reference)"
