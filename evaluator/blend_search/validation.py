"""How well found weights do on songs that they were not found on.

Songs are dealt out into folds; those of a fold are scored with weights found on all others. The strength
of the prior, where it is to be chosen, is chosen in the same way among the others alone (nested
cross-validation), so that the score of a held-out song knows nothing of that song.

References
----------
Stone 1974, "Cross-validatory choice and assessment of statistical predictions".
Varma and Simon 2006, "Bias in error estimation when using cross-validation for model selection".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evaluator.blend_search.gram import InnerProducts, Weights
from evaluator.blend_search.solving import Constraints, best
from kmdx.errors import KmdxError

PRIORS = (math.inf, 100.0, 10.0, 1.0, 0.1, 0.01, 0.0)
"""Strengths to choose from, in dB for a distance of 1: from the published weights to free ones."""

UNCHOSEN = 1.0
"""The strength where there is one song alone, among which none can be chosen."""

INNER = 5  # folds at most that a prior is chosen with inside a fold


@dataclass(frozen=True)
class Problem:
    """A stem whose weights are sought.

    Attributes
    ----------
    products : InnerProducts
        Of the songs that count for it.
    published : ndarray
        ``(signals,)``.
    songs : ndarray
        ``(songs,)``: number of each of these songs among all that were collected.
    """

    products: InnerProducts
    published: Weights
    songs: NDArray[np.intp]

    def of(self, chosen: NDArray[np.bool_]) -> Problem:
        """The same with some of its songs."""
        return replace(self, products=self.products.of_songs(chosen), songs=self.songs[chosen])

    def folds(self, number: int) -> NDArray[np.intp]:
        """The fold of each song: dealt out in turn, the same for all stems."""
        return self.songs % number

    def can_validate(self, number: int) -> bool:
        """Whether its songs lie in two folds at least."""
        return len(np.unique(self.folds(number))) > 1


@dataclass(frozen=True)
class Validation:
    """What cross-validation came to.

    Attributes
    ----------
    prior : float
        The strength given, or chosen on all songs.
    sdr : tuple of ndarray
        For each problem, dB of each of its songs while it was held out: ``(songs,)``.
    """

    prior: float
    sdr: tuple[NDArray[np.float64], ...]


def check_folds(number: int | None, songs: int) -> int:
    """Folds for so many songs: by default each song is one.

    Raises
    ------
    KmdxError
        If there cannot be so many.
    """
    if number is None:
        return max(songs, 2)
    if not 2 <= number <= max(songs, 2):
        raise KmdxError(f"--folds {number}: expected 2 to {max(songs, 2)}, the number of songs")
    return number


def validate(
    problems: Sequence[Problem], folds: int, constraints: Constraints, prior: float | None
) -> Validation:
    """Cross-validate the weights of stems that share one strength of the prior.

    Parameters
    ----------
    problems : sequence of Problem
        Each with songs in two folds at least.
    folds : int
    constraints : Constraints
    prior : float or None
        ``None`` to choose it.
    """
    if prior is not None:
        return Validation(
            prior, tuple(held_out(problem, folds, constraints, [prior])[0] for problem in problems)
        )
    sdr = [np.empty(len(problem.songs)) for problem in problems]
    for fold in np.unique(np.concatenate([problem.folds(folds) for problem in problems])):
        outside = [problem.of(problem.folds(folds) != fold) for problem in problems]
        strength = choose(_dealt_anew(outside), INNER, constraints)
        for problem, others, values in zip(problems, outside, sdr, strict=True):
            weights = path(others, constraints, [strength])[0]
            inside = problem.folds(folds) == fold
            values[inside] = problem.products.of_songs(inside).sdr(weights)
    return Validation(choose(problems, folds, constraints), tuple(sdr))


def choose(problems: Sequence[Problem], folds: int, constraints: Constraints) -> float:
    """The prior with the best cross-validated score, a mean over stems; of equal ones the greatest."""
    able = [problem for problem in problems if problem.can_validate(folds)]
    if not able:
        return UNCHOSEN
    scores = np.mean([held_out(each, folds, constraints, PRIORS).mean(axis=1) for each in able], axis=0)
    return PRIORS[int(np.argmax(scores))]


def held_out(
    problem: Problem, folds: int, constraints: Constraints, priors: Sequence[float]
) -> NDArray[np.float64]:
    """SDR in dB of each song with the weights found on other folds: ``(priors, songs)``."""
    sdr = np.empty((len(priors), len(problem.songs)))
    fold_of = problem.folds(folds)
    for fold in np.unique(fold_of):
        inside = fold_of == fold
        held = problem.products.of_songs(inside)
        for row, weights in zip(sdr, path(problem.of(~inside), constraints, priors), strict=True):
            row[inside] = held.sdr(weights)
    return sdr


def path(problem: Problem, constraints: Constraints, priors: Sequence[float]) -> list[Weights]:
    """The weights for each strength of the prior, greatest first: each climb begins where the last ended."""
    found: list[Weights] = []
    start = problem.published
    for prior in priors:
        start = best(problem.products, problem.published, constraints, prior, [start])
        found.append(start)
    return found


def _dealt_anew(problems: Sequence[Problem]) -> list[Problem]:
    """The same problems with their songs numbered without gaps, so that folds are even."""
    numbers = np.unique(np.concatenate([problem.songs for problem in problems]))
    return [replace(problem, songs=np.searchsorted(numbers, problem.songs)) for problem in problems]
