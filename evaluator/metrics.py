"""How close an estimate comes to the true stem.

Metrics
-------
global SDR
    The challenge's measure: one ratio of energies over all samples and both channels of a song.

References
----------
Fabbro et al. 2023, "The Sound Demixing Challenge 2023: Music Demixing Track", arXiv 2308.06979.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

DELTA = 1e-7
"""Added to both energies, so that silence has a ratio."""


def global_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Global signal-to-distortion ratio in dB.

    Parameters
    ----------
    reference, estimate : array_like
        ``(samples, channels)``, full scale ±1; taken as float32, summed in float64.

    Raises
    ------
    ValueError
        If their shapes differ.
    """
    truth = np.asarray(reference, np.float32)
    guess = np.asarray(estimate, np.float32)
    if truth.shape != guess.shape:
        raise ValueError(f"reference {truth.shape} and estimate {guess.shape} differ in shape")
    signal = np.sum(np.square(truth), dtype=np.float64)
    distortion = np.sum(np.square(truth - guess), dtype=np.float64)
    return float(10 * np.log10((signal + DELTA) / (distortion + DELTA)))
