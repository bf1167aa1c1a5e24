"""The ways to train a model on a workload: each method's settings with peak and time, from few simulated steps.

LoRA is simulated with and without checkpointing, QLoRA with it, both at the largest micro-batch and with the longest
row alone; full fine-tuning once. The rest is close by: what lies between is affine in the tokens of a micro-batch
(attention of a row aside), checkpointing saves all methods alike, and an update's memory depends on neither. A setting
that is recommended is simulated itself (`exact`); of a hybrid, whose layers are not chosen yet, it is that of NF4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from transformers import PretrainedConfig

from twinlora.adapters.targets import LoraConfig
from twinlora.config import AdapterOptions, Method, PlanOptions
from twinlora.numerics.formats import of_kind
from twinlora.plan.build import prove
from twinlora.plan.overhead import Overhead
from twinlora.plan.quality import expected
from twinlora.plan.rows import Candidate, Row, Way
from twinlora.plan.simulate import Cell, Simulated, larger, simulate
from twinlora.plan.speed import Rates
from twinlora.plan.targets import TargetName
from twinlora.plan.workload import Micro, Workload

__all__ = ["METHODS", "Conditions", "Ways", "cell_for", "simulated", "step_times"]

METHODS = ("full", "lora", "int8", "qlora", "hybrid")
_GROWING = ("activations", "loss head", "workspace", "fragmentation")  # with the tokens of a micro-batch
_KEPT = 2  # checkpoints, as train keeps by default


@dataclass(frozen=True)
class Conditions:
    """What a plan is made with beside the model and the workload."""

    options: PlanOptions
    target: TargetName
    dtype: torch.dtype
    rates: Rates | None
    overhead: Overhead  # of a process, beside the step
    fused: bool = True


@dataclass(frozen=True)
class _Point:
    """A cell: bytes by cause of the passes and of the update, operations and seconds of a micro-batch of `tokens`,
    seconds of an update."""

    passing: dict[str, int]
    updating: dict[str, int]
    gradients: int  # bytes of all of them
    tokens: int
    work: float
    seconds: float | None
    update: float
    exact: bool = True

    def plus_difference(self, more: _Point, less: _Point, share: float = 1.0) -> _Point:
        """This, with what `more` has more than `less`; of its time a `share`."""
        passing, updating = (
            {cause: max(0, size + up[cause] - down[cause]) for cause, size in own.items()}
            for own, up, down in (
                (self.passing, more.passing, less.passing),
                (self.updating, more.updating, less.updating),
            )
        )
        gradients = self.gradients + more.gradients - less.gradients
        seconds = None
        if self.seconds is not None and more.seconds is not None and less.seconds is not None:
            seconds = self.seconds + share * (more.seconds - less.seconds)
        work = self.work + more.work - less.work
        return _Point(passing, updating, gradients, self.tokens, work, seconds, more.update, exact=False)

    def slower_as(self, slow: _Point, fast: _Point) -> _Point:
        """This, as many times slower as `slow` is than `fast`."""
        if self.seconds is None or slow.seconds is None or fast.seconds is None:
            return self
        return dataclasses.replace(self, seconds=self.seconds * slow.seconds / fast.seconds, exact=False)


_Points = dict[tuple[str, bool], _Point]  # by method and checkpointing


class Ways:
    """Makes the ways of one model. `tell(done, total)` hears how far the simulation is."""

    def __init__(
        self,
        config: PretrainedConfig,
        workload: Workload,
        conditions: Conditions,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.conditions = config, conditions
        adapter = LoraConfig.from_options(conditions.options)
        if workload.packed and not prove(config, conditions.dtype, adapter, fused=conditions.fused).packed:
            workload = workload.padded()  # as training will
        self.workload = workload
        options = conditions.options
        self._formats = {
            kind: of_kind(kind, options.block_size, double_quant=options.double_quant)
            for kind in ("nf3", "nf4", "int8")
        }
        self._tell = tell or (lambda done, total: None)
        self._cells: set[str] = set()
        self.limits = self._limits()

    def _limits(self) -> list[int]:
        """Tokens of a micro-batch at most, descending to the longest row's."""
        longest, most = self.workload.longest, self.workload.largest_step
        limit, out = self.conditions.options.micro_batch_tokens, []
        while limit > longest:
            if limit // 2 < most:
                out.append(limit)
            limit //= 2
        return [*out, longest]

    def make(self, only: str | None = None) -> list[Way]:
        """All ways, in the order of METHODS, or `only` one."""
        full = only in (None, "full")
        simulated = ("lora", "qlora", "full") if full else ("lora", "qlora")
        points = self._points(self.limits[0], full=full)
        low = self._points(self.limits[-1], full=False) if len(self.limits) > 1 else {}
        if low and full:
            for c in (False, True):
                low["full", c] = low["lora", c].slower_as(points["full", c], points["lora", c])
        sizes = {method: self._simulated(method, method != "full", self.limits[0]) for method in simulated}
        quantised = self._quantised(sizes["lora"], sizes["qlora"])
        made = {}
        for method in simulated:
            candidates = [
                self._candidate(method, checkpointing, limit, points, low)
                for checkpointing in (False, True)
                for limit in self.limits
            ]
            made[method] = self._way(method, candidates, sizes[method], quantised)
        made["hybrid"] = dataclasses.replace(
            made["qlora"],
            method="hybrid",
            least_bits=math.ceil(100 * self._bits("nf3")) / 100,  # as the command can say them
            most_bits=made["qlora"].dense_bits,
            needs=_needs("hybrid"),
            expected=expected("hybrid", made["qlora"].parameters),
        )
        made["int8"] = self._in_int8(made["qlora"])
        return [made[method] for method in METHODS if only is None or method == only]

    def _points(self, limit: int, *, full: bool) -> _Points:
        """The cells with micro-batches of at most `limit`: of each method, with checkpointing and without."""
        found = {("lora", c): self._point("lora", c, limit) for c in (False, True)}
        found["qlora", True] = self._point("qlora", True, limit)
        # Recomputing decodes each weight a third time.
        found["qlora", False] = found["lora", False].plus_difference(found["qlora", True], found["lora", True], 2 / 3)
        if full:
            found["full", False] = self._point("full", False, limit)
            found["full", True] = found["full", False].plus_difference(found["lora", True], found["lora", False])
        return found

    def _quantised(self, lora: Simulated, qlora: Simulated) -> int:
        """Weights that QLoRA quantises. The sizes as stored: an allocator's rounding is not the format's."""
        saved = self.conditions.dtype.itemsize - self._bits("nf4") / 8
        return round((lora.weight_bytes - qlora.weight_bytes) / saved)

    def _bits(self, kind: str) -> float:
        """Of a weight in that format, scales included."""
        count = 1 << 24
        return 8 * self._formats[kind].stored_bytes(count) / count

    def exact(self, row: Row) -> Way:
        """The way of `row`, with the row's setting simulated itself."""
        method = "qlora" if row.method == "hybrid" else row.method
        found = self._simulated(method, row.setting.checkpointing, row.setting.micro_batch_tokens)
        by_cause = found.by_cause | self._beside(found, row.setting.micro_batch_tokens)
        better = dataclasses.replace(row.setting, by_cause=by_cause, exact=True)
        candidates = tuple(better if candidate is row.setting else candidate for candidate in row.way.candidates)
        return dataclasses.replace(row.way, candidates=candidates)

    def weight_bytes(self, precision: Mapping[str, str]) -> int:
        """Of the weights of a hybrid whose layers have these formats."""
        found = self._simulated("hybrid", True, self.limits[-1], precision).by_cause
        return found["weights"] + found["quantisation constants"]

    def _simulated(
        self, method: str, checkpointing: bool, limit: int, precision: Mapping[str, str] | None = None
    ) -> Simulated:
        given, packed = self.conditions, self.workload.packed
        cell = cell_for(
            self.workload.largest(limit), given.options, method=method, checkpointing=checkpointing,
            dtype=given.dtype, target=given.target, packed=packed, block_size=given.options.block_size,
            double_quant=given.options.double_quant, fused=given.fused, precision=precision,
        )  # fmt: skip
        found = simulated(self.config, cell)
        self._cells.add(repr(cell))
        total = max(len(self._cells), 4 + 3 * (len(self.limits) > 1))
        self._tell(len(self._cells), total)
        return found

    def _point(self, method: str, checkpointing: bool, limit: int) -> _Point:
        found = self._simulated(method, checkpointing, limit)
        micro, rates = self.workload.largest(limit), self.conditions.rates
        tokens = micro.size(packed=self.workload.packed)
        work = sum(found.counts.flops.values()) / micro.micro_batches
        times = (None, 0.0) if rates is None else step_times(rates, found, micro, tokens)
        beside = self._beside(found, limit)
        passing, updating = found.passing | beside, found.update | beside
        if found.by_cause is not found.update:  # the holes are those of the larger moment
            updating["fragmentation"] = 0
        return _Point(passing, updating, found.gradient_bytes, tokens, work, *times)

    def _candidate(self, method: str, checkpointing: bool, limit: int, points: _Points, lows: _Points) -> Candidate:
        """The setting with micro-batches of at most `limit`, from the cells of the largest and of the smallest ones;
        LoRA's two tell how memory grows."""
        top, low = points[method, checkpointing], lows.get((method, checkpointing))
        largest = self.workload.largest(limit)
        tokens = largest.size(packed=self.workload.packed)
        count, mean = self.workload.micro_batches(limit)
        passing = dict(top.passing)
        if low is not None and tokens != top.tokens:
            missing = (top.tokens - tokens) / (top.tokens - low.tokens)
            more, less = points["lora", checkpointing], lows["lora", checkpointing]
            for cause in _GROWING:
                grown = more.passing[cause] - less.passing[cause]
                passing[cause] = max(0, round(passing[cause] - missing * grown))
        if largest.micro_batches > 1:  # the second passes while the first one's gradients wait
            passing["gradients"] = max(passing["gradients"], top.gradients)
        by_cause = larger(passing, top.updating)
        seconds = None
        if top.seconds is not None:
            seconds = count * _at(mean, top, low) + len(self.workload.batches) * top.update
        steps = max(1, len(self.workload.batches))
        exact = tokens == top.tokens or (method == "lora" and low is not None and tokens == low.tokens)
        return Candidate(
            checkpointing,
            limit,
            max(1, round(count / steps)),
            by_cause,
            top.work * count * mean / top.tokens,
            seconds,
            exact and top.exact,
        )

    def _beside(self, found: Simulated, limit: int) -> dict[str, int]:
        runtime = self.conditions.overhead.total(found.products, self.workload.sizes(limit))
        return {"fragmentation": found.fragmentation, "runtime": runtime}

    def _way(self, method: str, candidates: list[Candidate], found: Simulated, quantised: int) -> Way:
        full = method == "full"
        dense = 8.0 * self.conditions.dtype.itemsize
        artefact = found.trainable_parameters * (self.conditions.dtype.itemsize if full else 4)
        return Way(
            method=method,
            bits=self._bits("nf4") if method == "qlora" else dense,
            dense_bits=dense,
            quantised_weights=quantised,
            trainable=found.trainable_parameters,
            parameters=found.total_parameters,
            disk_bytes=artefact + _KEPT * 12 * found.trainable_parameters,  # masters and both moments, float32
            artefact_bytes=artefact,
            tokens=self.workload.tokens,
            expected=expected(method, found.total_parameters),
            candidates=tuple(candidates),
            needs=_needs(method),
        )

    def _in_int8(self, qlora: Way) -> Way:
        """QLoRA with the weights of another format."""
        candidates = tuple(
            dataclasses.replace(c, by_cause=self._int8_causes(c.by_cause, qlora.quantised_weights), exact=False)
            for c in qlora.candidates
        )
        known = expected("int8", qlora.parameters)
        return dataclasses.replace(
            qlora, method="int8", bits=self._bits("int8"), candidates=candidates, expected=known, needs=_needs("int8")
        )

    def _int8_causes(self, by_cause: Mapping[str, int], weights: int) -> dict[str, int]:
        """Of NF4's: a byte a weight for half of one, and other scales."""
        constants = weights * (self._bits("int8") - 8) / 8
        more = by_cause["weights"] + weights // 2
        return dict(by_cause) | {"weights": more, "quantisation constants": round(constants)}


