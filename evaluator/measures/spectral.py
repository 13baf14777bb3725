"""Differences of spectra, as Music-Source-Separation-Training (MSST) defines them.

All are percentages: 100 is a perfect estimate. Their settings are MSST's. Signals are ``(samples, channels)``
float32 at full scale ±1. Silence in either signal gives a finite value. Each function needs less than
300 MB in addition to the arrays, independent of the song's length.

References
----------
MSST, https://github.com/ZFTurbo/Music-Source-Separation-Training, ``utils/metrics.py``, MIT.
Steinmetz and Reiss 2020, "auraloss: Audio-focused loss functions in PyTorch".
Arık, Jun and Diamos 2018, arXiv 1808.06719, for the spectral convergence.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from evaluator.measures.blocks import (
    Samples,
    Source,
    Transform,
    check_pair,
    filtered,
    magnitudes,
    mel_bank,
    plain,
)

L1_FREQ = Transform(2048, 1024, window=False)
AURA_STFT = Transform(1024, 256)
AURA_MRSTFT = (Transform(1024, 256), Transform(2048, 512), Transform(4096, 1024))
AURA_BANDS = 128  # mel
MIN_POWER = 1e-8  # of a bin, as in auraloss
BLEED = Transform(4096, 1024, reflect=False)
BLEED_BANDS = 512  # mel
BLEED_RANGE = 80.0  # dB below the loudest band, where a spectrum is cut off
MIN_MAGNITUDE = 1e-10  # of a mel band, before taking its logarithm


def l1_freq(reference: Samples, estimate: Samples) -> float:
    """L1 distance of magnitude spectra: ``100 / (1 + 10 * mean |X - Y|)``, in %.

    Frames of 2048 samples without a window, hop 1024. It depends on the level of the signals.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    check_pair(reference, estimate)
    total, count = 0.0, 0
    pairs = zip(*(magnitudes(plain(x), len(x), L1_FREQ) for x in (reference, estimate)), strict=True)
    for true, guess in pairs:
        total += float((guess - true).abs_().sum(dtype=torch.float64))
        count += true.numel()
    return 100 / (1 + 10 * total / count)


def aura_stft(reference: Samples, estimate: Samples) -> float:
    """Spectral convergence plus log-magnitude distance: ``100 / (1 + 10 * loss)``, in %.

        loss = |Y - X| / |Y| + mean |log X - log Y|

    with X and Y the magnitudes of the reference and the estimate, the first norm over the whole song, and
    frames of 1024 samples, hop 256. As in MSST, the norm in the denominator is the estimate's.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    check_pair(reference, estimate)
    loss = _aura_loss(plain(reference), plain(estimate), len(reference), AURA_STFT)
    return 100 / (1 + 10 * loss)


def aura_mrstft(reference: Samples, estimate: Samples, rate: int) -> float:
    """The distance of :func:`aura_stft` on A-weighted signals and 128 mel bands, in %.

    The loss is the mean of three, in frames of 1024, 2048 and 4096 samples with a hop of a quarter.

    Parameters
    ----------
    reference, estimate : ndarray
        ``(samples, channels)``.
    rate : int
        Hz.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    check_pair(reference, estimate)
    taps = a_weighting(rate)
    true, guess = filtered(reference, taps), filtered(estimate, taps)
    losses = [
        _aura_loss(true, guess, len(reference), transform, mel_bank(rate, transform.size, AURA_BANDS))
        for transform in AURA_MRSTFT
    ]
    return 100 / (1 + 10 * sum(losses) / len(losses))


