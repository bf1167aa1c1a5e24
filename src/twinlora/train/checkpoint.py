"""Checkpoints: `checkpoints/step-000120/` with state.safetensors, state.json and manifest.json, whole or not at all.

The manifest holds the SHA-256 of the other files. A resumed run takes the newest checkpoint that verifies; newest is
the highest step, whatever the clock said.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinlora import atomic
from twinlora.data.formats import file_digest
from twinlora.errors import CheckpointError
from twinlora.train.rng import rng_state

__all__ = ["Checkpoint", "directory_of", "newest", "prune", "save", "sweep"]

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_RNG = "rng."


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: optimiser tensors by name, the generators' states, and what the loop wrote beside them."""

    directory: Path
    tensors: dict[str, Tensor]
    rng: dict[str, Tensor]
    state: dict[str, Any]


def directory_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def _by_step(run: Path) -> dict[int, Path]:
    """All checkpoints, newest first."""
    matches = {path: re.fullmatch(r"step-(\d{6,})", path.name) for path in (run / "checkpoints").glob("step-*")}
    steps = {int(match[1]): path for path, match in matches.items() if match}
    return dict(sorted(steps.items(), reverse=True))


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], device: torch.device) -> Path:
    """Write the checkpoint of `step`, with the random generators; `state` is JSON. Raises StorageError."""
    directory = directory_of(run, step)
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents |= {_RNG + name: value for name, value in rng_state(device).items()}
    with atomic.write_directory(directory) as temporary:
        save_file(contents, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({"step": step} | state, indent=2), encoding="utf-8")
        manifest = {name: file_digest(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return directory


def _load(directory: Path) -> Checkpoint:
    try:
        manifest = json.loads((directory / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_TENSORS, _STATE):
            if file_digest(directory / name) != manifest[name]:
                raise CheckpointError(f"{name} does not match its SHA-256")
        tensors = load_file(directory / _TENSORS)
        state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from None
    rng = {name.removeprefix(_RNG): tensors.pop(name) for name in list(tensors) if name.startswith(_RNG)}
    return Checkpoint(directory, tensors, rng, state)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    for directory in _by_step(run).values():
        try:
            return _load(directory), skipped
        except CheckpointError as error:
            skipped.append(f"skipped {directory.name}: {error}")
    return None, skipped


def prune(run: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, which was just saved.

    One of a later step was skipped when the run was resumed: it would take the place of one that verifies.
    """
    found = _by_step(run)
    kept = [number for number in found if number <= step][:keep]
    for number, directory in found.items():
        if number not in kept:
            with atomic.writing(directory):
                atomic.remove(directory)


def sweep(run: Path) -> None:
    """Remove what a process that died left of checkpoints. Only for the holder of the run's lock."""
    for left in list((run / "checkpoints").glob(".step-*")):
        atomic.sweep(left.parent / left.name.split(".")[1])
