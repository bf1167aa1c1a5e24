"""Repeated layers are simulated a few times only; the rest follows, since memory is affine in their number.

A step is cut into segments (phase, layer). Seen from its end of the model, what a segment holds grows by the same bytes
with every further layer, by the same causes; from one layer of the middle to the next it changes by the same bytes
again. So the largest moment of the whole lies in the first two or the last two repetitions, whose peaks are
extrapolated one by one. tests/plan/test_simulate.py compares with models simulated whole.

Peaks are numbers and can be extrapolated; the log of what is made and given back is a sequence. There the events of one
repetition in the middle are repeated (`unfolded`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinlora.plan.ledger import Event, Peak, Segment

__all__ = ["Fold", "aligned", "extrapolate", "fold", "unfolded"]

_SMALL = 1 << 10  # bytes: what is not larger is no block to be logged
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


def unfolded(log: Sequence[Event], period: int, copies: int) -> list[int]:
    """The events of a model that has one of the middle repetitions `copies` times more than the model of `log`.

    A positive number is a block of so many bytes, the others are blocks given back: minus their index in order of
    taking. What was taken before the log began, and scalars, are left out.
    """
    log = _large(log)
    repeated = _Repeated(log, period, copies)
    out: list[int] = []
    index: dict[tuple[int, int], int] = {}  # of blocks that are held, by block and repetition
    count = itertools.count()
    for event, copy in repeated.events():
        key = repeated.block(event, copy)
        if event.size:
            index[key] = next(count)
            out.append(event.size)
        elif key in index:
            out.append(-index.pop(key))
    return out


def _large(log: Sequence[Event]) -> list[Event]:
    """Without scalars, one for each parameter in some operations of the optimiser."""
    made = {event.block for event in log if event.size > _SMALL}
    return [event for event in log if event.block in made]


class _Repeated:
    """A log whose layers `first` to `first + period` (excluded) come copies + 1 times: repetition 0 to `copies`."""

    def __init__(self, log: Sequence[Event], period: int, copies: int) -> None:
        self.log, self.period, self.copies = log, period, copies
        self.first = _ENDS * period
        self._births: dict[int, tuple[str, int, int]] = {}  # phase, layer, and its number among the blocks taken there
        self._blocks: dict[tuple[str, int, int], int] = {}
        made: dict[tuple[str, int], int] = {}
        for (phase, layer), block, size in log:
            if size and isinstance(layer, int):
                number = made[phase, layer] = made.get((phase, layer), -1) + 1
                self._births[block] = phase, layer, number
                self._blocks[phase, layer, number] = block

    def _inside(self, layer: Any) -> bool:
        return isinstance(layer, int) and self.first <= layer < self.first + self.period

    def _repeats(self, event: Event) -> bool:
        """Whether it belongs to the repeated layers: it happens there, or what it gives back was made there."""
        here = event.segment[1]
        return self._inside(here if isinstance(here, int) else self._layer(event.block))

    def events(self) -> Iterator[tuple[Event, int]]:
        """Each event with the repetition that it belongs to (0 outside of them)."""
        for (phase, repeats), group in itertools.groupby(self.log, lambda e: (e.segment[0], self._repeats(e))):
            events, copies = list(group), range(self.copies + 1 if repeats else 1)
            for copy in reversed(copies) if phase == "backward" else copies:
                yield from ((event, copy) for event in events)

    def _layer(self, block: int) -> int | None:
        """Where it was made, if in a layer."""
        return self._births[block][1] if block in self._births else None

    def block(self, event: Event, copy: int) -> tuple[int, int]:
        """Which block, of which repetition, an event is about."""
        here, born = event.segment[1], self._layer(event.block)
        if born is None or not isinstance(here, int):
            return event.block, copy
        if not self._inside(here):  # the neighbour of the first repetition, or of the last one
            return event.block, self.copies if here > self.first and self._inside(born) else 0
        return self._from_within(event.block, born, copy)

    def _from_within(self, block: int, born: int, copy: int) -> tuple[int, int]:
        """Seen from a repetition: its own block, or what stands in for it in the repetition before or after."""
        step = 0 if self._inside(born) else -1 if born < self.first else 1
        if not 0 <= copy + step <= self.copies or step == 0:
            return block, copy if step == 0 else 0
        phase, layer, number = self._births[block]
        return self._blocks.get((phase, layer - step * self.period, number), block), copy + step
