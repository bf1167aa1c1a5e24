"""The rates of this machine, measured in under a minute: products, attention, copies and what lies between them.

Nothing of a cell that is predicted later is measured: pieces alone, and two steps of models of its own. Each piece is a
call of one op at some size; what it did is counted by the same code that counts a step (work.py), so that rates and
counts cannot drift apart. Operands are cut from several times what the last-level cache holds, so that large ones come
from where they lie in a step. All is timed in turns, and of its times the median counts: a machine that others use
is slow for seconds at a time.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from twinlora import atomic, machine
from twinlora.errors import StorageError
from twinlora.model.fingerprint import cache_directory
from twinlora.numerics import ops
from twinlora.numerics.formats import Format, Int8Format, NF3Format, NF4Format
from twinlora.plan import probe, work
from twinlora.plan.simulate import Cell, simulate
from twinlora.plan.speed import Curve, Measured, computes, launches
from twinlora.reporter import Reporter

__all__ = ["TURNS", "calibrate", "hardware", "load", "measure", "store"]

TURNS = 3
_SECONDS = 0.1  # of a turn, for each piece
_LEAST, _MOST = 3, 2000  # calls of a piece in a turn
_STEPS_SECONDS = 1.5  # of a turn, for the steps that all rates are scaled by
_FASTEST = 0.6  # the least that a step's work takes of that of its pieces
_POOL = 96 << 20  # bytes that operands are cut from, at least

_ALIGNMENT = 64  # bytes
_SETS = 32  # of queries, keys and values

# curve, then what makes the call to time; that gets the number of the turn
Piece = tuple[str, Callable[[], Callable[[int], Any]]]


def calibrate(device: torch.device, reporter: Reporter) -> Measured:
    """Measure and keep. Raises StorageError."""
    machine.keep_freed_memory()  # as training does: fresh pages would be timed, too
    rates = measure(device, reporter)
    store(rates, hardware(device))
    return rates


def measure(device: torch.device, reporter: Reporter) -> Measured:
    """The rates of `device`, which should have nothing else to do."""
    pieces = list(_pieces(_Pool(device)))
    kinds: list[list[work.Kind]] = []
    tiny, small = _Step(probe.TINY, device), _Step(probe.SMALL, device)
    dispatches: list[float] = []
    times: list[list[float]] = [[] for _ in pieces]
    for turn in range(TURNS):
        dispatches.append(_dispatch(device))
        for number, (curve, make) in enumerate(pieces):
            with torch.no_grad():
                call = make()
                if not turn:
                    kinds.append(_main(_count(call)))
                times[number].append(_time(call, device))
                del call
            reporter.progress("calibrating", turn * len(pieces) + number + 1, TURNS * len(pieces), curve)
        tiny.time(device, _SECONDS)
        small.time(device, _STEPS_SECONDS)
    dispatch = statistics.median(dispatches)
    found: dict[str, list[tuple[float, float]]] = {}
    for (curve, _), calls, seconds in zip(pieces, kinds, map(statistics.median, times), strict=True):
        found.setdefault(curve, []).append(_point(calls, seconds, dispatch))
    curves = {name: Curve(tuple(sorted(points))) for name, points in found.items()}
    when = datetime.now(UTC).isoformat(sep=" ", timespec="minutes")
    rates = Measured(f"measured on this machine, {when}", curves, dispatch)
    rates = replace(rates, overhead=_overhead(tiny, rates))
    return replace(rates, slowdown=_slowdown(small, rates))


def _point(kinds: list[work.Kind], seconds: float, dispatch: float) -> tuple[float, float]:
    """Of a curve: the size of these calls, and the rate at which they work in `seconds`."""
    seconds = max(seconds - dispatch * sum(map(launches, kinds)), seconds / 4)
    flops, size = sum(k.flops for k in kinds), sum(k.read + k.written for k in kinds)
    return (flops / size, flops / seconds) if computes(kinds[0].name) else (size / len(kinds), size / seconds)


class _Counter(TorchDispatchMode):
    """The kinds of all operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[work.Kind] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        for kind, calls in work.of(func, args, kwargs or {}, made):
            self.kinds += [kind] * calls
        return out


