"""JSON and safetensors from strangers: every problem is found and named before a tensor is made.

What is claimed (sizes, offsets, shapes) is compared with the file itself, so that no claim can cost memory or time.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["read_json", "read_tensors"]

_JSON_LIMIT = 16 << 20
_HEADER_LIMIT = 100_000_000  # that of safetensors itself
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


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


def read_json(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The object in a JSON file, and what is wrong with the file."""
    size = path.stat().st_size
    if size > _JSON_LIMIT:
        return {}, [f"damaged: {size:,} bytes; expected less than {_JSON_LIMIT:,}"]
    return _parsed(path.read_bytes(), "the file")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a safetensors file, and what is wrong with it: with any problem of the file there are none."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return {}, [f"damaged: {size} bytes are no safetensors file; fetch it again"]
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _HEADER_LIMIT):
            return {}, [f"damaged: the header claims {length:,} bytes, the file has {size:,}; fetch it again"]
        header, problems = _parsed(file.read(length), "the header")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        problem = _entry_problem(entry, size - 8 - length, name, spans)
        if problem:
            problems.append(f"{name[:200]}: {problem}")
    for (_, end, one), (begin, _, other) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        if begin < end:
            problems.append(f"{other[:200]}: overlaps {one[:200]} in the file")
    if problems:
        return {}, problems
    try:
        return load_file(path), []
    except (SafetensorError, ValueError) as error:
        return {}, [f"damaged: {error}"]


def _entry_problem(entry: Any, room: int, name: str, spans: list[tuple[int, int, str]]) -> str | None:
    """What is wrong with a header's entry; if nothing is, its place in the file is added to `spans`."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets in the header"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _BYTES:
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
