"""Keys and values of running sequences in one allocation, and the two layouts that fill and read it.

Prompts are one pass over packed sequences (`Prefill`), without padding; then every sequence adds one token a pass
(`Step`). Both stand where a `Layout` stands, so that a model's own forward pass runs unchanged.

Shape legend: R rows, C capacity in tokens, K key/value heads, D head size, n running sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinlora.model.attention import Layout, Rotation
from twinlora.numerics import ops
from twinlora.numerics.attention import rotate

__all__ = ["KVCache", "Prefill", "Step"]


class KVCache:
    """Rotated keys and values [R, K, C, D] of each layer, made on first use; row i holds `lengths[i]` tokens."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.lengths = [0] * rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, made for keys like `like` [n, K, D]."""
        if index not in self._layers:
            shape = (self.rows, like.shape[1], self.capacity, like.shape[2])
            self._layers[index] = (like.new_empty(shape), like.new_empty(shape))
        return self._layers[index]


class Prefill(Layout):
    """The prompts of all rows of an empty cache, side by side."""

    one_pass = True

    def __init__(self, cache: KVCache, lengths: list[int], device: torch.device | str = "cpu") -> None:
        super().__init__(lengths, device)
        self.cache = cache
        self.row = torch.arange(cache.rows).repeat_interleave(torch.tensor(lengths)).to(self.device)  # of each token
        self.position = self.positions()[0]
        cache.lengths = list(lengths)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, scale: float, window: int | None
    ) -> Tensor:
        """See Layout; keeps the keys and values."""
        keys, values = self.cache.layer(layer, k)
        keys.transpose(1, 2)[self.row, self.position] = rotate(k, *rotation)
        values.transpose(1, 2)[self.row, self.position] = v
        return super().attend(layer, q, k, v, rotation, scale, window)


class Step(Layout):
    """One more token of each of the sequences in `rows`. After the pass, `advance`."""

    one_pass = True

    def __init__(self, cache: KVCache, rows: list[int], device: torch.device | str = "cpu") -> None:
        super().__init__([1] * len(rows), device)
        self.cache, self.rows = cache, rows
        self.before = [cache.lengths[row] for row in rows]

    def positions(self) -> Tensor:
        """See Layout."""
        return torch.tensor([self.before], device=self.device)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation, scale: float, window: int | None
    ) -> Tensor:
        """See Layout; q [n, H, D] sees its row's cached tokens and itself."""
        keys, values = self.cache.layer(layer, k)
        return ops.attention_step(q, k, v, rotation, keys, values, self.rows, self.before, scale, window)

    def advance(self) -> None:
        """The cache's rows are one token longer."""
        for row in self.rows:
            self.cache.lengths[row] += 1
