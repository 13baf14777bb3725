"""ISR, SIR and SAR of BSSEval v4, as the package museval computes them.

An estimate is split into four parts by projecting it on the references, each delayed by 0 to 511 samples:

    estimate = true stem + spatial error + interference + artifacts

``true + spatial`` is the projection on the stem's own reference, ``true + spatial + interference`` the
projection on all references. The filters of both projections are fitted once to the whole song (v4). The
ratios are taken in frames of 1 s:

    ISR = |true|² / |spatial|²
    SIR = |true + spatial|² / |interference|²
    SAR = |true + spatial + interference|² / |artifacts|²

If the references are nearly linearly dependent, museval's filters grow without bound. At the edges of frames
they turn rounding errors into artifacts, so SAR is near 0 dB and SIR far below it, and both change with the
order of the stems: by up to 40 dB on a song of four stems decoded from ogg. Such references are stems whose
two channels are equal except for rounding, almost silent stems, and stems decoded from lossy files, which
have no high frequencies. Here a ridge limits the filters, so the values of such songs are meaningful but
differ from museval's. All other values are the same.

museval itself is not used: it needs more than 10 GB for a song of 10 minutes, and for exactly dependent
references it calls a function that numpy 2.4 no longer has.

References
----------
Vincent, Gribonval and Févotte 2006, "Performance measurement in blind audio source separation".
Stöter, Liutkus and Ito 2018, "The 2018 Signal Separation Evaluation Campaign", arXiv 1804.06267.
museval 0.4.1, https://github.com/sigsep/sigsep-mus-eval, MIT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Samples = NDArray[np.float32]

TAPS = 512  # length of a distortion filter
FRAME = 1.0  # seconds: length and hop of museval's frames
FFT = 1 << 14  # samples of one block of the correlations
BLOCKS = 8  # blocks at a time
TRUSTED_GAIN = 1e6  # energy gain of distortion filters up to which museval's values are reproducible
MAX_GAIN = 3e4  # energy gain of filters with a ridge
METRICS = ("museval_isr", "museval_sir", "museval_sar")


def bsseval(
    references: Mapping[str, Samples], estimates: Mapping[str, Samples], rate: int, taps: int = TAPS
) -> dict[str, dict[str, list[float]]]:
    """Compute ISR, SIR and SAR of every estimate in frames of 1 s, in dB.

    Parameters
    ----------
    references : mapping of str to ndarray
        Every stem of the song, ``(samples, channels)``, including stems without an estimate, which are
        possible interference. Memory maps are possible, because the arrays are read in blocks.
    estimates : mapping of str to ndarray
        The stems to score, with the same shape.
    rate : int
        Hz.
    taps : int
        Length of the distortion filters; museval's are 512.

    Returns
    -------
    dict
        ``{stem: {metric: one value per whole frame}}`` for :data:`METRICS`; a song's score is the median
        over frames. As in museval, all stems are NaN in a frame in which any signal is silent (its channels
        sum to zero). If a whole signal is silent, all frames are NaN; museval rejects such a song. SIR is
        NaN if the song has only one stem. A perfect estimate gives 200 dB or more, possibly infinity.

    Raises
    ------
    ValueError
        If an estimate has no reference, or if shapes differ.

    Notes
    -----
    In addition to the arrays, this needs about ``3 * 8 * (references * channels * taps)²`` bytes plus 0.25
    GB: 0.65 GB for four stereo stems, 1.9 GB for eight, independent of the song's length.
    """
    truths, guesses = list(references.values()), list(estimates.values())
    _check(references, estimates)
    samples, channels = truths[0].shape
    frame = min(int(FRAME * rate), samples)
    frames = samples // frame if frame else 0
    scores = {stem: {metric: [math.nan] * frames for metric in METRICS} for stem in estimates}
    spans = [slice(number * frame, (number + 1) * frame) for number in range(frames)]
    signals = truths + guesses
    audible = [
        (n, span) for n, span in enumerate(spans) if not any(_is_silent(signal[span]) for signal in signals)
    ]
    if not audible or not guesses:
        return scores

    size = _fast_size(frame + taps - 1)
    own = [list(references).index(stem) for stem in estimates]
    filters = _filters(_correlations(truths, guesses, taps), own, channels, size)
    for number, span in audible:
        true = _spectrum([signal[span] for signal in truths], size)
        guess = _spectrum([signal[span] for signal in guesses], size)
        for stem, ratios in zip(estimates, _frame_ratios(true, guess, filters, own, channels), strict=True):
            for metric, value in zip(METRICS, ratios, strict=True):
                if metric != "museval_sir" or len(truths) > 1:
                    scores[stem][metric][number] = value
    return scores


def _frame_ratios(
    true: torch.Tensor,
    guess: torch.Tensor,
    filters: tuple[torch.Tensor, list[torch.Tensor]],
    own: list[int],
    channels: int,
) -> Iterator[tuple[float, float, float]]:
    """Yield ISR, SIR and SAR in dB of each estimate in one frame.

    ``true`` is ``(bins, references * channels)``, ``guess`` is ``(bins, estimates * channels)``.
    """
    to_all, to_own = filters
    projected = _project(true, to_all)  # (bins, estimates * channels)
    for index, reference in enumerate(own):
        columns = slice(index * channels, (index + 1) * channels)
        source = true[:, reference * channels : (reference + 1) * channels]
        yield _ratios(source, _project(source, to_own[index]), projected[:, columns], guess[:, columns])


def _ratios(
    source: torch.Tensor, filtered: torch.Tensor, projected: torch.Tensor, estimate: torch.Tensor
) -> tuple[float, float, float]:
    """ISR, SIR and SAR in dB from spectra ``(bins, channels)`` of four signals: the true stem, the estimate's
    projections on this stem and on all stems, and the estimate.
    """
    return (
        _decibels(_energy(source), _energy(filtered - source)),
        _decibels(_energy(filtered), _energy(projected - filtered)),
        _decibels(_energy(projected), _energy(estimate - projected)),
    )


def _energy(spectrum: torch.Tensor) -> float:
    """Energy of a signal, times a constant, from its spectrum of even size (Parseval)."""
    powers = (spectrum.real.square() + spectrum.imag.square()).sum(dim=1)
    return float(2 * powers.sum() - powers[0] - powers[-1])  # the first and last bin have no mirror image


def _project(signals: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Filter ``(bins, inputs)`` by ``(bins, inputs, outputs)``: ``(bins, outputs)``."""
    return (signals[:, :, None] * filters).sum(dim=1)


