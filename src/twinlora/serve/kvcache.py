"""The layout of a pass that mixes beginnings, middles and next tokens of sequences, over slots of one cache.

Shape legend: T tokens of the pass, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from twinlora.model.attention import Layout, Rotation
from twinlora.model.kvcache import KVCache
from twinlora.numerics import ops
from twinlora.numerics.attention import rotate

__all__ = ["Pass", "SlotCache"]


class SlotCache(KVCache):
    """A KVCache whose rows are slots: what lies where is the scheduler's business."""

    def copy(self, source: int, target: int, count: int) -> None:
        """The first `count` tokens of a slot into another one."""
        for keys, values in self._layers.values():
            keys[target, :, :count] = keys[source, :, :count]
            values[target, :, :count] = values[source, :, :count]


class Pass(Layout):
    """Chunks (slot, tokens before, tokens) side by side; each continues what its slot holds."""

    one_pass = True

    def __init__(self, cache: SlotCache, chunks: list[tuple[int, int, int]], device: torch.device | str) -> None:
        super().__init__([count for _, _, count in chunks], device)
        self.cache, self.chunks = cache, chunks
        for slot, before, count in chunks:
            assert 0 <= slot < cache.rows
            assert 0 <= before < before + count <= cache.capacity, f"{before + count} of {cache.capacity} tokens"
        assert len({slot for slot, _, _ in chunks}) == len(chunks), "two chunks of one slot"
        self._sorted = False

    def _sort(self, few: int) -> None:
        """By how they attend: chunks of up to `few` tokens, and of the others, beginnings and continuations."""
        numbered = [(at, *chunk) for at, chunk in zip(self.starts, self.chunks, strict=False)]
        self._sorted, self.next = True, [chunk for chunk in numbered if chunk[3] <= few]
        self.whole = [chunk for chunk in numbered if chunk[3] > few and chunk[2] == 0]
        self.later = [chunk for chunk in numbered if chunk[3] > few and chunk[2] > 0]
        self.next_rows = [slot for _, slot, _, count in self.next for _ in range(count)]
        self.next_lengths = [before + i for _, _, before, count in self.next for i in range(count)]
        self.whole_starts = [0, *itertools.accumulate(count for _, _, _, count in self.whole)]
        if len(self.next) < len(self.chunks):  # several kinds: the tokens of each
            self.next_tokens, self.whole_tokens = (self._tokens(kind) for kind in (self.next, self.whole))

    def _tokens(self, chunks: list[tuple[int, int, int, int]]) -> Tensor:
        parts = [torch.arange(at, at + count) for at, _, _, count in chunks]
        return torch.cat(parts or [torch.arange(0)]).to(self.device)

    def positions(self) -> Tensor:
        """See Layout."""
        return torch.tensor(
            [[before + i for _, before, count in self.chunks for i in range(count)]], device=self.device
        )

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, scale: float, window: int | None
    ) -> Tensor:
        """See Layout; keeps the keys and values."""
        keys, values = self.cache.layer(layer, k)
        if not self._sorted:  # once for all layers: they are of one type
            self._sort(ops.step_tokens(q, rotation, keys))
        if len(self.next) == len(self.chunks):
            return self._next(q, k, v, rotation, keys, values, scale, window)
        out = torch.empty_like(q)
        if self.next:
            q1, k1, v1, cos, sin = (x[self.next_tokens] for x in (q, k, v, *rotation))
            out[self.next_tokens] = self._next(q1, k1, v1, (cos, sin), keys, values, scale, window)
        if self.whole:
            for at, slot, _, count in self.whole:
                here = slice(at, at + count)
                keys[slot, :, :count] = rotate(k[here], rotation[0][here], rotation[1][here]).transpose(0, 1)
                values[slot, :, :count] = v[here].transpose(0, 1)
            q1, k1, v1, cos, sin = (x[self.whole_tokens] for x in (q, k, v, *rotation))
            out[self.whole_tokens] = ops.attention(q1, k1, v1, self.whole_starts, scale, window, (cos, sin))
        for at, slot, before, count in self.later:
            here = slice(at, at + count)
            turn = (rotation[0][here], rotation[1][here])
            out[here] = ops.attention_extend(q[here], k[here], v[here], turn, keys, values, slot, before, scale, window)
        return out

    def _next(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, keys: Tensor, values: Tensor,
        scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Few more tokens of each sequence: q [n, H, D]."""
        return ops.attention_step(q, k, v, rotation, keys, values, self.next_rows, self.next_lengths, scale, window)
