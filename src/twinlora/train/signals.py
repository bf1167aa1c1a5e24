"""SIGINT and SIGTERM while a run trains."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

__all__ = ["StopSignals"]


@dataclass
class StopSignals:
    """Signals are remembered, so that the step in hand can end and be saved. A second one is immediate."""

    received: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        except ValueError:  # not the main thread: whoever runs us handles signals
            self._before.clear()
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
