"""How well found weights do on songs that they were not found on.

Songs are dealt out into folds; those of a fold are scored with weights found on all others. The strength
of the prior, where it is to be chosen, is chosen in the same way among the others alone (nested
cross-validation), so that the score of a held-out song knows nothing of that song. What is done with the
others is what is done with all songs in the end: the same choice of the prior, the same climbs.

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

from evaluator.blend_search.inner_products import InnerProducts, Weights
from evaluator.blend_search.solving import Constraints, best
from kmdx.errors import KmdxError

PRIORS = (math.inf, 100.0, 10.0, 1.0, 0.1, 0.01, 0.0)
"""Strengths to choose from, in dB for a distance of 1: from the published weights to free ones."""

UNCHOSEN = 1.0
"""The strength where a fold would leave too few songs to choose one among them."""

CHOOSING = 5  # folds at most that a prior is chosen with, among the songs outside a fold as among all


@dataclass(frozen=True)
class BlendProblem:
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

    def of(self, chosen: NDArray[np.bool_]) -> BlendProblem:
        """The same with some of its songs."""
        return replace(self, products=self.products.of_songs(chosen), songs=self.songs[chosen])

    def weights(self, constraints: Constraints, prior: float) -> Weights:
        """The best weights: the one way in which they are found, for plans and for held-out songs."""
        return best(self.products, self.published, constraints, prior)


@dataclass(frozen=True)
class Validation:
    """What cross-validation came to.

    Attributes
    ----------
    prior : float
        The strength given, or chosen on all songs.
    unchosen : bool
        Whether the strength was to be chosen, but there are too few songs.
    sdr : tuple of ndarray or None
        For each problem, dB of each of its songs while it was held out: ``(songs,)``; ``None`` where all
        its songs lie in one fold.
    """

    prior: float
    unchosen: bool
    sdr: tuple[NDArray[np.float64] | None, ...]


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


def deal(problems: Sequence[BlendProblem], folds: int) -> list[NDArray[np.intp]]:
    """The fold of each song of each problem, ``(songs,)``; a song is in the same one for all.

    The songs of the problem that has the fewest come first; each goes where the fewest songs of its
    problems are, so that each problem has songs in as many folds as can be.
    """
    numbers = np.unique(np.concatenate([problem.songs for problem in problems]))
    counting = np.array([np.isin(numbers, problem.songs) for problem in problems])  # (problems, songs)
    counting = counting[np.argsort(counting.sum(1), kind="stable")]
    held = np.zeros((len(problems), folds), np.intp)
    dealt = np.empty(len(numbers), np.intp)
    for song in np.lexsort([numbers, *~counting[::-1]]):
        of = counting[:, song]
        # The rarest problem decides, the next ones where it leaves a choice, then how full a fold is.
        fold = np.lexsort([held.sum(0), *held[of][::-1]])[0]
        dealt[song] = fold
        held[of, fold] += 1
    return [dealt[np.searchsorted(numbers, problem.songs)] for problem in problems]


def validate(
    problems: Sequence[BlendProblem], folds: int, constraints: Constraints, prior: float | None
) -> Validation:
    """Cross-validate the weights of stems that share one strength of the prior.

    Parameters
    ----------
    problems : sequence of BlendProblem
    folds : int
    constraints : Constraints
    prior : float or None
        ``None`` to choose it.
    """
    dealt = deal(problems, folds)
    unchosen = prior is None and not can_choose(problems, folds)
    given = UNCHOSEN if unchosen else prior
    sdr = [
        np.empty(len(problem.songs)) if can_validate(of) else None
        for problem, of in zip(problems, dealt, strict=True)
    ]
    for fold in np.unique(np.concatenate(dealt)):
        outside = [problem.of(of != fold) for problem, of in zip(problems, dealt, strict=True)]
        strength = choose(outside, constraints) if given is None else given
        for problem, of, others, values in zip(problems, dealt, outside, sdr, strict=True):
            inside = of == fold
            if values is not None and inside.any():
                held = problem.products.of_songs(inside)
                values[inside] = held.sdr(others.weights(constraints, strength))
    return Validation(choose(problems, constraints) if given is None else given, unchosen, tuple(sdr))


def can_validate(fold_of: NDArray[np.intp]) -> bool:
    """Whether songs lie in two folds at least."""
    return len(np.unique(fold_of)) > 1


def can_choose(problems: Sequence[BlendProblem], folds: int) -> bool:
    """Whether there are songs enough outside each of so many folds to choose a prior by them."""
    dealt = deal(problems, folds)
    for fold in np.unique(np.concatenate(dealt)):
        outside = [problem.of(of != fold) for problem, of in zip(problems, dealt, strict=True)]
        if not any(map(can_validate, deal(outside, CHOOSING))):
            return False
    return True


def choose(problems: Sequence[BlendProblem], constraints: Constraints) -> float:
    """The prior with the best cross-validated score, a mean over stems; of equal ones the greatest.

    Parameters
    ----------
    problems : sequence of BlendProblem
        One at least with two songs.
    constraints : Constraints
    """
    scores = [
        held_out(problem, of, constraints, PRIORS).mean(axis=1)
        for problem, of in zip(problems, deal(problems, CHOOSING), strict=True)
        if can_validate(of)
    ]
    return PRIORS[int(np.argmax(np.mean(scores, axis=0)))]


def held_out(
    problem: BlendProblem, fold_of: NDArray[np.intp], constraints: Constraints, priors: Sequence[float]
) -> NDArray[np.float64]:
    """SDR in dB of each song with the weights found on other folds: ``(priors, songs)``.

    Parameters
    ----------
    problem : BlendProblem
    fold_of : ndarray
        ``(songs,)``, as :func:`deal` gives it.
    constraints : Constraints
    priors : sequence of float
    """
    sdr = np.empty((len(priors), len(problem.songs)))
    for fold in np.unique(fold_of):
        inside = fold_of == fold
        held, others = problem.products.of_songs(inside), problem.of(~inside)
        for row, prior in zip(sdr, priors, strict=True):
            row[inside] = held.sdr(others.weights(constraints, prior))
    return sdr
