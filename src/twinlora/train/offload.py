"""What autograd keeps of a forward pass, held in host memory until the backward pass wants it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["HostActivations"]

_SMALL = 1 << 16  # bytes; a copy of less costs more than it frees

_Kept = Tensor | tuple[Tensor, torch.device]


class HostActivations(saved_tensors_hooks):
    """`with HostActivations(model): loss = …`. Weights stay where they are, and so do tensors under 64 KiB.

    Copies run in the order of the device's work, into pinned memory. With checkpointing one tensor a layer moves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.moved_bytes = 0
        self._weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> _Kept:
        if tensor.nbytes < _SMALL or _storage(tensor) in self._weights:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor, non_blocking=True)
        self.moved_bytes += tensor.nbytes
        return host, tensor.device

    def _unpack(self, kept: _Kept) -> Any:
        return kept if isinstance(kept, Tensor) else kept[0].to(kept[1], non_blocking=True)


def _storage(tensor: Tensor) -> int:
    """The same for all views of one storage, on fake tensors too."""
    number: int = tensor.untyped_storage()._cdata
    return number
