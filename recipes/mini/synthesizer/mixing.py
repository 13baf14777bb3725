"""Levels of the stems, the master's limiter, and 16-bit stems that sum to their mixture exactly."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.ndimage import minimum_filter1d, uniform_filter1d

from kmdx.challenge import RATE

FULL_SCALE = 32767
WINDOW = RATE // 10  # samples over which a stem's level is measured
GATE = 1e-2  # of the loudest window's RMS (-40 dB): what is below it does not count as playing
LOOK_AHEAD = RATE // 200  # samples: the limiter's gain falls 5 ms before the peak


def level(stem: np.ndarray) -> float:
    """RMS of a stem ``(samples, channels)`` while it plays."""
    windows = _windows(stem)
    return float(np.sqrt(np.mean(np.square(windows[windows >= GATE * windows.max()]))))


def silence(stem: np.ndarray) -> float:
    """The part of a stem, 0 to 1, that is silent: below -60 dBFS or its gate."""
    windows = _windows(stem)
    return float(np.mean(windows < max(1e-3, GATE * windows.max())))


def balance(stems: Mapping[str, np.ndarray], levels: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The stems at these levels.

    Parameters
    ----------
    stems : mapping of str to ndarray
        None of them silent.
    levels : mapping of str to float
        RMS while it plays, in dB against full scale, of each.
    """
    return {name: stem * np.float32(10 ** (levels[name] / 20) / level(stem)) for name, stem in stems.items()}


def master(stems: Mapping[str, np.ndarray], ceiling: float) -> dict[str, np.ndarray]:
    """Stems whose sum stays below a ceiling, as a limiter on the mixture makes it.

    The limiter's gain at each sample is the same for all stems, so that they still sum to the mixture.

    Parameters
    ----------
    stems : mapping of str to ndarray
        ``(samples, channels)``.
    ceiling : float
        Largest absolute sample of the sum.
    """
    peaks = np.abs(np.sum(list(stems.values()), axis=0)).max(axis=1)  # (samples,)
    gain = np.minimum(1, ceiling / np.maximum(peaks, ceiling))
    # The lowest gain of a window, averaged over a window no longer: at a peak it is still low enough.
    window = 2 * LOOK_AHEAD + 1
    gain = uniform_filter1d(minimum_filter1d(gain, window), window)[:, None].astype(np.float32)
    return {name: stem * gain for name, stem in stems.items()}


def quantise(stems: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The stems in 16 bit, and the mixture, which is their sum.

    Where a stem or the sum would clip, all of them are scaled down first.

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
    room = FULL_SCALE - len(stems)  # each stem's rounding may add half a unit
    scale = min(float(FULL_SCALE), room / max(peak, 1e-9))
    whole = {name: np.rint(stem * scale).astype(np.int16) for name, stem in stems.items()}
    mixture = np.stack(list(whole.values())).sum(axis=0, dtype=np.int32)
    return whole, mixture.astype(np.int16)


def _windows(stem: np.ndarray) -> np.ndarray:
    """RMS of each window."""
    count = max(len(stem) // WINDOW, 1)
    return np.sqrt([np.mean(np.square(part, dtype=np.float64)) for part in np.array_split(stem, count)])
