"""The compiled CPU backend: the ops of ops.py over `_cpu`, where the package was built with a C++ compiler.

Bit for bit the reference's results for quantising and dequantising, on every instruction set. Threads are those of
torch (`torch.set_num_threads`, OMP_NUM_THREADS): the extension borrows the OpenMP runtime that torch has loaded.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections.abc import Sequence
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from twinlora.errors import BackendError
from twinlora.numerics import attention as reference_attention
from twinlora.numerics import elementwise, reference
from twinlora.numerics.nf4 import codebook, dynamic_map, midpoints

_native: ModuleType | None
try:
    _native = import_module("twinlora.numerics._cpu")
except ImportError:
    _native = None

__all__ = [
    "FEW_LORA_ROWS", "OPS", "add_lora", "attention_work", "extension", "has_blocks", "lora_entry", "multiply_adapted",
    "path", "paths", "runtime", "step_tokens", "use_path",
]  # fmt: skip

OPS = (
    "nf4_quantize", "scales_quantize", "nf4_dequantize", "nf4_linear", "nf4_linears",
    "nf4_linear_transposed", "blockwise_dequantize", "blockwise_linear", "blockwise_linear_transposed", "dense_linears",
    "attention", "attention_backward", "attention_step", "grouped_lora_",
    "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "cross_entropy_",
)  # fmt: skip

# How many of the first arguments must be bfloat16 for the kernels between the products.
_BFLOAT16 = {"rms_norm": 2, "rms_norm_backward": 3, "swiglu": 2, "swiglu_backward": 3, "cross_entropy_": 1}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FEW_DENSE_ROWS = 128  # more are bound by arithmetic, where oneDNN is as good
# Of products that oneDNN may give one thread.
_ROWS_OF_ONE_THREAD, _COLUMNS_OF_ONE_THREAD = range(257, 1536), range(512, 1025)
FEW_LORA_ROWS = 128  # of one adapter; more are a matter for GEMMs
_FEW_ROWS = 64  # up to here weights are decoded into the product or just before it; above, into a GEMM's buffer
_FEW_STEP_TOKENS = 64  # of one sequence
_NO_WINDOW = 1 << 40  # more keys than there are


@cache
def extension() -> Any:
    """The extension with its tables set, or None if the package was installed without it.

    Raises BackendError if its sources lie here and are others than it was built from.
    """
    if _native is not None:
        _require_current(_native, Path(__file__).parent / "csrc")
        tables = (codebook(), midpoints(codebook()), dynamic_map(), midpoints(dynamic_map()), codebook(3))
        _native.set_tables(*(table.tolist() for table in tables))
    return _native


def _require_current(native: ModuleType, sources: Path) -> None:
    files = sorted((file for file in sources.glob("*") if file.suffix in (".cpp", ".hpp")), key=lambda file: file.name)
    digests = "".join(sha256(file.read_bytes()).hexdigest() for file in files)
    if files and getattr(native, "sources", None) != sha256(digests.encode()).hexdigest():
        raise BackendError(
            f"the compiled kernels {native.__file__} were built from other sources than those in {sources}: build them "
            "again with `pip install --editable .`"
        )


def paths() -> list[str]:
    """Instruction-set paths that this processor has, the best first; empty without the extension."""
    return list(extension().paths()) if extension() else []


def use_path(name: str) -> None:
    """Compute on this path from now on (the best is chosen at start). Raises ValueError for one that is not here."""
    extension().use_path(name)


def has_blocks() -> bool:
    """Whether the path in use has the kernels between the products: bfloat16, with AVX512-BF16."""
    return bool(extension().has_blocks())


def path() -> str:
    """The path in use."""
    return str(extension().path())


def runtime() -> str:
    """File name of the OpenMP runtime whose threads are used; empty if there is none, then one thread computes."""
    return str(extension().runtime())


def nf4_quantize(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    flat = weight.contiguous().view(-1)
    count = flat.numel()
    packed = torch.empty((count + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-count // block_size), dtype=torch.float32)
    extension().quantize(
        flat.data_ptr(), _TYPES[flat.dtype], count, block_size, packed.data_ptr(), scales.data_ptr(), _threads()
    )
    return packed, scales


def scales_quantize(absmax: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """See ops.py."""
    absmax = absmax.contiguous()
    count = absmax.numel()
    offset = absmax.mean()  # torch's own order of summation: the same bits as the reference
    codes = torch.empty(count, dtype=torch.uint8)
    nested = torch.empty(-(-count // block_size), dtype=torch.float32)
    extension().quantize_scales(
        absmax.data_ptr(), offset.item(), count, block_size, codes.data_ptr(), nested.data_ptr(), _threads()
    )
    return codes, nested, offset


def nf4_dequantize(
    packed: Tensor,
    scales: Tensor,
    nested_scales: Tensor | None,
    nested_offset: Tensor | None,
    shape: list[int],
    block_size: int,
    nested_block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """See ops.py."""
    out = torch.empty(shape, dtype=dtype)
    _decode(out, packed, scales, nested_scales, nested_offset, block_size, nested_block_size)
    return out


def _decode(
    out: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, block: int, nested_block: int, bits: int = 4
) -> None:
    """Write the weight into `out`, whose shape and type say how much and as what."""
    where = _pointers(packed, scales, ns, no, nested_block)
    extension().dequantize(*where, out.numel(), block, bits, _TYPES[out.dtype], out.data_ptr(), _threads())


def _pointers(
    packed: Tensor, scales: Tensor, nested_scales: Tensor | None, nested_offset: Tensor | None, nested_block_size: int
) -> tuple[int, int, int, float, int]:
    """Addresses as the extension takes them: packed, scales, nested scales or 0, offset, nested block size."""
    assert packed.is_contiguous()
    assert scales.is_contiguous()
    if nested_scales is None or nested_offset is None:
        return packed.data_ptr(), scales.data_ptr(), 0, 0.0, 1
    return packed.data_ptr(), scales.data_ptr(), nested_scales.data_ptr(), nested_offset.item(), nested_block_size


_buffers = threading.local()


def _weight(shape: list[int], dtype: torch.dtype, *quant: Any) -> Tensor:
    """The weight in 16 or 32 bit, in a buffer that the thread's next call overwrites.

    A fresh tensor for each layer would cost more in page faults than the decoding itself.
    """
    count = shape[0] * shape[1]
    kept: dict[torch.dtype, Tensor] = _buffers.__dict__.setdefault("by_dtype", {})
    if dtype not in kept or kept[dtype].numel() < count:
        kept[dtype] = torch.empty(count, dtype=dtype)
    weight = kept[dtype][:count].view(shape)
    _decode(weight, *quant)
    return weight


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., K] @ matrix [K, N] -> [..., N]."""
    k, n = matrix.shape
    rows = x.numel() // max(k, 1)
    if rows not in _ROWS_OF_ONE_THREAD or n not in _COLUMNS_OF_ONE_THREAD or not _parts_columns(x, matrix):
        return x @ matrix
    _hand_over_product()
    y = x.new_empty(*x.shape[:-1], n)
    x = x.contiguous()
    extension().multiply_columns(x.data_ptr(), matrix.data_ptr(), y.data_ptr(), rows, k, n, matrix.stride(), _threads())
    return y


