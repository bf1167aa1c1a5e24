"""The rates of this machine, measured in under a minute within training steps of models of its own.

Nothing of a cell that is predicted later is measured. A call takes longer in a step than alone (threads sleep between
two calls, operands lie elsewhere), so that it is timed there, over rows and weights of several sizes; what it did is
counted by the same code that counts a plan's step (work.py): rates and counts cannot drift apart. Steps take turns, and
of a call's times the median counts: a machine that others use is slow for seconds at a time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from datetime import UTC, datetime
from operator import mul
from pathlib import Path
from typing import Any

import torch

from twinlora import atomic, machine
from twinlora.errors import StorageError
from twinlora.model.fingerprint import cache_directory
from twinlora.model.load import pick_dtype
from twinlora.numerics import ops
from twinlora.plan import probe
from twinlora.plan.speed import Cost, Measured, computes, launched, names
from twinlora.reporter import Reporter

__all__ = ["TURNS", "calibrate", "hardware", "load", "measure", "store"]

TURNS = 3
_SECONDS = 0.4  # of a turn, for each step at least
_FEW = 3  # sizes of an operation
_SAME = 0.001  # of the time of calls: errors that differ by less are one
# Not the tiny one, whose calls leave in the caches what passes around them: 14 µs there, 40 to 60 in larger models.
_MODELS = (probe.MIXED, probe.WIDE, probe.FULL)
# What a cost may consist of, by its parts' places: of work that moves bytes, and of arithmetic.
_PARTS = ((0,), (2,), (0, 2)), ((1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2))

_Case = tuple[tuple[float, ...], float]  # sizes, and the seconds that they took


def calibrate(device: torch.device, reporter: Reporter) -> Measured:
    """Measure and keep. Raises StorageError."""
    machine.keep_freed_memory()  # as training does: fresh pages would be timed, too
    rates = measure(device, reporter)
    store(rates, hardware(device))
    return rates


def measure(device: torch.device, reporter: Reporter) -> Measured:
    """The rates of `device`, which should have nothing else to do."""
    dtype, _ = pick_dtype("auto", device)
    watched = [step for each in _MODELS for step in probe.steps(each, device, dtype)]
    if dtype != torch.float32:
        watched += probe.steps(probe.PLAIN, device, torch.float32)
    seconds: list[list[float]] = [[] for _ in watched]
    for turn in range(TURNS):
        for number, (step, found) in enumerate(zip(watched, seconds, strict=True)):
            end = time.perf_counter() + _SECONDS
            while time.perf_counter() < end:
                found.append(step.run())
                step.look_within()
            reporter.progress("calibrating", turn * len(watched) + number + 1, TURNS * len(watched))
    when = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    rates = Measured(f"measured on this machine, {when}", *costs(watched))
    steps = [
        ((launched(step.counts), rates.step_seconds(step.counts, step.tokens)), statistics.median(found))
        for step, found in zip(watched, seconds, strict=True)
    ]
    overhead, slowdown = _solve(steps, ((0, 1), (1,)))
    return replace(rates, overhead=overhead, slowdown=slowdown)


def costs(watched: Iterable[probe.Step]) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """What calls cost by their sort of work and by their operation, from those of steps."""
    calls_of: dict[tuple[str, str], list[_Case]] = {}
    for step in watched:
        for kinds, seconds in step.seconds_of.items():
            sizes = (len(kinds), sum(kind.flops for kind in kinds), sum(kind.read + kind.written for kind in kinds))
            calls_of.setdefault(names(kinds[0]), []).append((sizes, seconds))
    of_sorts: dict[str, list[_Case]] = {}
    for (_, sort), calls in calls_of.items():
        of_sorts.setdefault(sort, []).extend(calls)
    sorts = {sort: Cost(*_solve(calls, _PARTS[computes(sort)])) for sort, calls in of_sorts.items()}
    operations = {}
    for (operation, sort), calls in calls_of.items():
        if len({sizes for sizes, _ in calls}) < _FEW:  # too few to tell its parts: as many times the sort's cost
            parts = astuple(sorts[sort])
            (times,) = _solve([((sum(map(mul, parts, sizes)),), seconds) for sizes, seconds in calls], ((0,),))
            operations[operation] = Cost(*(times * part for part in parts))
        else:
            operations[operation] = Cost(*_solve(calls, _PARTS[computes(operation)]))
    return sorts, operations


def _solve(cases: Sequence[_Case], choices: Sequence[tuple[int, ...]]) -> list[float]:
    """What each size of the cases is worth in seconds, with the least errors as shares of those they took.

    `choices` are the sizes that may count, the least that explain as much; none counts for less than nothing.
    """
    sizes = torch.tensor([sizes for sizes, _ in cases], dtype=torch.float64)
    shares = sizes / torch.tensor([seconds for _, seconds in cases], dtype=torch.float64)[:, None]
    best, least = [0.0] * sizes.shape[1], math.inf
    for chosen in choices:
        columns = shares[:, chosen]
        scale = columns.amax(0).clamp(min=1e-300)
        solved = torch.linalg.lstsq(columns / scale, torch.ones(len(cases), 1, dtype=torch.float64)).solution[:, 0]
        error = (columns / scale @ solved - 1).square().mean().sqrt().item()
        if (solved >= 0).all() and error < least - _SAME:
            best, least = [0.0] * sizes.shape[1], error
            for size, value in zip(chosen, (solved / scale).tolist(), strict=True):
                best[size] = value
    return best


def hardware(device: torch.device) -> str:
    """The name under which rates are kept: they hold for this device, backend and number of threads."""
    facts = machine.describe(device)
    if device.type == "cuda":
        return f"{facts['device']}, {ops.backend(device)}"
    return f"{facts['cpu']}, {facts['threads']} threads, {ops.backend(device)}"


def _file() -> Path:
    return cache_directory() / "rates.json"


def _kept() -> dict[str, Any]:
    try:
        kept = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def store(rates: Measured, name: str) -> None:
    """Keep `rates` in the cache directory under the hardware's name. Raises StorageError."""
    entry: dict[str, Any] = {"source": rates.source, "overhead": rates.overhead, "slowdown": rates.slowdown}
    found = {"sorts": rates.sorts, "operations": rates.operations}
    entry |= {key: {call: astuple(cost) for call, cost in of.items()} for key, of in found.items()}
    atomic.write_json(_file(), _kept() | {name: entry})


def load(name: str) -> Measured | None:
    """The rates kept under the hardware's name, None if there are none of this version. Raises StorageError if they are
    damaged."""
    entry = _kept().get(name)
    if entry is None or (isinstance(entry, dict) and ("curves" in entry or "costs" in entry)):
        return None  # the latter are earlier versions'
    try:
        sorts, operations = (
            {call: Cost(*map(float, parts)) for call, parts in entry[key].items()} for key in ("sorts", "operations")
        )
        return Measured(str(entry["source"]), sorts, operations, float(entry["overhead"]), float(entry["slowdown"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{_file()}: {name}: not rates ({error}); run twinlora plan --calibrate again") from None
