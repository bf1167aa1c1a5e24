"""What the processes of a comparison do: measure the base, search a learning rate, train and measure."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinlora import machine
from twinlora.config import CompareOptions, TrainOptions
from twinlora.data.examples import encode_rows
from twinlora.data.packing import epoch_size, steps_per_epoch
from twinlora.data.sources import read_rows
from twinlora.errors import TrainingDiverged
from twinlora.evaluate.metrics import Prediction, exact_match, mean_loss
from twinlora.evaluate.report import BASE, CurvePoint, MethodResult, Score, SearchPoint
from twinlora.evaluate.stats import wilson_interval
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
from twinlora.numerics import ops
from twinlora.reporter import ConsoleReporter
from twinlora.train.loop import TrainResult, train

if TYPE_CHECKING:
    from twinlora.evaluate.compare import Splits

__all__ = ["BaseMeasured", "measure_base", "search", "train_and_measure"]

_SHARED = set(TrainOptions.model_fields) & set(CompareOptions.model_fields) - {
    "data",
    "columns",
    "eval",
    "output",
    "overwrite",
}
_WARMUP_SHARE = 4  # short runs warm up for a quarter of their steps at most


@dataclass
class BaseMeasured:
    """The untuned base, and how many parameters it has."""

    result: MethodResult
    parameters: int


def measure_base(options: CompareOptions, test: Path) -> tuple[BaseMeasured, list[Prediction]]:
    """Exact match and loss of the model as it is."""
    source, device = resolve(options.model), pick_device(options.device)
    machine.reset_peaks(device)
    dtype, _ = pick_dtype(options.dtype, device)
    model = load_model(source, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code)
    parameters, size, precision = (
        sum(p.numel() for p in model.parameters()),
        weight_bytes(model),
        precision_by_layer(model),
    )
    swap.replace_blocks(model)
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    packed = packing_refusal(model, len(tokenizer)) is None
    done = TrainResult({}, model, tokenizer, has_plain_head(model), packed)
    figures, predictions = _measure(options, done, test, BASE)
    result = MethodResult(method=BASE, base_weight_bytes=size, base_precision=precision, **figures)
    return BaseMeasured(result, parameters), predictions


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
        pad_id=done.tokenizer.pad_token_id or 0,
        plain_head=done.plain_head,
    )
    predictions = exact_match(
        done.model,
        done.tokenizer,
        rows,
        batch_size=options.eval_batch_size,
        max_new_tokens=options.max_new_tokens,
        reporter=ConsoleReporter(name),
    )
    hits = [p.hit for p in predictions]
    low, high = wilson_interval(sum(hits), len(hits))
    device = pick_device(options.device)
    figures = {
        "exact_match": Score(value=sum(hits) / len(hits), low=low, high=high, hits=sum(hits), rows=len(hits)),
        "test_loss": loss,
        "row_hits": hits,
        "eval_seconds": time.perf_counter() - start,
        "peak_rss_bytes": machine.peak_rss_bytes(),
        "peak_device_bytes": machine.peak_device_bytes(device),
        "backend": ops.backend(device),
    }
    return figures, predictions


def _train_options(
    options: CompareOptions, method: str, lr: float, data: list[str], validation: Path, output: Path
) -> TrainOptions:
    values = {name: getattr(options, name) for name in _SHARED} | {"method": method, "lr": lr}
    steps = options.epochs * steps_per_epoch(epoch_size([row.weight for row in read_rows(data)]), options.batch_size)
    warmup = min(options.warmup_steps, max(1, steps // _WARMUP_SHARE))
    return TrainOptions(**values | {"data": data, "eval": validation, "output": output, "warmup_steps": warmup})


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
