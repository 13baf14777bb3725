"""The percentile bootstrap over songs: how far a mean over them may lie from that over others like them.

References
----------
Efron and Tibshirani 1993, "An Introduction to the Bootstrap", ch. 13.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

COVERAGE = 0.95


def interval(values: NDArray[np.float64], samples: int = 10_000, seed: int = 0) -> tuple[float, float] | None:
    """The ends of the interval of a mean over songs; ``None`` of fewer than two songs.

    Parameters
    ----------
    values : ndarray
        ``(songs,)``, such as differences in dB. The same draws are made for any values of as many songs,
        so that their intervals can be compared.
    samples : int
        Times that the songs are drawn again.
    seed : int
        Of the drawing.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    tail = 100 * (1 - COVERAGE) / 2
    low, high = map(float, np.percentile(values[drawn].mean(axis=1), [tail, 100 - tail]))
    return low, high
