"""Triton kernels for what lies between the products of a transformer block: rotation, norm, SwiGLU, loss, decoding.

Each is memory-bound and makes one pass: inputs are read once (the loss's logits twice), arithmetic is float32, results
are rounded once. Imported on first use, by `cuda.py`; importing it needs Triton.

Shape legend: T tokens, H query heads, K key/value heads, G = H / K, D head size, C capacity, n running sequences.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "cross_entropy_", "decode", "rms_norm", "rms_norm_backward", "rotate", "swiglu", "swiglu_backward",
]  # fmt: skip

_TILE = 4096  # elements that a program holds at once: 32 a thread with four warps
_SPLIT = 512  # keys that one program of `decode` walks
_KEYS_BYTES = 1 << 14  # of keys in hand at once: with what is fetched ahead, 72 KiB of shared memory


@triton.jit
def _rotate_kernel(
    x, y, cos, sin, heads, x_token, x_head, y_token, y_head, cos_token, sin_token,
    half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (at < half)
    source, target = x + token * x_token + head * x_head + at, y + token * y_token + head * y_head + at
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    c, s = cos + token * cos_token + at, sin + token * sin_token + at
    c1 = tl.load(c, mask=at < half, other=0.0).to(tl.float32)
    c2 = tl.load(c + half, mask=at < half, other=0.0).to(tl.float32)
    s1 = tl.load(s, mask=at < half, other=0.0).to(tl.float32)
    s2 = tl.load(s + half, mask=at < half, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * c1 + b * s2, b * c2 - a * s1
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    tl.store(target, first.to(y.dtype.element_ty), mask=mask)
    tl.store(target + half, second.to(y.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False, out: Tensor | None = None) -> Tensor:
    """x [T, heads, D] rotated by cos and sin [T, D], as `attention.rotate`; `out` may be x itself."""
    tokens, heads, size = x.shape
    x, cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    width = triton.next_power_of_2(size // 2)
    each = min(triton.next_power_of_2(heads), max(1, _TILE // 2 // width))
    _rotate_kernel[(tokens, triton.cdiv(heads, each))](
        x, y, cos, sin, heads, x.stride(0), x.stride(1), y.stride(0), y.stride(1), cos.stride(0), sin.stride(0),
        half=size // 2, HEADS=each, HALF=width, BACK=back,
    )  # fmt: skip
    return y


@triton.jit
def _norm_kernel(
    x, w, y, rstd, rows, x_row, width: tl.constexpr, eps, offset,
    WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (at < width)
    values = tl.load(x + row * x_row + at, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
    normal = values * scale[:, None]
    if not WIDE:
        normal = normal.to(x.dtype.element_ty).to(tl.float32)
    gain = tl.load(w + at, mask=at < width, other=0.0).to(tl.float32) + offset
    tl.store(y + row * width + at, (normal * gain).to(y.dtype.element_ty), mask=mask)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(rstd + number, scale, mask=number < rows)


@triton.jit
def _norm_backward_kernel(
    dy, x, w, rstd, dx, rows, dy_row, x_row, width: tl.constexpr, offset,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (at < width)
    scale = tl.load(rstd + row, mask=row < rows, other=0.0)
    normal = tl.load(x + row * x_row + at, mask=mask, other=0.0).to(tl.float32) * scale
    gain = tl.load(w + at, mask=at < width, other=0.0).to(tl.float32) + offset
    g = tl.load(dy + row * dy_row + at, mask=mask, other=0.0).to(tl.float32) * gain
    mean = tl.sum(g * normal, axis=1) / width
    tl.store(dx + row * width + at, ((g - normal * mean[:, None]) * scale).to(dx.dtype.element_ty), mask=mask)


def _by_row(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D]; rows may lie apart, as in a slice of a wider product."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _row_tiles(rows: int, width: int) -> tuple[int, int, int, int]:
    """Programs, rows of each, padded width, warps."""
    padded = triton.next_power_of_2(width)
    each = max(1, min(_TILE // padded, triton.next_power_of_2(rows)))
    return triton.cdiv(rows, each), each, padded, min(16, max(4, padded // 1024))


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    flat = _by_row(x)
    rows, width = flat.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    programs, each, padded, warps = _row_tiles(rows, width)
    _norm_kernel[(programs,)](
        flat, weight, y, rstd, rows, flat.stride(0), width, eps, offset,
        WIDE=wide, ROWS=each, WIDTH=padded, num_warps=warps,
    )  # fmt: skip
    return y, rstd


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    """See ops.py."""
    flat_dy, flat = _by_row(dy), _by_row(x)
    rows, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs, each, padded, warps = _row_tiles(rows, width)
    _norm_backward_kernel[(programs,)](
        flat_dy, flat, weight, rstd.contiguous(), dx, rows, flat_dy.stride(0), flat.stride(0), width, offset,
        ROWS=each, WIDTH=padded, num_warps=warps,
    )  # fmt: skip
    return dx


@triton.jit
def _swiglu_kernel(gate, up, y, gate_row, up_row, width, WIDTH: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = at < width
    g = tl.load(gate + row * gate_row + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * width + at, (g / (1.0 + tl.exp(-g)) * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dy, gate, up, d_gate, d_up, dy_row, gate_row, up_row, width, WIDTH: tl.constexpr
):  # fmt: skip
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = at < width
    d = tl.load(dy + row * dy_row + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(d_gate + row * width + at, (d * u * slope).to(d_gate.dtype.element_ty), mask=mask)
    tl.store(d_up + row * width + at, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=mask)


def _columns(width: int) -> tuple[int, int]:
    """Programs beside each other, and columns of each."""
    block = min(2048, triton.next_power_of_2(width))
    return triton.cdiv(width, block), block


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See ops.py."""
    g, u = _by_row(gate), _by_row(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    beside, block = _columns(g.shape[1])
    _swiglu_kernel[(g.shape[0], beside)](g, u, y, g.stride(0), u.stride(0), g.shape[1], WIDTH=block)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See ops.py."""
    d, g, u = _by_row(dy), _by_row(gate), _by_row(up)
    out = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate, up))
    beside, block = _columns(g.shape[1])
    _swiglu_backward_kernel[(g.shape[0], beside)](
        d, g, u, *out, d.stride(0), g.stride(0), u.stride(0), g.shape[1], WIDTH=block
    )
    return out[0], out[1]


@triton.jit
def _cross_entropy_kernel(logits, labels, losses, row_stride, width, WIDTH: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * row_stride
    label = tl.load(labels + tl.program_id(0))
    target = tl.load(row + label).to(tl.float32)
    top = float("-inf")
    total = 0.0
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        x = tl.load(row + at, mask=at < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), axis=0)
        top = new
    tl.store(losses + tl.program_id(0), tl.log(total) + top - target)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        x = tl.load(row + at, mask=at < width, other=float("-inf")).to(tl.float32)
        p = tl.exp(x - top) / total - tl.where(at == label, 1.0, 0.0)
        tl.store(row + at, p.to(logits.dtype.element_ty), mask=at < width)


def cross_entropy_(logits: Tensor, labels: Tensor) -> Tensor:
    """See ops.py. The last dimension of `logits` lies together."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    rows, width = logits.shape
    block = min(4096, triton.next_power_of_2(width))
    _cross_entropy_kernel[(rows,)](
        logits, labels.contiguous(), losses, logits.stride(0), width, WIDTH=block, num_warps=8
    )
    return losses


@triton.jit
def _decode_kernel(
    q, keys, values, rows, lengths, sums, tops, totals, scale, window, heads, capacity, q_row, splits,
    group: tl.constexpr, size: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    number, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    member, at = tl.arange(0, GROUP), tl.arange(0, SIZE)
    mask = (member < group)[:, None] & (at < size)[None, :]
    query = tl.load(q + number * q_row + (head * group + member[:, None]) * size + at[None, :], mask=mask, other=0.0)
    if EXACT:
        query = query.to(tl.float32)
    length = tl.load(lengths + number)
    low = tl.maximum(0, length - window)
    base = (tl.load(rows + number).to(tl.int64) * heads + head) * capacity * size
    top = tl.full((GROUP,), float("-inf"), tl.float32)
    total = tl.full((GROUP,), 0.0, tl.float32)
    out = tl.full((GROUP, SIZE), 0.0, tl.float32)
    for start in range(split * SPLIT, tl.minimum(length, (split + 1) * SPLIT), KEYS):
        key = start + tl.arange(0, KEYS)
        seen = (key < length) & (key >= low)
        place = base + key[:, None] * size + at[None, :]
        inside = seen[:, None] & (at < size)[None, :]
        k = tl.load(keys + place, mask=inside, other=0.0)
        v = tl.load(values + place, mask=inside, other=0.0)
        if EXACT:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(query, k.trans(1, 0), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, axis=1))
        # A block without a visible key leaves the maximum at -inf: nothing may be subtracted from itself there.
        known = tl.where(new == float("-inf"), 0.0, new)
        p, fade = tl.exp(scores - known[:, None]), tl.exp(top - known)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, axis=1)
        top = new
    place = ((number * heads + head) * splits + split) * group + member
    tl.store(sums + place[:, None] * size + at[None, :], out, mask=mask)
    tl.store(tops + place, top, mask=member < group)
    tl.store(totals + place, total, mask=member < group)


