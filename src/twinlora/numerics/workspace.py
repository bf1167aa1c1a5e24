"""Memory that an op takes inside, beside its outputs: what a planner adds while the op runs.

Of the C++ kernels it is what csrc allocates (they keep their buffers for the next call, a set for each thread, so that
the largest call so far decides), of the GPU's what triton/shapes.py says, of plain PyTorch what the reference itself
does when it runs on tensors without data. Not counted: tables of a few kB, and what oneDNN or cuBLAS take for
a product (oneDNN at most 2 MB a thread, as measured up to 4,096 × 11,008).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from twinlora.numerics import attention, cpu, cuda, elementwise, reference, triton

__all__ = ["WEIGHT", "Workspace", "has_kernel", "workspace"]

WEIGHT = "weight "  # buffers of decoded weights, one for each type, are torch's; the others are C++'s

_BLOCK, _STEP_PAIRS, _STEP_DEPTH, _QUERIES = 32, 512, 32, 256  # csrc/tiles.hpp, attention_blocks.hpp
_PANEL, _FROM_DECODED = 16, 17  # csrc/avx512.cpp
_TILE, _TILE_DEPTH, _TILE_CHUNK, _FROM_TILES = 16, 32, 256, 3  # csrc/amx.cpp
_GRAIN, _ELEMENT_GRAIN = 1 << 14, 1 << 13  # csrc/module.cpp

_REFERENCE = vars(reference) | vars(attention) | vars(elementwise)


@dataclass(frozen=True)
class Workspace:
    """Bytes beside an op's outputs: while it runs, and in buffers that it keeps for its next call, by their name."""

    passing: int = 0
    kept: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """At the op's peak."""
        return self.passing + sum(self.kept.values())


def has_kernel(op: str, *args: Any, target: str) -> bool:
    """Whether a kernel of `target` computes `op` with these arguments, and not the reference."""
    if target == "cuda":
        return op in triton.OPS or (op in cuda.OPS and cuda.takes(op, *args))
    return bool(cpu.paths()) and cpu.takes(op, *args)


def workspace(op: str, *args: Any, target: str = "cpu") -> Workspace:
    """What `op` takes beside its outputs on `target` (`cpu` or `cuda`).

    Arguments as for the op; fake tensors will do. For the CPU: on the threads that are in use here.
    """
    if not has_kernel(op, *args, target=target):
        return Workspace(reference_bytes(_REFERENCE[op], args))
    if target == "cpu":
        return _of_cpu(op, args, torch.get_num_threads())
    if op in triton.OPS:
        return Workspace(kept={f"{WEIGHT}panels": triton.workspace_bytes(op, *args)})
    return Workspace(cuda.workspace_bytes(op, *args))


