"""Padding-free causal attention: many sequences side by side in one row of tokens, none sees another.

A `Layout` says where the sequences lie. It groups them by length, so that each group runs as one batched product on a
[sequences, longest] grid: the fill at the end of a row is behind every real query and the causal mask hides it, and its
results are dropped. Queries run in chunks, keys only as far as a chunk can see, and the backward pass recomputes the
probabilities, so no square of a whole long sequence is ever stored.

On CPUs this beats torch's flash kernel several times at fine-tuning lengths (LOG.md). Registered with transformers
under the name `twinlora`; without a layout (generation, padded batches) it is transformers' own SDPA path.

Shape legend: T tokens, S sequences of a group, L its longest, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["NAME", "Grids", "Layout", "packed_attention", "register"]

NAME = "twinlora"
_CHUNK = 256  # queries per product
_WASTE = 1.3  # a group's longest sequence over its shortest


@dataclass(frozen=True)
class Grids:
    """Index tensors between rows of [T · heads, D] and the grids of all groups, cells ordered [K, S, G, L]."""

    gather: list[Tensor]  # per group: row of each cell; fill cells repeat their sequence's last token
    fill: list[Tensor]  # per group: the cells that hold no token
    back: Tensor  # [T · heads] cell of each row, groups one after another


class Layout:
    """Sequences of `lengths` (host integers) side by side in one row of T tokens, and how they lie on grids."""

    def __init__(self, lengths: list[int], device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.device = torch.device(device)
        self.tokens = sum(lengths)
        self.members = _group_by_length(lengths)
        self._starts = [0, *itertools.accumulate(lengths)]
        self._grids: dict[tuple[int, int], Grids] = {}

    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 [1, T]."""
        return torch.cat([torch.arange(length) for length in self.lengths])[None].to(self.device)

    def longest(self) -> list[int]:
        """The longest sequence of each group."""
        return [self.lengths[members[0]] for members in self.members]

    def grids(self, heads: int, group: int) -> Grids:
        """The grids of `heads` heads, of which `group` share one key/value head. Built once per layout."""
        if (heads, group) not in self._grids:
            self._grids[heads, group] = self._build(heads, group)
        return self._grids[heads, group]

    def _build(self, heads: int, group: int) -> Grids:
        head = torch.arange(heads).view(-1, group)
        gather, fill, back = [], [], torch.empty(self.tokens, heads, dtype=torch.long)
        base = 0
        for members, longest in zip(self.members, self.longest(), strict=True):
            column = torch.arange(longest)
            first = torch.tensor([self._starts[i] for i in members])[:, None]
            size = torch.tensor([self.lengths[i] for i in members])[:, None]
            token = first + column.minimum(size - 1)  # [S, L]
            real = column < size
            cells = token[None, :, None] * heads + head[:, None, :, None]  # [K, S, G, L]
            number = torch.arange(cells.numel()).view(cells.shape)
            mask = real[None, :, None].expand(cells.shape)
            back.view(-1)[cells[mask]] = base + number[mask]
            gather.append(cells.reshape(-1).to(self.device))
            fill.append(number[~mask].to(self.device))
            base += cells.numel()
        return Grids(gather, fill, back.view(-1).to(self.device))


def _group_by_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups of similar length, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[groups[-1][0]] <= max(_WASTE * lengths[i], lengths[i] + 8):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _masked_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax over keys of q [B, G, C, D] · k [B, N, D] with an additive mask [C, N] -> [B, G·C, N] in q's type."""
    batch, groups, chunk, size = q.shape
    # In float32: scores rounded to 16 bit would double the error of the loss (LOG.md).
    scores = torch.bmm(q.reshape(batch, groups * chunk, size).float(), k.transpose(1, 2).float())
    scores = scores.view(batch, groups, chunk, -1).mul_(scale).add_(mask)
    return torch.softmax(scores, dim=-1).to(q.dtype).view(batch, groups * chunk, -1)


def _chunks(longest: int, window: int | None, device: torch.device) -> list[tuple[int, int, int, Tensor]]:
    """(first query, past-last query, first visible key, additive mask) of each query chunk."""
    out = []
    for start in range(0, longest, _CHUNK):
        stop = min(start + _CHUNK, longest)
        low = 0 if window is None else max(0, start - window + 1)
        query = torch.arange(start, stop, device=device)[:, None]
        key = torch.arange(low, stop, device=device)[None]
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        out.append((start, stop, low, torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))))
    return out


def _rows(x: Tensor, index: Tensor, *shape: int) -> Tensor:
    """Rows [n, D] of x [T, heads, D] by `index`, viewed as [*shape, D]."""
    return x.reshape(-1, x.shape[-1]).index_select(0, index).view(*shape, x.shape[-1])


