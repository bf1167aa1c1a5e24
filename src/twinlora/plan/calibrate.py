"""The rates of this machine, measured in under a minute: products, attention, copies and what lies between them.

Nothing of a cell that is predicted later is measured: pieces alone, and steps of models of its own. Each piece is a
call of one op at some size; what it did is counted by the same code that counts a step (work.py), so that rates and
counts cannot drift apart. Operands are cut from several times what the last-level cache holds, so that large ones come
from where they lie in a step. All is timed in turns, and of its times the median counts: a machine that others use
is slow for seconds at a time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twinlora import atomic, machine
from twinlora.errors import StorageError
from twinlora.model.fingerprint import cache_directory
from twinlora.model.load import pick_dtype
from twinlora.numerics import ops
from twinlora.plan import probe, work
from twinlora.plan.pieces import MOST_CALLS, Pool, beyond_caches, pieces
from twinlora.plan.speed import Curve, InStep, Measured, computes, launched, launches, sort
from twinlora.reporter import Reporter

__all__ = ["TURNS", "calibrate", "hardware", "load", "measure", "store"]

TURNS = 3
_SECONDS = 0.07  # of a turn, for each piece
_LEAST = 3  # calls of a piece in a turn
_STEPS_SECONDS = 0.7  # of a turn, for each of two steps
_TINY_STEPS = 10  # of a turn
_FASTEST, _SLOWEST = 0.6, 2.0  # what a step's work takes of that of its pieces, at the least and at most
_SHARE = 0.01  # of a step's time; less tells nothing of a sort of calls


def calibrate(device: torch.device, reporter: Reporter) -> Measured:
    """Measure and keep. Raises StorageError."""
    machine.keep_freed_memory()  # as training does: fresh pages would be timed, too
    rates = measure(device, reporter)
    store(rates, hardware(device))
    return rates


def measure(device: torch.device, reporter: Reporter) -> Measured:
    """The rates of `device`, which should have nothing else to do."""
    timed = list(pieces(Pool(device)))
    kinds: list[list[work.Kind]] = []
    dtype, _ = pick_dtype("auto", device)
    looks_within = device.type == "cpu"  # elsewhere a call is over before its work is
    tiny, small, wide = (probe.Step(each, device, dtype) for each in (probe.TINY, probe.SMALL, probe.WIDE))
    dispatches: list[float] = []
    times: list[list[float]] = [[] for _ in timed]
    steps: dict[probe.Step, list[float]] = {tiny: [], small: []}
    for turn in range(TURNS):
        dispatches.append(_dispatch(device))
        for number, (curve, make) in enumerate(timed):
            with torch.no_grad():
                call = make()
                if not turn:
                    kinds.append(_main(_count(call)))
                times[number].append(_time(call, device))
                del call
            reporter.progress("calibrating", turn * len(timed) + number + 1, TURNS * len(timed), curve)
        for step, found in steps.items():
            found.append(_time(step.run, device, _STEPS_SECONDS))
        if looks_within:
            for step in (*[tiny] * _TINY_STEPS, small, wide, wide):
                step.look_within()
    dispatch = statistics.median(dispatches)
    points: dict[str, list[tuple[float, float]]] = {}
    for (curve, _), calls, seconds in zip(timed, kinds, map(statistics.median, times), strict=True):
        points.setdefault(curve, []).append(_point(calls, seconds, dispatch))
    curves = {name: Curve(tuple(sorted(found))) for name, found in points.items()}
    when = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    rates = Measured(f"measured on this machine, {when}", curves, dispatch)
    whole = {step: statistics.median(found) for step, found in steps.items()}
    overhead = max(dispatch, (whole[tiny] - _work(rates, tiny)) / launched(tiny.counts))
    rates = replace(rates, overhead=overhead)
    if looks_within:
        rates = replace(rates, in_step=_in_step(rates, tiny, small, wide))
    return replace(rates, slowdown=_slowdown(rates, small, whole[small]))


def _work(rates: Measured, step: probe.Step) -> float:
    """Seconds of its work alone at these rates."""
    return replace(rates, overhead=0.0).step_seconds(step.counts, step.tokens)


def _in_step(rates: Measured, tiny: probe.Step, *steps: probe.Step) -> dict[str, InStep]:
    """What calls take in steps, by sort, of those that a step spends time with."""
    # The part of the overhead that passes within a call.
    usual = (sum(tiny.within.values()) - _work(rates, tiny)) / launched(tiny.counts)
    works = replace(rates, overhead=0.0)
    found: dict[str, list[tuple[int, float, float]]] = {}
    for step in steps:
        within = step.within
        least = _SHARE * sum(within.values())
        for name, inside in within.items():
            counts = work.Counts(Counter(kind for kind in step.kinds if sort(kind) == name))
            calls, alone = launched(counts), works.step_seconds(counts, step.tokens)
            if calls and alone and inside > least:
                found.setdefault(name, []).append((calls, alone, inside))
    places = {name: _fit(points) for name, points in found.items()}
    return {name: replace(place, fixed=place.fixed - usual) for name, place in places.items()}


def _fit(points: Sequence[tuple[int, float, float]]) -> InStep:
    """Of calls, their seconds alone and in a step: what each takes more, and how many times as long its work.

    The ratio, within limits, that leaves the least error, as shares; of equal ones that with the least beside the work.
    """

    def at(ratio: float) -> tuple[float, InStep]:
        missing = [(inside - ratio * alone, calls, inside) for calls, alone, inside in points]
        weights = sum((calls / inside) ** 2 for _, calls, inside in missing)
        fixed = max(0.0, sum(more * calls / inside**2 for more, calls, inside in missing) / weights)
        error = sum(((more - fixed * calls) / inside) ** 2 for more, calls, inside in missing)
        return round(error, 4), InStep(fixed, ratio)

    ratios = [_FASTEST + (_SLOWEST - _FASTEST) * i / 140 for i in range(141)]
    return min(map(at, ratios), key=lambda found: (found[0], found[1].fixed))[1]


def _slowdown(rates: Measured, step: probe.Step, seconds: float) -> float:
    """How many times as long all work takes in that step as rates say: what timing its operations changed, and where
    they are not timed how much slower work is there. Where a step is all launches, nothing can be said of its work, so
    never far below 1."""
    return max(_FASTEST, (seconds - rates.overhead * launched(step.counts)) / _work(rates, step))


def _point(kinds: list[work.Kind], seconds: float, dispatch: float) -> tuple[float, float]:
    """Of a curve: the size of these calls, and the rate at which they work in `seconds`."""
    seconds = max(seconds - dispatch * sum(map(launches, kinds)), seconds / 4)
    flops, size = sum(k.flops for k in kinds), sum(k.read + k.written for k in kinds)
    return (flops / size, flops / seconds) if computes(kinds[0].name) else (size / len(kinds), size / seconds)


def _count(call: Callable[[int], Any]) -> list[work.Kind]:
    watch = probe.Watch()
    with watch:
        call(0)
    return watch.kinds


def _main(kinds: list[work.Kind]) -> list[work.Kind]:
    """Those that the piece is there for, without counters and the like."""
    name = max(kinds, key=lambda kind: (kind.flops, kind.read)).name
    return [kind for kind in kinds if kind.name == name]


def _time(call: Callable[[int], Any], device: torch.device, at_least: float = _SECONDS) -> float:
    """Seconds of a call: the median, as that of a step's calls adds up to a step.

    What calls give is kept for a while, as a step keeps it: the next ones write to other memory.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    first = call(0)
    wait()
    kept: deque[Any] = deque(maxlen=beyond_caches(device) // 4 // max(_bytes(first), 1))
    times: list[float] = []
    end = time.perf_counter() + at_least
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < MOST_CALLS):
        start = time.perf_counter()
        kept.append(call(len(times)))
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bytes(made: Any) -> int:
    """Of the tensors that a call gives."""
    return sum(t.nbytes for t in (made if isinstance(made, (tuple, list)) else (made,)) if isinstance(t, Tensor))


