"""What past runs were predicted to take and what they took: the planner's error bar, earned.

A line of JSON a run, in the cache directory or where `TWINLORA_HISTORY` says (`off`: nothing is kept or predicted).
Times are predicted without the correction that they lead to; a correction is judged on runs that it does not come from.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from twinlora import atomic
from twinlora.model.fingerprint import cache_directory
from twinlora.plan.rows import RESERVE

__all__ = [
    "Past",
    "Score",
    "append",
    "history_file",
    "of_hardware",
    "read",
    "reserve",
    "score",
    "summary",
    "time_factor",
    "with_rates",
]

_FEW = 10  # runs; fewer change no reserve, and of so many one does not count
_VARIABLE = "TWINLORA_HISTORY"


class Past(BaseModel):
    """A run: bytes at its peak and seconds of a step (None where no rates were known), predicted and measured."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    when: str
    hardware: str
    model: str
    method: str
    checkpointing: bool
    micro_batch_tokens: int
    steps: int
    predicted_peak_bytes: int
    predicted_by_cause: dict[str, int]
    measured_peak_bytes: int
    predicted_step_seconds: float | None
    measured_step_seconds: float
    rates: str | None = None  # by which the time was predicted

    @property
    def peak_ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_peak_bytes / self.predicted_peak_bytes

    @property
    def time_ratio(self) -> float | None:
        """Measured over predicted."""
        return self.measured_step_seconds / self.predicted_step_seconds if self.predicted_step_seconds else None


def history_file() -> Path | None:
    """Where runs are kept; None if they are not."""
    given = os.environ.get(_VARIABLE)
    if given == "off":
        return None
    return Path(given) if given else cache_directory() / "history.jsonl"


def append(past: Past) -> None:
    """Add a run. Raises StorageError."""
    file = history_file()
    if file is None:
        return
    with atomic.writing(file):
        atomic.make_directory(file.parent)
        with file.open("a", encoding="utf-8") as stream:  # one write, so that runs side by side do not mix
            stream.write(past.model_dump_json() + "\n")


def read(note: Callable[[str], None]) -> list[Past]:
    """All runs, oldest first; `note` hears how many lines are not one."""
    file = history_file()
    if file is None or not file.is_file():
        return []
    runs, wrong = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            runs.append(Past(**json.loads(line)))
        except (ValueError, TypeError, ValidationError):
            wrong += 1
    if wrong:
        note(f"{file}: {wrong} line(s) are not runs and were left out")
    return runs


def of_hardware(runs: Sequence[Past], hardware: str) -> list[Past]:
    """Those of one device, backend and number of threads."""
    return [run for run in runs if run.hardware == hardware]


def with_rates(runs: Sequence[Past], source: str) -> list[Past]:
    """Those whose times were predicted by these rates: a new calibration needs no correction of the old one."""
    return [run for run in runs if run.rates == source]


def time_factor(runs: Sequence[Past]) -> float:
    """By what predicted times are multiplied: the median of measured over predicted; 1 without runs."""
    ratios = [math.log(run.time_ratio) for run in runs if run.time_ratio]
    return math.exp(statistics.median(ratios)) if ratios else 1.0


def reserve(runs: Sequence[Past]) -> float:
    """The share of a predicted peak that is kept free: RESERVE, or what nine of ten past runs took at most."""
    over = sorted(run.peak_ratio - 1 for run in runs)
    return max(RESERVE, over[math.ceil(0.9 * len(over)) - 1]) if len(over) >= _FEW else RESERVE


class Score(BaseModel):
    """Median absolute errors, as shares of what was measured; None without runs that tell.

    `time` is that of the plain prediction, `time_corrected` that of each run with the correction of the others.
    """

    runs: int
    peak: float | None
    time: float | None
    time_corrected: float | None


def score(runs: Sequence[Past]) -> Score:
    """Of runs of one hardware."""
    timed = [run for run in runs if run.time_ratio]
    corrected = [
        _error((run.time_ratio or 1.0) / time_factor(others))
        for run in timed
        for others in [[other for other in timed if other is not run and other.rates == run.rates]]
        if others
    ]
    return Score(
        runs=len(runs),
        peak=_median([_error(run.peak_ratio) for run in runs]),
        time=_median([_error(run.time_ratio or 1.0) for run in timed]),
        time_corrected=_median(corrected),
    )


def _error(ratio: float) -> float:
    """Of a prediction that reality exceeds by `ratio`, as a share of reality."""
    return abs(1 / ratio - 1)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def summary(runs: Sequence[Past]) -> dict[str, Any]:
    """The score of each hardware that has runs."""
    names = sorted({run.hardware for run in runs})
    return {name: score(of_hardware(runs, name)).model_dump() for name in names}
