"""Plain PyTorch for the attention ops: causal attention within sequences that lie side by side in one row of tokens.

Sequences are grouped by length, so that each group runs as one batched product on a [sequences, longest] grid: the fill
at the end of a row is behind every real query and the causal mask hides it, and its results are dropped. Queries run
in chunks, keys only as far as a chunk can see, and the backward pass recomputes the probabilities, so no square of a
whole long sequence is ever stored.

Shape legend: T tokens, S sequences of a group, L its longest, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["attention", "attention_backward", "attention_extend", "attention_step", "rotate"]

_CHUNK = 256  # queries per product
_WASTE = 1.3  # a group's longest sequence over its shortest


@dataclass(frozen=True)
class _Grids:
    """Index tensors between rows of [T · heads, D] and the grids of all groups, cells ordered [K, S, G, L]."""

    longest: list[int]  # per group
    gather: list[Tensor]  # per group: row of each cell; fill cells repeat their sequence's last token
    fill: list[Tensor]  # per group: the cells that hold no token
    back: Tensor  # [T · heads] cell of each row, groups one after another


@lru_cache(maxsize=8)  # all layers of a model ask for the same two
def _grids(starts: tuple[int, ...], heads: int, group: int, device: torch.device) -> _Grids:
    """The grids of `heads` heads, of which `group` share one key/value head."""
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    groups = _group_by_length(lengths)
    head = torch.arange(heads).view(-1, group)
    gather, fill, back = [], [], torch.empty(starts[-1], heads, dtype=torch.long)
    base = 0
    for members in groups:
        column = torch.arange(lengths[members[0]])
        first = torch.tensor([starts[i] for i in members])[:, None]
        size = torch.tensor([lengths[i] for i in members])[:, None]
        token = first + column.minimum(size - 1)  # [S, L]
        real = column < size
        cells = token[None, :, None] * heads + head[:, None, :, None]  # [K, S, G, L]
        number = torch.arange(cells.numel()).view(cells.shape)
        mask = real[None, :, None].expand(cells.shape)
        back.view(-1)[cells[mask]] = base + number[mask]
        gather.append(cells.reshape(-1).to(device))
        fill.append(number[~mask].to(device))
        base += cells.numel()
    return _Grids([lengths[members[0]] for members in groups], gather, fill, back.view(-1).to(device))


def _group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups of similar length, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= max(_WASTE * lengths[i], lengths[i] + 8):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _masked_scores(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled q [B, G, C, D] · k [B, N, D] plus an additive mask [C, N] -> float32 (or wider) [B, G, C, N]."""
    batch, groups, chunk, size = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    # Not in 16 bit: rounded scores would double the error of the loss (LOG.md).
    scores = torch.bmm(q.reshape(batch, groups * chunk, size).to(wide), k.transpose(1, 2).to(wide))
    return scores.view(batch, groups, chunk, -1).mul_(scale).add_(mask)


