"""What the processes of a comparison do: measure the base, search a learning rate, train and measure."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinlora import atomic, machine
from twinlora.config import CompareOptions, HybridOptions, TrainOptions, validated
from twinlora.data.examples import encode_rows
from twinlora.data.packing import epoch_size, steps_per_epoch
from twinlora.data.sources import read_rows
from twinlora.errors import TrainingDiverged
from twinlora.evaluate.general import encode_texts, read_texts
from twinlora.evaluate.metrics import Prediction, mean_loss, predict, row_losses
from twinlora.evaluate.report import BASE, CurvePoint, General, MethodResult, SearchPoint
from twinlora.evaluate.scores import field_shares, row_scores, summarise
from twinlora.model import swap
from twinlora.model.forward import has_plain_head, packing_refusal
from twinlora.model.load import (
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    precision_by_layer,
    resolve,
    weight_bytes,
)
from twinlora.model.quantizer import nf4_of
from twinlora.numerics import ops
from twinlora.numerics.formats import Format
from twinlora.reporter import ConsoleReporter
from twinlora.train.hybrid import choose_precision
from twinlora.train.inputs import read_inputs
from twinlora.train.loop import TrainResult, train
from twinlora.train.notes import Notes

__all__ = [
    "BaseMeasured",
    "Splits",
    "choose_layers",
    "measure_base",
    "measure_quantised",
    "search",
    "train_and_measure",
]

_SHARED = set(TrainOptions.model_fields) & set(CompareOptions.model_fields) - {
    "data",
    "columns",
    "eval",
    "output",
    "overwrite",
}
_WARMUP_SHARE = 4  # short runs warm up for a quarter of their steps at most


@dataclass(frozen=True)
class Splits:
    """The files of a comparison, and how many rows they have."""

    train: list[str]
    search: list[str]
    validation: Path
    test: Path
    counts: dict[str, int]


@dataclass
class BaseMeasured:
    """The untuned base, and how many parameters it has."""

    result: MethodResult
    parameters: int


def measure_base(options: CompareOptions, test: Path) -> tuple[BaseMeasured, list[Prediction]]:
    """Scores and losses of the model as it is."""
    machine.reset_peaks(pick_device(options.device))
    done = _untrained(options, None)
    parameters = sum(p.numel() for p in done.model.parameters())
    size, precision = weight_bytes(done.model), precision_by_layer(done.model)
    figures, predictions = _measure(options, done, test, BASE)
    result = MethodResult(method=BASE, base_weight_bytes=size, base_precision=precision, **figures)
    return BaseMeasured(result, parameters), predictions


def _layers_file(options: CompareOptions) -> Path:
    """Where the precision of each layer is kept, for all runs of method hybrid."""
    return options.output / "data" / "layer_precision.json"


def choose_layers(options: CompareOptions, splits: Splits) -> None:
    """Choose the precision of each layer of method hybrid, once for all its runs."""
    given = train_options(options, "hybrid", data=splits.train)
    notes = Notes(ConsoleReporter("hybrid"))
    inputs, device = read_inputs(given, notes), pick_device(options.device)
    dtype, _ = pick_dtype(options.dtype, device)
    atomic.write_json(_layers_file(options), choose_precision(given, inputs, dtype, device, notes))


def train_options(options: CompareOptions, method: str, **changes: Any) -> TrainOptions:
    """What all runs of `method` share, with `changes`. Raises ConfigError if it cannot be trained so."""
    values = {name: getattr(options, name) for name in _SHARED} | {"method": method, "lr": options.lr_grid[0]}
    if method != "hybrid":
        values |= dict.fromkeys(HybridOptions.model_fields)
    values |= {"data": options.data, "output": options.output} | changes
    return validated(TrainOptions, values, where=f"compare, method {method}")


def measure_quantised(options: CompareOptions, method: str) -> General:
    """General text on the base of `method` without an adapter: what quantising costs must not count as forgetting."""
    if method == "hybrid":
        return _general(options, _untrained(options, json.loads(_layers_file(options).read_text(encoding="utf-8"))))
    return _general(options, _untrained(options, nf4_of(options)))


def _untrained(options: CompareOptions, quantize: Format | dict[str, str] | None) -> TrainResult:
    """The base, ready to measure."""
    source, device = resolve(options.model), pick_device(options.device)
    dtype, _ = pick_dtype(options.dtype, device)
    model = load_model(
        source, quantize=quantize, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code
    )
    swap.replace_blocks(model)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    return TrainResult({}, model, tokenizer, has_plain_head(model), packing_refusal(model, len(tokenizer)) is None)


def _general(options: CompareOptions, done: TrainResult) -> General:
    """The loss on general text of a model as it is; `before` is filled in by who knows it."""
    losses = row_losses(
        done.model,
        encode_texts(done.tokenizer, read_texts(options.general), options.max_length),
        micro_batch_tokens=options.micro_batch_tokens,
        packed=done.packed,
        plain_head=done.plain_head,
    )
    totals, tokens = [row.total for row in losses], [row.tokens for row in losses]
    mean = sum(totals) / sum(tokens)
    return General(before=mean, after=mean, rows_before=totals, rows_after=totals, tokens=tokens)


def _measure(
    options: CompareOptions, done: TrainResult, test: Path, name: str
) -> tuple[dict[str, Any], list[Prediction]]:
    rows = read_rows(test)
    start = time.perf_counter()
    loss = mean_loss(
        done.model,
        encode_rows(
            done.tokenizer,
            rows,
            options.max_length,
            overlong=options.overlong,
            allow_untrained=options.allow_untrained,
            note=ConsoleReporter(name).note,
        ),
        micro_batch_tokens=options.micro_batch_tokens,
        packed=done.packed,
        plain_head=done.plain_head,
    )
    predictions = predict(
        done.model,
        done.tokenizer,
        rows,
        batch_size=options.eval_batch_size,
        max_new_tokens=options.max_new_tokens,
        reporter=ConsoleReporter(name),
    )
    seconds = time.perf_counter() - start
    scores = {name: row_scores(name, predictions) for name in options.metric}
    device = pick_device(options.device)
    figures = {
        "scores": {name: summarise(name, values) for name, values in scores.items()},
        "row_scores": scores[options.metric[0]],
        "fields": field_shares(predictions) if "json-fields" in options.metric else {},
        "test_loss": loss,
        "general": _general(options, done),
        "eval_seconds": seconds,
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "peak_device_bytes": machine.peak_device_bytes(device),
        "backend": ops.backend(device),
    }
    return figures, predictions


def _train_options(
    options: CompareOptions, method: str, lr: float, data: list[str], validation: Path, output: Path
) -> TrainOptions:
    precision = {"layer_precision": _layers_file(options)} if method == "hybrid" else {}
    budget = dict.fromkeys(HybridOptions.model_fields) | precision  # chosen once, for all runs
    steps = options.epochs * steps_per_epoch(epoch_size([row.weight for row in read_rows(data)]), options.batch_size)
    steps = min(steps, options.max_steps or steps)
    warmup = min(options.warmup_steps, max(1, steps // _WARMUP_SHARE))
    own = {"lr": lr, "data": data, "eval": validation, "output": output, "warmup_steps": warmup}
    return train_options(options, method, **own, **budget)


def search(options: CompareOptions, method: str, data: list[str], validation: Path) -> list[SearchPoint]:
    """Validation loss of each learning rate of the grid after a run over `data`."""
    points = []
    for number, lr in enumerate(options.lr_grid, 1):
        directory = options.output / "search" / f"{method}-lr{lr:g}"
        start = time.perf_counter()
        name = f"{method} · learning rate {lr:g} ({number} of {len(options.lr_grid)})"
        try:
            record = train(
                _train_options(options, method, lr, data, validation, directory), ConsoleReporter(name)
            ).record
            loss = record["eval_loss"]
        except TrainingDiverged:
            loss = None
        points.append(SearchPoint(lr=lr, validation_loss=loss, seconds=time.perf_counter() - start))
        for leftover in ("checkpoints", "model"):
            shutil.rmtree(directory / leftover, ignore_errors=True)
    return points


def train_and_measure(
    options: CompareOptions, method: str, lr: float, splits: Splits
) -> tuple[MethodResult, list[Prediction]]:
    """The final run of `method`, measured on the test rows."""
    directory = options.output / "runs" / method
    done = train(
        _train_options(options, method, lr, splits.train, splits.validation, directory), ConsoleReporter(method)
    )
    record = done.record
    figures, predictions = _measure(options, done, splits.test, method)
    figures["peak_device_bytes"] = record["peak_device_bytes"]  # of training alone, before it answered
    artefact = Path(record.get("adapter") or record["model"])
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = MethodResult(
        method=method,
        learning_rate=lr,
        base_weight_bytes=record["base_weight_bytes"],
        base_precision=record["base_precision"],
        train_seconds=record["seconds"],
        train_peak_rss_bytes=record["peak_rss_bytes"],
        tokens_per_second=record["tokens_per_second"],
        trained_tokens=record["trained_tokens"],
        trainable_parameters=record["trainable_parameters"],
        artefact_bytes=sum(file.stat().st_size for file in artefact.glob("*.safetensors")),
        curve=[CurvePoint(step=x["step"], loss=x["loss"], tokens=x["tokens"]) for x in lines if "loss" in x],
        **figures,
    )
    return result, predictions
