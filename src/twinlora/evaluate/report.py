"""The one schema of a comparison. Every table, page and verdict renders it; nothing else holds a figure.

Sizes are bytes, times seconds, shares and scores 0 to 1, losses nats per trained token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from twinlora import atomic
from twinlora.errors import InputError

__all__ = [
    "BASE",
    "Difference",
    "General",
    "MethodResult",
    "Report",
    "Sample",
    "Score",
    "SearchPoint",
    "Verdict",
    "load",
    "save",
]

BASE = "base"  # the way of the untuned model


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Score(_Model):
    """The mean score of the rows, 0 to 1, with its 95 % interval; hits where a row is either right or wrong."""

    value: float
    low: float
    high: float
    rows: int
    hits: int | None = None


class General(_Model):
    """Loss on general text, by the same base in the same precision before training, and after it.

    `rows_before` and `rows_after` are sums of nats over each text's `tokens`.
    """

    before: float
    after: float
    rows_before: list[float]
    rows_after: list[float]
    tokens: list[int]


class SearchPoint(_Model):
    """One learning rate of the search; `validation_loss` is None if the run diverged."""

    lr: float
    validation_loss: float | None
    seconds: float


class CurvePoint(_Model):
    """The training loss after a step."""

    step: int
    loss: float
    tokens: int


class MethodResult(_Model):
    """Everything measured about one way: a method, or the untuned base."""

    method: str
    scores: dict[str, Score]  # by metric
    row_scores: list[float]  # of the metric that decides
    fields: dict[str, float] = {}  # of json-fields: the share of rows by field
    test_loss: float
    general: General
    eval_seconds: float
    peak_rss_bytes: int
    peak_device_bytes: int = 0
    base_weight_bytes: int
    base_precision: dict[str, int]
    backend: str
    # Of the tuned ways alone.
    learning_rate: float | None = None
    search: list[SearchPoint] = []
    at_edge: bool = False
    search_seconds: float = 0.0
    train_seconds: float = 0.0
    train_peak_rss_bytes: int = 0
    tokens_per_second: float | None = None
    trained_tokens: int = 0
    trainable_parameters: int = 0
    artefact_bytes: int = 0
    curve: list[CurvePoint] = []


class Difference(_Model):
    """What `a` has more than `b` on the same rows, with its paired 95 % interval.

    Of the deciding metric's scores; or of the rise of the loss on general text, where base stands for no rise.
    """

    a: str
    b: str
    value: float
    low: float
    high: float
    rows: int

    @property
    def undecided(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high


class Verdict(_Model):
    """Which way to choose, in words in `sentence`. `choose` is None if the verdict is withheld or nothing helps.

    `notes` say what else should be known, such as a method that forgets more than another.
    """

    choose: str | None
    sentence: str
    reasons: list[str]
    withheld: list[str] = []
    notes: list[str] = []


class Sample(_Model):
    """A test row, what each way said, and how the deciding metric judges it."""

    prompt: str
    expected: str
    outputs: dict[str, str]
    scores: dict[str, float]


class Report(_Model):
    """A comparison of fine-tuning methods on one model and one data set."""

    schema_version: int = 2
    title: str
    created: str
    git_hash: str | None
    machine: dict[str, Any]
    model: str
    model_parameters: int
    base_fingerprint: str
    data: dict[str, Any]
    options: dict[str, Any]
    metric: str  # the one that decides
    ways: list[MethodResult]
    diverged: list[str] = []  # methods whose every learning rate diverged; they have no result
    failed: dict[str, str] = {}  # nor those whose runs failed: why
    differences: list[Difference]
    forgetting: list[Difference]
    verdict: Verdict
    samples: list[Sample]
    next_commands: list[str]

    def way(self, method: str) -> MethodResult | None:
        """The result of `method`, if it was run."""
        return next((way for way in self.ways if way.method == method), None)

    def difference(self, a: str, b: str) -> Difference | None:
        """Paired difference a - b, if both were run."""
        return next((d for d in self.differences if (d.a, d.b) == (a, b)), None)


def save(report: Report, path: Path) -> None:
    """Write report.json."""
    atomic.write_json(path, report.model_dump(mode="json"))


def load(path: Path) -> Report:
    """Read report.json. Raises InputError that names the file and each wrong field."""
    try:
        return Report(**json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        lines = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path}: not a comparison report\n{lines}") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as a report: {error}") from None
