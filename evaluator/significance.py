"""Tests of paired differences: how likely are differences as large as these by chance alone?

Both tests are two-sided and share one idea: if two systems are equally good, each song's difference is
equally likely to have the opposite sign.

References
----------
Wilcoxon 1945, "Individual comparisons by ranking methods".
Pratt and Gibbons 1981, "Concepts of Nonparametric Theory", ch. 3 and 4: both tests for given values.
Holm 1979, "A simple sequentially rejective multiple test procedure".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Significance level: the probability of finding a difference between equally good systems."""

EXACT_RANKS = 100  # up to this many differences the signed-rank distribution is exact
EXACT_SIGNS = 14  # up to this many differences every combination of signs is tried
BLOCK = 10_000  # combinations of signs at a time


def min_songs(pairs: int = 1) -> int:
    """The fewest songs with which a pair can differ significantly, if Holm's method corrects for ``pairs``.

    The smallest p value of either test is that of differences of the same sign, ``2 ** (1 - songs)``. For one
    pair, five songs are too few, because 2/32 is more than 5 %.
    """
    return 2 + math.floor(math.log2(pairs / LEVEL))


def signed_rank(differences: NDArray[np.float64]) -> float | None:
    """The p value of Wilcoxon's signed-rank test; None if all differences are 0.

    Differences of 0 are left out, and ties share the mean of their ranks. For up to 100 differences the
    distribution is exact, even with ties. For more it is a normal distribution with corrections for
    continuity and ties.

    Parameters
    ----------
    differences : ndarray
        ``(songs,)``, finite.
    """
    kept = differences[differences != 0]
    if not len(kept):
        return None
    ranks = _ranks(np.abs(kept))
    positive = float(ranks[kept > 0].sum())
    smaller = min(positive, float(ranks.sum()) - positive)
    if len(kept) <= EXACT_RANKS:
        below = _distribution(np.rint(2 * ranks).astype(int))[: round(2 * smaller) + 1].sum()
        return min(1.0, 2 * float(below))
    mean = float(ranks.sum()) / 2
    spread = math.sqrt(float(np.square(ranks).sum()) / 4)
    return min(1.0, math.erfc(max(mean - smaller - 0.5, 0.0) / spread / math.sqrt(2)))


def sign_flip(differences: NDArray[np.float64], samples: int = 10_000, seed: int = 0) -> float | None:
    """The p value of the mean difference in a sign-flip test; None if all differences are 0.

    Parameters
    ----------
    differences : ndarray
        ``(songs,)``, finite. For up to 14 differences every combination of signs is tried.
    samples : int
        Number of random combinations for more differences.
    seed : int
        Seed of the random numbers.
    """
    kept = differences[differences != 0]
    if not len(kept):
        return None
    found = abs(float(kept.sum())) * (1 - 1e-12)  # allows for rounding errors of the sums
    if len(kept) <= EXACT_SIGNS:
        codes = np.arange(2 ** len(kept))[:, None] >> np.arange(len(kept)) & 1
        return float(np.mean(np.abs((2.0 * codes - 1) @ kept) >= found))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, samples, BLOCK):
        signs = rng.integers(2, size=(min(BLOCK, samples - start), len(kept)), dtype=np.int8)
        extreme += int(np.sum(np.abs((2.0 * signs - 1) @ kept) >= found))
    return (extreme + 1) / (samples + 1)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """P values of several comparisons, corrected by Holm's method; None stays None and does not count."""
    order = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for done, (value, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * value))
        corrected[place] = largest
    return corrected


def _ranks(sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal sizes share the mean of their ranks."""
    _, place, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: NDArray[np.float64] = last - (counts - 1) / 2
    return means[place]


def _distribution(ranks: NDArray[np.int_]) -> NDArray[np.float64]:
    """The probability of each sum of the ranks of positive differences."""
    chances = np.zeros(int(ranks.sum()) + 1)
    chances[0] = 1.0
    for rank in ranks:
        moved = np.zeros_like(chances)
        moved[rank:] = chances[: len(chances) - rank]
        chances = (chances + moved) / 2
    return chances
