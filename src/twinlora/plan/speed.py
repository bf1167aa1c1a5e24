"""How long a step takes: a roofline over its counted operations (work.py) and the rates of a device.

Rates are measured on this machine (calibrate.py) or follow from the maker's peaks (devices.py). Products are limited by
arithmetic or, with few operations a byte, by memory; everything else moves bytes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twinlora.plan.devices import Device

if TYPE_CHECKING:
    from twinlora.plan.work import Counts, Kind

__all__ = ["Curve", "InStep", "Measured", "Rates", "Stated", "computes", "launched", "launches", "sort", "stated"]

_NARROW = 64  # operations a byte; fewer are bound by their operands
_ARITHMETIC = ("product", "attention")  # kinds of work whose name has one of these do flops, the others move bytes


def computes(name: str) -> bool:
    """Whether this kind of work is measured by its floating-point operations."""
    return any(word in name for word in _ARITHMETIC)


def launches(kind: Kind) -> int:
    """Whether such a call pays a call's overhead: of lists of tensors (`_fused_…`) each tensor is counted, not paid."""
    return not kind.op.startswith(("_foreach_", "_fused_"))


def launched(counts: Counts) -> int:
    """Calls of a step that pay a call's overhead."""
    return sum(calls * launches(kind) for kind, calls in counts.calls_of.items())


def sort(kind: Kind) -> str:
    """The calls that a step changes alike: kind and operation, and of products whether they are as narrow as an
    adapter's."""
    narrow = kind.name == "product" and kind.flops < _NARROW * (kind.read + kind.written)
    return f"{kind.name} {kind.op}{' narrow' if narrow else ''}"


@dataclass(frozen=True)
class Curve:
    """A rate that depends on a size: points (size, rate) by ascending size, both above 0."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """Linear between the points' logarithms; outside of them that of the nearest point."""
        sizes = [point[0] for point in self.points]
        right = bisect_right(sizes, size)
        if right in (0, len(sizes)):
            return self.points[max(0, right - 1)][1]
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        share = (math.log(size) - math.log(x0)) / (math.log(x1) - math.log(x0))
        return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


class Rates:
    """What a device does in a second."""

    source: str

    @abstractmethod
    def call_seconds(self, kind: Kind, tokens: int) -> float:
        """Of one such call; `tokens` are those of a micro-batch."""

    def step_seconds(self, counts: Counts, tokens: int) -> float:
        """Of a whole step with micro-batches of `tokens`."""
        return sum(calls * self.call_seconds(kind, tokens) for kind, calls in counts.calls_of.items())

    def seconds_by_kind(self, counts: Counts, tokens: int) -> dict[str, float]:
        """The step's time by kind of work."""
        sums: dict[str, float] = {}
        for kind, calls in counts.calls_of.items():
            sums[kind.name] = sums.get(kind.name, 0.0) + calls * self.call_seconds(kind, tokens)
        return sums


@dataclass(frozen=True)
class InStep:
    """What a call takes in a step: `fixed` seconds more than others beside its work, and its work `ratio` times as long
    as alone. Threads have gone to sleep between two calls there, and operands lie elsewhere."""

    fixed: float = 0.0
    ratio: float = 1.0


@dataclass(frozen=True)
class Measured(Rates):
    """Curves by kind of work, seconds that every call takes beside its work, and how much slower work is in a step.

    Arithmetic: flop/s over the operations for each byte; the rest: bytes/s over a call's bytes. A curve is named by
    kind, operation and type (`product addmm_ bfloat16`), by an operation (`attention_backward`), by kind and type
    (`product bfloat16`), or by the kind alone.
    """

    source: str
    curves: Mapping[str, Curve]
    overhead: float
    # By `sort`; calls that are not in it take what they take alone.
    in_step: Mapping[str, InStep] = field(default_factory=dict)
    slowdown: float = 1.0  # a step's work over the same work, call by call
    factor: float = 1.0  # what past runs took, over what was predicted (score.py)

    def curve(self, kind: Kind) -> Curve:
        """The most particular one there is."""
        names = [f"{kind.name} {kind.op} {kind.dtype}", kind.op, f"{kind.name} {kind.dtype}", kind.name]
        for name in names:
            if name in self.curves:
                return self.curves[name]
        return self.curves["product float32" if computes(kind.name) else "elementwise"]

    def call_seconds(self, kind: Kind, tokens: int) -> float:
        """See Rates."""
        size, curve = kind.read + kind.written, self.curve(kind)
        if computes(kind.name):
            work = kind.flops / curve.at(kind.flops / max(size, 1)) if kind.flops else 0.0
        else:
            work = size / curve.at(size) if size else 0.0
        place = self.in_step.get(sort(kind), InStep())
        inside = place.ratio * work + place.fixed * launches(kind)
        return self.factor * (self.slowdown * inside + self.overhead * launches(kind))


@dataclass(frozen=True)
class Stated(Rates):
    """From a maker's peaks: arithmetic and memory traffic at the share of their peaks that is reached in practice.

    A product with a quantised weight takes more: for each weight half a byte is read, and two are written and read,
    while `tokens` rows are multiplied with it.
    """

    source: str
    product_flops: float
    bandwidth: float
    overhead: float = 5e-6  # a kernel's launch

    def call_seconds(self, kind: Kind, tokens: int) -> float:
        """See Rates."""
        traffic = (kind.read + kind.written) / self.bandwidth
        arithmetic = kind.flops / self.product_flops if computes(kind.name) else 0.0
        quantised = kind.name.endswith("product") and kind.name != "product"
        decoded = 4.5 * kind.flops / (2 * max(tokens, 1)) / self.bandwidth if quantised else 0.0
        return max(traffic, arithmetic) + decoded + self.overhead * launches(kind)


# Of an H200's stated peaks, 790 of 989.4 TFLOP/s of bfloat16 products and 4.3 of 4.8 TB/s of copies were measured.
_REACHED_FLOPS, _REACHED_BANDWIDTH = 790 / 989.4, 4.3 / 4.8


def stated(device: Device) -> Stated | None:
    """Rates from the table's figures; None for a device that has none and must be measured."""
    if device.product_flops is None or device.bandwidth is None:
        return None
    source = f"{device.source}, {device.date}, times the shares of the peaks that an H200 was measured to reach"
    return Stated(source, _REACHED_FLOPS * device.product_flops, _REACHED_BANDWIDTH * device.bandwidth)
