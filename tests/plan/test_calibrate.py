"""Rates from pieces whose time is given, kept and read again."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from twinlora import machine
from twinlora.errors import StorageError
from twinlora.plan import calibrate, probe
from twinlora.plan.simulate import Cell, simulate
from twinlora.plan.speed import Curve, Measured, computes
from twinlora.plan.work import Counts
from twinlora.reporter import Reporter

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Every piece once, and each takes a millisecond; a call's own overhead a microsecond, in a step, too,
    and nothing is slower there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "TURNS", 1)
    monkeypatch.setattr(calibrate, "_time", lambda call, device, at_least=0.0: 1e-3)
    monkeypatch.setattr(calibrate, "_dispatch", lambda device: 1e-6)
    monkeypatch.setattr(calibrate, "_overhead", lambda step, rates: rates.overhead)
    monkeypatch.setattr(calibrate, "_slowdown", lambda step, rates: 1.0)
    monkeypatch.setattr(probe, "SMALL", probe.TINY)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    return tmp_path / "twinlora" / "rates.json"


def test_a_piece_is_predicted_to_take_what_it_took(quick, monkeypatch):
    """Counts and rates speak of the same work, kind by kind."""
    products = ("product bfloat16", "product dense_linears bfloat16", "product addmm_ bfloat16", "nf4 product bfloat16")
    names = (*products, "attention", "attention_backward", "copy", "norm", "optimiser")
    pieces = list(calibrate._pieces(calibrate._Pool(CPU)))
    for name in names:
        curve, make = next(piece for piece in pieces if piece[0] == name)
        call = make()
        monkeypatch.setattr(calibrate, "_pieces", lambda pool, curve=curve, call=call: iter([(curve, lambda: call)]))
        rates = calibrate.measure(CPU, Reporter())
        with torch.no_grad():
            kinds = calibrate._main(calibrate._count(call))
        counts = Counts({kind: kinds.count(kind) for kind in kinds})
        assert rates.step_seconds(counts, 1) == pytest.approx(1e-3, rel=0.02), name


def test_operands_of_a_piece_lie_apart_and_those_of_the_next_elsewhere(monkeypatch):
    monkeypatch.setattr(calibrate, "_POOL", 8 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 3 << 20)
    pool = calibrate._Pool(CPU)
    assert len(pool._bytes) == 12 << 20
    cut = [pool.cut(1000, 100) for _ in range(3)] + [pool.cut(1000, 100, dtype=torch.float32)]
    assert [len(each) for each in cut] == [15, 15, 15, 7]
    places = sorted((view.data_ptr(), view.nbytes) for each in cut for view in each)
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(places))
    assert all(view.isfinite().all() for each in cut for view in each)
    assert places[0][0] in {view.data_ptr() for view in pool.cut(1000, 100)}, "from the start again"


def test_results_of_calls_go_to_other_memory(monkeypatch):
    monkeypatch.setattr(calibrate, "_POOL", 4 * 8 * 4000)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    places = []

    def call(turn):
        made = torch.empty(1000)
        places.append(made.data_ptr())
        return made

    calibrate._time(call, CPU, 0.001)
    kept = places[1:]  # the first call of all is not timed
    assert len(kept) > 20
    assert all(len(set(kept[i : i + 8])) == 8 for i in range(len(kept) - 8))


def test_every_kind_of_work_has_a_curve(quick):
    rates = calibrate.measure(CPU, Reporter())
    wanted = {
        f"{kind} {dtype}"
        for kind in ("product", "product dense_linears", "nf4 product", "int8 product", "nf3 product")
        for dtype in ("bfloat16", "float32")
    }
    wanted |= {"attention", "attention_backward", "copy", "elementwise", "norm", "loss", "optimiser", "swiglu"}
    assert wanted <= set(rates.curves)
    for name, curve in rates.curves.items():
        sizes = [size for size, _ in curve.points]
        assert sizes == sorted(sizes)
        assert all(rate > 0 for _, rate in curve.points)
        assert computes(name) == ("product" in name or "attention" in name)
    assert {tuple(round(s) for s, _ in rates.curves[n].points) for n in ("copy",)}


def test_rates_are_kept_under_the_hardwares_name(quick):
    rates = calibrate.calibrate(CPU, Reporter())
    name = calibrate.hardware(CPU)
    assert str(torch.get_num_threads()) in name
    found = calibrate.load(name)
    assert found == rates
    assert calibrate.load(name + " overclocked") is None
    calibrate.store(rates, "another")
    assert calibrate.load(name) == rates
    assert set(json.loads(quick.read_text())) == {name, "another"}


def test_damaged_rates_are_an_error_and_not_a_guess(quick):
    calibrate.calibrate(CPU, Reporter())
    kept = json.loads(quick.read_text())
    for broken in ({"source": "x"}, [], {"source": "x", "overhead": 1, "slowdown": 1, "curves": {"copy": [[1]]}}):
        quick.write_text(json.dumps(dict.fromkeys(kept, broken)))
        with pytest.raises(StorageError, match="--calibrate"):
            calibrate.load(calibrate.hardware(CPU))
    quick.write_text("no json")
    assert calibrate.load(calibrate.hardware(CPU)) is None


def test_a_call_takes_what_half_of_them_exceed(monkeypatch):
    clock = itertools.accumulate([0.0, 0.0, 5.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 5.0, 0.0])
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    assert calibrate._time(lambda turn: None, CPU) == 1


def test_of_all_turns_the_median_counts(quick, monkeypatch):
    """A machine that is slow in one turn of three, or fast, is not believed."""
    monkeypatch.setattr(calibrate, "TURNS", 3)
    curve, make = next(piece for piece in calibrate._pieces(calibrate._Pool(CPU)) if piece[0] == "product bfloat16")
    monkeypatch.setattr(calibrate, "_pieces", lambda pool: iter([(curve, make)]))
    once = calibrate.measure(CPU, Reporter()).curves[curve]
    turns = iter([9.0, 1.0, 0.1])

    def time(call, device, at_least=None):
        return 1e-3 if at_least else 1e-3 * next(turns)

    monkeypatch.setattr(calibrate, "_time", time)
    assert calibrate.measure(CPU, Reporter()).curves[curve] == once


def step_of(model, monkeypatch):
    """A step of it that takes a second."""
    monkeypatch.setattr(calibrate, "_time", lambda call, *_: (call(0), 1.0)[1])
    step = calibrate._Step(model, CPU)
    step.time(CPU, 0.0)
    return step


def test_a_steps_overhead_is_what_its_work_does_not_explain(monkeypatch):
    """With a curve that makes work free, all of the step's time is shared among its calls; nothing is below `rates`."""
    free = Measured("here", {"elementwise": Curve(((1.0, 1e30),)), "product float32": Curve(((1.0, 1e30),))}, 1e-6)
    tiny = probe.TINY
    step = step_of(tiny, monkeypatch)
    found = calibrate._overhead(step, free)
    counts = simulate(tiny.config, Cell(lengths=(tiny.tokens,), rank=tiny.rank)).counts
    assert replace(free, overhead=found).step_seconds(counts, tiny.tokens) == pytest.approx(1.0)
    slow = replace(free, curves={name: Curve(((1.0, 1.0),)) for name in free.curves})
    assert calibrate._overhead(step, slow) == 1e-6


def test_work_is_slower_in_a_step_by_what_a_real_one_takes(monkeypatch):
    """Rates with that slowdown predict the step that it was found by; a step is never much faster than its pieces."""
    tiny = probe.TINY
    step = step_of(tiny, monkeypatch)
    counts = simulate(tiny.config, Cell(lengths=(tiny.tokens,), rank=tiny.rank)).counts
    curves = {name: Curve(((1.0, 1e12),)) for name in ("elementwise", "product float32")}
    rates = Measured("here", curves, 1e-6)
    found = replace(rates, slowdown=calibrate._slowdown(step, rates))
    assert found.slowdown > 1
    assert found.step_seconds(counts, tiny.tokens) == pytest.approx(1.0)
    assert calibrate._slowdown(step, replace(rates, curves={name: Curve(((1.0, 1.0),)) for name in curves})) == 0.6
