"""Where verbs print: results on stdout, everything else on stderr."""

from __future__ import annotations

import codecs
import json
import shutil
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, RenderableType
from rich.table import Table

from twinlora.config import Options
from twinlora.reporter import ConsoleReporter

__all__ = ["as_typed", "carry_out", "err", "figures_table", "out", "print_json", "print_table", "print_wide"]

Given = TypeVar("Given", bound=Options)
Found = TypeVar("Found")
_WIDEST = 200  # columns of a table, also where stdout is no terminal and rich would cut it at 80

out = Console(highlight=False, soft_wrap=True, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def as_typed(command: str) -> str:
    """`twinlora …` as the user must type it where it is not on the search path (a fresh virtual environment)."""
    if shutil.which("twinlora") or not command.startswith("twinlora "):
        return command
    program = Path(sys.argv[0])
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return f"{program} {command.removeprefix('twinlora ')}"


def print_json(document: Any) -> None:
    """The one JSON document that `--json` promises, in ASCII where stdout is not UTF-8: nothing is lost."""
    escaped = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=escaped, default=str) + "\n")


def print_table(table: Table) -> None:
    """A table as wide as it is; nothing is cut."""
    Console(width=_WIDEST, highlight=False, markup=False, emoji=False).print(table)


def print_wide(found: RenderableType, width: int) -> None:
    """`found` in `width` columns, also where the terminal has fewer: what it wraps is not cut."""
    Console(width=width, highlight=False, soft_wrap=True, emoji=False).print(found)


def figures_table(*titles: str, words: Collection[str] = (), gap: int = 3) -> Table:
    """An empty table without lines; all columns but the first and those named in `words` hold figures."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number and title not in words else "left", no_wrap=True)
    return table


def carry_out(
    options: Given,
    work: Callable[[Given, ConsoleReporter], Found],
    show: Callable[[Found], None],
    document: Callable[[Found], Any] = lambda found: found,
) -> None:
    """Do the `work` of a verb with progress on stderr, then print its `document` as JSON or `show` what was found."""
    reporter = ConsoleReporter()
    try:
        found = work(options, reporter)
    finally:
        reporter.close()
    if options.json_output:
        print_json(document(found))
    else:
        show(found)
