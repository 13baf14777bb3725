"""Ratios and errors of waveforms: SI-SDR and log-WMSE.

Signals are ``(samples, channels)`` float32 at full scale ±1; energies are summed in float64. Each function
needs less than 50 MB in addition to the arrays, independent of the song's length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from evaluator.measures.blocks import Samples, check_pair

BLOCK = 1 << 18  # samples at a time
SMALL = 1e-8  # keeps perfect and silent estimates finite

SCALER = -4.0  # scales the natural logarithm to values similar to an SDR
TOLERANCE = 10 ** (-68 / 20)  # a weighted error below this is inaudible if the mixture's RMS is 1
DESIGN_RATE = 44100  # Hz
DESIGN_SIZE = 8192  # points of the weighting filter's response
HALF = 2000  # taps on each side of its center
EAR_FFT = 1 << 16


def si_sdr(reference: Samples, estimate: Samples) -> float:
    """Scale-invariant signal-to-distortion ratio over all samples and channels, in dB.

        a = <estimate, reference> / |reference|²
        SI-SDR = 10 log10(|a reference|² / |a reference - estimate|²)

    All channels share one factor, so an error in their balance counts. The mean is not removed. The constants
    are those of MSST: a silent estimate gives -80 dB, a perfect one a finite value.

    Returns
    -------
    float
        NaN if the reference is silent.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Le Roux, Wisdom, Erdogan and Hershey 2019, "SDR: half-baked or well done?", arXiv 1811.02508.
    """
    check_pair(reference, estimate)
    product, energy = 0.0, 0.0
    for begin in range(0, len(reference), BLOCK):
        true, guess = (x[begin : begin + BLOCK].astype(np.float64) for x in (reference, estimate))
        product += float(np.vdot(true, guess))
        energy += float(np.vdot(true, true))
    if energy == 0:
        return math.nan
    factor = product / energy
    noise = 0.0
    for begin in range(0, len(reference), BLOCK):
        true, guess = (x[begin : begin + BLOCK].astype(np.float64) for x in (reference, estimate))
        error = factor * true - guess
        noise += float(np.vdot(error, error))
    return 10 * math.log10(factor**2 * energy / (noise + SMALL) + SMALL)


def log_wmse(reference: Samples, estimate: Samples, mixture: Samples, rate: int) -> float:
    """Logarithm of the error's energy, weighted by the ear's sensitivity and relative to the mixture.

        per channel: -4 ln(mean(e²) + 1e-8),    e = weighted(estimate - reference) / RMS(weighted(mixture))

    The result is the mean over channels. Values of ``e`` below -68 dB count as zero. Higher is better; a
    perfect estimate gives 73.68, even if the reference or the song is silent.

    Parameters
    ----------
    reference, estimate, mixture : ndarray
        ``(samples, channels)``.
    rate : int
        Hz. The weighting filter is designed at 44.1 kHz and adapted to other rates.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Jordal 2023, https://github.com/nomonosound/log-wmse-audio-quality, Apache 2.0.
    torch-log-wmse 0.3.1 by Landschoot, which MSST calls. Version 1.0 removed the tolerance of -68 dB.
    """
    check_pair(reference, estimate)
    check_pair(mixture, estimate)
    taps = ear_filter(rate)
    loudness = np.zeros(mixture.shape[1])
    for part in _weighted(mixture, None, taps):
        loudness += np.square(part, out=part).sum(axis=0)
    scale = 1 / (np.sqrt(loudness / len(mixture)) + SMALL)
    error = np.zeros(mixture.shape[1])
    for part in _weighted(estimate, reference, taps):
        part *= scale
        part[np.abs(part) < TOLERANCE] = 0
        error += np.square(part, out=part).sum(axis=0)
    return float(np.mean(SCALER * np.log(error / len(mixture) + SMALL)))


@lru_cache(maxsize=4)
def ear_filter(rate: int) -> NDArray[np.float64]:
    """Make the weighting filter of log-WMSE: a high shelf (+5 dB at 1.5 kHz), a high-pass (120 Hz, second
    order), a peak (+2.5 dB at 500 Hz) and a low-pass (10 kHz, first order, applied twice), without phase.

    Parameters
    ----------
    rate : int
        Hz. At other rates than 44.1 kHz the response is the same below both half rates, and zero above.

    Returns
    -------
    ndarray
        Taps, of even number; the center is the tap after the middle. 4000 at 44.1 kHz.
    """
    size = 2 * round(DESIGN_SIZE / 2 * rate / DESIGN_RATE)
    half = round(HALF * rate / DESIGN_RATE)
    design = np.fft.rfftfreq(DESIGN_SIZE, 1 / DESIGN_RATE)
    # The published filter was sampled at 4097 points from 0 Hz up to, but excluding, half the rate.
    target = _magnitude(design * (len(design) - 1) / len(design))
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    response = np.interp(frequencies, design, target, right=0.0)
    taps = np.fft.fftshift(np.fft.irfft(response, size))
    middle = size // 2 + 1
    cut: NDArray[np.float64] = taps[middle - half : middle + half]
    return cut


def _magnitude(frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Response of the four filters at 44.1 kHz: two of the Audio EQ Cookbook and two Butterworth filters."""
    z = np.exp(-2j * np.pi * frequencies / DESIGN_RATE)  # one sample of delay

    def biquad(b: tuple[float, ...], a: tuple[float, ...]) -> NDArray[np.float64]:
        value: NDArray[np.float64] = np.abs(np.polyval(b[::-1], z) / np.polyval(a[::-1], z))
        return value

    def angle(center: float, q: float) -> tuple[float, float]:
        w = 2 * math.pi * center / DESIGN_RATE
        return math.cos(w), math.sin(w) / (2 * q)

    g = 10 ** (5 / 40)
    c, s = angle(1500, math.sqrt(0.5))
    r = 2 * math.sqrt(g) * s
    shelf = biquad(
        (g * (g + 1 + (g - 1) * c + r), -2 * g * (g - 1 + (g + 1) * c), g * (g + 1 + (g - 1) * c - r)),
        (g + 1 - (g - 1) * c + r, 2 * (g - 1 - (g + 1) * c), g + 1 - (g - 1) * c - r),
    )
    c, s = angle(120, math.sqrt(0.5))
    high_pass = biquad(((1 + c) / 2, -1 - c, (1 + c) / 2), (1 + s, -2 * c, 1 - s))
    g = 10 ** (2.5 / 40)
    c, s = angle(500, 1.5 * math.sqrt(0.5))
    peak = biquad((1 + s * g, -2 * c, 1 - s * g), (1 + s / g, -2 * c, 1 - s / g))
    t = math.tan(math.pi * 10_000 / DESIGN_RATE)
    low_pass = biquad((t, t), (1 + t, t - 1))
    product: NDArray[np.float64] = shelf * high_pass * peak * low_pass**2
    return product


def _weighted(
    signal: Samples, less: Samples | None, taps: NDArray[np.float64]
) -> Iterator[NDArray[np.float64]]:
    """Filter ``signal - less`` block by block, ``(samples, channels)``, aligned with the signal."""
    step = EAR_FFT - len(taps) + 1
    before = len(taps) - 1 - (len(taps) - 1) // 2  # samples before a block that it needs
    response = torch.fft.rfft(torch.from_numpy(taps), n=EAR_FFT)[:, None]
    for begin in range(0, len(signal), step):
        low, high = max(0, begin - before), min(len(signal), begin - before + EAR_FFT)
        part = signal[low:high].astype(np.float64)
        if less is not None:
            part -= less[low:high]
        part = np.pad(part, ((low - (begin - before), 0), (0, 0)))
        spectrum = torch.fft.rfft(torch.from_numpy(part), n=EAR_FFT, dim=0) * response
        end = min(begin + step, len(signal))
        yield torch.fft.irfft(spectrum, n=EAR_FFT, dim=0).numpy()[len(taps) - 1 :][: end - begin]
