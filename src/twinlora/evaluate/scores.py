"""How good an answer is: one registry from the name of a metric to a function (expected, output) -> 0 to 1 for a row.

The figure of a data set is the mean over its rows. chrF and ROUGE-L are computed by sacrebleu and rouge-score, which
only these two need: the extra `eval`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from twinlora.data.formats import Row
from twinlora.data.sources import first_of
from twinlora.errors import BackendError, DataError
from twinlora.evaluate.metrics import Prediction, require_answers
from twinlora.evaluate.report import Score
from twinlora.evaluate.stats import mean_interval

__all__ = ["METRICS", "Metric", "field_shares", "require", "row_scores", "summarise", "title_of"]


@dataclass(frozen=True)
class Metric:
    """How a metric is called in prose, its function, and what it asks for: a package, or JSON as expected answer."""

    title: str
    score: Callable[[str, str], float]
    module: str = ""
    package: str = ""
    wants_json: bool = False
    whole: bool = False  # a row is right or wrong


def exact_match(expected: str, output: str) -> float:
    """1 if equal but for white space at the ends."""
    return float(output.strip() == expected.strip())


@functools.cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def chrf(expected: str, output: str) -> float:
    """Character n-gram F-score, chrF2 (Popović 2015), as sacrebleu's sentence_chrf. Needs no words, so any language."""
    return float(_chrf().sentence_score(output, [expected]).score / 100)


_CJK = (
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
)
_TOKENS = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


class _Tokenizer:
    """For rouge-score: its own lower-case words, and each Chinese or Japanese character, which its default drops."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKENS.findall(text.lower())


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Tokenizer())


def rouge_l(expected: str, output: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004); Chinese and Japanese by character."""
    return float(_rouge().score(expected, output)["rougeL"].fmeasure)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, white space around it apart; None if it is anything else, also fenced or NaN."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def json_valid(expected: str, output: str) -> float:
    """1 if the whole answer is one JSON object."""
    return float(parse_object(output) is not None)


def field_hits(expected: str, output: str) -> dict[str, bool]:
    """For each field of the expected object, whether the answer has it with the same value.

    Strict: 1 is neither true nor "1" nor 1.0; the order of keys does not count.
    """
    wanted, found = parse_object(expected) or {}, parse_object(output) or {}
    return {
        key: key in found and json.dumps(found[key], sort_keys=True) == json.dumps(value, sort_keys=True)
        for key, value in wanted.items()
    }


def json_fields(expected: str, output: str) -> float:
    """Share of the expected object's fields that the answer has with the same value; further fields do not count."""
    hits = field_hits(expected, output)
    return sum(hits.values()) / len(hits) if hits else json_valid(expected, output)


METRICS = {
    "exact-match": Metric("exact match", exact_match, whole=True),
    "chrf": Metric("chrF", chrf, module="sacrebleu", package="sacrebleu"),
    "rouge-l": Metric("ROUGE-L", rouge_l, module="rouge_score", package="rouge-score"),
    "json-valid": Metric("valid JSON", json_valid, wants_json=True, whole=True),
    "json-fields": Metric("JSON fields", json_fields, wants_json=True),
}


def title_of(name: str) -> str:
    """How a metric is written in prose."""
    return METRICS[name].title


def require(names: Sequence[str], rows: Sequence[Row]) -> None:
    """Raise what would stop `names` from being measured on `rows`, before any model is loaded.

    BackendError for a package that is missing, DataError for expected answers without words or no JSON objects.
    """
    chosen = [METRICS[name] for name in names if name in METRICS]
    missing = [metric for metric in chosen if metric.module and importlib.util.find_spec(metric.module) is None]
    if missing:
        titles, packages = (", ".join(m.title for m in missing), " ".join(m.package for m in missing))
        raise BackendError(f"metric {titles}: not installed; run\n  pip install {packages}")
    if chosen:
        require_answers(rows)
    wanting = ", ".join(metric.title for metric in chosen if metric.wants_json)
    bad = [row.where for row in rows if parse_object(row.answer) is None] if wanting else []
    if bad:
        raise DataError(
            f"metric {wanting}: {len(bad)} of {len(rows)} rows do not expect a JSON object\n  {first_of(bad)}\n"
            "leave the metric out, or measure on rows whose answers are JSON objects"
        )


def row_scores(name: str, predictions: Sequence[Prediction]) -> list[float]:
    """The score of each row."""
    return [METRICS[name].score(p.expected, p.output) for p in predictions]


def summarise(name: str, scores: Sequence[float]) -> Score:
    """The mean of row scores with its interval; hits are counted where a row is right or wrong."""
    low, high = mean_interval(scores)
    hits = int(sum(scores)) if METRICS[name].whole else None
    return Score(value=sum(scores) / len(scores), low=low, high=high, hits=hits, rows=len(scores))


def field_shares(predictions: Sequence[Prediction]) -> dict[str, float]:
    """For each field of the expected objects, the share of the rows with it whose answers have it right."""
    hits: dict[str, list[bool]] = {}
    for p in predictions:
        for field, hit in field_hits(p.expected, p.output).items():
            hits.setdefault(field, []).append(hit)
    return {field: sum(found) / len(found) for field, found in hits.items()}
