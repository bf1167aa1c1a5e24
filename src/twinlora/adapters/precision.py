"""How the base of an adapter is stored, as a file, its passport, or the passports of several adapters say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinlora.adapters import passport
from twinlora.adapters.passport import Passport
from twinlora.errors import AdapterError, ConfigError
from twinlora.numerics.formats import DENSE, Precision, is_format, parse

__all__ = ["agreed", "read_layers", "trained_on"]


def read_layers(path: Path) -> dict[str, str]:
    """A format's name, or "16bit", for each linear layer: from a JSON file, or the passport in an adapter's or a run's
    directory.

    Raises ConfigError.
    """
    given = _of_directory(path) if path.is_dir() else _of_file(path)
    wrong = []
    for name, value in given.items():
        try:
            if value != DENSE:
                parse(value)
        except ConfigError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        shown = "\n  ".join(wrong[:20])
        raise ConfigError(f"layer_precision {path}: {len(wrong)} of {len(given)} formats are unknown\n  {shown}")
    return given


def _of_file(path: Path) -> dict[str, str]:
    try:
        given: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"layer_precision {path}: cannot be read as JSON: {error}") from None
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise ConfigError(f'layer_precision {path}: expected {{"layer": "format", …}}')
    return given


def _of_directory(path: Path) -> dict[str, str]:
    try:
        found = passport.read(passport.home(path))
    except AdapterError as error:
        raise ConfigError(f"layer_precision {error}") from None
    if found is None or found.layer_precision is None:
        raise ConfigError(
            f"layer_precision {path}: no passport here that says the precision of each layer; expected a JSON file, or "
            "the directory of an adapter that was trained with --method hybrid"
        )
    return found.layer_precision


def trained_on(found: Passport | None, name: str) -> Precision | None:
    """What the base of the adapter `name` was stored in while it was trained; None: 16 bit, or nobody says.

    Raises AdapterError where the passport names several formats and not their layers.
    """
    if found is None:
        return None
    if found.layer_precision is not None:
        return found.layer_precision if set(found.layer_precision.values()) != {DENSE} else None
    formats = [known for known in found.base_precision if is_format(known)]
    if len(formats) > 1:
        raise AdapterError(
            f"adapter {name}: trained on {' and '.join(formats)}, and its passport does not say which layer had which; "
            "that base cannot be made again: train it with --method qlora or hybrid"
        )
    return parse(formats[0]) if formats else None


def agreed(found: Mapping[str, Passport | None]) -> dict[str, str]:
    """The precision of each layer on which all of the adapters were trained, by their names and passports.

    Raises AdapterError if none was trained layer by layer, or one on another precision. One without a passport has no
    say.
    """
    papers = {name: paper for name, paper in found.items() if paper is not None}
    first = next((name for name, paper in papers.items() if paper.layer_precision is not None), None)
    if first is None:
        raise AdapterError(
            f"precision hybrid: {len(found)} adapter(s) given, none trained with --method hybrid, whose passport says "
            "the precision of each layer; give such an adapter, or --layer-precision FILE"
        )
    layers = papers[first].layer_precision or {}
    others = [name for name, paper in papers.items() if paper.layer_precision != layers]
    if others:
        lines = [f"{name}: {passport.described(papers[name].base_precision)}" for name in (first, *others)]
        lines += [f"{name} differs from {first} in {_moved(papers[name], layers)}" for name in others]
        raise AdapterError(
            f"precision hybrid: adapters {first} and {', '.join(others)} were trained on bases of different "
            "precision\n  "
            + "\n  ".join(lines)
            + "\nserve them apart, or say with --layer-precision DIR which adapter's base it is to be"
        )
    return layers


def _moved(paper: Passport, layers: Mapping[str, str]) -> str:
    theirs = paper.layer_precision
    if theirs is None:
        return "that its layers all had one precision"
    moved = sorted(name for name in layers.keys() | theirs.keys() if layers.get(name) != theirs.get(name))
    name = moved[0]
    return f"{len(moved)} layer(s), such as {name}: {theirs.get(name)}, not {layers.get(name)}"
