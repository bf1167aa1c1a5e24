"""How long a step takes: its counted operations (work.py) at the rates of a device.

Rates are measured on this machine (calibrate.py) or follow from the maker's peaks (devices.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from twinlora.plan.devices import Device

if TYPE_CHECKING:
    from twinlora.plan.work import Counts, Kind

__all__ = ["Cost", "Measured", "Rates", "Stated", "computes", "launched", "launches", "names", "stated"]

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


def names(kind: Kind) -> tuple[str, str]:
    """What calls like this one are called, the most alike first: by operation, and of products with a weight of 16 bits
    whether they are as narrow as an adapter's; by the kind of work. Of arithmetic its type is part of the name."""
    narrow = kind.name == "product" and kind.flops < _NARROW * (kind.read + kind.written)
    dtype = f" {kind.dtype}" if computes(kind.name) else ""
    return f"{kind.name} {kind.op}{' narrow' if narrow else ''}{dtype}", f"{kind.name}{dtype}"


@dataclass(frozen=True)
class Cost:
    """Seconds that a call takes: some whatever its size, some for each floating-point operation, some for each byte."""

    call: float = 0.0
    flop: float = 0.0
    byte: float = 0.0

    def seconds(self, kind: Kind) -> float:
        """Of one such call."""
        return self.call + self.flop * kind.flops + self.byte * (kind.read + kind.written)


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
class Measured(Rates):
    """What calls cost by their operation and by their sort of work (the two `names`), of which the former counts where
    it is known; seconds that pass around every call, and factors for the whole.
    """

    source: str
    sorts: Mapping[str, Cost]
    operations: Mapping[str, Cost]
    overhead: float = 0.0
    slowdown: float = 1.0  # a step's work over that of its calls, as they were timed
    factor: float = 1.0  # what past runs took, over what was predicted (score.py)

    def cost(self, kind: Kind) -> Cost:
        """Of such calls. Raises KeyError if nothing like them was measured."""
        operation, sort = names(kind)
        other = "product float32" if computes(kind.name) else "elementwise"
        found = self.operations.get(operation) or self.sorts.get(sort) or self.sorts.get(other)
        if found is None:
            raise KeyError(f"{kind.name} {kind.op}: nothing like it was measured")
        return found

    def call_seconds(self, kind: Kind, tokens: int) -> float:
        """See Rates."""
        return self.factor * (self.slowdown * self.cost(kind).seconds(kind) + self.overhead * launches(kind))


@dataclass(frozen=True)
class Stated(Rates):
    """A roofline from a maker's peaks: arithmetic and memory traffic at the share of them that is reached in practice.

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