def _parts_columns(x: Tensor, matrix: Tensor) -> bool:
    """Whether each thread gets columns of its own: oneDNN 3.12 takes one thread for many a product on AMX where it has
    two (where it has more it takes all), since it holds two cores that share an operand for slower than one."""
    bfloat16 = x.dtype == matrix.dtype == torch.bfloat16
    return bfloat16 and _threads() == 2 and path() == "amx-bf16"


@cache
def _hand_over_product() -> None:
    """Hand torch's product over to the extension, which does not link to torch."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    names = ("aoti_torch_create_tensor_from_blob", "aoti_torch_cpu_mm_out", "aoti_torch_delete_tensor_object")
    addresses = [ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in names]
    extension().set_product(*addresses, library.aoti_torch_dtype_bfloat16(), library.aoti_torch_device_type_cpu())


def nf4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], block: int, nested_block: int
) -> Tensor:
    """See ops.py."""
    if has_few_rows(x, shape[1], block):
        return _multiply_rows(x, [(packed, scales, ns, no)], [shape[0]], block, nested_block)[0]
    return _product(x, _weight(shape, x.dtype, packed, scales, ns, no, block, nested_block).T)


def nf4_linears(x: Tensor, tensors: list[Tensor], rows: list[int], block: int, nested_block: int) -> list[Tensor]:
    """See ops.py."""
    weights = reference.by_weight(tensors, len(rows))
    if has_few_rows(x, x.shape[-1], block):
        return _multiply_rows(x, weights, rows, block, nested_block)
    shapes = ([n, x.shape[-1]] for n in rows)
    return [
        nf4_linear(x, packed, scales, ns, no, shape, block, nested_block)
        for (packed, scales, ns, no), shape in zip(weights, shapes, strict=True)
    ]


def has_few_rows(x: Tensor, k: int, block: int) -> bool:
    """Whether x [..., k] is multiplied without decoding the weight into a buffer first."""
    return x.numel() <= _FEW_ROWS * k and x.dtype == torch.bfloat16 and block >= 64 and k % block == 0


def _multiply_rows(
    x: Tensor, weights: list[reference.Weight], rows: list[int], block: int, nested_block: int
) -> list[Tensor]:
    x = x.contiguous()
    k = x.shape[-1]
    ys = [x.new_empty(*x.shape[:-1], n) for n in rows]
    described = [
        (*_pointers(packed, scales, ns, no, nested_block), n, y.data_ptr())
        for (packed, scales, ns, no), n, y in zip(weights, rows, ys, strict=True)
    ]
    extension().multiply_rows(x.data_ptr(), described, x.numel() // k, k, block, _threads())
    return ys


def nf4_linear_transposed(
    dy: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], block: int, nested_block: int
) -> Tensor:
    """See ops.py."""
    return _product(dy, _weight(shape, dy.dtype, packed, scales, ns, no, block, nested_block))


def blockwise_dequantize(
    packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], block: int, nested_block: int, bits: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See ops.py."""
    out = torch.empty(shape, dtype=dtype)
    _decode(out, packed, scales, ns, no, block, nested_block, bits)
    return out


