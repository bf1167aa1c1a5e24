"""benchmarks/results/*.json, and what every table is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
NOT_MEASURED = "**not measured**"


def measured(name: str) -> bool:
    return (RESULTS / f"{name}.json").exists()


def load(name: str) -> dict:
    found: dict = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def not_yet(command: str) -> str:
    """In place of figures."""
    return f"{NOT_MEASURED} yet: `python benchmarks/{command}` measures."


def machine_line(result: dict) -> str:
    m, v = result["machine"], result["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in v.items())
    return (
        f"{m['cpu']}, {m['threads']} thread{'s' * (m['threads'] > 1)}, {m['memory_bytes'] / 2**30:.0f} GiB; {versions}."
    )


def markdown(header: str, rows: Sequence[Sequence[str]]) -> str:
    """A table; `header` is its first line."""
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
