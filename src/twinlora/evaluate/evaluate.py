"""`evaluate(options)`: the figures of one model, with or without an adapter, on held-out rows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twinlora import atomic
from twinlora.config import EvalOptions
from twinlora.data import sources
from twinlora.data.examples import Advice, encode_rows
from twinlora.data.formats import Row
from twinlora.data.template import Example
from twinlora.errors import DataError
from twinlora.evaluate.metrics import RowLoss, predict, row_losses
from twinlora.evaluate.opening import Opened, open_model
from twinlora.evaluate.scores import METRICS, field_shares, require, row_scores, summarise
from twinlora.evaluate.stats import ratio_interval
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.model.load import load_tokenizer, resolve
from twinlora.output import require_apart
from twinlora.reporter import Reporter

__all__ = ["evaluate"]

_MICRO_BATCH_TOKENS = 2048
_ADVICE = Advice("shorten these rows, or leave them out", "mend them, or leave them out")


def evaluate(options: EvalOptions, reporter: Reporter | None = None, *, advice: Advice = _ADVICE) -> dict[str, Any]:
    """The chosen figures as JSON. `advice`: what a verb says of rows that cannot be measured.

    Raises InputError for a wrong model, adapter, data file or output, BackendError.
    """
    reporter = reporter or Reporter()
    if options.output:
        require_apart(options.output, map(Path, options.data))
    rows = sources.read(options.data, columns=options.columns, limit=options.rows, note=reporter.note).rows
    require(options.metric, rows)
    wants_loss = bool({"loss", "perplexity"} & set(options.metric))
    tokenizer = load_tokenizer(resolve(options.model), trust_remote_code=options.trust_remote_code)
    examples = encode_rows(tokenizer, rows, options.max_length, advice=advice) if wants_loss else []  # before the model
    adapters = {"adapter": options.adapter} if options.adapter else {}
    opened = open_model(
        options,
        adapters,
        precision=options.precision,
        layer_precision=options.layer_precision,
        reporter=reporter,
        tokenizer=tokenizer,
    )
    start = time.perf_counter()
    result: dict[str, Any] = {"rows": len(rows)}
    lines: list[dict[str, Any]] = [{"prompt": row.question, "expected": row.answer} for row in rows]
    if wants_loss:
        losses = _losses(opened, examples)
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


def _losses(opened: Opened, examples: Sequence[Example]) -> list[RowLoss]:
    model, tokenizer = opened.model, opened.tokenizer
    return row_losses(
        model,
        examples,
        micro_batch_tokens=_MICRO_BATCH_TOKENS,
        packed=packing_refusal(model, len(tokenizer)) is None,
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
