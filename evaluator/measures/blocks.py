"""Processes long signals in blocks: short-time Fourier transforms, filters, and the mel scale.

Every function needs memory for one block only, independent of the song's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Source = Callable[[int, int], torch.Tensor]
"""``source(begin, end)`` returns samples of a signal, ``(channels, end - begin)`` float32."""

VALUES = 1 << 20  # spectrum values per block and channel: 8 MB


@dataclass(frozen=True)
class Transform:
    """A short-time Fourier transform with frames centered on multiples of the hop."""

    size: int  # samples of a frame and its window
    hop: int
    window: bool = True  # periodic Hann window, or no window
    reflect: bool = True  # pad the ends by reflection, or with zeros


def check_pair(reference: Samples, estimate: Samples) -> None:
    """Check that two signals can be compared.

    Raises
    ------
    ValueError
        If their shapes differ, or are not ``(samples, channels)`` with at least one of each.
    """
    if reference.shape != estimate.shape:
        raise ValueError(f"reference {reference.shape} and estimate {estimate.shape} differ in shape")
    if reference.ndim != 2 or not reference.size:
        raise ValueError(f"expected (samples, channels), found {reference.shape}")


def plain(signal: Samples) -> Source:
    """Read parts of an array ``(samples, channels)``."""

    def read(begin: int, end: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(signal[begin:end].T, dtype=np.float32))

    return read


def filtered(signal: Samples, taps: torch.Tensor) -> Source:
    """Read parts of an array through a symmetric filter of odd length; zeros are outside the array."""
    half = len(taps) // 2

    def read(begin: int, end: int) -> torch.Tensor:
        low, high = max(0, begin - half), min(len(signal), end + half)
        part = plain(signal)(low, high)
        part = torch.nn.functional.pad(part, (low - begin + half, end + half - high))
        return torch.nn.functional.conv1d(part[:, None], taps[None, None])[:, 0]

    return read


def magnitudes(source: Source, samples: int, transform: Transform) -> Iterator[torch.Tensor]:
    """Compute the magnitude spectrum block by block, ``(channels, bins, frames)`` float32."""
    size, hop = transform.size, transform.hop
    window = torch.hann_window(size) if transform.window else torch.ones(size)
    frames = 1 + samples // hop
    step = max(1, VALUES // (size // 2 + 1))
    for first in range(0, frames, step):
        last = min(first + step, frames) - 1
        padded = _padded(source, samples, first * hop - size // 2, last * hop + size // 2, transform.reflect)
        spectrum = torch.stft(padded, size, hop, window=window, center=False, return_complex=True)
        yield spectrum.abs()


def _padded(source: Source, samples: int, begin: int, end: int, reflect: bool) -> torch.Tensor:
    """Read ``begin`` to ``end``; parts may be before the first sample or after the last."""
    wanted = np.arange(begin, end)
    if reflect:  # a wave of period 2 * (samples - 1), so that short signals are mirrored repeatedly
        period = max(1, 2 * (samples - 1))
        wanted %= period
        wanted = np.minimum(wanted, period - wanted) if samples > 1 else 0 * wanted
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return source(low, high)[:, torch.from_numpy(wanted - low)]
    low, high = max(0, begin), min(samples, end)
    return torch.nn.functional.pad(source(low, high), (low - begin, end - high))


@lru_cache(maxsize=8)
def mel_bank(rate: int, size: int, bands: int) -> torch.Tensor:
    """Make triangular filters on Slaney's mel scale, each of area 1, from 0 Hz to half the rate.

    Slaney's scale is linear below 1 kHz (15 mel) and logarithmic above (27 mel per factor of 6.4).

    Parameters
    ----------
    rate : int
        Hz.
    size : int
        Samples of a frame of the transform.
    bands : int
        Filters.

    Returns
    -------
    Tensor
        ``(bands, size // 2 + 1)`` float32. Filters that are too narrow to contain a bin are left out; this
        does not happen at 44.1 and 48 kHz with the sizes used here.

    References
    ----------
    Slaney 1998, "Auditory Toolbox"; same as ``librosa.filters.mel`` with its defaults.
    """
    slope, log_step, knee = 200 / 3, np.log(6.4) / 27, 15.0  # Hz per mel, per mel, mel
    nyquist = rate / 2
    top = nyquist / slope if nyquist < 1000 else knee + np.log(nyquist / 1000) / log_step
    mels = np.linspace(0, top, bands + 2)
    edges = np.where(mels < knee, slope * mels, 1000 * np.exp(log_step * (mels - knee)))  # Hz
    bins = np.linspace(0, nyquist, size // 2 + 1)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (mid - low), (high - bins) / (high - mid)
    bank = np.clip(np.minimum(rising, falling), 0, None) * 2 / (high - low)
    return torch.from_numpy(bank[bank.any(axis=1)].astype(np.float32))
