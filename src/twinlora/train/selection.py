"""Which evaluation was the best: early stopping, and the weights that are kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Selection"]

_PREFIX = "best."


@dataclass
class Selection:
    """The evaluation with the lowest loss so far; of equal ones the first. Saved with every checkpoint.

    With `keep`, the trained weights of that moment are held on the CPU, as large as the adapter (or the model).
    """

    keep: bool
    loss: float = math.inf
    step: int | None = None
    stale: int = 0  # evaluations since
    weights: dict[str, Tensor] = field(default_factory=dict)

    def update(self, loss: float, step: int, parameters: dict[str, nn.Parameter]) -> None:
        """Take note of an evaluation after `step` steps."""
        if loss >= self.loss:
            self.stale += 1
            return
        self.loss, self.step, self.stale = loss, step, 0
        if self.keep:
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}

    @property
    def kept_step(self) -> int | None:
        """The step whose weights are held, if any are."""
        return self.step if self.weights else None

    def restore_best(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put the best weights into the model, if they were kept."""
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"loss": self.loss, "step": self.step, "stale": self.stale} if self.step is not None else {}

    def tensors(self) -> dict[str, Tensor]:
        """The best weights, by name."""
        return {_PREFIX + name: value for name, value in self.weights.items()}

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state` and `tensors`."""
        for key, value in state.items():
            setattr(self, key, value)
        self.weights = {
            name.removeprefix(_PREFIX): value.clone() for name, value in tensors.items() if name.startswith(_PREFIX)
        }
