"""Checkpoints: `checkpoints/step-000120/` with state.safetensors, state.json and manifest.json, whole or not at all.

The manifest holds the SHA-256 of the other files. A resumed run takes the newest checkpoint that verifies.
"""

from __future__ import annotations

import json
import shutil
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

__all__ = ["Checkpoint", "directory_of", "newest", "prune", "save"]

_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_RNG = "rng.cpu"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: optimiser tensors by name, the generator's state, and what the loop wrote beside them."""

    directory: Path
    tensors: dict[str, Tensor]
    rng: Tensor
    state: dict[str, Any]


def directory_of(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def save(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`; `state` is JSON. Also saves the CPU random generator."""
    directory = directory_of(run, step)
    contents = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    contents[_RNG] = torch.get_rng_state()
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
    return Checkpoint(directory, tensors, tensors.pop(_RNG), state)


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, or None, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    for directory in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return _load(directory), skipped
        except CheckpointError as error:
            skipped.append(f"skipped {directory.name}: {error}")
    return None, skipped


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left behind."""
    root = run / "checkpoints"
    for directory in [*sorted(root.glob("step-*"))[:-keep], *root.glob(".step-*")]:
        shutil.rmtree(directory)
