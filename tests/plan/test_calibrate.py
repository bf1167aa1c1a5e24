"""Rates from steps whose calls take a given time, kept and read again."""

import json
from copy import copy
from dataclasses import replace

import pytest
import torch

from twinlora.errors import StorageError
from twinlora.plan import calibrate, probe
from twinlora.plan.speed import Cost, Measured, computes, launches, names
from twinlora.plan.work import Kind
from twinlora.reporter import Reporter

CPU = torch.device("cpu")
FORMATS = replace(probe.TINY, formats=probe.MIXED.formats, batches=((64,), (8, 24), (160,)))


@pytest.fixture(scope="module")
def steps():
    """Of small models, looked into once."""
    found = [step for each in (probe.TINY, FORMATS) for step in probe.steps(each, CPU, torch.float32)]
    for step in found:
        step.look_within()
    return found


@pytest.fixture
def quick(monkeypatch, tmp_path, steps):
    """Steps that were run before; the directory that rates are kept in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_MODELS", (probe.TINY, FORMATS))
    monkeypatch.setattr(calibrate, "_SECONDS", 0.01)
    monkeypatch.setattr(calibrate, "pick_dtype", lambda *_: (torch.float32, None))
    monkeypatch.setattr(probe, "steps", lambda each, *_: steps[:1] if each is probe.TINY else steps[1:])
    return tmp_path / "twinlora" / "rates.json"


@pytest.fixture
def timed(quick, monkeypatch):
    """Gives every call the seconds that its cost says, and every step what that makes in all and some more."""

    def give(sorts, overhead=0.0, slowdown=1.0):
        truth = Measured("here", sorts, {}, overhead, slowdown)
        within = replace(truth, overhead=0.0, slowdown=1.0)

        def seconds_of(step):
            return {kinds: sum(within.call_seconds(kind, 1) for kind in kinds) for kinds in step.calls}

        monkeypatch.setattr(probe.Step, "seconds_of", property(seconds_of))
        monkeypatch.setattr(probe.Step, "run", lambda step: truth.step_seconds(step.counts, step.tokens))
        return truth

    return give


ALL = {"product float32": Cost(2e-6, 1e-9, 1e-9), "elementwise": Cost(1e-6, 0.0, 2e-8)}


def test_costs_are_found_from_calls(timed, steps):
    truth = timed(ALL)
    found = calibrate.measure(CPU, Reporter())
    assert found.overhead == pytest.approx(0, abs=1e-6)
    assert found.slowdown == pytest.approx(1, rel=0.01)
    for step in steps:
        for kind, calls in step.counts.calls_of.items():
            wanted = truth.call_seconds(kind, 1)
            if calls * wanted > 0.01 * truth.step_seconds(step.counts, 1) and launches(kind):  # lists are seen whole
                assert found.cost(kind).seconds(kind) == pytest.approx(wanted, rel=0.05), kind
    for step in steps:
        assert found.step_seconds(step.counts, 1) == pytest.approx(truth.step_seconds(step.counts, 1), rel=0.02)


def test_what_passes_around_calls_is_told_from_what_slows_them(timed):
    for overhead, slowdown in ((3e-5, 1.0), (0.0, 1.2), (2e-5, 0.8)):
        timed(ALL, overhead, slowdown)
        found = calibrate.measure(CPU, Reporter())
        assert found.overhead == pytest.approx(overhead, abs=2e-6)
        assert found.slowdown == pytest.approx(slowdown, rel=0.03)


def test_the_least_that_explains_the_times_counts_and_nothing_is_negative():
    choices = ((0,), (1,), (0, 1))
    assert calibrate._solve([((1, 10), 30.0), ((1, 20), 60.0)], choices) == [0.0, pytest.approx(3.0)]
    assert calibrate._solve([((1, 10), 5.0), ((1, 90), 5.0)], choices) == [pytest.approx(5.0), 0.0]
    assert calibrate._solve([((1, 10), 25.0), ((1, 20), 45.0)], choices) == pytest.approx([5.0, 2.0])
    falling = calibrate._solve([((1, 10), 20.0), ((1, 20), 10.0)], choices)
    assert min(falling) == 0
    assert max(falling) > 0
    assert calibrate._solve([((1, 0), 5.0)], choices) == [pytest.approx(5.0), 0.0]
    assert calibrate._solve([((1, 10), 5.0)], choices[1:]) == [0.0, pytest.approx(0.5)]


def test_an_operation_of_one_size_costs_as_its_sort_does(steps):
    """So many times: of one call nobody can say what each of its bytes takes."""
    adds = [Kind("elementwise", "add", "float32", 0, size, 0) for size in (10**4, 10**5, 10**6)]
    tiny = Kind("elementwise", "cos", "float32", 0, 10**5, 0)
    step = copy(steps[0])
    step._seconds = {(kind,): [1e-5 + 1e-9 * kind.read] for kind in adds} | {(tiny,): [2 * (1e-5 + 1e-9 * 10**5)]}
    sorts, operations = calibrate.costs([step])
    assert operations["elementwise add"] == Cost(pytest.approx(1e-5), 0.0, pytest.approx(1e-9))
    sort, cos = sorts["elementwise"], operations["elementwise cos"]
    assert cos.seconds(tiny) == pytest.approx(2.2e-4)
    assert cos.call / cos.byte == pytest.approx(sort.call / sort.byte)


def test_errors_count_as_shares_of_the_time():
    """A call of a second does not drown those of a millisecond."""
    (found,) = calibrate._solve([*[((1,), 1e-3)] * 3, ((1000,), 1.5)], ((0,),))
    assert found == pytest.approx(1.06e-3, rel=0.01)


def test_every_call_of_a_plan_has_a_cost(quick, steps):
    """In every format; by its operation, or as the sort of work that it is."""
    rates = calibrate.measure(CPU, Reporter())
    wanted = {f"{kind} float32" for kind in ("product", "nf4 product", "int8 product", "nf3 product")}
    assert wanted | {"copy", "elementwise", "norm", "loss", "optimiser", "embedding"} <= set(rates.sorts)
    for step in steps:
        assert all(names(kind)[1] in rates.sorts for kind in step.counts.calls_of)
    for name, cost in {**rates.sorts, **rates.operations}.items():
        assert min(cost.call, cost.flop, cost.byte) >= 0
        assert max(cost.call, cost.flop, cost.byte) > 0
        assert computes(name) or cost.flop == 0


def test_another_type_of_arithmetic_is_measured_too(quick, monkeypatch):
    asked = []
    made = probe.steps
    monkeypatch.setattr(calibrate, "pick_dtype", lambda *_: (torch.bfloat16, None))

    def observed(each, device, dtype):
        asked.append(dtype)
        return made(FORMATS if each is probe.PLAIN else each, device, dtype)

    monkeypatch.setattr(probe, "steps", observed)
    calibrate.measure(CPU, Reporter())
    assert asked == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_steps_take_turns(quick):
    """A machine that is slow for seconds is slow for one turn of a step."""
    shown = []

    class Seen(Reporter):
        def progress(self, stage, number, total, text=""):
            shown.append((stage, number, total))

    calibrate.measure(CPU, Seen())
    assert shown == [("calibrating", n, 4 * calibrate.TURNS) for n in range(1, 4 * calibrate.TURNS + 1)]


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
    damaged = {"source": "x", "overhead": 1, "slowdown": 1, "sorts": {"copy": [1, 2, 3, 4]}, "operations": {}}
    for broken in ({"source": "x"}, [], damaged):
        quick.write_text(json.dumps(dict.fromkeys(kept, broken)))
        with pytest.raises(StorageError, match="--calibrate"):
            calibrate.load(calibrate.hardware(CPU))
    for earlier in ({"curves": {"copy": [[1, 1]]}, "in_step": {}}, {"costs": {"copy": [0, 0, 1]}}):
        quick.write_text(json.dumps(dict.fromkeys(kept, {"source": "x", "overhead": 1, "slowdown": 1} | earlier)))
        assert calibrate.load(calibrate.hardware(CPU)) is None, "measured by an earlier version"
    quick.write_text("no json")
    assert calibrate.load(calibrate.hardware(CPU)) is None
