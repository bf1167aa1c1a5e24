"""Intervals: for a proportion, and for the difference of two methods on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["paired_interval", "wilson_interval"]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(hits: int, rows: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, JASA 22:209). Stays within [0, 1] and works at 0 and 1."""
    if rows == 0:
        return 0.0, 1.0
    share, z2 = hits / rows, _Z**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over rows, and its 95 % interval by the paired percentile bootstrap (Efron 1979).

    Rows are drawn together, so that what is hard for both methods cancels. Where the two agree on every row the
    bootstrap knows nothing, and the rule of three (3 / rows) bounds the difference. Raises ValueError for
    other lengths.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"expected the same rows for both, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    mean = float(difference.mean())
    if not difference.any():
        bound = min(1.0, 3 / len(difference))
        return 0.0, -bound, bound
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            difference[generator.integers(0, len(difference), (100, len(difference)))].mean(axis=1)
            for _ in range(resamples // 100)
        ]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)
