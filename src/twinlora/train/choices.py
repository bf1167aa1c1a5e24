"""What a run chooses by measuring, before its model is loaded. A resumed run takes what was chosen: what is measured
need not come out the same twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from twinlora.config import TrainOptions
from twinlora.model.load import pick_dtype
from twinlora.train.checkpoint import Checkpoint
from twinlora.train.hybrid import choose_precision
from twinlora.train.identity import as_before, identity, require_same
from twinlora.train.inputs import Inputs
from twinlora.train.notes import Notes

__all__ = ["Choices", "choose"]


@dataclass(frozen=True)
class Choices:
    """The options with what `plan auto` chose, the type to compute in, and which run this is (see `identity`)."""

    options: TrainOptions
    dtype: torch.dtype
    identity: dict[str, Any]

    @property
    def precision(self) -> dict[str, str] | None:
        """For method hybrid the format of each layer."""
        found: dict[str, str] | None = self.identity["precision"]
        return found


def choose(
    options: TrainOptions, inputs: Inputs, found: Checkpoint | None, device: torch.device, notes: Notes
) -> Choices:
    """As `options` say, measured where they leave it open, or as the run of the checkpoint `found` chose.

    Raises CheckpointError if `found` belongs to another run, ConfigError if nothing can be chosen.
    """
    saved = None if found is None else found.state["identity"]
    options = _planned(options, inputs, found, notes)
    dtype, reason = pick_dtype(options.dtype, device)
    if options.dtype == "auto" and saved is not None:
        dtype, reason = getattr(torch, saved["options"]["dtype"]), "dtype as before"
    if reason:
        notes.add(reason)
    precision = None
    if options.method == "hybrid":
        kept = saved["precision"] if saved is not None and options.layer_precision is None else None
        precision = kept or choose_precision(options, inputs, dtype, device, notes)
    who = identity(options, inputs, dtype, device, precision)
    if found is not None:
        require_same(found, who, options)
    return Choices(options, dtype, who)


def _planned(options: TrainOptions, inputs: Inputs, found: Checkpoint | None, notes: Notes) -> TrainOptions:
    if options.plan == "off":
        return options
    from twinlora.plan.auto import CHOSEN, planned_options

    return planned_options(options, inputs, notes) if found is None else as_before(found, options, CHOSEN)
