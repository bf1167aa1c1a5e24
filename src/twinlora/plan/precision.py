"""Which precision each layer gets: the least expected loss under a budget of bytes.

A multiple-choice knapsack: one format a layer, losses add up, and so do bytes. Solved by dynamic programming over the
bytes above the smallest choice, in units. With the unit at one byte it is exact; else sizes are rounded, and of the
solutions for ever fewer units the first is taken that fits in bytes. How far from the optimum that can be is bounded by
the Lagrangian dual (Everett 1963), and reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinlora.errors import ConfigError

__all__ = ["Choice", "choose"]

_STATES = 1 << 16  # units of the spare bytes, at most
_CELLS = 1 << 25  # of the table that is walked back, one byte each

Table = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """A format for each layer, the bytes they take, the loss expected of them, and a bound that no choice is below."""

    formats: dict[str, str]
    stored_bytes: int
    loss: float
    bound: float

    @property
    def counts(self) -> dict[str, int]:
        """How many layers have which format."""
        return dict(Counter(self.formats.values()))


def choose(losses: Table, sizes: Mapping[str, Mapping[str, int]], budget: int) -> Choice:
    """The formats whose `losses` [layer][format] have the least sum while `sizes`, in bytes, stay within `budget`.

    Raises ConfigError if even the smallest formats are larger.
    """
    names = list(losses)
    options = [sorted(sizes[name], key=sizes[name].__getitem__) for name in names]
    smallest = [sizes[name][formats[0]] for name, formats in zip(names, options, strict=True)]
    spare = budget - sum(smallest)
    if spare < 0:
        raise ConfigError(f"{budget:,} bytes for the linear layers: they take at least {sum(smallest):,}")
    cost = [np.array([losses[n][f] for f in formats]) for n, formats in zip(names, options, strict=True)]
    extra = [
        np.array([sizes[n][f] - least for f in formats])
        for n, formats, least in zip(names, options, smallest, strict=True)
    ]
    picked = _knapsack(cost, extra, spare)
    formats = {name: options[i][k] for i, (name, k) in enumerate(zip(names, picked, strict=True))}
    loss = float(sum(c[k] for c, k in zip(cost, picked, strict=True)))
    taken = sum(sizes[name][fmt] for name, fmt in formats.items())
    return Choice(formats, taken, loss, min(loss, _dual_bound(cost, extra, spare)))


def _knapsack(cost: list[NDArray[np.float64]], extra: list[NDArray[np.int64]], spare: int) -> list[int]:
    """The choice of each layer."""
    states = max(1, min(_STATES, _CELLS // max(1, len(cost)), spare))
    unit = max(1, -(-spare // states))
    room = spare // unit + (len(cost) if unit > 1 else 0)  # what rounding up may add
    weights = [np.where(e > 0, np.maximum(1, np.rint(e / unit)), 0).astype(np.int64) for e in extra]
    best = np.zeros(room + 1)  # least loss of the layers so far within so many units
    taken = np.zeros((len(cost), room + 1), dtype=np.uint8)
    for i, (c, w) in enumerate(zip(cost, weights, strict=True)):
        found = np.full(room + 1, np.inf)
        for k in range(len(c)):
            if w[k] > room:
                continue
            with_k = best[: room + 1 - w[k]] + c[k]
            better = with_k < found[w[k] :]
            found[w[k] :][better] = with_k[better]
            taken[i, w[k] :][better] = k
        best = found
    for units in range(room, 0, -1):
        picked = _walk_back(taken, weights, units)
        if sum(int(e[k]) for e, k in zip(extra, picked, strict=True)) <= spare:
            return picked
    return _walk_back(taken, weights, 0)  # nothing above the smallest


def _walk_back(taken: NDArray[np.uint8], weights: list[NDArray[np.int64]], units: int) -> list[int]:
    picked = []
    for i in reversed(range(len(weights))):
        k = int(taken[i, units])
        picked.append(k)
        units -= int(weights[i][k])
    return picked[::-1]


def _dual_bound(cost: list[NDArray[np.float64]], extra: list[NDArray[np.int64]], spare: int) -> float:
    """Maximum over prices p ≥ 0 of sum_i min_k (cost + p · extra) - p · spare: below every choice that fits."""

    def value(price: float) -> tuple[float, int]:
        totals = [c + price * e for c, e in zip(cost, extra, strict=True)]
        picked = [int(t.argmin()) for t in totals]
        used = sum(int(e[k]) for e, k in zip(extra, picked, strict=True))
        return sum(float(t[k]) for t, k in zip(totals, picked, strict=True)) - price * spare, used

    low, high = 0.0, 1.0
    best, used = value(low)
    if used <= spare:
        return best
    while value(high)[1] > spare:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        found, used = value(middle)
        best = max(best, found)
        low, high = (middle, high) if used > spare else (low, middle)
    return max(best, value(high)[0])
