"""The weights with the best score: the mean over songs of global SDR in dB, not of squared errors.

The score is minus a sum of logarithms of quadratic forms, smooth but not concave. Newton steps climb it
from several starts. Where the Hessian is not definite, the one of the reweighted least squares that bound
the score from below takes its place (majorize-minimize: every such step climbs). Constraints are linear,
so each step is a small quadratic program, solved exactly by the active-set method.

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

STEPS = 300
STILL = 1e-13  # share of the objective: a step that promises less gain is the last
ROUNDED = 1e-13  # share of the objective that rounding may hide
SUFFICIENT = 1e-4  # share of the foretold gain that a step must bring
SHORTEST = 2.0**-40  # part of a step

SETTLED = 1e-10  # share of the gradient below which nothing pulls a weight away from 0

COLLINEAR = 1e-11  # ratio of curvatures below which a direction counts as flat
RIDGE = 1e-9  # of the greatest curvature: pull to the published weights along flat directions
FAINTEST = 1e-12  # dB for a weight of 1: a greatest curvature below which nothing is heard of any signal

MERGED = 1e-3  # dB: a climb that comes so near to a maximum that was found ends there


@dataclass(frozen=True)
class Constraints:
    """What weights must be.

    Attributes
    ----------
    sum_to_one : bool
    non_negative : bool
    """

    sum_to_one: bool = False
    non_negative: bool = False

    def nearby(self, weights: Weights) -> Weights:
        """Weights that fulfil the constraints, not far from the given ones."""
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
    """Of an objective at one place.

    Attributes
    ----------
    gradient : ndarray
        ``(signals,)``.
    hessian : ndarray
        ``(signals, signals)``.
    bound : ndarray
        ``(signals, signals)``: positive semidefinite Hessian of the quadratic function that touches the
        objective here and lies above it everywhere.
    """

    gradient: Weights
    hessian: NDArray[np.float64]
    bound: NDArray[np.float64]


class Objective:
    """What is minimised: error in dB, mean over songs, plus ``prior · ‖weights − published‖²``.

    Parameters
    ----------
    products : InnerProducts
    published : ndarray
        ``(signals,)``: the weights to stay close to.
    prior : float
        dB that a distance of 1 from them costs.
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
        Of at least one song.
    published : ndarray
        ``(signals,)``: the weights to stay close to. Along directions in which signals are collinear, and
        the score is the same, the result is the nearest to them.
    constraints : Constraints
    prior : float
        Strength of the pull to them, in dB for a distance of 1; infinite gives them back, or what the
        constraints leave of them.
    starts : iterable of ndarray, optional
        Where climbs begin; by default the published weights, those of least squares, equal shares and
        each signal alone.
    """
    if math.isinf(prior):
        return constraints.nearby(published)
    pull = prior + (flat_ridge(products, published) or 0.0)
    objective = Objective(products, published, pull)
    chosen = _starts(products, published) if starts is None else starts
    found: list[Weights] = []
    for start in chosen:
        weights = _climbed(objective, constraints.nearby(start), constraints, found)
        if weights is not None:
            found.append(weights)
    return min(found, key=objective)


def flat_ridge(products: InnerProducts, published: Weights) -> float | None:
    """The pull that settles directions in which signals are collinear in all songs; ``None`` if none are."""
    curvatures = np.linalg.eigvalsh(Objective(products, published).derivatives(published).bound)
    greatest = float(curvatures[-1])
    if greatest <= FAINTEST:  # nothing pulls but this: to the nearest weights that the constraints allow
        return 1.0
    return RIDGE * greatest if curvatures[0] <= COLLINEAR * greatest else None


def _starts(products: InnerProducts, published: Weights) -> Iterator[Weights]:
    count = len(published)
    yield published
    # Least squares with all songs made equally loud; its shortest solution where it has many.
    share = 1 / (products.constant + DELTA)
    squares = np.linalg.lstsq(np.tensordot(share, products.gram, 1), share @ products.cross, rcond=1e-10)
    yield squares[0].astype(np.float64)
    yield np.full(count, 1 / count)
    yield from np.eye(count)


def _climbed(
    objective: Objective, weights: Weights, constraints: Constraints, known: Sequence[Weights]
) -> Weights | None:
    """Weights at which no step helps any more; ``None`` where the climb ends at known ones."""
    value = objective(weights)
    for _ in range(STEPS):
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
        part, last = 1.0, -slope <= STILL * size
        most = value + ROUNDED * size
        while not last and objective(weights + part * step) > most + SUFFICIENT * part * slope:
            part /= 2
            last = part < SHORTEST
        weights = weights + part * step
        if constraints.non_negative:
            weights = np.maximum(weights, 0)  # rounding may leave -1e-17
        if last:
            break
        value = objective(weights)
    return weights


def _definite(matrix: NDArray[np.float64], constraints: Constraints) -> NDArray[np.float64] | None:
    """The matrix where it is positive definite for steps that keep the sum; else ``None``."""
    if constraints.sum_to_one:  # such a step feels nothing of this
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
        ``(signals,)``; the weights fulfil the constraints.
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
            met = blocking & (parts == part)  # several at once where a climb begins in a corner
            step = step + part * move
            step[met], free[met] = -weights[met], False
            continue
        step = step + move
        pull = np.where(free, 0.0, slope + curvature @ move + multiplier)
        if pull.min() >= -SETTLED * np.abs(gradient).max():
            break
        free[np.argmin(pull)] = True
    return step


def _equality_step(
    curvature: NDArray[np.float64], slope: Weights, free: NDArray[np.bool_], sum_to_one: bool
) -> tuple[Weights, float]:
    """The best move of the free weights alone, and the multiplier of their sum."""
    move = np.zeros_like(slope)
    count = int(free.sum())
    if count == 0:
        return move, 0.0
    inner = curvature[np.ix_(free, free)]
    sides = np.stack([-slope[free], -np.ones(count)], axis=1)
    plain, unit = np.linalg.solve(inner, sides).T
    # Stationarity: curvature · move + slope + multiplier = 0, where the moves add up to nothing.
    multiplier = float(-plain.sum() / unit.sum()) if sum_to_one else 0.0
    move[free] = plain + multiplier * unit
    return move, multiplier
