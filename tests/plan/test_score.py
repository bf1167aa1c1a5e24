"""The history: kept, read, judged on what it was not corrected by."""

import pytest

from twinlora.plan import score
from twinlora.plan.rows import RESERVE

RUN = {
    "when": "2026-11-25T10:00:00+00:00", "hardware": "here", "model": "m", "method": "lora", "checkpointing": False,
    "micro_batch_tokens": 2048, "steps": 10, "predicted_peak_bytes": 1000, "predicted_by_cause": {"weights": 1000},
    "measured_peak_bytes": 1000, "predicted_step_seconds": 1.0, "measured_step_seconds": 1.0,
}  # fmt: skip


def past(**changes):
    return score.Past(**(RUN | changes))


@pytest.fixture
def history(tmp_path, monkeypatch):
    monkeypatch.setenv("TWINLORA_HISTORY", str(tmp_path / "deep" / "history.jsonl"))
    return tmp_path / "deep" / "history.jsonl"


def test_runs_are_kept_and_lines_that_are_none_are_counted(history):
    score.append(past(model="a"))
    with history.open("a") as file:
        file.write('{"torn": \n[1]\n')
    score.append(past(model="b"))
    notes = []
    assert [run.model for run in score.read(notes.append)] == ["a", "b"]
    assert "2 line(s)" in notes[0]


def test_off_keeps_nothing(monkeypatch):
    monkeypatch.setenv("TWINLORA_HISTORY", "off")
    score.append(past())
    assert score.read(print) == []


def test_a_correction_is_judged_on_other_runs():
    """Twice as slow as predicted, all alike: the plain error is a half, the corrected one nothing."""
    runs = [past(measured_step_seconds=2.0) for _ in range(4)]
    found = score.score(runs)
    assert found.time == pytest.approx(0.5)
    assert found.time_corrected == pytest.approx(0.0)
    assert score.time_factor(runs) == pytest.approx(2.0)
    # One alone cannot correct itself.
    assert score.score(runs[:1]).time_corrected is None
    scattered = [past(measured_step_seconds=seconds) for seconds in (1.0, 4.0)]
    assert score.score(scattered).time_corrected > score.score(scattered).time


def test_a_new_calibration_is_not_corrected_for_the_old_one():
    old = [past(measured_step_seconds=2.0, rates="then") for _ in range(3)]
    new = [past(measured_step_seconds=1.0, rates="now") for _ in range(2)]
    assert score.time_factor(score.with_rates(old + new, "now")) == pytest.approx(1.0)
    assert score.time_factor(score.with_rates(old + new, "then")) == pytest.approx(2.0)
    assert score.score(old + new).time_corrected == pytest.approx(0.0)


def test_runs_without_rates_say_nothing_of_time():
    found = score.score([past(predicted_step_seconds=None, measured_peak_bytes=1100)])
    assert found.time is None
    assert found.peak == pytest.approx(1 - 1000 / 1100)


def test_the_reserve_grows_with_what_past_runs_took_more():
    over = [past(measured_peak_bytes=1000 + 10 * i) for i in range(11)]
    assert score.reserve(over) == pytest.approx(0.09)
    assert score.reserve(over[:9]) == RESERVE  # too few to tell
    assert score.reserve([past()] * 12) == RESERVE
    assert score.reserve([past()] * 9 + [past(measured_peak_bytes=2000)]) == RESERVE, "one of ten does not count"


def test_hardware_is_told_apart():
    runs = [past(), past(hardware="there", measured_step_seconds=3.0)]
    assert set(score.summary(runs)) == {"here", "there"}
    assert score.summary(runs)["there"]["time"] == pytest.approx(2 / 3)
