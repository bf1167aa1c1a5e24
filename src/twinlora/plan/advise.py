"""From the rows of a plan to a recommendation, its reason, the runner-up, and what would change it. Pure: only rows
are read, and what would change it is found by solving again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from twinlora.config import Goal
from twinlora.plan.quality import SAME_POINTS
from twinlora.plan.rows import Row, Way, solve

__all__ = ["Change", "Choice", "Reason", "changes", "choose", "rows_for"]

Reason = Literal[
    "nothing fits",  # the row is the one that needs least
    "alone",  # no other was planned
    "only way",  # no other fits
    "not rounded",  # the base stays in 16 bit, and that costs little time
    "no rounding to fear",  # quantising costs no quality that anybody measured, and saves time or memory
    "less rounded",  # the best precision that fits, or a mix that takes away most of what NF4 rounds
    "fastest",
    "least memory",
    "edge",  # what it is deployed on runs a base of 4 bits
    "switching",  # many adapters over one 16-bit base
]
# How much more time NF4's rounding counts like: for accuracy any time, for speed none; None: memory alone counts.
_AVERSION: dict[Goal, float | None] = {"accuracy": 1e3, "speed": 0.0, "memory": None}
_USUAL_AVERSION = 0.25
_SIMPLEST = ("lora", "qlora", "hybrid", "int8", "full")  # a later one must be better by _WORTH
_WORTH = 0.1
_EDGE_BITS = 4.5
_MIB = 2**20


@dataclass(frozen=True)
class Choice:
    """`row` is recommended for `reason`; `runner_up` is what would be without it, if anything fits."""

    row: Row
    reason: Reason
    runner_up: Row | None

    @property
    def method(self) -> str | None:
        """The recommended method; None if nothing fits."""
        return None if self.reason == "nothing fits" else self.row.method


def rows_for(ways: Sequence[Way], memory: int, goal: Goal, reserve: float) -> list[Row]:
    """A row for each way: its setting that serves `goal` best in `memory` bytes."""
    return [solve(way, memory, reserve, _AVERSION.get(goal, _USUAL_AVERSION)) for way in ways]


def choose(rows: Sequence[Row], goal: Goal) -> Choice:
    """The row for `goal`. Rows of ways that this version cannot train do not count, nor a mix that is LoRA itself."""
    rows = [row for row in rows if row.way.needs is None]
    if any(row.method == "lora" for row in rows):
        rows = [row for row in rows if row.method != "hybrid" or row.rounding > 0]
    serving = [row for row in rows if _serves(row, goal)] or rows
    usable = _usable(serving)
    if not usable:
        return Choice(min(rows, key=lambda row: row.peak), "nothing fits", None)
    best = _best(usable, goal)
    left = _usable([row for row in serving if row is not best])
    return Choice(best, _reason(best, rows, goal), _best(left, goal) if left else None)


def _usable(rows: Sequence[Row]) -> list[Row]:
    """Rows that fit; those that are tight where none fits."""
    return [row for row in rows if row.fit == "fits"] or [row for row in rows if row.fit == "tight"]


def _serves(row: Row, goal: Goal) -> bool:
    if goal == "edge":
        return row.bits <= _EDGE_BITS
    return goal != "many-tasks" or row.method != "full"  # a task's full copy cannot be switched in


def _best(rows: Sequence[Row], goal: Goal) -> Row:
    if goal == "accuracy":
        good = _no_worse(rows)
        return min(good, key=lambda row: (row.rounding, row.method == "full", row.setting.cost))
    if goal == "speed":
        return _simplest(rows, lambda row: row.setting.cost)
    if goal == "memory":
        return _simplest(rows, lambda row: row.peak)
    return _simplest(_no_worse(rows), lambda row: row.weighed(_USUAL_AVERSION))


def _no_worse(rows: Sequence[Row]) -> list[Row]:
    """Rows whose expected quality is that of the best, or of which nobody knows."""
    known = [row.way.expected.points for row in rows if row.way.expected.points is not None]
    floor = max(known, default=0.0) - SAME_POINTS
    good = [row for row in rows if row.way.expected.points is None or row.way.expected.points >= floor]
    # An unknown mix is no better than the share of NF4 in it, so it cannot replace every known one.
    return good or list(rows)


def _simplest(rows: Sequence[Row], cost: Callable[[Row], float]) -> Row:
    """The least cost, but a way that is less simple must be worth it."""
    ordered = sorted(rows, key=lambda row: _SIMPLEST.index(row.method))
    best = ordered[0]
    for row in ordered[1:]:
        if cost(row) <= (1 - _WORTH) * cost(best):
            best = row
    return best


def _reason(best: Row, rows: Sequence[Row], goal: Goal) -> Reason:
    fitting = [row for row in rows if row.fit in ("fits", best.fit)]
    if len(rows) == 1:
        return "alone"
    if goal == "edge":
        return "edge"
    if len(fitting) == 1:
        return "only way"
    if goal == "speed":
        return "fastest"
    if goal == "memory":
        return "least memory"
    if best.rounding == 0:
        return "switching" if goal == "many-tasks" else "not rounded"
    return "no rounding to fear" if best.method == "qlora" else "less rounded"


@dataclass(frozen=True)
class Change:
    """With `memory` bytes instead, or for `goal` instead, `method` is the choice (None: nothing fits)."""

    method: str | None
    bits: float
    memory: int | None = None
    goal: Goal | None = None


def changes(ways: Sequence[Way], memory: int, goal: Goal, reserve: float) -> list[Change]:
    """What would change the choice: the nearest memory above and below where another method is chosen, other goals."""

    def at(memory: int, goal: Goal = goal) -> Choice:
        return choose(rows_for(ways, memory, goal, reserve), goal)

    now = at(memory).method
    found = []
    for points in (_above(ways, memory, reserve), _below(memory)):
        border = _first_change(points, lambda size: at(size).method, now)
        if border is not None:
            choice = at(border)
            found.append(Change(choice.method, choice.row.bits, memory=border))
    for other in get_args(Goal):
        choice = at(memory, other)
        if choice.method != now:
            found.append(Change(choice.method, choice.row.bits, goal=other))
    return found


def _above(ways: Sequence[Way], memory: int, reserve: float) -> list[int]:
    """Sizes from `memory` to the one where every way fits as it likes, in steps of at most a thirtieth."""
    most = max(int(c.peak * (1 + reserve)) + _spread(way) for way in ways for c in way.candidates)
    return list(itertools.takewhile(lambda size: size < 1.04 * most, _geometric(memory, 1 + 1 / 30)))


def _spread(way: Way) -> int:
    """What the weights of a mix can still grow by."""
    return int((way.dense_bits - way.bits) * way.quantised_weights / 8) if way.method == "hybrid" else 0


def _below(memory: int) -> list[int]:
    return list(itertools.takewhile(lambda size: size > memory / 64, _geometric(memory, 1 - 1 / 30)))


def _geometric(start: int, factor: float) -> itertools.accumulate[int]:
    return itertools.accumulate(itertools.repeat(factor), lambda size, f: int(size * f) + (f > 1), initial=start)


def _first_change(points: Sequence[int], method: Callable[[int], str | None], now: str | None) -> int | None:
    """The size nearest to the first of `points` where `method` is not `now`, to a MiB."""
    for near, far in itertools.pairwise(points):
        if method(far) != now:
            while abs(far - near) > _MIB:
                middle = (near + far) // 2
                near, far = (near, middle) if method(middle) != now else (middle, far)
            return far
    return None