def bleedless_and_fullness(reference: Samples, estimate: Samples, rate: int) -> dict[str, float]:
    """Compare mel spectra in dB, separately for bins where the estimate is louder and where it is quieter.

    Both are ``100 / (1 + mean difference)`` in %. For bleedless, the mean in dB is taken over the values
    where the estimate is louder; for fullness, over those where it is quieter. Without such values the result
    is 100. The spectra have 512 mel bands, from frames of 4096 samples with hop 1024, and are cut off 80 dB
    below their loudest value.

    Parameters
    ----------
    reference, estimate : ndarray
        ``(samples, channels)``.
    rate : int
        Hz.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    check_pair(reference, estimate)
    bank = mel_bank(rate, BLEED.size, BLEED_BANDS)
    signals = [plain(signal) for signal in (reference, estimate)]
    floors = [
        max(float(_decibels(block, bank).max()) for block in magnitudes(signal, len(reference), BLEED))
        - BLEED_RANGE
        for signal in signals
    ]
    sums, counts = [0.0, 0.0], [0, 0]
    for blocks in zip(*(magnitudes(signal, len(reference), BLEED) for signal in signals), strict=True):
        true, guess = (
            _decibels(block, bank).clamp_(min=floor) for block, floor in zip(blocks, floors, strict=True)
        )
        difference = guess.sub_(true)
        for side, part in enumerate((difference, -difference)):
            sums[side] += float(part.clamp(min=0).sum(dtype=torch.float64))
            counts[side] += int(torch.count_nonzero(part > 0))
    louder, quieter = (total / count if count else 0.0 for total, count in zip(sums, counts, strict=True))
    return {"bleedless": 100 / (1 + louder), "fullness": 100 / (1 + quieter)}


@lru_cache(maxsize=4)
def a_weighting(rate: int, taps: int = 101) -> torch.Tensor:
    """Fit a symmetric filter to the A-weighting curve, as auraloss does.

    The analog curve of IEC 61672 is converted by the bilinear transform. The filter is a least squares fit of
    its magnitude over 256 bands of equal width, with gaps of the same width between them. Within a band the
    curve is assumed to be linear.

    Parameters
    ----------
    rate : int
        Hz.
    taps : int
        Length of the filter, odd.

    Returns
    -------
    Tensor
        ``(taps,)`` float32.
    """
    edges = np.arange(512) / 1024  # band edges in cycles per sample
    angular = 2 * rate * np.tan(np.pi * edges)  # rad/s of the analog curve
    lowest, low, high, highest = 2 * np.pi * np.array([20.598997, 107.65265, 737.86223, 12194.217])
    curve = highest**2 * 10 ** (1.9997 / 20) * angular**4
    curve /= (angular**2 + lowest**2) * (angular**2 + highest**2)
    curve /= np.sqrt((angular**2 + low**2) * (angular**2 + high**2))

    nodes, weights = np.polynomial.legendre.leggauss(8)  # integrates over a band
    share = (nodes + 1) / 2
    start, stop = edges[::2, None], edges[1::2, None]
    points = (start + (stop - start) * share).ravel()
    wanted = (curve[::2, None] * (1 - share) + curve[1::2, None] * share).ravel()
    root = np.sqrt(np.tile(weights, len(start)))
    cosines = np.cos(2 * np.pi * np.outer(points, np.arange(taps // 2 + 1)))
    half = np.linalg.lstsq(cosines * root[:, None], wanted * root, rcond=None)[0]
    half[1:] /= 2
    return torch.from_numpy(np.concatenate([half[:0:-1], half]).astype(np.float32))


def _aura_loss(
    reference: Source, estimate: Source, samples: int, transform: Transform, bank: torch.Tensor | None = None
) -> float:
    """Spectral convergence plus mean difference of logarithms, over bins or mel bands."""
    apart, norm, logs, count = 0.0, 0.0, 0.0, 0
    pairs = zip(*(magnitudes(x, samples, transform) for x in (reference, estimate)), strict=True)
    for true, guess in pairs:
        true, guess = (x.clamp_(min=MIN_POWER**0.5) for x in (true, guess))
        if bank is not None:
            true, guess = bank @ true, bank @ guess
        apart += float((guess - true).square_().sum(dtype=torch.float64))
        norm += float(guess.square().sum(dtype=torch.float64))
        logs += float(true.log_().sub_(guess.log_()).abs_().sum(dtype=torch.float64))
        count += true.numel()
    return float(np.sqrt(apart / norm)) + logs / count


def _decibels(block: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return (bank @ block).clamp_(min=MIN_MAGNITUDE).log10_().mul_(20)
