"""`evaluate(options)`: the figures of one model, with or without an adapter, on held-out rows."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from twinlora import atomic
from twinlora.config import EvalOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.evaluate.metrics import exact_match, mean_loss, require_answers
from twinlora.evaluate.opening import open_model
from twinlora.evaluate.stats import wilson_interval
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.reporter import Reporter

__all__ = ["evaluate"]

_MICRO_BATCH_TOKENS = 2048


def evaluate(options: EvalOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """Loss and exact match as JSON. Raises InputError for a wrong model, adapter or data file."""
    reporter = reporter or Reporter()
    rows = sources.read(options.data, columns=options.columns, limit=options.rows, note=reporter.note).rows
    if "exact-match" in options.metric:
        require_answers(rows)
    adapters = {"adapter": options.adapter} if options.adapter else {}
    opened = open_model(options, adapters, precision=options.precision, reporter=reporter)
    model, tokenizer = opened.model, opened.tokenizer
    examples = encode_rows(tokenizer, rows, options.max_length)
    start = time.perf_counter()
    result: dict[str, Any] = {"rows": len(rows)}
    if "loss" in options.metric:
        result["loss"] = mean_loss(
            model,
            examples,
            micro_batch_tokens=_MICRO_BATCH_TOKENS,
            packed=packing_refusal(model, len(tokenizer)) is None,
            pad_id=tokenizer.pad_token_id or 0,
            plain_head=has_plain_head(model),
        )
        result["perplexity"] = math.exp(result["loss"])
    if "exact-match" in options.metric:
        predictions = exact_match(
            model,
            tokenizer,
            rows,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            reporter=reporter,
        )
        hits = sum(p.hit for p in predictions)
        low, high = wilson_interval(hits, len(rows))
        result["exact_match"] = {"value": hits / len(rows), "hits": hits, "rows": len(rows), "low": low, "high": high}
        if options.output:
            lines = (json.dumps(vars(p) | {"hit": p.hit}, ensure_ascii=False) + "\n" for p in predictions)
            atomic.write_text(options.output, "".join(lines))
    result["seconds"] = time.perf_counter() - start
    return result
