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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

__all__ = ["Found", "read_json", "read_tensors"]

T = TypeVar("T")

_JSON_LIMIT = 16 << 20
_HEADER_LIMIT = 100_000_000  # that of safetensors itself
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


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
    return value, problems


def read_json(path: Path) -> Found[dict[str, Any]]:
    """The object in a JSON file."""
    size = path.stat().st_size
    if size > _JSON_LIMIT:
        return Found({}, [f"damaged: {size:,} bytes; expected less than {_JSON_LIMIT:,}"])
    data = path.read_bytes()
    value, problems = _parsed(data, "the file")
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        problems.append("the file holds half of a character (a lone surrogate), or is nested too deeply")
    return Found(value, problems, hashlib.sha256(data).digest())


def read_tensors(path: Path) -> Found[dict[str, Tensor]]:
    """The tensors of a safetensors file, in memory of their own; none with any problem."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            return Found({}, [f"damaged: {size} bytes are no safetensors file; fetch it again"])
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _HEADER_LIMIT):
            return Found({}, [f"damaged: the header claims {length:,} bytes, the file has {size:,}; fetch it again"])
        start += file.read(length)
        names, problems = _names(start[8:], size - 8 - length)
        if problems:
            return Found({}, problems)
        file.seek(0)
        data = file.read()
    if not data.startswith(start):
        return Found({}, ["changed while it was read; try again"])
    try:
        tensors = load(data)  # in no order at all
        return Found({name: tensors[name] for name in names}, [], hashlib.sha256(data).digest())
    except (SafetensorError, ValueError) as error:
        return Found({}, [f"damaged: {error}"])


def _names(text: bytes, room: int) -> tuple[list[str], list[str]]:
    """The tensors of a header in the order of the file, which has `room` bytes after it, and what is wrong with it."""
    header, problems = _parsed(text, "the header")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        problem = _entry_problem(entry, room, name, spans)
        if problem:
            problems.append(f"{name[:200]}: {problem}")
    for (_, end, one), (begin, _, other) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if begin < end:
            problems.append(f"{other[:200]}: overlaps {one[:200]} in the file")
    named = max((end for _, end, _ in spans), default=0)
    if not problems and named < room:
        problems.append(f"damaged: {room - named:,} bytes after the last tensor; fetch it again")
    return [name for _, _, name in sorted(spans)], problems


def _entry_problem(entry: Any, room: int, name: str, spans: list[tuple[int, int, str]]) -> str | None:
    """What is wrong with a header's entry; if nothing is, its place in the file is added to `spans`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets in the header"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BYTES:
        return f"dtype {str(dtype)[:20]}; expected one of {', '.join(_BYTES)}"
    if not (_integers(shape) and 1 <= len(shape) <= 8 and min(shape) > 0):
        return f"shape {str(shape)[:100]}; expected positive sizes"
    if not (_integers(offsets) and len(offsets) == 2 and 0 <= offsets[0] <= offsets[1]):
        return f"offsets {str(offsets)[:100]}; expected [begin, end]"
    if offsets[1] > room:
        return f"ends at byte {offsets[1]:,} of {room:,}; the file is cut short, fetch it again"
    if offsets[1] - offsets[0] != math.prod(shape) * _BYTES[dtype]:
        return (
            f"{offsets[1] - offsets[0]:,} bytes; expected {math.prod(shape) * _BYTES[dtype]:,} for {shape} of {dtype}"
        )
    spans.append((*offsets, name))
    return None


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
