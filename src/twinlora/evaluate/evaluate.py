"""`evaluate(options)`: the figures of one model, with or without an adapter, on held-out rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from twinlora import atomic
from twinlora.config import EvalOptions
from twinlora.data import sources
from twinlora.data.examples import encode_rows
from twinlora.data.formats import Row
from twinlora.errors import DataError
from twinlora.evaluate.metrics import RowLoss, predict, row_losses
from twinlora.evaluate.opening import Opened, open_model
from twinlora.evaluate.scores import METRICS, field_shares, require, row_scores, summarise
from twinlora.evaluate.stats import ratio_interval
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.reporter import Reporter

__all__ = ["evaluate"]

_MICRO_BATCH_TOKENS = 2048


def evaluate(options: EvalOptions, reporter: Reporter | None = None) -> dict[str, Any]:
    """The chosen figures as JSON. Raises InputError for a wrong model, adapter or data file, BackendError."""
    reporter = reporter or Reporter()
    rows = sources.read(options.data, columns=options.columns, limit=options.rows, note=reporter.note).rows
    require(options.metric, rows)
    adapters = {"adapter": options.adapter} if options.adapter else {}
    opened = open_model(
        options,
        adapters,
        precision=options.precision,
        layer_precision=options.layer_precision,
        reporter=reporter,
    )
    start = time.perf_counter()
    result: dict[str, Any] = {"rows": len(rows)}
    lines: list[dict[str, Any]] = [{"prompt": row.question, "expected": row.answer} for row in rows]
    if {"loss", "perplexity"} & set(options.metric):
        losses = _losses(opened, rows, options.max_length)
        if len(losses) != len(rows):
            raise DataError(
                f"data {', '.join(options.data)}: {len(rows) - len(losses)} of {len(rows)} rows are there twice, with "
                "file and line: name each file once"
            )
        result |= _loss_figures(losses)
        for line, loss in zip(lines, losses, strict=True):
            line["loss"] = loss.total / loss.tokens
    if judged := [name for name in options.metric if name in METRICS]:
        result |= _judge(options, opened, rows, judged, lines, reporter)
    if options.output:
        atomic.write_text(options.output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result["seconds"] = time.perf_counter() - start
    return result


def _losses(opened: Opened, rows: Sequence[Row], max_length: int) -> list[RowLoss]:
    model, tokenizer = opened.model, opened.tokenizer
    return row_losses(
        model,
        encode_rows(tokenizer, rows, max_length),
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        packed=packing_refusal(model, len(tokenizer)) is None,
        pad_id=tokenizer.pad_token_id or 0,
        plain_head=has_plain_head(model),
    )


def _loss_figures(losses: Sequence[RowLoss]) -> dict[str, Any]:
    """Nats per trained token, and perplexity, its exponential."""
    loss, low, high = ratio_interval([row.total for row in losses], [row.tokens for row in losses])
    return {
        "loss": loss,
        "loss_interval": [low, high],
        "perplexity": math.exp(loss),
        "perplexity_interval": [math.exp(low), math.exp(high)],
    }


def _judge(
    options: EvalOptions,
    opened: Opened,
    rows: Sequence[Row],
    names: Sequence[str],
    lines: list[dict[str, Any]],
    reporter: Reporter,
) -> dict[str, Any]:
    """Answer every row and score the answers by `names`; each row's answer and scores are added to `lines`."""
    predictions = predict(
        opened.model,
        opened.tokenizer,
        rows,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        reporter=reporter,
    )
    for line, prediction in zip(lines, predictions, strict=True):
        line |= {"output": prediction.output, "scores": {}}
    figures: dict[str, Any] = {}
    for name in names:
        scores = row_scores(name, predictions)
        for line, score in zip(lines, scores, strict=True):
            line["scores"][name] = score
        figures[name] = summarise(name, scores).model_dump(exclude_none=True)
    if "json-fields" in names:
        figures["json-fields"]["fields"] = field_shares(predictions)
    return {name.replace("-", "_"): figure for name, figure in figures.items()}
