"""A way to train, in all its settings, and the row of the plan that a memory budget leaves of it. Pure arithmetic.

Sizes are bytes, times seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from twinlora.plan.quality import FORMATS, Expectation, rounding

__all__ = ["RESERVE", "Candidate", "Fit", "Row", "Way", "solve"]

RESERVE = 0.02  # of the predicted peak: what the prediction may be off by
Fit = Literal["fits", "tight", "does not fit"]
_FEW_TOKENS = 128  # about as many are multiplied in the time that reading the weights takes
_SAME_TIME = 0.02  # settings that differ by less are equally fast
_LEAST_BITS, _MOST_BITS = FORMATS[0].bits, FORMATS[-1].bits  # of a hybrid base in 16 bit


@dataclass(frozen=True)
class Candidate:
    """One setting of a way. `work` is the run's floating-point operations; `seconds` is None without rates."""

    checkpointing: bool
    micro_batch_tokens: int
    micro_batches: int  # of a typical step
    by_cause: Mapping[str, int]
    work: float
    seconds: float | None = None
    exact: bool = True  # simulated; else between two simulated settings

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return sum(self.by_cause.values())

    @property
    def cost(self) -> float:
        """What compares times: seconds, or without rates operations and the weights that are read for few tokens."""
        return self.work * (1 + _FEW_TOKENS / self.micro_batch_tokens) if self.seconds is None else self.seconds


@dataclass(frozen=True)
class Way:
    """A method on a model and data. `bits` a weight of its quantisable linears; of hybrid, what its candidates have.

    `needs` says what this version lacks to train it.
    """

    method: str
    bits: float
    quantised_weights: int
    trainable: int
    parameters: int
    disk_bytes: int
    artefact_bytes: int
    tokens: int  # of the run
    expected: Expectation
    candidates: tuple[Candidate, ...]
    needs: str | None = None
    least_bits: float = _LEAST_BITS  # that hybrid may have, and the most
    most_bits: float = _MOST_BITS
    dense_bits: float = _MOST_BITS  # of a weight that is not quantised

    def with_checkpointing(self, wanted: bool) -> Way:
        """With checkpointing alone, or without."""
        return dataclasses.replace(self, candidates=tuple(c for c in self.candidates if c.checkpointing == wanted))

    def with_bits(self, bits: float) -> Way:
        """A hybrid of so many bits, whatever else would fit."""
        return dataclasses.replace(self, least_bits=bits, most_bits=bits)

    def with_weights(self, nbytes: int) -> Way:
        """A hybrid whose weights take so many bytes, or as near to that as its formats come."""
        causes = self.candidates[0].by_cause
        stored = causes["weights"] + causes.get("quantisation constants", 0)
        bits = self.bits + 8 * (nbytes - stored) / self.quantised_weights
        return self.with_bits(min(max(bits, self.least_bits), self.most_bits))


@dataclass(frozen=True)
class Row:
    """What a budget of `memory` leaves of a way: its best setting."""

    way: Way
    setting: Candidate
    fit: Fit
    by_cause: Mapping[str, int]
    bits: float
    memory: int
    reserve: float

    @property
    def method(self) -> str:
        """Its name."""
        return self.way.method

    @property
    def peak(self) -> int:
        """Predicted bytes."""
        return sum(self.by_cause.values())

    @property
    def needed(self) -> int:
        """The peak and the reserve: the least memory that it fits in."""
        return math.ceil(self.peak * (1 + self.reserve))

    @property
    def rounding(self) -> float:
        """Mean squared rounding error of the base's weights, NF4's being 1."""
        return rounding(self.bits, self.way.dense_bits)

    def weighed(self, aversion: float) -> float:
        """The run's time, NF4's rounding counting as `aversion` times as much more."""
        return self.setting.cost * (1 + aversion * self.rounding)

    @property
    def seconds(self) -> float | None:
        """Of the run, if rates are known."""
        return self.setting.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of the run, if rates are known."""
        return self.way.tokens / self.seconds if self.seconds else None


def solve(way: Way, memory: int, reserve: float = RESERVE, aversion: float | None = 0.25) -> Row:
    """The setting of `way` for `memory` bytes: the fastest that fits, else the smallest that is tight, or does not.

    Hybrid takes as many bits as fit; its setting is the one whose time is least when rounding like NF4's counts as
    `aversion` times as much time more. With None the smallest is taken, however slow.
    """
    make = _hybrid if way.method == "hybrid" else _plain
    rows = [make(way, candidate, memory, reserve) for candidate in way.candidates]
    order = {"fits": 0, "tight": 1, "does not fit": 2}

    def merit(row: Row) -> tuple[float, float]:
        if row.fit != "fits" or aversion is None:
            return row.peak, 0
        # Of equally fast settings the one that needs less: larger micro-batches may gain nothing.
        time = round(math.log(row.weighed(aversion)) / _SAME_TIME)
        return time, row.peak

    return min(rows, key=lambda row: (order[row.fit], merit(row)))


def _plain(way: Way, candidate: Candidate, memory: int, reserve: float) -> Row:
    return Row(way, candidate, _fit(candidate.peak, memory, reserve), candidate.by_cause, way.bits, memory, reserve)


def _fit(peak: int, memory: int, reserve: float) -> Fit:
    if math.ceil(peak * (1 + reserve)) <= memory:
        return "fits"
    return "tight" if peak <= memory else "does not fit"


def _hybrid(way: Way, candidate: Candidate, memory: int, reserve: float) -> Row:
    """The candidate is in NF4; what memory is left buys bits, or too little is left and bits are saved."""
    spare = memory / (1 + reserve) - candidate.peak
    bits = way.bits + 8 * spare / way.quantised_weights
    bits = min(max(bits, way.least_bits), way.most_bits)
    bits = max(math.floor(100 * bits) / 100, way.least_bits)
    more = math.ceil((bits - way.bits) * way.quantised_weights / 8)
    by_cause = dict(candidate.by_cause) | {"weights": candidate.by_cause["weights"] + more}
    return Row(way, candidate, _fit(sum(by_cause.values()), memory, reserve), by_cause, bits, memory, reserve)
