"""What the planner would have said of a run that is there: its peak by cause and the time of a step, for run.json and
the history; and, when memory runs out, which cause took more than predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PretrainedConfig

from twinlora import machine
from twinlora.config import TrainOptions
from twinlora.plan import calibrate, score
from twinlora.plan.overhead import overhead
from twinlora.plan.targets import TargetName
from twinlora.plan.ways import cell_for, simulated, step_times
from twinlora.plan.workload import Workload
from twinlora.train.inputs import Inputs

__all__ = ["Prediction", "as_json", "blame", "predict", "remember", "wanted"]

_GIB = 2**30
_OFF = 1.03  # more than this times the prediction is more than its error


@dataclass(frozen=True)
class Prediction:
    """Bytes by cause at the peak, the process's own included; seconds of a mean step, None without rates."""

    peak_bytes: int
    by_cause: Mapping[str, int]
    step_seconds: float | None
    rates: str | None


def wanted() -> bool:
    """Whether runs are predicted and kept at all."""
    return score.history_file() is not None


def predict(
    config: PretrainedConfig,
    options: TrainOptions,
    inputs: Inputs,
    *,
    packed: bool,
    dtype: torch.dtype,
    device: torch.device,
    runtime: int,
    precision: Mapping[str, str] | None,
) -> Prediction:
    """Of a run with `options`; `runtime` are the bytes that the process had before its model (of a GPU's memory 0),
    `precision` the format of each layer of a hybrid base."""
    workload = Workload(inputs.examples, options, from_data=True, packed=packed)
    limit = options.micro_batch_tokens
    micro = workload.largest(limit)
    target: TargetName = "cuda" if device.type == "cuda" else "cpu"
    cell = cell_for(
        micro, options, method=str(options.method), checkpointing=options.gradient_checkpointing == "on", dtype=dtype,
        target=target, packed=packed, block_size=options.block_size, double_quant=options.double_quant,
        fused=options.fused, precision=precision,
    )  # fmt: skip
    found = simulated(config, cell)
    compiled = overhead().compiled(found.products, workload.sizes(limit)) if device.type == "cpu" else 0
    by_cause = found.by_cause | {"fragmentation": found.fragmentation, "runtime": runtime + compiled}
    rates = calibrate.load(calibrate.hardware(device))
    seconds = None
    if rates is not None:
        tokens = micro.size(packed=packed)
        each, update = step_times(rates, found, micro, tokens)
        count, mean = workload.micro_batches(limit)
        seconds = update + each * mean / tokens * count / len(workload.batches)
    return Prediction(sum(by_cause.values()), by_cause, seconds, None if rates is None else rates.source)


def remember(prediction: Prediction, options: TrainOptions, record: Mapping[str, Any], device: torch.device) -> None:
    """Add the run to the history. Raises StorageError."""
    measured = record["peak_device_bytes"] if device.type == "cuda" else record["step_peak_rss_bytes"]
    past = score.Past(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=calibrate.hardware(device),
        model=options.model,
        method=str(options.method),
        checkpointing=options.gradient_checkpointing == "on",
        micro_batch_tokens=options.micro_batch_tokens,
        steps=record["steps"],
        predicted_peak_bytes=prediction.peak_bytes,
        predicted_by_cause=dict(prediction.by_cause),
        measured_peak_bytes=measured,
        predicted_step_seconds=prediction.step_seconds,
        measured_step_seconds=record["seconds"] / record["steps"],
        rates=prediction.rates,
    )
    score.append(past)


def as_json(prediction: Prediction) -> dict[str, Any]:
    """For run.json."""
    return asdict(prediction) | {"by_cause": dict(prediction.by_cause)}


def blame(prediction: Prediction, *, weights: int, trained: int, device: torch.device) -> str:
    """Which cause exceeded its prediction when memory ran out, in words.

    `weights` are the base's bytes as loaded, `trained` those of what trains with its masters and moments, beyond the
    base's; the rest is what the pass holds.
    """
    by_cause = prediction.by_cause
    stored = by_cause["weights"] + by_cause["quantisation constants"]
    fixed = stored + sum(by_cause[cause] for cause in ("adapter", "optimiser"))
    held = weights + trained
    rest = prediction.peak_bytes - fixed - by_cause["runtime"]
    said = f"predicted peak {_gib(prediction.peak_bytes)}, of it {_gib(rest)} for activations, gradients and loss"
    total, others = _memory(device)
    if weights > _OFF * stored:
        return f"{said}; the weights take {_gib(weights)} instead of {_gib(stored)}"
    if held > _OFF * fixed:
        return f"{said}; what trains takes {_gib(held - weights)} instead of {_gib(fixed - stored)}"
    if prediction.peak_bytes > total:
        return f"{said}; nothing exceeded that, there are {_gib(total)}"
    if prediction.peak_bytes + others > total:
        return f"{said}; nothing exceeded that, but of {_gib(total)} others hold {_gib(others)}"
    return f"{said}; weights and what trains take what was predicted, so what a pass holds took more"


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f} GiB"


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes of `device`, and those of them that other processes hold."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, max(0, total - free - torch.cuda.memory_reserved(device))
    total = int(machine.describe()["memory_bytes"])
    return total, max(0, total - machine.available_bytes() - machine.rss_bytes())
