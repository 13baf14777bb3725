"""Finds the weights with the best score: the mean over songs of global SDR in dB, not of squared errors.

The score is minus a sum of logarithms of quadratic forms. It is smooth but not concave, so Newton's method
starts from several points. If the Hessian is not definite, it is replaced by the Hessian of a reweighted
least squares problem that bounds the score from below (majorize-minimize: every such step improves the
score). Constraints are linear, so each step is a small quadratic program, which the active-set method solves
exactly.

References
----------
Nocedal and Wright 2006, "Numerical Optimization", 2nd ed.: algorithm 16.3 (active sets), ch. 3 (descent).
Hunter and Lange 2004, "A Tutorial on MM Algorithms".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluator.blend_search.inner_products import InnerProducts, Weights
from evaluator.metrics import DELTA

DECIBELS = 10 / math.log(10)  # of a natural logarithm of energies

MAX_STEPS = 300
CONVERGED = 1e-13  # share of the objective: the search ends when a step predicts a smaller gain
ROUNDING = 1e-13  # share of the objective that rounding errors may hide
SUFFICIENT = 1e-4  # share of the predicted gain that a step must bring
SHORTEST = 2.0**-40  # smallest part of a step

RELEASE = 1e-10  # share of the gradient that must pull a weight away from 0

COLLINEAR = 1e-11  # ratio of curvatures below which a direction counts as flat
RIDGE = 1e-9  # pull toward the published weights along flat directions, relative to the largest curvature
FAINTEST = 1e-12  # dB for a weight of 1: if the largest curvature is below this, all signals are silent

MERGED = 1e-3  # dB: a search that comes this close to a known maximum is abandoned


@dataclass(frozen=True)
class Constraints:
    """Constraints on the weights of a stem."""

    sum_to_one: bool = False
    non_negative: bool = False

    def nearby(self, weights: Weights) -> Weights:
        """Weights that satisfy the constraints, close to the given ones."""
        count = len(weights)
        if self.non_negative:
            weights = np.maximum(weights, 0)
        if not self.sum_to_one:
            return weights
        if not self.non_negative:
            return weights + (1 - weights.sum()) / count
        total = weights.sum()
        return weights / total if total else np.full(count, 1 / count)


class Derivatives(NamedTuple):
    """Derivatives of an objective at one point."""

    gradient: Weights  # ``(signals,)``
    hessian: NDArray[np.float64]  # ``(signals, signals)``
    bound: NDArray[np.float64]
    """``(signals, signals)``: positive semidefinite Hessian of a quadratic upper bound.

    The bound equals the objective at this point and is nowhere below it.
    """


class Objective:
    """The function to minimize: error in dB, mean over songs, plus ``prior · ‖weights − published‖²``.

    Parameters
    ----------
    products : InnerProducts
    published : ndarray
        ``(signals,)``: the weights to stay close to.
    prior : float
        Cost in dB of a distance of 1 from the published weights.
    """

    def __init__(self, products: InnerProducts, published: Weights, prior: float = 0.0) -> None:
        self.products = products
        self.published = published
        self.prior = prior
        songs, signals = products.cross.shape
        self._scale = DECIBELS / songs
        self._flat = products.gram.reshape(songs, signals**2)

    def __call__(self, weights: Weights) -> float:
        """Value in dB."""
        distance = np.square(weights - self.published).sum()
        return float(self._scale * np.log(self.products.errors(weights)).sum() + self.prior * distance)

    def derivatives(self, weights: Weights) -> Derivatives:
        """Exact first and second derivatives."""
        count = len(weights)
        share = 1 / self.products.errors(weights)  # (songs,)
        slopes = (
            2 * (self.products.with_blend(weights) - self.products.cross) * share[:, None]
        )  # (songs, signals)
        pull = 2 * self.prior * np.eye(count)
        bound = 2 * self._scale * (share @ self._flat).reshape(count, count) + pull
        return Derivatives(
            gradient=self._scale * slopes.sum(axis=0) + pull @ (weights - self.published),
            hessian=bound - self._scale * slopes.T @ slopes,
            bound=bound,
        )


def best(
    products: InnerProducts,
    published: Weights,
    constraints: Constraints = Constraints(),
    prior: float = 0.0,
    starts: Iterable[Weights] | None = None,
) -> Weights:
    """The weights with the best score, ``(signals,)``.

    Parameters
    ----------
    products : InnerProducts
        Inner products of at least one song.
    published : ndarray
        ``(signals,)``: the weights to stay close to. If signals are collinear and several weights have the
        same score, the result is the one closest to the published weights.
    constraints : Constraints
    prior : float
        Strength of the pull toward the published weights, in dB at a distance of 1. If infinite, the result
        is the published weights, changed only to satisfy the constraints.
    starts : iterable of ndarray, optional
        Starting points; by default the published weights, the least squares solution, equal weights, and
        each signal alone.
    """
    if math.isinf(prior):
        return constraints.nearby(published)
    pull = prior + (flat_ridge(products, published) or 0.0)
    objective = Objective(products, published, pull)
    chosen = _starts(products, published) if starts is None else starts
    found: list[Weights] = []
    for start in chosen:
        weights = _improve(objective, constraints.nearby(start), constraints, found)
        if weights is not None:
            found.append(weights)
    return min(found, key=objective)


def flat_ridge(products: InnerProducts, published: Weights) -> float | None:
    """The pull that makes weights of collinear signals unique; ``None`` if no signals are collinear."""
    curvatures = np.linalg.eigvalsh(Objective(products, published).derivatives(published).bound)
    greatest = float(curvatures[-1])
    if greatest <= FAINTEST:  # all signals are silent, so only this pull determines the weights
        return 1.0
    return RIDGE * greatest if curvatures[0] <= COLLINEAR * greatest else None


def _starts(products: InnerProducts, published: Weights) -> Iterator[Weights]:
    count = len(published)
    yield published
    # Least squares with all songs equally loud; the shortest solution if there are several.
    share = 1 / (products.constant + DELTA)
    squares = np.linalg.lstsq(np.tensordot(share, products.gram, 1), share @ products.cross, rcond=1e-10)
    yield squares[0].astype(np.float64)
    yield np.full(count, 1 / count)
    yield from np.eye(count)


def _improve(
    objective: Objective, weights: Weights, constraints: Constraints, known: Sequence[Weights]
) -> Weights | None:
    """Improve weights until no step helps; ``None`` if the search approaches known weights."""
    value = objective(weights)
    for _ in range(MAX_STEPS):
        gradient, hessian, bound = objective.derivatives(weights)
        for each in known:
            away = weights - each
            if away @ bound @ away <= MERGED:
                return None
        curvature = _definite(hessian, constraints)
        if curvature is None:
            curvature = _definite(bound + 1e-14 * np.trace(bound) * np.eye(len(bound)), constraints)
        assert curvature is not None, "the bound's Hessian is positive semidefinite"
        step = quadratic_step(curvature, gradient, weights, constraints)
        slope = float(gradient @ step)
        size = max(1.0, abs(value))
        part, last = 1.0, -slope <= CONVERGED * size
        most = value + ROUNDING * size
        while not last and objective(weights + part * step) > most + SUFFICIENT * part * slope:
            part /= 2
            last = part < SHORTEST
        weights = weights + part * step
        if constraints.non_negative:
            weights = np.maximum(weights, 0)  # removes rounding errors such as -1e-17
        if last:
            break
        value = objective(weights)
    return weights


def _definite(matrix: NDArray[np.float64], constraints: Constraints) -> NDArray[np.float64] | None:
    """The matrix if it is positive definite for steps that keep the sum; else ``None``."""
    if constraints.sum_to_one:  # has no effect on steps that keep the sum
        matrix = matrix + np.abs(matrix).max()
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    return matrix


def quadratic_step(
    curvature: NDArray[np.float64], gradient: Weights, weights: Weights, constraints: Constraints
) -> Weights:
    """The step ``d`` with the least ``gradient · d + ½ d · curvature · d`` that stays within constraints.

    Parameters
    ----------
    curvature : ndarray
        ``(signals, signals)``, positive definite.
    gradient, weights : ndarray
        ``(signals,)``; the weights satisfy the constraints.
    constraints : Constraints
    """
    step = np.zeros_like(weights)
    free = np.ones(len(weights), bool)
    for _ in range(20 * len(weights)):
        slope = gradient + curvature @ step
        move, multiplier = _equality_step(curvature, slope, free, constraints.sum_to_one)
        if not constraints.non_negative:
            return move
        place = weights + step
        blocking = free & (place + move < 0)
        if blocking.any():
            parts = np.where(blocking, place, 1.0) / np.where(blocking, -move, 1.0)
            part = parts.min()
            met = blocking & (parts == part)  # several at once if the search starts in a corner
            step = step + part * move
            step[met], free[met] = -weights[met], False
            continue
        step = step + move
        pull = np.where(free, 0.0, slope + curvature @ move + multiplier)
        if pull.min() >= -RELEASE * np.abs(gradient).max():
            break
        free[np.argmin(pull)] = True
    return step


def _equality_step(
    curvature: NDArray[np.float64], slope: Weights, free: NDArray[np.bool_], sum_to_one: bool
) -> tuple[Weights, float]:
    """The best step of the free weights alone, and the Lagrange multiplier of their sum."""
    move = np.zeros_like(slope)
    count = int(free.sum())
    if count == 0:
        return move, 0.0
    inner = curvature[np.ix_(free, free)]
    sides = np.stack([-slope[free], -np.ones(count)], axis=1)
    plain, unit = np.linalg.solve(inner, sides).T
    # Stationarity: curvature · move + slope + multiplier = 0, and the moves add up to 0.
    multiplier = float(-plain.sum() / unit.sum()) if sum_to_one else 0.0
    move[free] = plain + multiplier * unit
    return move, multiplier
