"""What a run has to say: shown at once, and kept for run.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from twinlora.reporter import Reporter

__all__ = ["Notes"]


@dataclass
class Notes:
    """Lines that are shown at once; those that `add` and `detail` get also end up in run.json."""

    reporter: Reporter
    lines: list[str] = field(default_factory=list)

    def show(self, text: str) -> None:
        """Show a line."""
        self.reporter.note(text)

    def add(self, text: str) -> None:
        """Show a line and keep it."""
        self.lines.append(text)
        self.reporter.note(text)

    def detail(self, text: str) -> None:
        """Keep a line; it is shown unless whoever runs this run said it before."""
        self.lines.append(text)
        self.reporter.detail(text)