def cell_for(
    micro: Micro,
    options: AdapterOptions,
    *,
    method: str,
    checkpointing: bool,
    dtype: torch.dtype,
    target: TargetName,
    packed: bool,
    block_size: int = 64,
    double_quant: bool = True,
    fused: bool = True,
    precision: Mapping[str, str] | None = None,
) -> Cell:
    """The cell of a step whose micro-batches are like `micro`; `precision` is that of each layer of a hybrid base."""
    return Cell(
        method=method,  # type: ignore[arg-type]
        lengths=micro.lengths,
        trained_tokens=micro.trained_tokens,
        micro_batches=micro.micro_batches,
        rank=options.rank,
        targets=tuple(options.target),
        adapter=LoraConfig.from_options(options),
        precision=precision or {},
        block_size=block_size,
        double_quant=double_quant,
        checkpointing=checkpointing,
        dtype=dtype,
        target=target,
        fused=fused,
        packing=packed,
    )


def step_times(rates: Rates, found: Simulated, micro: Micro, tokens: int) -> tuple[float, float]:
    """Seconds of one micro-batch of `tokens`, and of one update of the weights."""
    by_kind = rates.seconds_by_kind(found.counts, tokens)
    update = by_kind.pop("optimiser", 0.0)
    return sum(by_kind.values()) / micro.micro_batches, update


_done: dict[tuple[str, str], Simulated] = {}  # by configuration and cell, in words


def simulated(config: PretrainedConfig, cell: Cell) -> Simulated:
    """`simulate`, once in a process for equal questions."""
    key = config.to_json_string(), repr(cell)
    if key not in _done:
        _done[key] = simulate(config, cell)
    return _done[key]


def _at(tokens: float, top: _Point, low: _Point | None) -> float:
    """Seconds of a micro-batch of `tokens`."""
    assert top.seconds is not None
    if low is None or low.seconds is None or low.tokens == top.tokens:
        return top.seconds * tokens / top.tokens
    return low.seconds + (top.seconds - low.seconds) * (tokens - low.tokens) / (top.tokens - low.tokens)


def _needs(method: str) -> str | None:
    """What this version lacks; a base in int8 alone is a hybrid of its bits."""
    name = "hybrid" if method == "int8" else method
    return None if name in get_args(Method) else f"--method {name}, which this version does not train yet"
