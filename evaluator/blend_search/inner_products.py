"""The inner products of signals with each other and with the true stem, and the SDR that they foretell.

For a blend ``Σ wᵢ sᵢ`` of signals and a true stem ``t`` the error's energy is
``‖t‖² − 2 w·⟨s, t⟩ + w·⟨s, s⟩·w``: inner products over all samples and channels of a song tell the
global SDR of any blend of it.

What is scored is a 16-bit file. libsndfile, which writes it, rounds down: the file lies half a step below
the blend, and deviates from there by what rounding leaves. So it is the true stem half a step up that the
blend has to meet. In all but very quiet stems that is far less than a hundredth of a dB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluator.metrics import DELTA
from kmdx.signals import blocks

Weights = NDArray[np.float64]
"""Of a blend, ``(signals,)``."""

STEP = 1 / 32768  # of a 16-bit file
ROUNDING = STEP**2 / 12  # mean energy of a sample's deviation from half a step below
SILENCE = 4 * STEP**2
"""Mean energy of a true stem's samples up to which it counts as silent: two steps of 16 bits, -84 dBFS.

Dither and what is left of a fade are below it. Any estimate of such a stem is all error, however small."""


@dataclass(frozen=True)
class InnerProducts:
    """What is kept of a stem's signals in some songs; float64.

    Attributes
    ----------
    energy : ndarray
        ``(songs,)``, of the true stem.
    constant : ndarray
        ``(songs,)``, of the error of weights that are all 0: of the true stem half a step up, and of
        rounding.
    cross : ndarray
        ``(songs, signals)``, of each signal with the true stem half a step up.
    gram : ndarray
        ``(songs, signals, signals)``, of signals with each other.
    """

    energy: NDArray[np.float64]
    constant: NDArray[np.float64]
    cross: NDArray[np.float64]
    gram: NDArray[np.float64]

    def with_blend(self, weights: Weights) -> NDArray[np.float64]:
        """Inner products of each signal with a blend: ``(songs, signals)``."""
        # As one product of a matrix and a vector, many times faster than one for each song.
        return (self.gram.reshape(-1, len(weights)) @ weights).reshape(self.cross.shape)

    def errors(self, weights: Weights) -> NDArray[np.float64]:
        """Energy of a blend's error in each song, plus the metric's constant: ``(songs,)``."""
        exact = self.constant - 2 * self.cross @ weights + self.with_blend(weights) @ weights
        return np.maximum(exact, 0) + DELTA

    def sdr(self, weights: Weights) -> NDArray[np.float64]:
        """Global SDR in dB of a blend in each song, ``(songs,)``, but for clipping at full scale."""
        return 10 * np.log10((self.energy + DELTA) / self.errors(weights))

    def of_songs(self, songs: NDArray[np.bool_] | NDArray[np.intp]) -> InnerProducts:
        """The same of some of the songs."""
        return InnerProducts(self.energy[songs], self.constant[songs], self.cross[songs], self.gram[songs])

    def of_signals(self, signals: NDArray[np.intp]) -> InnerProducts:
        """The same of some of the signals."""
        gram = self.gram[:, signals][:, :, signals]
        return InnerProducts(self.energy, self.constant, self.cross[:, signals], gram)


def is_silent(energy: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """In which songs a true stem is silent.

    Parameters
    ----------
    energy : ndarray
        ``(songs,)``, of the true stem.
    values : ndarray
        ``(songs,)``: samples times channels.
    """
    return energy <= SILENCE * values


def measure(truth: NDArray[np.float32], signals: Sequence[NDArray[np.float32]]) -> InnerProducts:
    """Inner products of one song's true stem and signals.

    Parameters
    ----------
    truth : ndarray
        ``(samples, channels)``.
    signals : sequence of ndarray
        Of the same shape. All are read in blocks, which alone are float64.
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
