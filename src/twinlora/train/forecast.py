"""What the planner would have said of this run, beside what the run took. Nothing here ever fails a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from twinlora import machine
from twinlora.config import TrainOptions
from twinlora.errors import StorageError
from twinlora.train.inputs import Inputs
from twinlora.train.memory import Memory
from twinlora.train.notes import Notes
from twinlora.train.prepare import Prepared

if TYPE_CHECKING:
    from twinlora.plan.predict import Prediction

__all__ = ["Forecast"]


class Forecast:
    """To be made before the model is: the process's own memory counts apart."""

    def __init__(
        self, options: TrainOptions, inputs: Inputs, dtype: torch.dtype, device: torch.device, notes: Notes
    ) -> None:
        self.options, self.inputs, self.dtype, self.device, self.notes = options, inputs, dtype, device, notes
        self._runtime = 0 if device.type == "cuda" else machine.held_bytes()

    def _predict(self, prepared: Prepared, memory: Memory) -> Prediction | None:
        """Of a run with the settings that `memory` has come to."""
        from twinlora.plan import predict
        from twinlora.plan.model import describe

        if not predict.wanted():
            return None
        if self.options.deploy:
            self.notes.add("no prediction beside this run: what deploy keeps in memory is not simulated")
            return None
        try:
            return predict.predict(
                describe(str(self.inputs.source.path), trust_remote_code=self.options.trust_remote_code).config,
                self._with(memory),
                self.inputs,
                packed=prepared.packed,
                dtype=self.dtype,
                device=self.device,
                runtime=self._runtime,
                precision=prepared.layers,
            )
        except Exception as error:  # a model that trains need not be one that can be simulated
            self.notes.add(f"no prediction beside this run: {type(error).__name__}: {str(error).splitlines()[0]}")
            return None

    def _with(self, memory: Memory) -> TrainOptions:
        now = {"micro_batch_tokens": memory.micro_batch_tokens,
               "gradient_checkpointing": "on" if memory.checkpointing else "off"}  # fmt: skip
        return self.options.model_copy(update=now)

    def beside(
        self, record: dict[str, Any], prepared: Prepared, memory: Memory, *, as_planned: bool
    ) -> dict[str, Any] | None:
        """The prediction for run.json; the run joins the history. None for a run that was not `as_planned`."""
        from twinlora.plan import predict

        prediction = self._predict(prepared, memory) if as_planned else None
        if prediction is None:
            return None
        try:
            predict.remember(prediction, self._with(memory), record, self.device)
        except StorageError as error:
            self.notes.add(f"this run is missing from the history: {error}")
        return predict.as_json(prediction)

    def blame(self, prepared: Prepared, memory: Memory) -> str | None:
        """Which cause took more than predicted when memory ran out, in words; None without a prediction."""
        from twinlora.plan import predict

        prediction = self._predict(prepared, memory)
        if prediction is None:
            return None
        full = self.options.method == "full"  # then a float32 weight is its own master
        trained = sum(
            p.numel() * (8 if full and p.dtype == torch.float32 else 12)  # two moments, and the float32 weight itself
            for p in prepared.model.parameters()
            if p.requires_grad
        )
        return predict.blame(prediction, weights=prepared.weight_bytes, trained=trained, device=self.device)
