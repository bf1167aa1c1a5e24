"""Intervals: for a share of rows, for a mean, for a loss per token, and for differences on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["mean_interval", "paired_interval", "ratio_interval", "wilson_interval"]

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_RESAMPLES = 10_000


def wilson_interval(hits: int, rows: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, JASA 22:209). Stays within [0, 1] and works at 0 and 1."""
    if rows == 0:
        return 0.0, 1.0
    share, z2 = hits / rows, _Z**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _Z * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of row scores within [0, 1].

    Wilson's where every row is 0 or 1, else a bootstrap over rows; where all rows score the same in between, the rule
    of three (3 / rows).
    """
    if all(score in (0, 1) for score in scores):
        return wilson_interval(int(sum(scores)), len(scores))
    if len(set(scores)) == 1:
        bound = 3 / len(scores)
        return max(0.0, scores[0] - bound), min(1.0, scores[0] + bound)
    _, low, high = ratio_interval(scores, [1] * len(scores))
    return low, high


def ratio_interval(
    totals: Sequence[float], counts: Sequence[float], *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """sum(totals) / sum(counts) and its 95 % interval by the percentile bootstrap over rows (Efron 1979).

    A loss per token: totals of nats and of tokens, drawn together. Raises ValueError for other lengths.
    """
    if len(totals) != len(counts) or len(totals) == 0:
        raise ValueError(f"expected the same rows for both, got {len(totals)} and {len(counts)}")
    above, below = np.asarray(totals, dtype=float), np.asarray(counts, dtype=float)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(max(1, resamples // 100)):
        drawn = generator.integers(0, len(above), (100, len(above)))
        ratios.append(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(above.sum() / below.sum()), float(low), float(high)


def paired_interval(
    a: Sequence[float], b: Sequence[float], *, resamples: int = _RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over rows, and its 95 % interval by the paired bootstrap.

    Rows are drawn together, so that what is hard for both methods cancels. Where the two agree on every row the
    bootstrap knows nothing, and the rule of three (3 / rows) bounds the difference. Raises ValueError for
    other lengths.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"expected the same rows for both, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if not difference.any():
        bound = min(1.0, 3 / len(difference))
        return 0.0, -bound, bound
    return ratio_interval(difference.tolist(), [1] * len(difference), resamples=resamples, seed=seed)
