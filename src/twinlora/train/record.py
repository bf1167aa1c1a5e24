"""What a run leaves: the adapter or the model, and what run.json says of it."""

from __future__ import annotations

from typing import Any

import torch

from twinlora import atomic, machine
from twinlora.adapters import files, hf, passport
from twinlora.adapters.deploy import digests
from twinlora.adapters.lora import trainable_parameters
from twinlora.config import TrainOptions
from twinlora.data.formats import Row
from twinlora.numerics import ops
from twinlora.train.inputs import Inputs
from twinlora.train.memory import Memory
from twinlora.train.notes import Notes
from twinlora.train.prepare import Prepared, storage_of
from twinlora.train.progress import Progress
from twinlora.train.run import RunDirectory
from twinlora.train.selection import Selection

__all__ = ["document", "result", "save"]


def save(run: RunDirectory, options: TrainOptions, inputs: Inputs, prepared: Prepared, steps: int) -> dict[str, str]:
    """Write the adapter after `steps` steps, or for method full the model; what it is, and where."""
    model = prepared.model
    if options.method == "full":
        with atomic.write_directory(run.path / "model") as temporary:
            model.save_pretrained(temporary)
            inputs.tokenizer.save_pretrained(temporary)
        return {"model": str(run.path / "model")}
    seal = _passport_of(options, inputs, prepared, steps)
    files.save_adapter(model, run.adapter, options.model, seal)
    hf.follow_peft(model, seal)
    return {"adapter": str(run.adapter)}


def result(
    options: TrainOptions,
    at: Progress,
    selection: Selection,
    prepared: Prepared,
    loading_peak: int,
    device: torch.device,
) -> dict[str, Any]:
    """The figures of a run that is `at` its end. Sizes in bytes, times in seconds."""
    kept = selection.kept_step
    return {
        "method": options.method,
        "steps": at.step,
        "saved_step": kept or at.step,
        "stopped_early": at.stopped,
        "loss": at.loss,
        "eval_loss": selection.loss if kept else at.eval_loss,
        "last_eval_loss": at.eval_loss,
        "tokens": at.tokens,
        "trained_tokens": at.trained_tokens,
        "skipped_steps": at.skipped,
        "seconds": at.seconds,
        "tokens_per_second": at.tokens / at.seconds if at.seconds else None,
        "peak_rss_bytes": max(loading_peak, machine.peak_rss_bytes()),
        "step_peak_rss_bytes": machine.peak_rss_bytes(),
        "peak_device_bytes": machine.peak_device_bytes(device),
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(prepared.model).values()),
        "base_weight_bytes": prepared.weight_bytes,
        "base_precision": prepared.precision,
        "bits_per_linear_weight": prepared.bits[0],
        "bits_per_weight": prepared.bits[1],
        "backend": ops.backend(device),
    }


def document(
    options: TrainOptions, inputs: Inputs, prepared: Prepared, memory: Memory, notes: Notes, device: torch.device
) -> dict[str, Any]:
    """run.json but for its result: how the run came about."""
    found: dict[str, Any] = {
        "options": options.model_dump(mode="json"),
        "base_fingerprint": inputs.fingerprint,
        "data_sha256": inputs.digests,
        "machine": machine.describe(device),
        "notes": notes.lines,
    }
    if options.deploy:
        found["deployed"] = digests(prepared.model)
    return found | {
        "replaced": prepared.replaced,
        "packed": prepared.packed,
        "plain_head": prepared.plain_head,
        "memory": memory.record(),
    }


def _passport_of(options: TrainOptions, inputs: Inputs, prepared: Prepared, steps: int) -> passport.Passport:
    """The passport of an adapter after `steps` steps over the base of `prepared`."""
    return passport.Passport(
        base_model=options.model,
        base_fingerprint=inputs.fingerprint,
        base_precision=prepared.precision,
        layer_precision=prepared.layers,
        **passport.tokenizer_digests(inputs.tokenizer),
        system=_common_system(inputs.rows),
        data_sha256=inputs.digests,
        method=options.method,
        deploy=storage_of(options).name if options.deploy else None,
        seed=options.seed,
        steps=steps,
        versions=passport.versions(),
    )


def _common_system(rows: list[Row]) -> str | None:
    """The system message that all rows share, if they do."""
    messages = {
        str(row.messages[0]["content"]) if row.messages and row.messages[0]["role"] == "system" else None
        for row in rows
    }
    return messages.pop() if len(messages) == 1 else None
