"""Which kind of device the arithmetic is for: a tensor's own, or, in a simulation on fake CPU tensors, another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["kind_of", "simulating"]

_simulated: str | None = None


def kind_of(device: torch.device | str) -> str:
    """`cpu` or `cuda`: the kind that is simulated, else that of `device`."""
    return _simulated or torch.device(device).type


@contextlib.contextmanager
def simulating(kind: str) -> Iterator[None]:
    """For a while all tensors count as those of a device of `kind`, wherever code asks for it."""
    global _simulated
    before, _simulated = _simulated, kind
    try:
        yield
    finally:
        _simulated = before
