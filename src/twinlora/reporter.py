"""What long work says while it runs: notes for people, and how far it is. This one is silent; the console's is in cli."""

from __future__ import annotations

__all__ = ["Reporter"]


class Reporter:
    """Receives notes and progress. Subclass it to show them."""

    def note(self, text: str) -> None:
        """A line to show once."""

    def progress(self, stage: str, done: int, total: int, text: str = "") -> None:
        """`done` of `total` units of `stage` are done; `text` says how it goes. `done == total` ends the stage."""
