"""The inner products of signals with each other and with the true stem, and the SDR that they predict.

For a blend ``Σ wᵢ sᵢ`` of signals and a true stem ``t`` the energy of the error is
``‖t‖² − 2 w·⟨s, t⟩ + w·⟨s, s⟩·w``. Inner products over all samples and channels of a song therefore
determine the global SDR of any blend of it.

The evaluator scores a 16-bit file, and libsndfile rounds down when it writes one. On average the file is half
a step below the blend, plus a rounding error. The blend is therefore compared with the true stem raised by
half a step. Except in very quiet stems, the effect is far less than a hundredth of a dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics import DELTA
from kmdx.signals import blocks

Weights = NDArray[np.float64]
"""Weights of a blend, ``(signals,)``."""

STEP = 1 / 32768  # of a 16-bit file
ROUNDING = STEP**2 / 12  # mean energy of a sample's rounding error
SILENCE = 4 * STEP**2
"""A true stem with at most this mean energy per sample counts as silent: two 16-bit steps, -84 dBFS.

Dither and the end of a fade are below it. Any estimate of such a stem is all error, however small."""


@dataclass(frozen=True)
class InnerProducts:
    """Inner products of a stem's signals in several songs, in float64."""

    energy: NDArray[np.float64]  # ``(songs,)``: of the true stem
    constant: NDArray[np.float64]
    """``(songs,)``: energy of the error if all weights are 0: the raised true stem and the rounding error."""
    cross: NDArray[np.float64]  # ``(songs, signals)``: of each signal with the raised true stem
    gram: NDArray[np.float64]  # ``(songs, signals, signals)``: of the signals with each other

    def with_blend(self, weights: Weights) -> NDArray[np.float64]:
        """Inner products of each signal with a blend: ``(songs, signals)``."""
        # One matrix-vector product for all songs is many times faster than one for each song.
        return (self.gram.reshape(-1, len(weights)) @ weights).reshape(self.cross.shape)

    def errors(self, weights: Weights) -> NDArray[np.float64]:
        """Energy of a blend's error in each song, plus the metric's constant: ``(songs,)``."""
        exact = self.constant - 2 * self.cross @ weights + self.with_blend(weights) @ weights
        return np.maximum(exact, 0) + DELTA

    def sdr(self, weights: Weights) -> NDArray[np.float64]:
        """Global SDR in dB of a blend in each song, ``(songs,)``, without clipping at full scale."""
        return 10 * np.log10((self.energy + DELTA) / self.errors(weights))

    def of_songs(self, songs: NDArray[np.bool_] | NDArray[np.intp]) -> InnerProducts:
        """The inner products of some of the songs."""
        return InnerProducts(self.energy[songs], self.constant[songs], self.cross[songs], self.gram[songs])

    def of_signals(self, signals: NDArray[np.intp]) -> InnerProducts:
        """The inner products of some of the signals."""
        gram = self.gram[:, signals][:, :, signals]
        return InnerProducts(self.energy, self.constant, self.cross[:, signals], gram)


def is_silent(energy: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each true stem is silent, given its energy and its number of values (samples × channels)."""
    return energy <= SILENCE * values


def measure(truth: NDArray[np.float32], signals: Sequence[NDArray[np.float32]]) -> InnerProducts:
    """Measure the inner products of one song's true stem and signals.

    Parameters
    ----------
    truth : ndarray
        ``(samples, channels)``.
    signals : sequence of ndarray
        Arrays of the same shape. Only one block at a time is converted to float64.
    """
    energy = 0.0
    products = np.zeros((1 + len(signals),) * 2)
    for parts in zip(*map(blocks, (truth, *signals)), strict=True):
        rows = np.stack([part.ravel() for part in parts], dtype=np.float64, casting="safe")
        energy += rows[0] @ rows[0]
        rows[0] += STEP / 2
        products += rows @ rows.T
    return InnerProducts(
        energy=np.array([energy]),
        constant=products[:1, 0] + truth.size * ROUNDING,
        cross=products[:1, 1:],
        gram=products[None, 1:, 1:],
    )
