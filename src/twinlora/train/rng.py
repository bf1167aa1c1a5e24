"""The random generators that training draws from (dropout): the CPU's and, on a GPU, the device's."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["restore_rng", "rng_state"]


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators, uint8 tensors on the CPU by name."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of `rng_state`. KeyError if the state of the device's generator is missing."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
