"""What a step holds and does, operation by operation: bytes alive by cause, their peak, and work done.

A `Ledger` is a dispatch mode over fake tensors. Every storage counts once, from the operation that made it until its
last tensor is gone; views and results in place add nothing. The step is cut into segments (phase, layer), each with a
peak of its own, so that models of repeated layers can be folded (fold.py).
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twinlora.plan import work
from twinlora.plan.targets import Target, without_data

__all__ = ["CAUSES", "Cause", "Event", "Ledger", "Peak", "Segment"]

Cause = Literal[
    "weights", "quantisation constants", "adapter", "gradients", "optimiser", "activations", "loss head", "workspace"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
Place = int | str | None  # a layer's number, or the name of a parameter outside of the layers
Segment = tuple[str, Place]  # phase, and where in the model it is


class Event(NamedTuple):
    """A block of so many bytes is taken for a storage, or is given back (0 bytes)."""

    segment: Segment
    block: int  # its number
    size: int


@dataclass
class Peak:
    """The most bytes of a segment, and what they were at that moment."""

    total: int
    by_cause: dict[str, int]


class Ledger(TorchDispatchMode):
    """Counts while it is entered. `segment` and `cause` say what new storages are for; who runs the step sets them."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.target = target
        self.sees_workspace = True  # to find that of what quantises a large weight takes minutes
        self.segment: Segment = ("build", None)
        self.cause: Cause = "weights"
        self.live: dict[str, int] = dict.fromkeys(CAUSES, 0)
        self.total = 0
        self.peaks: dict[Segment, Peak] = {}
        self.part: int | None = None  # which micro-batch; None between and after them
        self.work: dict[int | None, dict[work.Kind, int]] = {}  # by part
        self.kept: dict[str, int] = {}  # buffers that kernels keep for their next call, by name
        self.products: set[Any] = set()  # shapes of 16-bit products, which the target's library compiles one by one
        self.log: list[Event] = []  # without workspaces, which are a part of peaks
        self._numbers = itertools.count()
        self._storages: dict[int, tuple[weakref.ref[Any], int, str]] = {}  # by address
        self._places: dict[int, Place] = {}  # of gradients

    def start(self) -> None:
        """Forget peaks, work and events so far, not what is alive; from here on workspace counts."""
        self.sees_workspace = True
        self.peaks, self.work, self.kept, self.log = {}, {}, {}, []

    @contextlib.contextmanager
    def within(self, segment: Segment, cause: Cause) -> Iterator[None]:
        """For a while in this segment, new storages being for `cause`."""
        before = self.segment, self.cause
        self.segment, self.cause = segment, cause
        try:
            yield
        finally:
            self.segment, self.cause = before

    def assign(self, tensor: Tensor, cause: Cause, place: Place = None) -> None:
        """What the storage of `tensor` is for, if that was not known when it was made, and whose gradient it is."""
        address = tensor.untyped_storage()._cdata
        reference, size, before = self._storages[address]
        self._storages[address] = reference, size, cause
        if place is not None:
            self._places[address] = place
        self.live[before] -= size
        self.live[cause] += size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; count what it makes, what it holds meanwhile, and what it does."""
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        composed = self.target.composed(func, args)
        if composed is not None:  # no kernel: its parts are operations themselves
            with self:
                return composed(*args, **kwargs)
        if self.segment[0] == "optimiser":  # which goes through the gradients one by one, or takes lists of them
            first = args[0] if args and isinstance(args[0], Tensor) else None
            address = None if first is None else first.untyped_storage()._cdata
            self.segment = ("optimiser", self._places.get(address) if address else None)
        out = without_data(func, args, kwargs)
        made = out if isinstance(out, (tuple, list)) else (out,)
        for tensor in made:
            if isinstance(tensor, Tensor):
                self._add(tensor)
        if self.sees_workspace:
            passing, kept = self.target.workspace(func, args, kwargs, made)
            for name, size in kept.items():
                self.kept[name] = max(size, self.kept.get(name, 0))
            self._see(passing)
        if (shape := self.target.compiles(func, args)) is not None:
            self.products.add(shape)
        for kind, calls in work.of(func, args, kwargs, made):
            done = self.work.setdefault(self.part, {})
            done[kind] = done.get(kind, 0) + calls
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        size = self.target.rounded(storage.nbytes())
        number = self._log(size)

        def forget(_: Any) -> None:
            _, size, cause = self._storages.pop(address)
            self._log(0, number)
            self._places.pop(address, None)
            self.live[cause] -= size
            self.total -= size

        self._storages[address] = weakref.ref(storage, forget), size, self.cause
        self.live[self.cause] += size
        self.total += size

    def _log(self, size: int, number: int | None = None) -> int:
        """A block is taken, or the one of that number is given back (0 bytes). Returns the number."""
        number = next(self._numbers) if number is None else number
        self.log.append(Event(self.segment, number, size))
        return number

    def _see(self, passing: int) -> None:
        """Compare this moment, `passing` bytes of workspace included, with the segment's peak."""
        peak = self.peaks.get(self.segment)
        if peak is None or self.total + passing > peak.total:
            by_cause = self.live | {"workspace": self.live["workspace"] + passing}
            self.peaks[self.segment] = Peak(self.total + passing, by_cause)
