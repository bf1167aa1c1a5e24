"""The kinds of values that options have, and how text becomes one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from twinlora.errors import ConfigError

__all__ = [
    "AnswerMetric",
    "AutoOrOff",
    "BasePrecision",
    "Goal",
    "HeldOut",
    "Method",
    "Positive",
    "Probability",
    "Size",
    "SizeOrWord",
    "Sources",
    "Switch",
    "Tracker",
    "parse_patterns",
    "parse_ranges",
    "parse_size",
]

Method = Literal["lora", "qlora", "hybrid", "full"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
AnswerMetric = Literal["exact-match", "chrf", "rouge-l", "json-valid", "json-fields"]
Goal = Literal["balanced", "accuracy", "speed", "memory", "edge", "many-tasks"]
BasePrecision = Literal["16bit", "bf16", "int8", "nf4", "nf3", "hybrid", "auto"]
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

_UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """`24GiB`, `500MB`, `4096` -> bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", text.lower())
    if not match:
        raise ConfigError(f"size {text!r}: expected a number with a unit, for example 24GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_ranges(text: str) -> tuple[int, ...]:
    """`0-2,5` -> (0, 1, 2, 5). Raises ValueError."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{part!r} is not a number or a range such as 0-7")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers))


def parse_patterns(entries: list[str]) -> dict[str, float]:
    """`["q_proj=8"]` -> {"q_proj": 8.0}; names are regular expressions. Raises ValueError."""
    patterns: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        if not name or not re.fullmatch(r"\d+(\.\d+)?", value) or float(value) <= 0:
            raise ValueError(f"{entry!r} is not NAME=NUMBER, for example down_proj=32")
        patterns[name] = float(value)
    return patterns


def _listed(given: Any) -> Any:
    """One source is a list of one; paths are as good as text."""
    given = [given] if isinstance(given, (str, Path)) else given
    return [str(one) if isinstance(one, Path) else one for one in given] if isinstance(given, list) else given


def _switched(given: Any) -> Any:
    """Recipes say true and false, or on and off, which YAML reads as the same."""
    return {True: "on", False: "off"}[given] if isinstance(given, bool) else given


def _size_or_word(given: Any) -> Any:
    given = "off" if given is False else given
    if isinstance(given, str) and given not in ("auto", "off"):
        parse_size(given)
    return given


def _unweighted(sources: list[str]) -> list[str]:
    for source in sources:
        if re.search(r"@\d*\.?\d+$", source) and not Path(source).exists():
            raise ValueError(f"{source!r} has a weight; held-out rows are read once each")
    return sources


def _size(text: str) -> str:
    if parse_size(text) < 2**20:
        raise ValueError(f"{text!r} is less than a MiB: give a unit, for example 24GiB")
    return text


Size = Annotated[str, AfterValidator(_size)]
Sources = Annotated[list[str], BeforeValidator(_listed)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switched)]
AutoOrOff = Annotated[Literal["auto", "off"], BeforeValidator(_switched)]
SizeOrWord = Annotated[str, BeforeValidator(_size_or_word)]  # a size, auto or off
HeldOut = Annotated[list[str], BeforeValidator(_listed), AfterValidator(_unweighted)]