def _count(call: Callable[[int], Any]) -> list[work.Kind]:
    counter = _Counter()
    with counter:
        call(0)
    return counter.kinds


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
    kept: deque[Any] = deque(maxlen=_beyond_caches(device) // 4 // max(_bytes(first), 1))
    times: list[float] = []
    end = time.perf_counter() + at_least
    while len(times) < _LEAST or (time.perf_counter() < end and len(times) < _MOST):
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


class _Step:
    """A step of a model: what it does, and the seconds that it takes."""

    def __init__(self, model: probe.Probe, device: torch.device) -> None:
        cell = Cell(lengths=(model.tokens,), rank=model.rank, target="cuda" if device.type == "cuda" else "cpu")
        self.counts, self.tokens = simulate(model.config, cell).counts, model.tokens
        self._run = probe.step_of(model, device)
        self._run()
        self._times: list[float] = []

    def time(self, device: torch.device, at_least: float) -> None:
        """Run it for `at_least` seconds, one of several times."""
        self._times.append(_time(lambda _: self._run(), device, at_least))

    @property
    def seconds(self) -> float:
        """The median of those times."""
        return statistics.median(self._times)

    @property
    def launched(self) -> int:
        """Calls that pay a call's overhead."""
        return sum(calls * launches(kind) for kind, calls in self.counts.calls_of.items())

    def work(self, rates: Measured) -> float:
        """Seconds of its work alone at these rates."""
        return replace(rates, overhead=0.0).step_seconds(self.counts, self.tokens)


def _overhead(tiny: _Step, rates: Measured) -> float:
    """Seconds that a step takes for each call beside its work, modules, hooks and our own functions in Python included:
    a tiny model's step, less its work at these rates. At least those of `rates`."""
    return max(rates.overhead, (tiny.seconds - tiny.work(rates)) / tiny.launched)


def _slowdown(small: _Step, rates: Measured) -> float:
    """How much longer work takes in a step than a piece at a time: operands come from further away there, and what a
    call leaves in caches is not what the next one wants. Below 1 if the machine was slow while pieces were timed; where
    a step is all launches, nothing can be said of its work, so never far below."""
    return max(_FASTEST, (small.seconds - rates.overhead * small.launched) / small.work(rates))


def _beyond_caches(device: torch.device) -> int:
    """Bytes of which the caches hold little at a time."""
    if device.type == "cuda":
        cache, free = torch.cuda.get_device_properties(device).L2_cache_size, torch.cuda.mem_get_info(device)[0]
    else:
        cache, free = machine.last_cache_bytes(), machine.available_bytes()
    return max(_POOL, min(4 * cache, free // 4))


class _Pool:
    """Random memory that operands are cut from in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._at = device, 0
        values = torch.randn(_POOL // 8, device=device).bfloat16().view(torch.uint8)
        self._bytes = values.repeat(_beyond_caches(device) // values.nbytes)

    def cut(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Operands of one shape for the calls of a piece, behind those that were cut before: a quarter of all at most,
        so that what a call reads is not what it writes."""
        nbytes = math.prod(shape) * dtype.itemsize
        found: list[Tensor] = []
        for _ in range(max(1, min(_MOST, len(self._bytes) // 4 // nbytes))):
            if self._at + nbytes > len(self._bytes):
                self._at = 0
            found.append(self._bytes[self._at : self._at + nbytes].view(dtype).view(shape))
            self._at += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return found


def _pieces(pool: _Pool) -> Iterator[Piece]:
    for dtype, every in ((torch.bfloat16, 1), (torch.float32, 2)):
        name = str(dtype).removeprefix("torch.")
        for shape in _PRODUCTS[::every]:
            yield f"product {name}", partial(_product, *shape, dtype, pool)
        for shape in _FROZEN_PRODUCTS[::every]:
            yield f"product dense_linears {name}", partial(_dense, *shape, dtype, pool)
        for form in (NF4Format(), Int8Format(), NF3Format()):
            for shape in (_FROZEN_PRODUCTS if form.kind == "nf4" else _OTHER_PRODUCTS)[::every]:
                yield f"{form.kind} product {name}", partial(_quantised, form, *shape, dtype, pool)
    for shape in _ADDED:
        yield "product addmm_ bfloat16", partial(_added, *shape, pool)
    for length in (32, 128, 512, 2048):
        yield "attention", partial(_attention, length, pool, backward=False)
        yield "attention_backward", partial(_attention, length, pool, backward=True)
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 23):
        yield "copy", partial(_copy, size, pool)
        yield "elementwise", partial(_add, size, pool)
    for rows in (64, 1024):
        yield "norm", partial(_norm, rows, pool)
        yield "swiglu", partial(_swiglu, rows, pool, backward=False)
        yield "swiglu_backward", partial(_swiglu, rows, pool, backward=True)
    yield "loss", partial(_loss, 64, pool)
    for count, tensors in ((1 << 12, 64), (1 << 24, 1024)):
        yield "optimiser", partial(_adam, count, tensors, pool.device)


# rows, inner, outer: wide, and as narrow as the products of an adapter
_PRODUCTS = (
    (1024, 16, 1024), (1024, 1024, 16), (1024, 1024, 48), (64, 1024, 1024), (256, 1024, 1024), (1024, 576, 576),
    (1024, 1024, 1024), (1024, 2048, 4096),
)  # fmt: skip


# With a frozen weight, which have ops of their own.
_FROZEN_PRODUCTS = (
    (64, 1024, 1024), (512, 576, 1536), (960, 576, 576), (256, 1024, 1024), (1024, 1024, 1024), (512, 2048, 2048),
    (1024, 2048, 4096),
)  # fmt: skip
_OTHER_PRODUCTS = ((256, 1024, 1024), (1024, 1024, 1024), (1024, 2048, 4096))
_ADDED = ((1024, 16, 1024), (512, 16, 4096), (1024, 48, 1024))


def _product(rows: int, inner: int, outer: int, dtype: torch.dtype, pool: _Pool) -> Callable[[int], Any]:
    xs, weights = pool.cut(rows, inner, dtype=dtype), pool.cut(outer, inner, dtype=dtype)
    return lambda turn: xs[turn % len(xs)] @ weights[turn % len(weights)].T


def _dense(rows: int, inner: int, outer: int, dtype: torch.dtype, pool: _Pool) -> Callable[[int], Any]:
    xs, weights = pool.cut(rows, inner, dtype=dtype), pool.cut(outer, inner, dtype=dtype)
    return lambda turn: ops.dense_linears(xs[turn % len(xs)], [weights[turn % len(weights)]])


def _added(rows: int, inner: int, outer: int, pool: _Pool) -> Callable[[int], Any]:
    """A product that is added to what is there, as that of an adapter's B is."""
    ys, xs, weight = pool.cut(rows, outer), pool.cut(rows, inner), pool.cut(outer, inner)[0]
    return lambda turn: ys[turn % len(ys)].addmm_(xs[turn % len(xs)], weight.T)


def _quantised(
    form: Format, rows: int, inner: int, outer: int, dtype: torch.dtype, pool: _Pool
) -> Callable[[int], Any]:
    xs = pool.cut(rows, inner, dtype=dtype)
    first = ops.quantize(torch.randn(outer, inner, dtype=dtype, device=pool.device), form)
    weights = [replace(first, packed=packed) for packed in pool.cut(*first.packed.shape, dtype=first.packed.dtype)]
    return lambda turn: ops.linear(xs[turn % len(xs)], weights[turn % len(weights)])


def _attention(length: int, pool: _Pool, *, backward: bool) -> Callable[[int], Any]:
    """At least 1,024 tokens in rows of `length`, eight heads of 64, four of keys."""
    count = max(1, 1024 // length)
    starts = [i * length for i in range(count + 1)]
    qs, douts = pool.cut(starts[-1], 8, 64), pool.cut(starts[-1], 8, 64)
    ks, vs = pool.cut(starts[-1], 4, 64), pool.cut(starts[-1], 4, 64)
    settings = (starts, 0.125, 0)
    heads = [(q, k, v, None, None) for q, k, v in zip(qs[:_SETS], ks, vs, strict=False)]
    if not backward:
        return lambda turn: torch.ops.twinlora.attention(*heads[turn % len(heads)], *settings)
    made = [torch.ops.twinlora.attention(*each, *settings) for each in heads]
    calls = [(dout, *each, *found, *settings) for dout, each, found in zip(douts, heads, made, strict=False)]
    return lambda turn: torch.ops.twinlora.attention_backward(*calls[turn % len(calls)])


def _copy(count: int, pool: _Pool) -> Callable[[int], Any]:
    sources, targets = pool.cut(count, dtype=torch.float32), pool.cut(count)
    return lambda turn: targets[turn % len(targets)].copy_(sources[turn % len(sources)])


def _add(count: int, pool: _Pool) -> Callable[[int], Any]:
    values = pool.cut(count)
    return lambda turn: values[turn % len(values)] + values[(turn + 1) % len(values)]


def _norm(rows: int, pool: _Pool) -> Callable[[int], Any]:
    xs = pool.cut(rows, 1024)
    scale = torch.ones(1024, dtype=torch.bfloat16, device=pool.device)
    return lambda turn: torch.ops.twinlora.rms_norm(xs[turn % len(xs)], scale, 1e-5, 0.0, False)


def _swiglu(rows: int, pool: _Pool, *, backward: bool) -> Callable[[int], Any]:
    gs, us, dys = (pool.cut(rows, 2048) for _ in range(3))
    if backward:
        return lambda turn: torch.ops.twinlora.swiglu_backward(
            dys[turn % len(dys)], gs[turn % len(gs)], us[turn % len(us)]
        )
    return lambda turn: torch.ops.twinlora.swiglu(gs[turn % len(gs)], us[turn % len(us)])


def _loss(rows: int, pool: _Pool) -> Callable[[int], Any]:
    logits = pool.cut(rows, 32768)
    labels = torch.zeros(rows, dtype=torch.long, device=pool.device)
    return lambda turn: torch.ops.twinlora.cross_entropy_(logits[turn % len(logits)], labels)


def _adam(count: int, tensors: int, device: torch.device) -> Callable[[int], Any]:
    """A step over matrices of `count` values in all."""
    parameters = [torch.nn.Parameter(torch.zeros(count // tensors, device=device)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    adam = torch.optim.AdamW(parameters, fused=True)
    return lambda _: adam.step()


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
    atomic.write_json(_file(), _kept() | {name: entry})


def load(name: str) -> Measured | None:
    """The rates kept under the hardware's name, None if there are none. Raises StorageError if they are damaged."""
    entry = _kept().get(name)
    if entry is None:
        return None
    try:
        curves = {
            curve: Curve(tuple((float(x), float(y)) for x, y in points)) for curve, points in entry["curves"].items()
        }
        return Measured(str(entry["source"]), curves, float(entry["overhead"]), float(entry["slowdown"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"{_file()}: {name}: not rates ({error}); run twinlora plan --calibrate again") from None
