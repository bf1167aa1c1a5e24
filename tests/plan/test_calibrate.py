"""Rates from pieces whose time is given, kept and read again."""

import itertools
import json
from collections import Counter
from copy import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from twinlora import machine
from twinlora.errors import StorageError
from twinlora.numerics import cpu
from twinlora.plan import calibrate, pieces, probe
from twinlora.plan.speed import Curve, InStep, Measured, computes, launched, sort
from twinlora.plan.work import Counts
from twinlora.reporter import Reporter

CPU = torch.device("cpu")


@cache
def tiny_step():
    step = probe.Step(probe.TINY, CPU, torch.float32)
    step.look_within()
    return step


def step_of(within):
    """A step of the tiny model, of which that time passes within each sort of operations."""
    step = copy(tiny_step())
    step._within = {name: [seconds] for name, seconds in within.items()}
    return step


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Every piece once, and each takes a millisecond; a call's own overhead a microsecond, in a step, too,
    and nothing is slower there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "TURNS", 1)
    monkeypatch.setattr(calibrate, "_time", lambda call, device, at_least=0.0: 1e-3)
    monkeypatch.setattr(calibrate, "_dispatch", lambda device: 1e-6)
    monkeypatch.setattr(calibrate, "_work", lambda rates, step: 1e-3)  # all of a step's time
    monkeypatch.setattr(calibrate, "_in_step", lambda rates, *steps: {})
    monkeypatch.setattr(calibrate, "_slowdown", lambda rates, step, seconds: 1.0)
    monkeypatch.setattr(calibrate, "_TINY_STEPS", 1)
    made = tiny_step()
    monkeypatch.setattr(probe, "Step", lambda *_: copy(made))
    monkeypatch.setattr(calibrate, "pick_dtype", lambda *_: (torch.float32, None))
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 0)
    return tmp_path / "twinlora" / "rates.json"


def test_a_piece_is_predicted_to_take_what_it_took(quick, monkeypatch):
    """Counts and rates speak of the same work, kind by kind."""
    products = ("product bfloat16", "product dense_linears bfloat16", "product addmm_ bfloat16", "nf4 product bfloat16")
    names = (*products, "attention", "attention_backward", "copy", "norm", "optimiser")
    all_pieces = list(pieces.pieces(pieces.Pool(CPU)))
    for name in names:
        curve, make = next(piece for piece in all_pieces if piece[0] == name)
        call = make()
        monkeypatch.setattr(calibrate, "pieces", lambda pool, curve=curve, call=call: iter([(curve, lambda: call)]))
        rates = calibrate.measure(CPU, Reporter())
        with torch.no_grad():
            kinds = calibrate._main(calibrate._count(call))
        counts = Counts({kind: kinds.count(kind) for kind in kinds})
        assert rates.step_seconds(counts, 1) == pytest.approx(1e-3, rel=0.02), name


def test_operands_of_a_piece_lie_apart_and_those_of_the_next_elsewhere(monkeypatch):
    monkeypatch.setattr(pieces, "_POOL", 8 << 20)
    monkeypatch.setattr(machine, "last_cache_bytes", lambda: 3 << 20)
    pool = pieces.Pool(CPU)
    assert len(pool._bytes) == 12 << 20
    cut = [pool.cut(1000, 100) for _ in range(3)] + [pool.cut(1000, 100, dtype=torch.float32)]
    assert [len(each) for each in cut] == [15, 15, 15, 7]
    places = sorted((view.data_ptr(), view.nbytes) for each in cut for view in each)
    assert all(at + size <= after for (at, size), (after, _) in itertools.pairwise(places))
    assert all(view.isfinite().all() for each in cut for view in each)
    assert places[0][0] in {view.data_ptr() for view in pool.cut(1000, 100)}, "from the start again"


def test_results_of_calls_go_to_other_memory(monkeypatch):
    monkeypatch.setattr(pieces, "_POOL", 4 * 8 * 4000)
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
    damaged = {"source": "x", "overhead": 1, "slowdown": 1, "in_step": {}, "curves": {"copy": [[1]]}}
    for broken in ({"source": "x"}, [], damaged):
        quick.write_text(json.dumps(dict.fromkeys(kept, broken)))
        with pytest.raises(StorageError, match="--calibrate"):
            calibrate.load(calibrate.hardware(CPU))
    earlier = {key: value for key, value in next(iter(kept.values())).items() if key != "in_step"}
    quick.write_text(json.dumps(dict.fromkeys(kept, earlier)))
    assert calibrate.load(calibrate.hardware(CPU)) is None, "measured by an earlier version"
    quick.write_text("no json")
    assert calibrate.load(calibrate.hardware(CPU)) is None


def test_a_call_takes_what_half_of_them_exceed(monkeypatch):
    clock = itertools.accumulate([0.0, 0.0, 5.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 5.0, 0.0])
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    assert calibrate._time(lambda turn: None, CPU) == 1


