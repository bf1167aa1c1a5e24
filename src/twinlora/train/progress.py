"""Where a run is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress"]


@dataclass
class Progress:
    """Where a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    skipped: int = 0  # steps whose float16 gradients overflowed
    seconds: float = 0.0
    loss: float = math.nan
    eval_loss: float | None = None
    stopped: bool = False  # early, by `patience`

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {k: v for k, v in vars(self).items() if k != "step" and not (isinstance(v, float) and math.isnan(v))}
