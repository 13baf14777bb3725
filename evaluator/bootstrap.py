"""The percentile bootstrap over songs: a confidence interval of a mean or median.

References
----------
Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.95

Statistic = Literal["mean", "median"]


def interval(
    values: NDArray[np.float64], samples: int = 10_000, seed: int = 0, statistic: Statistic = "mean"
) -> tuple[float, float] | None:
    """The ends of the confidence interval of a statistic over songs; ``None`` for fewer than two songs.

    Parameters
    ----------
    values : ndarray
        ``(songs,)``, such as differences in dB. Arrays of the same length are resampled in the same way, so
        their intervals can be compared.
    samples : int
        Number of bootstrap samples.
    seed : int
        Seed of the random numbers.
    statistic : {"mean", "median"}
    """
    if len(values) < 2:
        return None
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))]
    over = drawn.mean(axis=1) if statistic == "mean" else np.median(drawn, axis=1)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = map(float, np.percentile(over, [tail, 100 - tail]))
    return low, high
