"""Cross-validation: scores weights on songs that they were not found on.

Songs are divided into folds. The songs of a fold are scored with weights found on all other songs. If the
strength of the prior must be chosen, it is chosen by cross-validation among those other songs (nested
cross-validation), so a held-out song has no influence on its own score. The weights within a fold and the
final weights are found in the same way: with the same choice of the prior and the same optimization.

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
"""Strengths to choose from, in dB at a distance of 1: from the published weights to free weights."""

UNCHOSEN = 1.0
"""The strength to use if a fold leaves too few songs to choose one."""

CHOOSING = 5  # folds for choosing a prior


@dataclass(frozen=True)
class BlendProblem:
    """A stem whose weights are optimized."""

    products: InnerProducts  # of the songs that count for the stem
    published: Weights  # ``(signals,)``
    songs: NDArray[np.intp]  # ``(songs,)``: index of each of these songs among all collected songs

    def of(self, chosen: NDArray[np.bool_]) -> BlendProblem:
        """The problem with some of its songs."""
        return replace(self, products=self.products.of_songs(chosen), songs=self.songs[chosen])

    def weights(self, constraints: Constraints, prior: float) -> Weights:
        """The best weights. Final weights and those for held-out songs are both found with this method."""
        return best(self.products, self.published, constraints, prior)


@dataclass(frozen=True)
class Validation:
    """Result of a cross-validation."""

    prior: float  # the given strength, or the one chosen on all songs
    unchosen: bool  # whether there were too few songs to choose the strength
    sdr: tuple[NDArray[np.float64] | None, ...]
    """For each problem the SDR in dB of each song while it was held out, ``(songs,)``.

    ``None`` if all songs of the problem are in one fold.
    """


def check_folds(number: int | None, songs: int) -> int:
    """The number of folds: by default one per song.

    Raises :class:`KmdxError` if the number is not from 2 to the number of songs.
    """
    if number is None:
        return max(songs, 2)
    if not 2 <= number <= max(songs, 2):
        raise KmdxError(f"--folds {number}: expected 2 to {max(songs, 2)}, the number of songs")
    return number


def deal(problems: Sequence[BlendProblem], folds: int) -> list[NDArray[np.intp]]:
    """Assign songs to folds; return the fold of each problem's songs, ``(songs,)``.

    A song is in the same fold for all problems. Each song goes to the fold with the fewest songs of its
    problems, and songs of the smallest problem come first. Each problem therefore has songs in as many folds
    as possible.
    """
    numbers = np.unique(np.concatenate([problem.songs for problem in problems]))
    counting = np.array([np.isin(numbers, problem.songs) for problem in problems])  # (problems, songs)
    counting = counting[np.argsort(counting.sum(1), kind="stable")]
    held = np.zeros((len(problems), folds), np.intp)
    dealt = np.empty(len(numbers), np.intp)
    for song in np.lexsort([numbers, *~counting[::-1]]):
        of = counting[:, song]
        # The problem with the fewest songs decides, then the others break ties, then the size of the fold.
        fold = np.lexsort([held.sum(0), *held[of][::-1]])[0]
        dealt[song] = fold
        held[of, fold] += 1
    return [dealt[np.searchsorted(numbers, problem.songs)] for problem in problems]


def validate(
    problems: Sequence[BlendProblem], folds: int, constraints: Constraints, prior: float | None
) -> Validation:
    """Cross-validate the weights of stems that share a prior.

    The prior ``None`` is chosen by nested cross-validation.
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
    """Whether the songs are in at least two folds."""
    return len(np.unique(fold_of)) > 1


def can_choose(problems: Sequence[BlendProblem], folds: int) -> bool:
    """Whether there are enough songs outside each fold to choose a prior."""
    dealt = deal(problems, folds)
    for fold in np.unique(np.concatenate(dealt)):
        outside = [problem.of(of != fold) for problem, of in zip(problems, dealt, strict=True)]
        if not any(map(can_validate, deal(outside, CHOOSING))):
            return False
    return True


def choose(problems: Sequence[BlendProblem], constraints: Constraints) -> float:
    """The prior with the best cross-validated score, mean over stems; the strongest if several are equal.

    At least one problem must have two songs.
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
    """SDR in dB of each song with weights found on the other folds: ``(priors, songs)``.

    ``fold_of`` is the fold of each song, from :func:`deal`.
    """
    sdr = np.empty((len(priors), len(problem.songs)))
    for fold in np.unique(fold_of):
        inside = fold_of == fold
        held, others = problem.products.of_songs(inside), problem.of(~inside)
        for row, prior in zip(sdr, priors, strict=True):
            row[inside] = held.sdr(others.weights(constraints, prior))
    return sdr
