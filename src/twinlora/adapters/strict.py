"""JSON and safetensors from strangers: every problem is found and named before a tensor is made.

What is claimed (sizes, offsets, shapes) is compared with the file itself, so that no claim can cost memory or time.
A file is read once: what is checked, used and hashed are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from twinlora import machine

__all__ = ["Found", "read_json", "read_tensors"]

T = TypeVar("T")

_JSON_LIMIT = 16 << 20
_HEADER_LIMIT = 100_000_000  # that of safetensors itself
_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Found(Generic[T]):
    """What is in a file, what is wrong with it (then there may be nothing), and the SHA-256 of its bytes."""

    value: T
    problems: list[str]
    digest: bytes = b""


def _objects(problems: list[str]) -> Any:
    """A hook for json that notes keys which an object has twice."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            keys = [key for key, _ in pairs]
            problems.extend(f"{key[:200]}: is there twice" for key in built if keys.count(key) > 1)
        return built

    return build


def _parsed(text: bytes, what: str) -> tuple[dict[str, Any], list[str]]:
    problems: list[str] = []
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_objects(problems))
    except (ValueError, RecursionError) as error:
        return {}, [f"damaged: {what} is not JSON ({str(error)[:100]})"]
    if not isinstance(value, dict):
        return {}, [f"{what} is a JSON {type(value).__name__}; expected an object"]
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return {}, [f"{what} holds half of a character (a lone surrogate), or is nested too deeply"]
    return value, problems


def read_json(path: Path) -> Found[dict[str, Any]]:
    """The object in a JSON file."""
    size = path.stat().st_size
    if size > _JSON_LIMIT:
        return Found({}, [f"damaged: {size:,} bytes; expected less than {_JSON_LIMIT:,}"])
    data = path.read_bytes()
    value, problems = _parsed(data, "the file")
    return Found(value, problems, hashlib.sha256(data).digest())


def read_tensors(path: Path) -> Found[dict[str, Tensor]]:
    """The tensors of a safetensors file, over one block of memory of their own; none with any problem."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            return Found({}, [f"damaged: {size} bytes are no safetensors file; fetch it again"])
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _HEADER_LIMIT):
            return Found({}, [f"damaged: the header claims {length:,} bytes, the file has {size:,}; fetch it again"])
        header = file.read(length)
        places, problems = _places(header, size - 8 - length)
        if problems:
            return Found({}, problems)
        data = machine.mapped(size - 8 - length)
        body: Any = data.numpy()
        if file.readinto(body) < len(data):
            return Found({}, ["changed while it was read; try again"])
    digest = hashlib.sha256(start + header)
    digest.update(body)
    return Found({place.name: place.tensor(data) for place in places}, [], digest.digest())


@dataclass(frozen=True, order=True)
class _Place:
    """Where a tensor lies: bytes begin .. end behind the header."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype = field(compare=False)
    shape: tuple[int, ...] = field(compare=False)

    def tensor(self, data: Tensor) -> Tensor:
        """A view of the bytes, or a copy of those that do not begin where their type could."""
        part = data[self.begin : self.end]
        return (part.clone() if self.begin % self.dtype.itemsize else part).view(self.dtype).view(self.shape)


def _places(text: bytes, room: int) -> tuple[list[_Place], list[str]]:
    """The tensors of a header in the order of the file, which has `room` bytes after it, and what is wrong with it."""
    header, problems = _parsed(text, "the header")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        problems.append("__metadata__: expected an object of texts")
    places: list[_Place] = []
    for name, entry in header.items():
        if problem := _entry_problem(entry, room):
            problems.append(f"{name[:200]}: {problem}")
        else:
            begin, end = entry["data_offsets"]
            places.append(_Place(begin, end, name, _TYPES[entry["dtype"]], tuple(entry["shape"])))
    places.sort()
    at, before = 0, ""
    for place in places:
        if place.begin < at:
            problems.append(f"{place.name[:200]}: overlaps {before[:200]} in the file")
        elif place.begin > at:
            problems.append(f"damaged: {place.begin - at:,} bytes before {place.name[:200]} belong to no tensor")
        at, before = place.end, place.name
    if not problems and at < room:
        problems.append(f"damaged: {room - at:,} bytes after the last tensor; fetch it again")
    return places, problems


def _entry_problem(entry: Any, room: int) -> str | None:
    """What is wrong with a header's entry."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets in the header"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        return f"dtype {str(dtype)[:20]}; expected one of {', '.join(_TYPES)}"
    if not (_integers(shape) and 1 <= len(shape) <= 8 and min(shape) > 0 and max(shape) < 1 << 63):
        return f"shape {str(shape)[:100]}; expected positive sizes"
    if not (_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]):
        return f"offsets {str(offsets)[:100]}; expected [begin, end]"
    if offsets[1] > room:
        return f"ends at byte {offsets[1]:,} of {room:,}; the file is cut short, fetch it again"
    nbytes = math.prod(shape) * _TYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        return f"{offsets[1] - offsets[0]:,} bytes; expected {nbytes:,} for {shape} of {dtype}"
    return None


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
