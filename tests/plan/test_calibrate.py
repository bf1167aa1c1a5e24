"""Rates from pieces whose time is given, kept and read again."""

import itertools
import json

import pytest
import torch

from twinlora.errors import StorageError
from twinlora.plan import calibrate
from twinlora.plan.speed import computes
from twinlora.plan.work import Counts
from twinlora.reporter import Reporter

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Every piece once, and each takes a millisecond; a call's own overhead a microsecond."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "_time", lambda call, device: 1e-3)
    monkeypatch.setattr(calibrate, "_overhead", lambda device: 1e-6)
    monkeypatch.setattr(calibrate, "_ROTATING", 0)
    return tmp_path / "twinlora" / "rates.json"


def test_a_piece_is_predicted_to_take_what_it_took(quick, monkeypatch):
    """Counts and rates speak of the same work, kind by kind."""
    names = ("product bfloat16", "nf4 product bfloat16", "attention", "attention_backward", "copy", "norm", "optimiser")
    pieces = list(calibrate._pieces(CPU))
    for name in names:
        curve, make = next(piece for piece in pieces if piece[0] == name)
        call = make()
        monkeypatch.setattr(calibrate, "_pieces", lambda device, curve=curve, call=call: iter([(curve, lambda: call)]))
        rates = calibrate.measure(CPU, Reporter())
        with torch.no_grad():
            kinds = calibrate._main(calibrate._count(call))
        counts = Counts({kind: kinds.count(kind) for kind in kinds})
        assert rates.step_seconds(counts, 1) == pytest.approx(1e-3, rel=0.02), name


def test_every_kind_of_work_has_a_curve(quick):
    rates = calibrate.measure(CPU, Reporter())
    wanted = {f"{kind} {dtype}" for kind in ("product", "nf4 product") for dtype in ("bfloat16", "float32")}
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
    for broken in ({"source": "x"}, [], {"source": "x", "overhead": 1, "curves": {"copy": [[1]]}}):
        quick.write_text(json.dumps(dict.fromkeys(kept, broken)))
        with pytest.raises(StorageError, match="--calibrate"):
            calibrate.load(calibrate.hardware(CPU))
    quick.write_text("no json")
    assert calibrate.load(calibrate.hardware(CPU)) is None


def test_the_fastest_calls_count(monkeypatch):
    clock = itertools.accumulate(itertools.cycle([0.0, 5.0, 0.0, 1.0]))
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: next(clock))
    assert calibrate._time(lambda turn: None, CPU) < 2
