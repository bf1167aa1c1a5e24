"""Safetensors files written tensor by tensor: a checkpoint of any size needs the memory of its largest tensor."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from torch import Tensor

__all__ = ["ShardWriter"]

_TYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip
_METADATA = {"format": "pt"}
_ENTRY = 160  # bytes that a tensor's line in the header takes beside its name


class ShardWriter:
    """`model.safetensors` in `directory`, or numbered parts and their index where it would pass `limit` bytes.

    `names` are all tensors that will come: the header stands before the data, and room for it is kept.
    """

    def __init__(self, directory: Path, names: list[str], limit: int = 4_000_000_000) -> None:
        self._directory, self._limit = directory, limit
        # The lengths of header and data are known in the end; JSON may be followed by spaces.
        self._room = -(-(200 + sum(len(name) + _ENTRY for name in names)) // 8) * 8
        self._files: list[Path] = []
        self._places: dict[str, int] = {}
        self._header: dict[str, Any] = {}
        self._file: IO[bytes] | None = None
        self._size = self.total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._file is not None:
            self._file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor behind the others."""
        tensor = tensor.detach().contiguous().cpu()
        if self._file is None or (self._size and self._size + tensor.nbytes > self._limit):
            self._next_file()
        assert self._file is not None
        end = self._size + tensor.nbytes
        self._header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._size, end],
        }
        self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._places[name] = len(self._files) - 1
        self._size = end
        self.total += tensor.nbytes

    def _next_file(self) -> None:
        self._close_file()
        path = self._directory / f"model-{len(self._files) + 1:05}.safetensors"
        self._files.append(path)
        self._file = path.open("wb")
        self._file.seek(8 + self._room)
        self._header, self._size = {"__metadata__": _METADATA}, 0

    def _close_file(self) -> None:
        if self._file is None:
            return
        text = json.dumps(self._header, separators=(",", ":")).encode()
        assert len(text) <= self._room
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
        self._file.close()
        self._file = None

    def _finish(self) -> None:
        self._close_file()
        if len(self._files) == 1:
            self._files[0].rename(self._directory / "model.safetensors")
            return
        names = [f"model-{i + 1:05}-of-{len(self._files):05}.safetensors" for i in range(len(self._files))]
        for path, name in zip(self._files, names, strict=True):
            path.rename(self._directory / name)
        index = {
            "metadata": {"total_size": self.total},
            "weight_map": {name: names[place] for name, place in self._places.items()},
        }
        text = json.dumps(index, indent=2)
        (self._directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