def _check(references: Mapping[str, Samples], estimates: Mapping[str, Samples]) -> None:
    """Raise ValueError unless every estimate has a reference and all have one shape."""
    if unknown := [stem for stem in estimates if stem not in references]:
        raise ValueError(f"no references for the estimates of {unknown}; references: {list(references)}")
    shapes = {signal.shape for signal in [*references.values(), *estimates.values()]}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"expected arrays of one shape (samples, channels), found {sorted(shapes)}")


def _is_silent(frame: Samples) -> bool:
    """Whether a frame is silent for museval: its channels sum to zero throughout."""
    return not frame.sum(axis=1).any()


def _correlations(truths: list[Samples], guesses: list[Samples], taps: int) -> NDArray[np.float64]:
    """Correlate each channel of the references with each channel of all signals.

    Returns ``(taps, r, r + e)``: sum over n of ``x[n] * y[n + lag]``, with ``r`` and ``e`` the channels
    of all references and of all estimates. Blocks are correlated in the frequency domain.
    """
    fft = max(FFT, _fast_size(4 * taps))
    step = fft - taps + 1  # samples of a block
    samples = len(truths[0])
    rows = sum(signal.shape[1] for signal in truths)
    columns = rows + sum(signal.shape[1] for signal in guesses)
    total = torch.zeros(fft // 2 + 1, rows, columns, dtype=torch.complex128)
    for begin in range(0, samples, step * BLOCKS):
        starts = range(begin, min(begin + step * BLOCKS, samples), step)
        short = [_spectrum([signal[at : at + step] for signal in truths], fft) for at in starts]
        long = [_spectrum([signal[at : at + fft] for signal in truths + guesses], fft) for at in starts]
        total += torch.stack(short, 2).conj() @ torch.stack(long, 1)
    lags: NDArray[np.float64] = torch.fft.irfft(total, n=fft, dim=0)[:taps].numpy()
    return lags


def _filters(
    lags: NDArray[np.float64], own: list[int], channels: int, size: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Fit the distortion filters and take their spectra over ``size`` samples.

    Returns
    -------
    to_all : Tensor
        ``(bins, references * channels, estimates * channels)``: projects estimates on all references.
    to_own : list of Tensor
        ``(bins, channels, channels)`` per estimate: projects it on its own reference.
    """
    taps, rows, _ = lags.shape
    gram = np.empty((rows, taps, rows, taps))  # inner products of the delayed references
    delay = np.arange(taps)[:, None] - np.arange(taps) + taps - 1
    for i in range(rows):
        for j in range(rows):
            gram[i, :, j] = np.concatenate([lags[:0:-1, j, i], lags[:, i, j]])[delay]
    right = np.moveaxis(lags[:, :, rows:], 0, 1)  # (rows, taps, estimates * channels)

    def spectra(matrix: NDArray[np.float64], targets: NDArray[np.float64]) -> torch.Tensor:
        count, _, outputs = targets.shape
        solution = _solve(matrix.reshape(count * taps, -1), targets.reshape(count * taps, outputs))
        return torch.fft.rfft(solution.reshape(count, taps, outputs), n=size, dim=1).movedim(1, 0)

    to_own = []
    for index, stem in enumerate(own):
        rows_of = slice(stem * channels, (stem + 1) * channels)
        columns_of = slice(index * channels, (index + 1) * channels)
        to_own.append(spectra(gram[rows_of, :, rows_of], right[rows_of, :, columns_of]).contiguous())
    return spectra(gram, right).contiguous(), to_own


def _solve(gram: NDArray[np.float64], right: NDArray[np.float64]) -> torch.Tensor:
    """Solve ``gram @ x = right``, with a ridge if references are nearly linearly dependent.

    A solution is used unchanged if the energy of its filters is at most :data:`TRUSTED_GAIN` times that of
    the projection. Otherwise rounding errors dominate it. Then the smallest ridge (relative to each channel's
    energy) is added that reduces the gain to :data:`MAX_GAIN`.
    """
    matrix, targets = torch.from_numpy(gram), torch.from_numpy(np.ascontiguousarray(right))
    energies = matrix.diagonal().clone()
    energies.clamp_(min=float(energies.max()) * np.finfo(float).eps)  # for silent channels
    for ridge in (0.0, *(10.0**power for power in range(-15, -5))):
        loaded = matrix.clone()
        loaded.diagonal().add_(ridge * energies)
        factor, failed = torch.linalg.cholesky_ex(loaded)
        if failed:
            continue
        solution = torch.cholesky_solve(targets, factor)
        gains = (solution.square() * energies[:, None]).sum(dim=0)
        limit = MAX_GAIN if ridge else TRUSTED_GAIN
        if bool((gains <= limit * (solution * targets).sum(dim=0).abs()).all()):
            return solution
    raise ValueError("no distortion filters can be fitted: expected samples of full scale ±1, without NaN")


def _spectrum(signals: list[Samples], size: int) -> torch.Tensor:
    """Spectra of parts of signals, zero-padded to ``size``: ``(bins, all channels)``."""
    part = np.concatenate(signals, axis=1, dtype=np.float64)
    return torch.fft.rfft(torch.from_numpy(part), n=size, dim=0)


def _fast_size(least: int) -> int:
    """The smallest even product of powers of 2, 3 and 5 that is at least ``least``."""
    best = 1 << max(1, (least - 1).bit_length())
    for five in (1, 5, 25, 125):
        for three in (1, 3, 9, 27):
            odd = five * three
            best = min(best, odd << max(1, (-(-least // odd) - 1).bit_length()))
    return best


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
