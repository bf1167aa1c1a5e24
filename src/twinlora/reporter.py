"""What long work says while it runs: notes for people, and how far it is."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ConsoleReporter", "Reporter"]

_QUIET_SECONDS = 10.0  # between progress lines where stderr is not a terminal


class Reporter:
    """Receives notes and progress; this one is silent."""

    def note(self, text: str) -> None:
        """A line to show once."""

    def detail(self, text: str) -> None:
        """A note that runs of a comparison need not repeat, because their parent said it."""
        self.note(text)

    def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` units of `stage` are done; `text` says how it goes. `done == total` ends the stage."""

    def close(self) -> None:
        """Nothing more will come, perhaps early."""


class ConsoleReporter(Reporter):
    """Progress bars on a terminal; elsewhere a line now and then. `prefix` tells several workers apart."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = f"{prefix} · " if prefix else ""
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}

    def note(self, text: str) -> None:
        """Show a line."""
        console = self._bars.console if self._bars else self._console
        console.print(self._prefix + text, markup=False)

    def detail(self, text: str) -> None:
        """Show a line, unless several workers would show it."""
        if not self._prefix:
            self.note(text)

    def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of `stage`, or print a line if the last one is old or this is the end."""
        if self._console.is_terminal:
            self._bar(stage, done, total, text)
        elif done >= total or time.monotonic() - self._printed.get(stage, -_QUIET_SECONDS) >= _QUIET_SECONDS:
            self._printed[stage] = time.monotonic()
            self._console.print(f"{self._prefix}{stage} {done}/{total} {text}".rstrip(), markup=False)

    def _bar(self, stage: str, done: int, total: int, text: str) -> None:
        if self._bars is None:
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[text]}"),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self._console, transient=False)
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(self._prefix + stage, total=total, text=text)
        self._bars.update(self._tasks[stage], completed=done, total=total, text=text)
        if done >= total:
            del self._tasks[stage]
            if not self._tasks:
                self._bars.stop()
                self._bars = None

    def close(self) -> None:
        """Stop the bars, also when work ends early."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
