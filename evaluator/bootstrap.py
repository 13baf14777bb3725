"""The percentile bootstrap over songs: how far a statistic of them may lie from that of others like them.

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
    """The ends of the interval of a statistic over songs; ``None`` of fewer than two songs.

    Parameters
    ----------
    values : ndarray
        ``(songs,)``, such as differences in dB. The same draws are made for any values of as many songs,
        so that their intervals can be compared.
    samples : int
        Times that the songs are drawn again.
    seed : int
        Of the drawing.
    statistic : {"mean", "median"}
        What is computed over songs.
    """
    if len(values) < 2:
        return None
    drawn = values[np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))]
    over = drawn.mean(axis=1) if statistic == "mean" else np.median(drawn, axis=1)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = map(float, np.percentile(over, [tail, 100 - tail]))
    return low, high
