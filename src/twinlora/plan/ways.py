"""The ways to train a model on a workload: each method's settings with peak and time, from few simulated steps.

Simulated are, for each method with and without checkpointing, the largest micro-batch, and for LoRA also the longest
row alone. What lies between is affine in the tokens of a micro-batch (attention of a row aside), and a setting that is
recommended is simulated itself (`exact`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import get_args

import torch
from transformers import PretrainedConfig

from twinlora import machine
from twinlora.adapters.targets import LoraConfig
from twinlora.config import AdapterOptions, Method, PlanOptions
from twinlora.numerics.nf4 import NF4Format
from twinlora.plan.quality import FORMATS, expected
from twinlora.plan.rows import Candidate, Row, Way
from twinlora.plan.simulate import Cell, Simulated, simulate
from twinlora.plan.speed import Rates
from twinlora.plan.targets import TargetName
from twinlora.plan.workload import Micro, Workload

__all__ = ["METHODS", "Setting", "Ways", "cell_for", "step_times"]

METHODS = ("full", "lora", "int8", "qlora", "hybrid")
_GROWING = ("activations", "loss head", "workspace")  # with the tokens of a micro-batch
_NF4, _INT8 = FORMATS[1], FORMATS[2]
_CUDA_CONTEXT = 600 << 20  # bytes: driver context and the libraries' workspaces; seen on data-centre cards
_KEPT = 2  # checkpoints, as train keeps by default


@dataclass(frozen=True)
class Setting:
    """What a plan is made with beside the model and the workload."""

    options: PlanOptions
    target: TargetName
    dtype: torch.dtype
    rates: Rates | None


@dataclass(frozen=True)
class _Point:
    """A simulated cell: tokens of its micro-batch, and seconds of one micro-batch and of one update."""

    found: Simulated
    tokens: int
    seconds: float | None
    update: float


class Ways:
    """Makes the ways of one model. `tell(done, total)` hears how far the simulation is."""

    def __init__(
        self,
        config: PretrainedConfig,
        workload: Workload,
        setting: Setting,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        self.config, self.workload, self.setting = config, workload, setting
        self._tell, self._done = tell or (lambda done, total: None), 0
        self._runtime = machine.rss_bytes() if setting.target == "cpu" else _CUDA_CONTEXT
        self.limits = self._limits()

    def _limits(self) -> list[int]:
        """Tokens of a micro-batch at most, descending to the longest row's."""
        longest, most = self.workload.longest, self.workload.largest_step
        limit, out = self.setting.options.micro_batch_tokens, []
        while limit > longest:
            if limit // 2 < most:
                out.append(limit)
            limit //= 2
        return [*out, longest]

    def make(self) -> list[Way]:
        """All ways, in the order of METHODS."""
        points = {
            (method, checkpointing): self._point(method, checkpointing, self.limits[0])
            for method in ("lora", "qlora", "full")
            for checkpointing in (False, True)
        }
        lora, qlora, options = points["lora", False].found, points["qlora", False].found, self.setting.options
        # The sizes as stored: an allocator's rounding is not the format's.
        fmt, count = NF4Format(options.block_size, 256 if options.double_quant else 0), 1 << 24
        saved = lora.weight_bytes - qlora.weight_bytes
        quantised = round(saved / (self.setting.dtype.itemsize - fmt.stored_bytes(count) / count))
        low = {c: self._point("lora", c, self.limits[-1]) for c in (False, True)} if len(self.limits) > 1 else {}
        made = {}
        for method in ("lora", "qlora", "full"):
            candidates = [
                self._candidate(points[method, checkpointing], points["lora", checkpointing], low.get(checkpointing),
                                checkpointing, limit, shared=method == "full")
                for checkpointing in (False, True)
                for limit in self.limits
            ]  # fmt: skip
            made[method] = self._way(method, candidates, points[method, False].found, quantised)
        made["hybrid"] = dataclasses.replace(
            made["qlora"],
            method="hybrid",
            needs=_needs("hybrid"),
            expected=expected("hybrid", made["qlora"].parameters),
        )
        made["int8"] = self._in_int8(made["qlora"])
        return [made[method] for method in METHODS]

    def exact(self, row: Row) -> Way:
        """The way of `row`, with the row's setting simulated itself."""
        method = {"hybrid": "qlora", "int8": "qlora"}.get(row.method, row.method)
        found = self._simulated(method, row.setting.checkpointing, row.setting.micro_batch_tokens)
        by_cause = self._causes(found.by_cause)
        if row.method == "int8":
            by_cause = _int8_causes(by_cause, row.way.quantised_weights)
        better = dataclasses.replace(row.setting, by_cause=by_cause, exact=True)
        candidates = tuple(better if candidate is row.setting else candidate for candidate in row.way.candidates)
        return dataclasses.replace(row.way, candidates=candidates)

    def _simulated(self, method: str, checkpointing: bool, limit: int) -> Simulated:
        total = 6 + 2 * (len(self.limits) > 1)
        self._done += 1
        self._tell(min(self._done, total), total)
        setting, packed = self.setting, self.workload.packed
        cell = cell_for(
            self.workload.largest(limit), setting.options, method=method, checkpointing=checkpointing,
            dtype=setting.dtype, target=setting.target, packed=packed, block_size=setting.options.block_size,
            double_quant=setting.options.double_quant,
        )  # fmt: skip
        return _simulated(self.config, cell)

    def _point(self, method: str, checkpointing: bool, limit: int) -> _Point:
        found = self._simulated(method, checkpointing, limit)
        micro, rates = self.workload.largest(limit), self.setting.rates
        tokens = micro.size(packed=self.workload.packed)
        if rates is None:
            return _Point(found, tokens, None, 0.0)
        return _Point(found, tokens, *step_times(rates, found, micro, tokens))

    def _candidate(
        self, top: _Point, lora: _Point, low: _Point | None, checkpointing: bool, limit: int, *, shared: bool
    ) -> Candidate:
        """The setting with micro-batches of at most `limit`; LoRA's two points tell how things grow.

        `shared`: what the method takes more time than LoRA grows with the tokens, too.
        """
        tokens = self.workload.largest(limit).size(packed=self.workload.packed)
        count, mean = self.workload.micro_batches(limit)
        by_cause = dict(top.found.by_cause)
        if low is not None and tokens != top.tokens:
            missing = (top.tokens - tokens) / (top.tokens - low.tokens)
            for cause in _GROWING:
                grown = lora.found.by_cause[cause] - low.found.by_cause[cause]
                by_cause[cause] = max(0, round(by_cause[cause] - missing * grown))
        seconds = None
        if top.seconds is not None and lora.seconds is not None:
            plain = _at(mean, lora, low)
            each = plain * top.seconds / lora.seconds if shared else plain + top.seconds - lora.seconds
            seconds = count * each + len(self.workload.batches) * top.update
        micro_batches = self.workload.largest(self.limits[0]).micro_batches
        work = sum(top.found.counts.flops.values()) / micro_batches * count * mean / top.tokens
        steps = max(1, len(self.workload.batches))
        exact = tokens == top.tokens or (top is lora and low is not None and tokens == low.tokens)
        causes = self._causes(by_cause)
        return Candidate(checkpointing, limit, max(1, round(count / steps)), causes, work, seconds, exact)

    def _causes(self, by_cause: dict[str, int]) -> dict[str, int]:
        return by_cause | {"runtime": by_cause.get("runtime", self._runtime)}

    def _way(self, method: str, candidates: list[Candidate], found: Simulated, quantised: int) -> Way:
        full = method == "full"
        bits = _NF4.bits if method == "qlora" else 8.0 * self.setting.dtype.itemsize
        artefact = found.trainable_parameters * (self.setting.dtype.itemsize if full else 4)
        return Way(
            method=method,
            bits=bits,
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
            dataclasses.replace(c, by_cause=_int8_causes(c.by_cause, qlora.quantised_weights)) for c in qlora.candidates
        )
        known = expected("int8", qlora.parameters)
        return dataclasses.replace(
            qlora, method="int8", bits=_INT8.bits, candidates=candidates, expected=known, needs=_needs("int8")
        )


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
) -> Cell:
    """The cell of a step whose micro-batches are like `micro`."""
    return Cell(
        method=method,  # type: ignore[arg-type]
        lengths=micro.lengths,
        trained_tokens=micro.trained_tokens,
        micro_batches=micro.micro_batches,
        rank=options.rank,
        targets=tuple(options.target),
        adapter=LoraConfig.from_options(options),
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


@cache
def _kept(text: str, cell: str) -> list[Simulated]:
    return []


def _simulated(config: PretrainedConfig, cell: Cell) -> Simulated:
    """`simulate`, once in a process for equal questions."""
    kept = _kept(config.to_json_string(), repr(cell))
    if not kept:
        kept.append(simulate(config, cell))
    return kept[0]


def _int8_causes(by_cause: dict[str, int], weights: int) -> dict[str, int]:
    constants = weights * (_INT8.bits - 8) / 8
    return dict(by_cause) | {"weights": by_cause["weights"] + weights // 2, "quantisation constants": round(constants)}


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
