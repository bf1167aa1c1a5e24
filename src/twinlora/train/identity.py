"""Which run a checkpoint belongs to: all that its result depends on. A resumed run must have the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from twinlora.config import TrainOptions
from twinlora.errors import CheckpointError
from twinlora.numerics import ops
from twinlora.train.checkpoint import Checkpoint
from twinlora.train.inputs import Inputs

__all__ = ["as_before", "identity", "require_same"]

_FORMAT = 3  # of the checkpoint
# Options that may change between a run and its continuation; of files the content counts, not the path.
# Those of memory compute the same bits; micro-batches that were halved are part of the checkpoint.
_FREE = {
    "output", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "json_output", "report_to", "device",
    "gradient_checkpointing", "on_oom", "offload", "dense_copies", "plan", "goal", "program",
}  # fmt: skip
_FILES = {"model", "data", "eval", "init_adapter", "layer_precision"}


def identity(
    options: TrainOptions,
    inputs: Inputs,
    dtype: torch.dtype,
    device: torch.device,
    precision: dict[str, str] | None = None,
) -> dict[str, Any]:
    """As JSON. The schedule stretches over all steps, so that max_steps is part of it."""
    kept = options.model_dump(mode="json", exclude=_FREE | _FILES)
    return {
        "format": _FORMAT,
        "options": kept | {"dtype": str(dtype).removeprefix("torch.")},
        "base": inputs.fingerprint,
        "precision": precision,
        "data": inputs.data.identity,
        "eval": inputs.held_out.identity,
        "backend": ops.backend(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def require_same(found: Checkpoint, now: dict[str, Any], options: TrainOptions) -> None:
    """Raise CheckpointError that names all that changed since `found` was saved."""
    lines = _differences(found.state["identity"], now, options)
    if lines:
        raise CheckpointError(
            f"{found.directory} belongs to another run\n  "
            + "\n  ".join(lines)
            + "\ngive the options and files of the first run, or another --output"
        )


def as_before(found: Checkpoint, options: TrainOptions, names: Sequence[str]) -> TrainOptions:
    """`options` with what the planner had chosen when the run began: it need not choose the same twice."""
    saved = found.state["identity"]["options"]
    return options.model_copy(update={name: saved[name] for name in names if name in saved})


def _differences(saved: dict[str, Any], now: dict[str, Any], options: TrainOptions) -> list[str]:
    names = {
        "data": f"the content of data {', '.join(options.data)}",
        "eval": f"the content of eval {', '.join(options.eval)}",
        "base": f"the weights of base model {options.model}",
        "threads": "threads (OMP_NUM_THREADS; sums depend on it)",
        "format": "format of the checkpoint (another version of twinlora wrote it)",
    }
    out = []
    for key in sorted(set(saved) | set(now) - {"options"}):
        if key == "precision" and saved.get(key) != now.get(key):
            out.append(_moved(saved.get(key) or {}, now.get(key) or {}))
        elif key != "options" and saved.get(key) != now.get(key):
            out.append(f"{names.get(key, key)}: was {saved.get(key)}, now {now.get(key)}")
    was, given = saved["options"], now["options"]
    for key in sorted(set(was) | set(given)):
        if was.get(key) != given.get(key):
            out.append(f"options.{key}: was {was.get(key)}, now {given.get(key)}")
    return out


def _moved(was: dict[str, str], now: dict[str, str]) -> str:
    """One line about the layers whose precision changed."""
    layers = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    first = layers[0]
    return f"precision of {len(layers)} layer(s), such as {first}: was {was.get(first)}, now {now.get(first)}"