def test_of_all_turns_the_median_counts(quick, monkeypatch):
    """A machine that is slow in one turn of three, or fast, is not believed."""
    monkeypatch.setattr(calibrate, "TURNS", 3)
    curve, make = next(piece for piece in pieces.pieces(pieces.Pool(CPU)) if piece[0] == "product bfloat16")
    monkeypatch.setattr(calibrate, "pieces", lambda pool: iter([(curve, make)]))
    once = calibrate.measure(CPU, Reporter()).curves[curve]
    turns = iter([9.0, 1.0, 0.1])

    def time(call, device, at_least=None):
        return 1e-3 if at_least else 1e-3 * next(turns)

    monkeypatch.setattr(calibrate, "_time", time)
    assert calibrate.measure(CPU, Reporter()).curves[curve] == once


FREE = {name: Curve(((1.0, 1e30),)) for name in ("elementwise", "product float32")}


def test_a_step_does_what_is_counted():
    """With a kernel for every operation, those that run are those that a plan counts."""
    if not cpu.paths() or not cpu.has_blocks():
        pytest.skip("this processor has no kernels between the products")
    step = probe.Step(probe.TINY, CPU, torch.bfloat16)
    step.look_within()
    ran = Counts(Counter(step.kinds))
    assert ran.flops == pytest.approx(step.counts.flops, rel=0.01)
    assert launched(ran) == pytest.approx(launched(step.counts), rel=0.01)
    waited = {"elementwise _local_scalar_dense"}  # for the loss
    assert {sort(kind) for kind in ran.calls_of} - waited == {sort(kind) for kind in step.counts.calls_of}


def test_a_probe_has_layers_of_every_format():
    made = probe.SMALL.precision()
    assert probe.TINY.precision() is None
    assert len(made) == 16 * 7
    assert [made[f"model.layers.{i}.mlp.up_proj"] for i in (0, 1, 2, 3, 4)] == [*probe.SMALL.formats, "16bit"]
    step = probe.Step(replace(probe.TINY, formats=probe.SMALL.formats), CPU, torch.float32)
    step.look_within()
    assert {"product dense_linears narrow", "nf4 product nf4_linears", "int8 product blockwise_linear"} <= set(
        step.within
    )
    assert {"nf3 product blockwise_linear_transposed", "product mm narrow", "norm rms_norm"} <= set(step.within)


def test_what_calls_take_in_a_step_is_found_from_two():
    """Fixed seconds and a ratio, whatever they are within the limits; and the best there is beyond them."""
    for fixed, ratio in ((3e-5, 1.2), (0.0, 0.8), (1e-4, 1.0)):
        points = [(calls, alone, calls * fixed + ratio * alone) for calls, alone in ((100, 0.01), (40, 0.1))]
        found = calibrate._fit(points)
        assert (found.fixed, found.ratio) == (pytest.approx(fixed, abs=2e-6), pytest.approx(ratio, abs=0.02))
        one = calibrate._fit(points[:1])
        assert 100 * one.fixed + 0.01 * one.ratio == pytest.approx(points[0][2])
    assert calibrate._fit([(10, 1.0, 5.0)]) == InStep(pytest.approx(0.3), 2.0)
    assert calibrate._fit([(10, 1.0, 0.1)]) == InStep(0.0, 0.6)


def test_a_sort_of_calls_takes_in_a_step_what_it_took():
    """Rates that know it predict that time again; sorts that take next to nothing say nothing."""
    rates = Measured("here", {name: Curve(((1.0, 1e9),)) for name in FREE}, 1e-5)
    tiny = step_of({"elementwise mul": 1e-3})
    alone = replace(rates, overhead=0.0)
    named = {}
    for kind in tiny.kinds:
        named[sort(kind)] = named.get(sort(kind), 0.0) + alone.call_seconds(kind, 64)
    wanted = {name: 1.5 * seconds for name, seconds in named.items()}
    step = step_of(wanted)
    step._within["elementwise silu"] = [1e-12]
    found = replace(alone, in_step=calibrate._in_step(rates, tiny, step))
    assert "elementwise silu" not in found.in_step
    usual = (1e-3 - calibrate._work(rates, tiny)) / launched(tiny.counts)
    for name, place in found.in_step.items():
        counts = Counts(Counter(kind for kind in step.kinds if sort(kind) == name))
        assert found.step_seconds(counts, 64) + usual * launched(counts) == pytest.approx(wanted[name], rel=0.01), (
            name,
            place,
        )


def test_a_step_is_predicted_to_take_what_it_took():
    """As a whole, after its parts; a step is never much faster than its pieces."""
    step = step_of({})
    rates = Measured("here", {name: Curve(((1.0, 1e12),)) for name in FREE}, 1e-6, {"product mm": InStep(1e-5, 1.3)})
    found = replace(rates, slowdown=calibrate._slowdown(rates, step, 1.0))
    assert found.slowdown > 1
    assert found.step_seconds(step.counts, step.tokens) == pytest.approx(1.0)
    slow = replace(rates, curves={name: Curve(((1.0, 1.0),)) for name in rates.curves})
    assert calibrate._slowdown(slow, step, 1.0) == 0.6
