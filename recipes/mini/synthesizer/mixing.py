"""Stem levels, the limiter on the mixture, and 16-bit stems that sum exactly to their mixture."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import minimum_filter1d, uniform_filter1d

from kmdx.challenge import RATE

FULL_SCALE = 32767
WINDOW = RATE // 10  # samples over which a stem's level is measured
GATE = 1e-2  # of the loudest window's RMS (-40 dB); quieter windows do not count as playing
LOOK_AHEAD = RATE // 200  # samples: the limiter's gain falls 5 ms before the peak


def level(stem: np.ndarray) -> float:
    """RMS of a stem ``(samples, channels)`` over the windows in which it plays."""
    windows = _windows(stem)
    return float(np.sqrt(np.mean(np.square(windows[windows >= GATE * windows.max()]))))


def silence(stem: np.ndarray) -> float:
    """Share of a stem, 0 to 1, that is silent: below -60 dBFS or below the gate."""
    windows = _windows(stem)
    return float(np.mean(windows < max(1e-3, GATE * windows.max())))


def balance(stems: Mapping[str, np.ndarray], levels: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Scale stems to these levels.

    Parameters
    ----------
    stems : mapping of str to ndarray
        None of them may be silent.
    levels : mapping of str to float
        For each stem, its RMS while it plays, in dBFS.
    """
    return {name: stem * np.float32(10 ** (levels[name] / 20) / level(stem)) for name, stem in stems.items()}


def master(stems: Mapping[str, np.ndarray], ceiling: float) -> dict[str, np.ndarray]:
    """Apply a limiter to the mixture, so that the sum of the stems stays below a ceiling.

    The gain at each sample is the same for all stems, so they still sum to the mixture.

    Parameters
    ----------
    stems : mapping of str to ndarray
        ``(samples, channels)``.
    ceiling : float
        Largest absolute sample of the sum.
    """
    peaks = np.abs(np.sum(list(stems.values()), axis=0)).max(axis=1)  # (samples,)
    gain = np.minimum(1, ceiling / np.maximum(peaks, ceiling))
    # A minimum over a window, then a mean over a window of the same length: still low enough at a peak.
    window = 2 * LOOK_AHEAD + 1
    gain = uniform_filter1d(minimum_filter1d(gain, window), window)[:, None].astype(np.float32)
    return {name: stem * gain for name, stem in stems.items()}


def quantize(stems: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Round stems to 16 bits and sum them to the mixture.

    If a stem or the sum would clip, all of them are scaled down first.

    Parameters
    ----------
    stems : mapping of str to ndarray
        ``(samples, channels)``, full scale at -1 and 1.

    Returns
    -------
    stems : dict of str to ndarray
        int16.
    mixture : ndarray
        int16, ``mixture == sum of stems`` at every sample.
    """
    sounds = list(stems.values())
    peak = max(float(np.abs(sound).max()) for sound in (*sounds, np.sum(sounds, axis=0)))
    room = FULL_SCALE - len(stems)  # rounding can add half a unit per stem
    scale = min(float(FULL_SCALE), room / max(peak, 1e-9))
    whole = {name: np.rint(stem * scale).astype(np.int16) for name, stem in stems.items()}
    mixture = np.stack(list(whole.values())).sum(axis=0, dtype=np.int32)
    return whole, mixture.astype(np.int16)


def _windows(stem: np.ndarray) -> np.ndarray:
    """RMS of each window."""
    count = max(len(stem) // WINDOW, 1)
    return np.sqrt([np.mean(np.square(part, dtype=np.float64)) for part in np.array_split(stem, count)])
