"""What operations do: floating-point operations, bytes read and written, calls. The time model (speed.py) reads it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["Counts", "Kind", "extrapolate", "of"]

# Products with a quantised weight, and which argument is multiplied; the weight's shape comes five arguments later.
_QUANTISED = {
    "nf4_linear": 0, "nf4_linear_transposed": 0, "nf4_linear_add_": 1, "nf4_linear_transposed_add_": 1,
    "blockwise_linear": 0, "blockwise_linear_transposed": 0,
}  # fmt: skip
_PART_OF = {"linear": "dense_linears"}  # a ledger sees ops without a kernel by their parts
_OTHER_FORMATS = {8: "int8 product", 3: "nf3 product"}  # by the bits of a blockwise format
_NORMS = {"rms_norm", "rms_norm_backward", "native_layer_norm", "native_layer_norm_backward"}
_LOSS = {"cross_entropy_", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward"}


@dataclass(frozen=True)
class Kind:
    """Calls that do the same: `name` is the sort of work, the rest is of one call."""

    # product, nf4 product, int8 product, nf3 product, attention, norm, loss, embedding, optimiser, copy, elementwise
    name: str
    op: str
    dtype: str
    flops: int
    read: int  # bytes
    written: int  # bytes


@dataclass(frozen=True)
class Counts:
    """The work of a step: how often each `Kind` of call is made."""

    calls_of: Mapping[Kind, int]

    def _sum(self, what: str) -> dict[str, int]:
        sums: dict[str, int] = {}
        for kind, calls in self.calls_of.items():
            name = f"{kind.name} {kind.dtype}" if kind.name.endswith("product") else kind.name
            sums[name] = sums.get(name, 0) + calls * (getattr(kind, what) if what else 1)
        return sums

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations by kind of work (a multiplication and an addition are two); products by type."""
        return self._sum("flops")

    @property
    def read(self) -> dict[str, int]:
        """Bytes read by kind of work, as if nothing stayed in a cache."""
        return self._sum("read")

    @property
    def written(self) -> dict[str, int]:
        """Bytes written by kind of work."""
        return self._sum("written")

    @property
    def calls(self) -> dict[str, int]:
        """Calls by kind of work."""
        return self._sum("")

    @staticmethod
    def sum(parts: Iterable[tuple[Mapping[Kind, int], int]]) -> Counts:
        """Parts, each with how often it is done."""
        total: dict[Kind, int] = {}
        for part, times in parts:
            for kind, calls in part.items():
                total[kind] = total.get(kind, 0) + times * calls
        return Counts({kind: calls for kind, calls in total.items() if calls})


def extrapolate(small: Mapping[Kind, int], large: Mapping[Kind, int], times: int) -> dict[Kind, int]:
    """The work of small + times · (large - small): calls of the same kind grow in number, or else in size."""
    found = {kind: small[kind] + times * (large[kind] - small[kind]) for kind in small.keys() & large.keys()}
    sums: dict[tuple[str, str, str], list[list[int]]] = {}
    for number, side in enumerate((small, large)):
        for kind, calls in side.items():
            if kind not in found:
                both = sums.setdefault((kind.name, kind.op, kind.dtype), [[0] * 4, [0] * 4])
                for i, each in enumerate((1, kind.flops, kind.read, kind.written)):
                    both[number][i] += calls * each
    for key, both in sums.items():
        calls, *sizes = (a + times * (b - a) for a, b in zip(*both, strict=True))
        found[Kind(*key, *(size // max(calls, 1) for size in sizes))] = calls
    return found


# Neither work nor a view by its schema.
_NOTHING = {"device", "detach", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


def of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Iterable[Any]) -> Iterator[tuple[Kind, int]]:
    """The calls that an operation counts as: none for views, one a tensor for lists (`_foreach_…`, `_fused_…`)."""
    name = func._schema.name.rpartition("::")[2]
    outputs = [t for t in made if isinstance(t, Tensor)]
    if func.is_view or name in _NOTHING:
        return
    if name.startswith(("_foreach_", "_fused_")):
        yield from _of_lists(name, func, args, outputs)
        return
    inputs = list(_tensors(args))
    first = outputs[0] if outputs else inputs[0] if inputs else None
    if first is None:
        return
    written = outputs if outputs else inputs[:1]
    kind = _OTHER_FORMATS[args[8]] if name.startswith("blockwise_linear") else _name(name)
    flops = _flops(func, name, args, kwargs, outputs)
    read = sum(map(_bytes, inputs))
    if kind == "embedding":
        read = sum(map(_bytes, written))
    op = _PART_OF.get(name, name)
    yield Kind(kind, op, _dtype(inputs, first), flops, read, sum(map(_bytes, written))), 1


def _of_lists(name: str, func: Any, args: tuple[Any, ...], outputs: list[Tensor]) -> Iterator[tuple[Kind, int]]:
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if not lists:
        return
    writes = 3 if name.startswith("_fused_adam") else 1  # parameter and both moments
    for number, first in enumerate(lists[0]):
        read = sum(_bytes(each[number]) for each in lists if number < len(each))
        kind = "optimiser" if name.startswith("_fused_") else "elementwise"
        flops = first.numel() * (12 if name.startswith("_fused_adam") else 1)
        written = writes * _bytes(first) if func._schema.is_mutable else 4
        yield Kind(kind, name, _short(first.dtype), flops, read, written), 1


def _name(name: str) -> str:
    if name in _QUANTISED or name in ("nf4_linears", "nf4_linear_with"):
        return "nf4 product"
    if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm", "linear", "dense_linears"):
        return "product"
    if "attention" in name:
        return "attention"
    if name in _NORMS:
        return "norm"
    if name in _LOSS:
        return "loss"
    if name in ("embedding", "index_select", "gather"):
        return "embedding"
    if name in ("copy_", "_to_copy", "clone", "cat", "fill_", "zero_", "zeros", "zeros_like", "new_zeros"):
        return "copy"
    return "elementwise"


def _flops(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> int:
    if name in _QUANTISED:
        at = _QUANTISED[name]
        rows: int = args[at].numel() // args[at].shape[-1]
        weights: int = math.prod(args[at + 5])
        return 2 * rows * weights
    if name in ("nf4_linears", "nf4_linear_with", "linear", "dense_linears"):
        width: int = args[0].shape[-1]
        return sum(2 * y.numel() * width for y in outputs)
    if name == "addmm_":
        depth: int = args[1].shape[1]
        return 2 * outputs[0].numel() * depth
    if name in ("attention", "attention_backward"):
        products = 5 if name == "attention_backward" else 2
        q: Tensor = args[1 if name == "attention_backward" else 0]
        pairs: int = _pairs(args[-3], args[-1])
        return products * 2 * pairs * q.shape[1] * q.shape[2]
    if func._overloadpacket in flop_registry:
        out = outputs[0] if len(outputs) == 1 else tuple(outputs)
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    return sum(t.numel() for t in outputs)


def _pairs(starts: list[int], window: int) -> int:
    """Queries times the keys each sees, in causal sequences."""
    total = 0
    for start, stop in itertools.pairwise(starts):
        length = stop - start
        seen = min(window or length, length)
        total += seen * (seen + 1) // 2 + (length - seen) * seen
    return total


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(inputs: list[Tensor], first: Tensor) -> str:
    """The type of the arithmetic: that of the first floating-point tensor."""
    return _short(next((t.dtype for t in (*inputs, first) if t.is_floating_point()), first.dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
