"""Tensors of a checkpoint that are read when transformers asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from twinlora.numerics.ops import QuantTensor

__all__ = ["Lazy", "Stored"]

_SMALL = 1 << 20  # bytes; a mapping each would be hundreds for the norms


class Lazy:
    """A tensor of a checkpoint, mapped when it is asked for and unmapped with its last use.

    transformers keeps every shard mapped while it loads, and one tensor that lives on keeps its shard mapped: each page
    ever read would count as this process's memory.
    """

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name

    def __getitem__(self, index: Any) -> Tensor:
        with safe_open(self.file, framework="pt") as file:
            tensor: Tensor = file.get_slice(self.name)[index]
        return tensor.clone() if tensor.nbytes < _SMALL else tensor


class Stored:
    """A 4-bit weight, dequantised when it is asked for."""

    def __init__(self, read: Callable[[], QuantTensor]) -> None:
        self.read = read

    def __getitem__(self, index: Any) -> Tensor:
        return self.read().dequantize(torch.float32)[index]