def _dispatch(device: torch.device) -> float:
    """Seconds that a call of an op takes where there is next to nothing to do, its part of autograd included."""
    x = torch.ones(8, device=device, requires_grad=True)

    def chain(_: int) -> None:
        y = x
        for _ in range(50):
            y = y * x
        y.sum().backward()
        x.grad = None

    return _time(chain, device) / len(_count(chain))


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
    curves = {curve: [list(point) for point in found.points] for curve, found in rates.curves.items()}
    entry = {"source": rates.source, "overhead": rates.overhead, "slowdown": rates.slowdown, "curves": curves}
    entry["in_step"] = {name: [place.fixed, place.ratio] for name, place in rates.in_step.items()}
    atomic.write_json(_file(), _kept() | {name: entry})


def load(name: str) -> Measured | None:
    """The rates kept under the hardware's name, None if there are none of this version. Raises StorageError if they are
    damaged."""
    entry = _kept().get(name)
    if entry is None or (isinstance(entry, dict) and "curves" in entry and "in_step" not in entry):
        return None  # the latter are an earlier version's, which did not look within steps
    try:
        curves = {
            curve: Curve(tuple((float(x), float(y)) for x, y in points)) for curve, points in entry["curves"].items()
        }
        in_step = {name: InStep(float(fixed), float(ratio)) for name, (fixed, ratio) in entry["in_step"].items()}
        return Measured(str(entry["source"]), curves, float(entry["overhead"]), in_step, float(entry["slowdown"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{_file()}: {name}: not rates ({error}); run twinlora plan --calibrate again") from None