def _join(parts: list[Tensor], back: Tensor, like: Tensor) -> Tensor:
    """Cells of all groups back to token order, in the shape of `like` [T, heads, D]."""
    cells = parts[0] if len(parts) == 1 else torch.cat(parts)
    return cells.index_select(0, back).view(like.shape)


class _PackedAttention(torch.autograd.Function):
    """q [T, H, D], k and v [T, K, D] -> [T, H, D]. Gathers serve both ways: every token has exactly one cell."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
        group = q.shape[1] // k.shape[1]
        wide, narrow = layout.grids(q.shape[1], group), layout.grids(k.shape[1], 1)
        outputs = []
        for i, longest in enumerate(layout.longest()):
            k3 = _rows(k, narrow.gather[i], -1, longest)
            v3 = _rows(v, narrow.gather[i], -1, longest)
            q4 = _rows(q, wide.gather[i], -1, group, longest)
            out = torch.empty_like(q4)
            for start, stop, low, mask in _chunks(longest, window, q.device):
                p = _masked_probabilities(q4[:, :, start:stop], k3[:, low:stop], mask, scale)
                out[:, :, start:stop] = torch.bmm(p, v3[:, low:stop]).view(-1, group, stop - start, q.shape[-1])
            outputs.append(out.view(-1, q.shape[-1]))
        result = _join(outputs, wide.back, q)
        ctx.save_for_backward(q, k, v, result)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result = ctx.saved_tensors
        (dout,) = grads
        group, size = q.shape[1] // k.shape[1], q.shape[-1]
        wide, narrow = ctx.layout.grids(q.shape[1], group), ctx.layout.grids(k.shape[1], 1)
        delta = (dout.float() * result).sum(-1, keepdim=True)  # row sums of dP ∘ P
        dqs, dks, dvs = [], [], []
        for i, longest in enumerate(ctx.layout.longest()):
            k3 = _rows(k, narrow.gather[i], -1, longest)
            v3 = _rows(v, narrow.gather[i], -1, longest)
            q4 = _rows(q, wide.gather[i], -1, group, longest)
            # Queries in fill cells must send no gradient to real keys.
            dout4 = _rows(dout, wide.gather[i], -1).index_fill_(0, wide.fill[i], 0).view(q4.shape)
            delta4 = _rows(delta, wide.gather[i], -1).index_fill_(0, wide.fill[i], 0).view(*q4.shape[:3], 1)
            dq4 = torch.empty_like(q4)
            dk3, dv3 = torch.zeros_like(k3, dtype=torch.float32), torch.zeros_like(v3, dtype=torch.float32)
            for start, stop, low, mask in _chunks(longest, ctx.window, q.device):
                flat = (q4.shape[0], group * (stop - start), -1)
                qc, do = q4[:, :, start:stop].reshape(flat), dout4[:, :, start:stop].reshape(flat)
                p = _masked_probabilities(q4[:, :, start:stop], k3[:, low:stop], mask, ctx.scale)
                dv3[:, low:stop] += torch.bmm(p.transpose(1, 2), do)
                dp = torch.bmm(do, v3[:, low:stop].transpose(1, 2)).float()
                ds = dp.sub_(delta4[:, :, start:stop].reshape(flat)).mul_(p).mul_(ctx.scale).to(q.dtype)
                dq4[:, :, start:stop] = torch.bmm(ds, k3[:, low:stop]).view(-1, group, stop - start, size)
                dk3[:, low:stop] += torch.bmm(ds.transpose(1, 2), qc)
            dqs.append(dq4.view(-1, size))
            dks.append(dk3.to(k.dtype).view(-1, size))
            dvs.append(dv3.to(v.dtype).view(-1, size))
        return (
            _join(dqs, wide.back, q),
            _join(dks, narrow.back, k),
            _join(dvs, narrow.back, v),
            None,
            None,
            None,
        )


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Causal attention within each sequence of `layout`. q [T, H, D], k and v [T, K, D] -> [T, H, D].

    `window`: a query sees that many keys, itself included (sliding-window models). Differentiable in q, k and v.
    """
    out: Tensor = _PackedAttention.apply(q, k, v, layout, scale, window)
    return out


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
    layout: Layout | None = kwargs.pop("layout", None)
    if layout is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out
    scale = kwargs.get("scaling")
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    result = packed_attention(
        q, k, v, layout, q.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("sliding_window")
    )
    return result[None], None


def register() -> None:
    """Make `attn_implementation="twinlora"` known to transformers, with its mask function. Idempotent."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