def blockwise_linear(
    x: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], *layout: int
) -> Tensor:
    """See ops.py. Decoded whole into a kept buffer, for few rows too."""
    return _product(x, _weight(shape, x.dtype, packed, scales, ns, no, *layout).T)


def blockwise_linear_transposed(
    dy: Tensor, packed: Tensor, scales: Tensor, ns: Any, no: Any, shape: list[int], *layout: int
) -> Tensor:
    """See ops.py."""
    return _product(dy, _weight(shape, dy.dtype, packed, scales, ns, no, *layout))


def dense_linears(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """See ops.py. Few rows are bound by reading the weights, which oneDNN does at half the rate."""
    if not _few_dense_rows(x, weights):
        return [_product(x, weight.T) for weight in weights]
    return _multiply_dense(x, weights, [(0, 0)] * len(weights), None)


def _multiply_dense(
    x: Tensor, weights: Sequence[Tensor], tables: Sequence[tuple[int, int]], route: Tensor | None
) -> list[Tensor]:
    x = x.contiguous()
    *shape, k = x.shape
    ys, layers, addresses = [], [], []
    for weight, (table, size) in zip(weights, tables, strict=True):
        n = weight.shape[0]
        y = x.new_empty((*shape, n))
        ys.append(y)
        layers.append((y.data_ptr(), n, table, size))
        addresses.append(weight.data_ptr())
    at, count = (0, 0) if route is None else (route.data_ptr(), len(route))
    extension().multiply_dense(x.data_ptr(), addresses, layers, at, count, x.numel() // k, k, _threads())
    return ys


def _few_dense_rows(x: Tensor, weights: Sequence[Tensor]) -> bool:
    k = x.shape[-1]
    if not (0 < x.numel() <= _FEW_DENSE_ROWS * k and k % 64 == 0 and x.dtype == torch.bfloat16):
        return False
    for weight in weights:  # no `all`, which costs a microsecond in every layer
        if weight.dtype != torch.bfloat16 or weight.shape[1] != k or not weight.is_contiguous():
            return False
    return bool(extension().has_dense())


def takes(op: str, *args: Any) -> bool:
    """Whether a kernel of ours computes `op` with these arguments, and not the reference."""
    if op == "dense_linears":
        return _few_dense_rows(*args)
    if op.startswith("attention"):
        q, cos = (args[1], args[4]) if op == "attention_backward" else (args[0], args[3])
        return _attends(q, cos) and (op != "attention_step" or args[5].dtype == q.dtype)
    if op == "grouped_lora_":
        y, x, shrinks, expands, _, starts = args
        few = all(stop - start <= FEW_LORA_ROWS for start, stop in itertools.pairwise(starts))
        factors = (*shrinks, *(b.T for b in expands))
        return few and _fits(y, x, *factors) and all(factor.is_contiguous() for factor in factors)
    if op in _BFLOAT16:
        return _fits(*args[: _BFLOAT16[op]]) and (op != "cross_entropy_" or args[0].is_contiguous())
    return op in OPS


def _attends(q: Tensor, cos: Tensor | None) -> bool:
    """Whether the kernels take it: bfloat16, heads of a multiple of 32, with AVX512-BF16."""
    size = q.shape[-1]
    same = q.dtype == torch.bfloat16 and (cos is None or (cos.dtype == torch.bfloat16 and cos.shape[-1] == size))
    return same and size % 32 == 0 and size <= 256 and extension().has_blocks()


def step_tokens(q: Tensor, cos: Tensor | None, keys: Tensor) -> int:
    """See ops.py; more tokens read the cache so often that a GEMM is faster."""
    return _FEW_STEP_TOKENS if _attends(q, cos) and keys.dtype == q.dtype else 1


def _by_token(x: Tensor) -> Tensor:
    """x [T, heads, D] whose tokens may lie apart, but whose heads lie together."""
    return x if x.is_contiguous() or (x.stride(2) == 1 and x.stride(1) == x.shape[2]) else x.contiguous()


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
    if not _attends(q, cos):
        return reference_attention.attention(q, k, v, cos, sin, starts, scale, window)
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)
    _attend(partial(extension().attend, False), (q, k, v, cos, sin), (out, lse), (starts,), scale, window)
    return out, lse


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
    if not _attends(q, cos):
        return reference_attention.attention_backward(dout, q, k, v, cos, sin, out, lse, starts, scale, window)
    gradients = (
        torch.empty(q.shape, dtype=q.dtype),
        torch.empty(k.shape, dtype=q.dtype),
        torch.empty(v.shape, dtype=q.dtype),
    )
    rest = (out, lse, dout.contiguous(), *gradients)
    _attend(partial(extension().attend, True), (q, k, v, cos, sin), rest, (starts,), scale, window)
    return gradients


def attention_work(
    starts: list[int], heads: int, kv_heads: int, size: int, window: int, threads: int, *, backward: bool
) -> tuple[list[list[int]], int]:
    """How the kernels cut a call, and the bytes that they keep for parts of dK and dV beside each thread's buffers.

    Of each item of work: sequence, query heads [first, last), queries [first, last), keys. The items do not depend
    on `threads`.
    """
    items, parts = extension().attention_work(backward, starts, heads, kv_heads, size, window or _NO_WINDOW, threads)
    return items, parts


def _attend(
    kernel: Any,
    heads: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    rest: tuple[Tensor, ...],
    where: tuple[Any, ...],
    scale: float,
    window: int,
) -> None:
    """Call `kernel`; `where` says what the sequences are, in its own terms."""
    q, k, v, cos, sin = heads
    q, k, v = _by_token(q), _by_token(k), _by_token(v)
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    pointers = [0 if x is None else x.data_ptr() for x in (q, k, v, cos, sin, *rest)]
    strides = [q.stride(0), k.stride(0), v.stride(0)]
    kernel(pointers, strides, *where, q.shape[1], k.shape[1], q.shape[2], scale, window or _NO_WINDOW, _threads())


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
    if not _attends(q, cos) or keys.dtype != q.dtype:
        return reference_attention.attention_step(q, k, v, cos, sin, keys, values, rows, lengths, scale, window)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert max(lengths) < keys.shape[2]
    assert max(rows) < keys.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    where = (rows, lengths, keys.shape[2])
    _attend(extension().attend_step, (q, k, v, cos, sin), (out, keys, values), where, scale, window)
    return out


def _fits(*tensors: Tensor) -> bool:
    """Whether the kernels between the products take them: bfloat16, with AVX512-BF16."""
    for x in tensors:  # no `all`, which costs a microsecond in every layer
        if x.dtype != torch.bfloat16:
            return False
    return bool(extension().has_blocks())


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    if not _fits(x, weight):
        return elementwise.rms_norm(x, weight, eps, offset, wide)
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    y, rstd = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
    pointers = (y.data_ptr(), rstd.data_ptr())
    rows = rstd.numel()
    extension().rms_norm(x.data_ptr(), weight.data_ptr(), rows, width, eps, offset, wide, *pointers, _threads())
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """See ops.py."""
    if not _fits(dy, x, weight):
        return elementwise.rms_norm_backward(dy, x, weight, rstd, offset)
    tensors = [t.contiguous() for t in (dy, x, weight, rstd)]
    dx = torch.empty_like(tensors[1])
    pointers = [t.data_ptr() for t in tensors]
    extension().rms_norm_backward(*pointers, rstd.numel(), x.shape[-1], offset, dx.data_ptr(), _threads())
    return dx


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ops.py."""
    if not _fits(gate, up):
        return elementwise.swiglu(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    extension().swiglu(gate.data_ptr(), up.data_ptr(), gate.numel(), out.data_ptr(), _threads())
    return out


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    if not _fits(dy, gate, up):
        return elementwise.swiglu_backward(dy, gate, up)
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate), torch.empty_like(up)
    pointers = [t.data_ptr() for t in (dy, gate, up)]
    extension().swiglu_backward(*pointers, gate.numel(), *(t.data_ptr() for t in out), _threads())
    return out


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """See ops.py."""
    if not _fits(logits) or not logits.is_contiguous():
        return elementwise.cross_entropy_(logits, labels)
    labels = labels.contiguous()
    losses = torch.empty(labels.shape, dtype=torch.float32)
    extension().cross_entropy(logits.data_ptr(), labels.data_ptr(), *logits.shape, losses.data_ptr(), _threads())
    return losses


def grouped_lora_(y: Tensor, x: Tensor, *adapters: Any) -> None:
    """See ops.py."""
    if not takes("grouped_lora_", y, x, *adapters):
        reference.grouped_lora_(y, x, *adapters)
        return
    shrinks, expands, scales, starts = adapters
    table = torch.tensor([lora_entry(*each) for each in zip(shrinks, expands, scales, strict=True)]).view(-1, 4)
    route = [[number, *rows] for number, rows in enumerate(itertools.pairwise(starts))]
    add_lora([y], x, [(table.data_ptr(), len(table))], torch.tensor(route).view(-1, 3))


def lora_entry(a: Tensor, b: Tensor, scale: float) -> list[int]:
    """A row of a table for `add_lora`, valid while the tensors live: bfloat16, A and the transpose of B contiguous."""
    (bits,) = struct.unpack("q", struct.pack("d", scale))
    return [a.data_ptr(), b.data_ptr(), len(a), bits]


def add_lora(ys: Sequence[Tensor], x: Tensor, tables: Sequence[tuple[int, int]], route: Tensor) -> None:
    """x [..., K] of bfloat16 is added to every layer's y [..., N], through the adapters in the layer's table.

    Tables are the address and the number of rows of `lora_entry`, or of zeros; route [n, 3] has adapters and where
    their rows start and stop.
    """
    x = x.contiguous()
    layers = []
    for y, table in zip(ys, tables, strict=True):
        assert y.is_contiguous()
        assert y.dtype == x.dtype == torch.bfloat16
        layers.append((y.data_ptr(), y.shape[-1], *table))
    extension().grouped_lora(layers, x.data_ptr(), route.data_ptr(), len(route), x.shape[-1], _threads())


def multiply_adapted(
    x: Tensor, weights: Sequence[Tensor], tables: Sequence[tuple[int, int]], route: Tensor
) -> list[Tensor] | None:
    """`dense_linears`, and what `add_lora` adds; adapters' weights come from memory while the others are multiplied.

    None, and nothing done, where oneDNN multiplies.
    """
    return _multiply_dense(x, weights, tables, route) if _few_dense_rows(x, weights) else None


_threads = torch.get_num_threads
