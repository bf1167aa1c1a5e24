"""The pieces that a machine's rates come from: calls of one op at some size, over operands that no cache holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from twinlora import machine
from twinlora.numerics import ops
from twinlora.numerics.formats import Format, Int8Format, NF3Format, NF4Format

__all__ = ["MOST_CALLS", "Piece", "Pool", "beyond_caches", "pieces"]

MOST_CALLS = 2000  # of a piece in a turn
_POOL = 96 << 20  # bytes that operands are cut from, at least
_ALIGNMENT = 64  # bytes
_SETS = 32  # of queries, keys and values

# curve, then what makes the call to time; that gets the number of the turn
Piece = tuple[str, Callable[[], Callable[[int], Any]]]


def beyond_caches(device: torch.device) -> int:
    """Bytes of which the caches hold little at a time."""
    if device.type == "cuda":
        cache, free = torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]
    else:
        cache, free = machine.last_cache_bytes(), machine.available_bytes()
    return max(_POOL, min(4 * cache, free // 4))


class Pool:
    """Random memory that operands are cut from in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._at = device, 0
        values = torch.randn(_POOL // 8, device=device).bfloat16().view(torch.uint8)
        self._bytes = values.repeat(beyond_caches(device) // values.nbytes)

    def cut(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Operands of one shape for the calls of a piece, behind those that were cut before: a quarter of all at most,
        so that what a call reads is not what it writes."""
        nbytes = math.prod(shape) * dtype.itemsize
        found: list[Tensor] = []
        for _ in range(max(1, min(MOST_CALLS, len(self._bytes) // 4 // nbytes))):
            if self._at + nbytes > len(self._bytes):
                self._at = 0
            found.append(self._bytes[self._at : self._at + nbytes].view(dtype).view(shape))
            self._at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return found


def pieces(pool: Pool) -> Iterator[Piece]:
    """All of them, with operands from `pool`."""
    for dtype, every in ((torch.bfloat16, 1), (torch.float32, 3)):
        name = str(dtype).removeprefix("torch.")
        for shape in _PRODUCTS[::every]:
            yield f"product {name}", partial(_product, *shape, dtype, pool)
        for shape in _FROZEN_PRODUCTS[::every]:
            yield f"product dense_linears {name}", partial(_dense, *shape, dtype, pool)
        for form in (NF4Format(), Int8Format(), NF3Format()):
            for shape in (_FROZEN_PRODUCTS if form.kind == "nf4" else _OTHER_PRODUCTS)[::every]:
                yield f"{form.kind} product {name}", partial(_quantised, form, *shape, dtype, pool)
    for shape in _ADDED:
        yield "product addmm_ bfloat16", partial(_added, *shape, pool)
    for length in (32, 128, 512, 2048):
        yield "attention", partial(_attention, length, pool, backward=False)
        yield "attention_backward", partial(_attention, length, pool, backward=True)
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
        yield "copy", partial(_copy, size, pool)
        yield "elementwise", partial(_add, size, pool)
    for rows in (64, 1024):
        yield "norm", partial(_norm, rows, pool)
        yield "swiglu", partial(_swiglu, rows, pool, backward=False)
        yield "swiglu_backward", partial(_swiglu, rows, pool, backward=True)
    yield "loss", partial(_loss, 64, pool)
    for count, tensors in ((1 << 12, 64), (1 << 24, 1024)):
        yield "optimiser", partial(_adam, count, tensors, pool.device)


# rows, inner, outer: wide, and as narrow as the products of an adapter
_PRODUCTS = (
    (1024, 16, 1024), (1024, 1024, 16), (1024, 1024, 48), (64, 1024, 1024), (256, 1024, 1024), (1024, 576, 576),
    (1024, 1024, 1024), (1024, 2048, 4096),
)  # fmt: skip


# With a frozen weight, which have ops of their own.
_FROZEN_PRODUCTS = (
    (64, 1024, 1024), (512, 576, 1536), (960, 576, 576), (256, 1024, 1024), (512, 2048, 2048), (512, 2048, 8192),
    (1024, 2048, 4096),
)  # fmt: skip
_OTHER_PRODUCTS = ((256, 1024, 1024), (1024, 1024, 1024), (1024, 2048, 4096))
_ADDED = ((1024, 16, 1024), (512, 16, 4096), (1024, 48, 1024))


def _product(rows: int, inner: int, outer: int, dtype: torch.dtype, pool: Pool) -> Callable[[int], Any]:
    xs, weights = pool.cut(rows, inner, dtype=dtype), pool.cut(outer, inner, dtype=dtype)
    return lambda turn: xs[turn % len(xs)] @ weights[turn % len(weights)].T


def _dense(rows: int, inner: int, outer: int, dtype: torch.dtype, pool: Pool) -> Callable[[int], Any]:
    xs, weights = pool.cut(rows, inner, dtype=dtype), pool.cut(outer, inner, dtype=dtype)
    return lambda turn: ops.dense_linears(xs[turn % len(xs)], [weights[turn % len(weights)]])


def _added(rows: int, inner: int, outer: int, pool: Pool) -> Callable[[int], Any]:
    """A product that is added to what is there, as that of an adapter's B is."""
    ys, xs, weight = pool.cut(rows, outer), pool.cut(rows, inner), pool.cut(outer, inner)[0]
    return lambda turn: ys[turn % len(ys)].addmm_(xs[turn % len(xs)], weight.T)


def _quantised(form: Format, rows: int, inner: int, outer: int, dtype: torch.dtype, pool: Pool) -> Callable[[int], Any]:
    xs = pool.cut(rows, inner, dtype=dtype)
    first = ops.quantize(torch.randn(outer, inner, dtype=dtype, device=pool.device), form)
    weights = [replace(first, packed=packed) for packed in pool.cut(*first.packed.shape, dtype=first.packed.dtype)]
    return lambda turn: ops.linear(xs[turn % len(xs)], weights[turn % len(weights)])


def _attention(length: int, pool: Pool, *, backward: bool) -> Callable[[int], Any]:
    """At least 1,024 tokens in rows of `length`, eight heads of 64, four of keys."""
    count = max(1, 1024 // length)
    starts = [i * length for i in range(count + 1)]
    qs, douts = pool.cut(starts[-1], 8, 64), pool.cut(starts[-1], 8, 64)
    ks, vs = pool.cut(starts[-1], 4, 64), pool.cut(starts[-1], 4, 64)
    settings = (starts, 0.125, 0)
    heads = [(q, k, v, None, None) for q, k, v in zip(qs[:_SETS], ks, vs, strict=False)]
    if not backward:
        return lambda turn: torch.ops.twinlora.attention(*heads[turn % len(heads)], *settings)
    made = [torch.ops.twinlora.attention(*each, *settings) for each in heads]
    calls = [(dout, *each, *found, *settings) for dout, each, found in zip(douts, heads, made, strict=False)]
    return lambda turn: torch.ops.twinlora.attention_backward(*calls[turn % len(calls)])


def _copy(count: int, pool: Pool) -> Callable[[int], Any]:
    sources, targets = pool.cut(count, dtype=torch.float32), pool.cut(count)
    return lambda turn: targets[turn % len(targets)].copy_(sources[turn % len(sources)])


def _add(count: int, pool: Pool) -> Callable[[int], Any]:
    values = pool.cut(count)
    return lambda turn: values[turn % len(values)] + values[(turn + 1) % len(values)]


def _norm(rows: int, pool: Pool) -> Callable[[int], Any]:
    xs = pool.cut(rows, 1024)
    scale = torch.ones(1024, dtype=torch.bfloat16, device=pool.device)
    return lambda turn: torch.ops.twinlora.rms_norm(xs[turn % len(xs)], scale, 1e-5, 0.0, False)


def _swiglu(rows: int, pool: Pool, *, backward: bool) -> Callable[[int], Any]:
    gs, us, dys = (pool.cut(rows, 2048) for _ in range(3))
    if backward:
        return lambda turn: torch.ops.twinlora.swiglu_backward(
            dys[turn % len(dys)], gs[turn % len(gs)], us[turn % len(us)]
        )
    return lambda turn: torch.ops.twinlora.swiglu(gs[turn % len(gs)], us[turn % len(us)])


def _loss(rows: int, pool: Pool) -> Callable[[int], Any]:
    logits = pool.cut(rows, 32768)
    labels = torch.zeros(rows, dtype=torch.long, device=pool.device)
    return lambda turn: torch.ops.twinlora.cross_entropy_(logits[turn % len(logits)], labels)


def _adam(count: int, tensors: int, device: torch.device) -> Callable[[int], Any]:
    """A step over matrices of `count` values in all."""
    parameters = [torch.nn.Parameter(torch.zeros(count // tensors, device=device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW(parameters, fused=True)
    return lambda _: adam.step()
