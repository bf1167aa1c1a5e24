"""Where verbs print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["as_typed", "err", "out", "print_json", "print_table"]

_WIDEST = 200  # columns of a table, also where stdout is no terminal and rich would cut it at 80

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def as_typed(command: str) -> str:
    """`twinlora …` as the user must type it where it is not on the search path (a fresh virtual environment)."""
    if shutil.which("twinlora") or not command.startswith("twinlora "):
        return command
    program = Path(sys.argv[0])
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return f"{program} {command.removeprefix('twinlora ')}"


def print_json(document: Any) -> None:
    """The one JSON document that `--json` promises."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n")


def print_table(table: Table) -> None:
    """A table as wide as it is; nothing is cut."""
    Console(width=_WIDEST, highlight=False).print(table)