def keys_at_once(size: int, itemsize: int) -> int:
    """Keys that a program of `decode` has in hand, for a padded head size and bytes of an element; at least 16."""
    return max(16, min(64, _KEYS_BYTES // (size * itemsize)))


def decode(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, lengths: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    """q [n, H, D], rotated, over the first lengths[i] keys of row rows[i] in keys, values [rows, K, C, D] -> [n, H, D].

    A sequence's keys are split among programs; what each found is put together here.
    """
    n, count, size = q.shape
    padded = max(16, triton.next_power_of_2(size))
    heads, capacity = keys.shape[1], keys.shape[2]
    group, splits = count // heads, triton.cdiv(longest, _SPLIT)
    sums = torch.empty(n, heads, splits, group, size, dtype=torch.float32, device=q.device)
    tops, totals = sums.new_empty(n, heads, splits, group), sums.new_empty(n, heads, splits, group)
    _decode_kernel[(n, heads, splits)](
        q, keys, values, rows, lengths, sums, tops, totals, scale, window or 1 << 30, heads, capacity,
        q.stride(0), splits,
        group=group, size=size, GROUP=max(16, triton.next_power_of_2(group)),
        SIZE=padded, KEYS=keys_at_once(padded, q.element_size()), SPLIT=_SPLIT,
        EXACT=not q.is_cuda,  # Triton's interpreter has no 16-bit products
    )  # fmt: skip
    weight = torch.exp(tops - tops.amax(dim=2, keepdim=True))
    out = (sums * weight[..., None]).sum(2) / (totals * weight).sum(2)[..., None]
    return out.view(n, count, size).to(q.dtype)