def _of_cpu(op: str, args: tuple[Any, ...], threads: int) -> Workspace:
    """Of an op that cpu.py hands to its kernel."""
    x: Tensor = args[0]
    if op == "nf4_linears":
        rows, k, block = args[2], x.shape[-1], args[3]
        return _of_product(x, sum(rows), max(rows), k, block, threads)
    if op == "nf4_linear":
        (n, k), block = args[5], args[6]
        return _of_product(x, n, n, k, block, threads)
    if op in ("nf4_linear_transposed", "blockwise_linear", "blockwise_linear_transposed"):
        n, k = args[5]
        return Workspace(kept=_decoded(x, n * k))
    if op == "dense_linears":
        n, k = sum(len(weight) for weight in args[1]), x.shape[-1]
        return Workspace(copy_bytes(x), few_rows_bytes(op, x.numel() // k, n, k, 0, threads, cpu.path()))
    if op == "attention_step":
        return Workspace(kept={op: attention_step_bytes(args[8], args[10], x.shape, args[1].shape[1], threads)})
    if op in ("attention", "attention_backward"):
        backward = op == "attention_backward"
        heads, tables, starts = (args[1:4], args[4:6], args[8]) if backward else (args[:3], args[3:5], args[5])
        copied: int = sum(t.nbytes for t in heads if t.stride(2) != 1 or t.stride(1) != t.shape[2])
        copied += copy_bytes(*tables, *((x,) if backward else ()))
        shape = heads[0].shape[1], heads[1].shape[1], heads[0].shape[2]
        return Workspace(copied, attention_bytes(starts, *shape, args[-1], threads, backward=backward))
    return Workspace(copy_bytes(*(t for t in args if isinstance(t, Tensor))))  # between the products, and codes


def _of_product(x: Tensor, n: int, largest: int, k: int, block: int, threads: int) -> Workspace:
    """Of weights with n rows in all, or else of the buffer into which they are decoded one by one."""
    if not cpu.has_few_rows(x, k, block):
        return Workspace(kept=_decoded(x, largest * k))
    return Workspace(copy_bytes(x), few_rows_bytes("multiply_rows", x.numel() // k, n, k, block, threads, cpu.path()))


def _decoded(x: Tensor, count: int) -> dict[str, int]:
    """The buffer of a weight of `count` values in x's type."""
    return {f"{WEIGHT}{x.dtype}": count * x.dtype.itemsize}


def _threads_used(threads: int, total: int, grain: int) -> int:
    return max(1, min(threads, total // max(grain, 1)))


def few_rows_bytes(name: str, rows: int, n: int, k: int, block: int, threads: int, path: str) -> dict[str, int]:
    """Of `multiply_rows` (and, with block 0, of `multiply_dense`) for x [rows, k] and n rows of weights."""
    used = _threads_used(threads, n, max(1, _GRAIN // k))
    if path not in ("avx512-bf16", "amx-bf16"):
        return {name: used * 2 * k}  # one row, decoded
    blocks = k // block if block else 0
    if path == "amx-bf16" and (not block or rows >= _FROM_TILES):
        chunk = k if rows > 2 * _TILE or not block else min(k, _rounded(_TILE_CHUNK, block))
        decoded = 2 * _TILE * (4 * blocks + 2 * (chunk + _TILE_DEPTH)) if block else 0
        return {f"{name} tiles": used * (2 * _rounded(rows, _TILE) * k + decoded)}
    decoded = 2 * _PANEL * (k + 64) if block and rows >= _FROM_DECODED else 0
    return {name: used * (4 * _PANEL * blocks + 2 * rows * k + decoded)}


def _rounded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def attention_bytes(
    starts: list[int], heads: int, kv_heads: int, size: int, window: int, threads: int, *, backward: bool
) -> dict[str, int]:
    """Of the attention kernels: a thread's buffers, each as large as an item of work needs it, and dK and dV."""
    items, parts = cpu.attention_work(starts, heads, kv_heads, size, window, threads, backward=backward)
    used = min(threads, len(items))
    if not backward:
        return {"attention": used * _largest({_forward_buffers(keys, size) for *_, keys in items})}
    alone = [keys for _, first, last, *_, keys in items if last - first == heads // kv_heads]
    return {
        "attention_backward": used * _largest({_backward_buffers(k, stop - q, size) for *_, q, stop, k in items}),
        "attention_backward sums": used * 4 * 2 * max(alone, default=0) * size,
        "attention_backward parts": parts,
    }


def _largest(items: set[tuple[int, ...]]) -> int:
    """All buffers, each as large as the item that needs most of it."""
    return sum(map(max, zip(*items, strict=True)))


def _forward_buffers(keys: int, size: int) -> tuple[int, ...]:
    """Bytes of each buffer of an item of work that reads so many keys, a multiple of 32."""
    panel, row = 4 * size // _STEP_DEPTH * _STEP_PAIRS, 4 * _BLOCK * size
    return 3 * 2 * keys * size, panel, 4 * keys // _BLOCK * _STEP_PAIRS, 4 * keys * _BLOCK, row


def _backward_buffers(keys: int, queries: int, size: int) -> tuple[int, ...]:
    """As those, but for dK and dV."""
    blocks = min(-(-queries // _BLOCK), _QUERIES // _BLOCK)
    panels, scores = 4 * 4 * blocks * size // _STEP_DEPTH * _STEP_PAIRS, 4 * blocks * keys // _BLOCK * _STEP_PAIRS
    rows, strips = 2 * 2 * blocks * _BLOCK * size, 2 * 2 * _BLOCK * blocks * _BLOCK
    return 3 * 2 * keys * size, rows, strips, panels, scores, 4 * _BLOCK * size


def attention_step_bytes(lengths: list[int], window: int, q_shape: torch.Size, kv_heads: int, threads: int) -> int:
    """Of the kernel for one new token of each sequence, q [n, H, D]."""
    items, seen = len(lengths) * kv_heads, sum(lengths) + len(lengths)
    each = max(1, seen * q_shape[1] * q_shape[2] // items)
    longest = max(lengths) + 1
    scores = _rounded(min(longest, window or longest), 16)
    return _threads_used(threads, items, -(-_ELEMENT_GRAIN // each)) * 4 * scores


def reference_bytes(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """Of an op in plain PyTorch: its peak beyond its outputs, counted on tensors without data."""

    def without_data(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return [without_data(item) for item in value] if isinstance(value, (list, tuple)) else value

    with _disable_current_modes(), torch.no_grad():
        given = [without_data(value) for value in arguments]
        function(*given)  # tables that are kept for later calls exist now
        with _Peak() as mode:
            out = function(*given)
    made = [out] if isinstance(out, Tensor) else list(out or ())
    left = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in made}
    beyond: int = mode.peak - sum(left.values())
    return max(0, beyond)


class _Peak(TorchDispatchMode):
    """Counts live storages without data that were made inside."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[StorageWeakRef, int] = {}
        self._given: set[StorageWeakRef] = set()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((*args, *(kwargs or {}).values())):
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage not in self._live:
                self._given.add(storage)
        out = func(*args, **(kwargs or {}))
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        for tensor in _tensors((out,)):
            storage = StorageWeakRef(tensor.untyped_storage())
            if tensor.device.type == "meta" and storage not in self._given:
                self._live[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return out


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(tuple(value))
    return found


def copy_bytes(*tensors: Tensor | None) -> int:
    """Of contiguous copies of those that are not."""
    return sum(prod(t.shape) * t.dtype.itemsize for t in tensors if t is not None and not t.is_contiguous())
