"""Made-up results, for what renders and judges them."""

from __future__ import annotations

from twinlora.evaluate.compare import _differences, _forgetting
from twinlora.evaluate.report import BASE, General, MethodResult, Report, Sample, SearchPoint
from twinlora.evaluate.scores import summarise
from twinlora.evaluate.verdict import judge

TEXTS = 30


def way(
    method: str, hits: list[float], metric: str = "exact-match", rise: float = 0.0, **changes: object
) -> MethodResult:
    """A way with these row scores, whose loss on general text rose by about `rise` nats a token."""
    tokens = [50 + i for i in range(TEXTS)]
    before = [n * (2.5 + 0.1 * (i % 3)) for i, n in enumerate(tokens)]
    after = [b + n * rise * (1 + 0.2 * (i % 2)) for i, (n, b) in enumerate(zip(tokens, before, strict=True))]
    values: dict = {
        "method": method, "test_loss": 0.5, "row_scores": hits, "eval_seconds": 3.0, "peak_rss_bytes": 10**9,
        "base_weight_bytes": 269 * 10**6, "base_precision": {"bf16": 10}, "backend": "reference-cpu",
        "scores": {metric: summarise(metric, hits)},
        "general": General(before=sum(before) / sum(tokens), after=sum(after) / sum(tokens), rows_before=before, rows_after=after, tokens=tokens),
    }  # fmt: skip
    if method != BASE:
        values |= {
            "learning_rate": 1e-3, "tokens_per_second": 400.0, "train_seconds": 61.0, "trained_tokens": 1000,
            "train_peak_rss_bytes": 2 * 10**9, "trainable_parameters": 10**6, "artefact_bytes": 4 * 10**6,
            "search": [SearchPoint(lr=lr, validation_loss=loss, seconds=2.0) for lr, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, None))],
            "curve": [{"step": s, "loss": 4.0 / s, "tokens": 100 * s} for s in range(1, 20)],
        }  # fmt: skip
    return MethodResult(**(values | changes))


def rows(share: float, count: int = 200, start: int = 0) -> list[float]:
    """`share` of `count` rows hit, beginning with row `start`."""
    return [float((i - start) % count < share * count) for i in range(count)]


def report(*ways: MethodResult, **changes: object) -> Report:
    results, metric = list(ways), next(iter(ways[0].scores))
    differences, forgetting = _differences(results), _forgetting(results)
    values: dict = {
        "title": "LoRA or QLoRA?", "created": "2026-01-01T00:00:00+00:00", "git_hash": None,
        "machine": {"cpu": "A CPU", "device": "cpu", "threads": 2}, "model": "/models/tiny", "model_parameters": 135 * 10**6,
        "base_fingerprint": "abc", "data": {"train": "a", "test": "b", "general": "built in", "rows": {"train": 9, "search": 3, "validation": 2, "test": 200}},
        "options": {"rank": 16}, "metric": metric, "ways": results, "differences": differences, "forgetting": forgetting,
        "verdict": judge(results, differences, [] if ways[1:] else ["lora"], metric=metric, forgetting=forgetting),
        "samples": [Sample(prompt="a <b>bold</b> prompt", expected="x", outputs={w.method: "</script>" for w in ways}, scores={w.method: w.row_scores[0] for w in ways})],
        "next_commands": ["twinlora chat"],
    }  # fmt: skip
    return Report(**(values | changes))
