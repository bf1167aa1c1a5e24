"""Repeated layers are simulated a few times only; the rest follows, since memory is affine in their number.

A step is cut into segments (phase, layer). Seen from its end of the model, what a segment holds grows by the same bytes
with every further layer, by the same causes; from one layer of the middle to the next it changes by the same bytes
again. So the largest moment of the whole lies in the first two or the last two repetitions, whose peaks are
extrapolated one by one. tests/plan/test_simulate.py compares with models simulated whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinlora.plan.ledger import Peak, Segment

__all__ = ["Fold", "aligned", "extrapolate", "fold"]

_ENDS = 2  # repetitions at either end that are looked at one by one


@dataclass(frozen=True)
class Fold:
    """Which numbers of layers to simulate, and how often the difference of the two is added to the first."""

    sizes: tuple[int, ...]
    times: int
    period: int


def fold(signatures: Sequence[Any]) -> Fold:
    """From what each layer is, in order: two sizes if that pays, else the whole model."""
    count = len(signatures)
    period = next(
        p for p in range(1, count + 1) if all(signatures[i] == signatures[i + p] for i in range(count - p))
    )  # the last p that is tried, `count`, compares nothing
    first = 2 * _ENDS * period + count % period
    if first + period >= count:
        return Fold((count,), 0, period)
    return Fold((first, first + period), (count - first) // period, period)


def aligned(peaks: Mapping[Segment, Peak], layers: int, period: int) -> dict[Segment, Peak]:
    """Segments by where their layer is seen from its end: 0, 1, … from the start, …, -2, -1 from the end."""
    ends = _ENDS * period

    def place(layer: int | str | None) -> int | str | None:
        return layer - layers if isinstance(layer, int) and layer >= ends else layer

    return {(phase, place(layer)): peak for (phase, layer), peak in peaks.items()}


def extrapolate(small: Mapping[Any, int], large: Mapping[Any, int], times: int) -> dict[Any, int]:
    """small + times · (large - small), entry by entry."""
    return {key: small.get(key, 0) + times * (large.get(key, 0) - small.get(key, 0)) for key in {**small, **large}}
