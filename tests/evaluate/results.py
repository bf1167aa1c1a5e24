"""Made-up results, for what renders and judges them."""

from __future__ import annotations

from twinlora.evaluate.compare import _differences
from twinlora.evaluate.report import BASE, MethodResult, Report, Sample, Score, SearchPoint
from twinlora.evaluate.stats import wilson_interval
from twinlora.evaluate.verdict import judge


def way(method: str, hits: list[bool], **changes: object) -> MethodResult:
    low, high = wilson_interval(sum(hits), len(hits))
    values: dict = {
        "method": method, "test_loss": 0.5, "row_hits": hits, "eval_seconds": 3.0, "peak_rss_bytes": 10**9,
        "base_weight_bytes": 269 * 10**6, "base_precision": {"bf16": 10}, "backend": "reference-cpu",
        "exact_match": Score(value=sum(hits) / len(hits), low=low, high=high, hits=sum(hits), rows=len(hits)),
    }  # fmt: skip
    if method != BASE:
        values |= {
            "learning_rate": 1e-3, "tokens_per_second": 400.0, "train_seconds": 61.0, "trained_tokens": 1000,
            "train_peak_rss_bytes": 2 * 10**9, "trainable_parameters": 10**6, "artefact_bytes": 4 * 10**6,
            "search": [SearchPoint(lr=lr, validation_loss=loss, seconds=2.0) for lr, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, None))],
            "curve": [{"step": s, "loss": 4.0 / s, "tokens": 100 * s} for s in range(1, 20)],
        }  # fmt: skip
    return MethodResult(**(values | changes))


def rows(share: float, count: int = 200, start: int = 0) -> list[bool]:
    """`share` of `count` rows hit, beginning with row `start`."""
    return [(i - start) % count < share * count for i in range(count)]


def report(*ways: MethodResult, **changes: object) -> Report:
    values: dict = {
        "title": "LoRA or QLoRA?", "created": "2026-01-01T00:00:00+00:00", "git_hash": None,
        "machine": {"cpu": "A CPU", "device": "cpu", "threads": 2}, "model": "/models/tiny", "model_parameters": 135 * 10**6,
        "base_fingerprint": "abc", "data": {"train": "a", "test": "b", "rows": {"train": 9, "search": 3, "validation": 2, "test": 200}},
        "options": {"rank": 16}, "ways": list(ways), "differences": _differences(list(ways)),
        "verdict": judge(list(ways), _differences(list(ways)), [] if ways[1:] else ["lora"]),
        "samples": [Sample(prompt="a <b>bold</b> prompt", expected="x", outputs={w.method: "</script>" for w in ways})],
        "next_commands": ["twinlora chat"],
    }  # fmt: skip
    return Report(**(values | changes))