def _chunks(longest: int, window: int, device: torch.device, first: int = 0) -> list[tuple[int, int, int, Tensor]]:
    """(first query, past-last query, first visible key, additive mask) of each query chunk from query `first` on."""
    out = []
    for start in range(first, longest, _CHUNK):
        stop = min(start + _CHUNK, longest)
        low = max(0, start - window + 1) if window else 0
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(low, stop, device=device)[None]
        hidden = key > query
        if window:
            hidden |= key <= query - window
        out.append((start, stop, low, torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))))
    return out


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, *, back: bool = False) -> Tensor:
    """x [T, heads, D] rotated by cos and sin [T, D] (rotate-half), in float32 or wider; `back`: the transpose."""
    if cos is None or sin is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    values, cos, sin = x.to(wide), cos[:, None].to(wide), sin[:, None].to(wide)
    if back:
        first, second = (values * sin).chunk(2, dim=-1)
        turned = torch.cat([second, -first], dim=-1)
    else:
        first, second = values.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1) * sin
    return (values * cos + turned).to(x.dtype)


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
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    group = q.shape[1] // k.shape[1]
    wide = _grids(tuple(starts), q.shape[1], group, q.device)
    narrow = _grids(tuple(starts), k.shape[1], 1, q.device)
    outputs, sums = [], []
    for i, longest in enumerate(wide.longest):
        k3 = _rows(k, narrow.gather[i], -1, longest)
        v3 = _rows(v, narrow.gather[i], -1, longest)
        q4 = _rows(q, wide.gather[i], -1, group, longest)
        out = torch.empty_like(q4)
        lse = torch.empty(q4.shape[:3], dtype=torch.float32, device=q.device)
        for start, stop, low, mask in _chunks(longest, window, q.device):
            scores = _masked_scores(q4[:, :, start:stop], k3[:, low:stop], mask, scale)
            lse[:, :, start:stop] = torch.logsumexp(scores, dim=-1)
            p = torch.softmax(scores, dim=-1).to(q.dtype).flatten(1, 2)
            out[:, :, start:stop] = torch.bmm(p, v3[:, low:stop]).view(-1, group, stop - start, q.shape[-1])
        outputs.append(out.view(-1, q.shape[-1]))
        sums.append(lse.view(-1, 1))
    return _join(outputs, wide.back, q.shape), _join(sums, wide.back, q.shape[:2])


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
    """See ops.py. Gathers serve both ways: every token has exactly one cell."""
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    group, size = q.shape[1] // k.shape[1], q.shape[-1]
    wide = _grids(tuple(starts), q.shape[1], group, q.device)
    narrow = _grids(tuple(starts), k.shape[1], 1, q.device)
    exact = torch.promote_types(q.dtype, torch.float32)
    delta = (dout.to(exact) * out).sum(-1, keepdim=True)  # row sums of dP ∘ P
    dqs, dks, dvs = [], [], []
    for i, longest in enumerate(wide.longest):
        k3 = _rows(k, narrow.gather[i], -1, longest)
        v3 = _rows(v, narrow.gather[i], -1, longest)
        q4 = _rows(q, wide.gather[i], -1, group, longest)
        # Queries in fill cells must send no gradient to real keys.
        dout4 = _rows(dout, wide.gather[i], -1).index_fill_(0, wide.fill[i], 0).view(q4.shape)
        delta4 = _rows(delta, wide.gather[i], -1).index_fill_(0, wide.fill[i], 0).view(*q4.shape[:3], 1)
        dq4 = torch.empty_like(q4)
        dk3, dv3 = torch.zeros_like(k3, dtype=exact), torch.zeros_like(v3, dtype=exact)
        for start, stop, low, mask in _chunks(longest, window, q.device):
            flat = (q4.shape[0], group * (stop - start), -1)
            qc, do = q4[:, :, start:stop].reshape(flat), dout4[:, :, start:stop].reshape(flat)
            scores = _masked_scores(q4[:, :, start:stop], k3[:, low:stop], mask, scale)
            p = torch.softmax(scores, dim=-1).to(q.dtype).flatten(1, 2)
            dv3[:, low:stop] += torch.bmm(p.transpose(1, 2), do)
            dp = torch.bmm(do, v3[:, low:stop].transpose(1, 2)).to(exact)
            ds = dp.sub_(delta4[:, :, start:stop].reshape(flat)).mul_(p).mul_(scale).to(q.dtype)
            dq4[:, :, start:stop] = torch.bmm(ds, k3[:, low:stop]).view(-1, group, stop - start, size)
            dk3[:, low:stop] += torch.bmm(ds.transpose(1, 2), qc)
        dqs.append(dq4.view(-1, size))
        dks.append(dk3.to(k.dtype).view(-1, size))
        dvs.append(dv3.to(v.dtype).view(-1, size))
    dq, dk = _join(dqs, wide.back, q.shape), _join(dks, narrow.back, k.shape)
    return rotate(dq, cos, sin, back=True), rotate(dk, cos, sin, back=True), _join(dvs, narrow.back, v.shape)


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
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    group, outputs = q.shape[1] // k.shape[1], []
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        keys[row, :, length], values[row, :, length] = k[i], v[i]
        low = max(0, length + 1 - window) if window else 0
        wide = torch.promote_types(q.dtype, torch.float32)
        heads = q[i].view(-1, group, q.shape[-1]).to(wide)  # [K, G, D]
        scores = heads @ keys[row, :, low : length + 1].transpose(1, 2).to(wide) * scale
        p = torch.softmax(scores, dim=-1)
        outputs.append((p @ values[row, :, low : length + 1].to(wide)).flatten(0, 1).to(q.dtype))
    return torch.stack(outputs)


def attention_extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    row: int,
    length: int,
    scale: float,
    window: int,
) -> Tensor:
    """See ops.py."""
    total, group, size = length + q.shape[0], q.shape[1] // k.shape[1], q.shape[-1]
    keys[row, :, length:total] = rotate(k, cos, sin).transpose(0, 1)
    values[row, :, length:total] = v.transpose(0, 1)
    q4 = rotate(q, cos, sin).view(-1, k.shape[1], group, size).permute(1, 2, 0, 3)  # [K, G, T, D]
    out = torch.empty_like(q4)
    for start, stop, low, mask in _chunks(total, window, q.device, first=length):
        here = slice(start - length, stop - length)
        scores = _masked_scores(q4[:, :, here], keys[row, :, low:stop], mask, scale)
        p = torch.softmax(scores, dim=-1).to(q.dtype).flatten(1, 2)
        out[:, :, here] = torch.bmm(p, values[row, :, low:stop]).view(-1, group, stop - start, size)
    return out.permute(2, 0, 1, 3).reshape(q.shape)


def _rows(x: Tensor, index: Tensor, *shape: int) -> Tensor:
    """Rows [n, D] of x [T, heads, D] by `index`, viewed as [*shape, D]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, index).view(*shape, x.shape[-1])


def _join(parts: list[Tensor], back: Tensor, shape: torch.Size) -> Tensor:
    """Cells of all groups back to token order, as [T, heads, …]."""
    cells = parts[0] if len(parts) == 1 else torch.cat(parts)
    return cells.index_select(0, back).view(shape)
