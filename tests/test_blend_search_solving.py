"""Exact weights of a blend: against known bests, grids and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blend_cases import EVERY, FREE, POSITIVE, SIMPLEX, known_best, simulated, stacked

from evaluator.blend_search.solving import Constraints, Objective, best


@pytest.mark.parametrize("constraints", EVERY)
def test_a_known_best_blend_is_found_to_six_digits(constraints: Constraints) -> None:
    known = np.array([0.5, 0.2, 0.0, 0.3]) if constraints == SIMPLEX else np.array([0.6, -0.3, 0.1, 0.6])
    if constraints == POSITIVE:
        known = np.array([0.9, 0.0, 0.4, 0.2])
    found = best(known_best(known), np.full(4, 0.25), constraints)
    assert np.abs(found - known).max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_gradient_and_hessian_match_finite_differences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    objective = Objective(simulated(5, 4, seed), rng.uniform(0, 1, 4), prior=0.3)
    weights, step = rng.normal(0.25, 0.3, 4), 1e-5
    gradient, hessian, bound = objective.derivatives(weights)
    shifts = step * np.eye(4)
    slopes = [(objective(weights + shift) - objective(weights - shift)) / (2 * step) for shift in shifts]
    assert gradient == pytest.approx(np.array(slopes), rel=1e-6, abs=1e-7)
    curvatures = [
        (objective.derivatives(weights + shift).gradient - objective.derivatives(weights - shift).gradient)
        / (2 * step)
        for shift in shifts
    ]
    assert hessian == pytest.approx(np.array(curvatures), rel=1e-5, abs=1e-5)
    for _ in range(50):  # the bound is above the objective and touches it
        other = weights + rng.normal(0, 0.5, 4)
        move = other - weights
        assert objective(other) <= objective(weights) + gradient @ move + move @ bound @ move / 2 + 1e-9


@pytest.mark.parametrize("constraints", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_no_blend_in_a_grid_is_better(constraints: Constraints, seed: int) -> None:
    products = simulated(6, 5, seed, bias=-0.2)
    rng = np.random.default_rng(seed)
    grid = rng.normal(0.2, 0.4, (10_000, 5))
    if constraints.non_negative:
        grid = rng.dirichlet(np.ones(5), 10_000)
        if not constraints.sum_to_one:
            grid *= rng.uniform(0.5, 1.5, (10_000, 1))
    elif constraints.sum_to_one:
        grid += (1 - grid.sum(axis=1, keepdims=True)) / 5
    published = np.full(5, 0.2)
    found = best(products, published, constraints)
    assert products.sdr(found).mean() > max(products.sdr(weights).mean() for weights in grid)
    # And nearby, where a maximum that was not quite climbed would show.
    for nearby in found + 1e-3 * rng.standard_normal((1000, 5)):
        nearby = constraints.nearby(nearby)
        assert products.sdr(nearby).mean() <= products.sdr(found).mean() + 1e-12
    if constraints.sum_to_one:
        assert found.sum() == pytest.approx(1, abs=1e-12)
    if constraints.non_negative:
        assert found.min() >= 0


@pytest.mark.parametrize("constraints", EVERY)
def test_the_higher_of_two_maxima_is_found(constraints: Constraints) -> None:
    """One song is nearly all the first signal, as in the published weights; the other is mostly the second."""
    first, second, noise_of_one, noise_of_two = np.eye(4)
    songs = [
        (first + 3e-2 * noise_of_one, np.stack([first, second])),
        (second + 1e-3 * noise_of_two, np.stack([first, second])),
    ]
    products, published = stacked(songs), np.array([1.0, 0.0])
    found = best(products, published, constraints)
    assert found == pytest.approx([0, 1], abs=1e-2)
    stuck = best(products, published, constraints, starts=[published])
    assert products.sdr(found).mean() > products.sdr(stuck).mean() + 10


@pytest.mark.parametrize("constraints", EVERY)
def test_the_solver_needs_few_newton_steps(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 13 starts on 150 songs and 10 signals needs few Newton steps."""
    calls = 0
    derivatives = Objective.derivatives

    def counted(self: Objective, weights: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        return derivatives(self, weights)

    monkeypatch.setattr(Objective, "derivatives", counted)
    best(simulated(150, 10), np.full(10, 0.1), constraints)
    assert calls <= 13 * 10


def test_the_solver_maximizes_decibels_and_not_squared_errors() -> None:
    loud, quiet = np.eye(4)[0], np.eye(4)[1]
    songs = [
        (100 * loud, np.stack([100 * loud + 50 * np.eye(4)[2], 100 * loud])),
        *[(quiet, np.stack([quiet, quiet + 0.5 * np.eye(4)[3]]))] * 2,
    ]
    found = best(stacked(songs), np.array([0.5, 0.5]), SIMPLEX)
    assert found[0] > 0.9, "two quiet songs say the first signal, the loud one the second"


def test_a_stronger_prior_stays_closer_and_an_infinite_one_changes_nothing() -> None:
    products, published = simulated(4, 3, bias=0.3), np.array([0.5, 0.3, 0.2])
    distances = [
        np.linalg.norm(best(products, published, FREE, prior) - published)
        for prior in (0, 0.1, 1, 10, 100, math.inf)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] == 0


def test_collinear_signals_get_the_nearest_weights() -> None:
    products = simulated(8, 3, bias=0.2)
    doubled = products.of_signals(np.array([0, 1, 2, 2]))
    published = np.array([0.3, 0.3, 0.1, 0.4])
    found = best(doubled, published)
    alone = best(products, np.array([0.3, 0.3, 0.5]))
    assert found[:2] == pytest.approx(alone[:2], abs=1e-5)
    assert found[2] + found[3] == pytest.approx(alone[2], abs=1e-5)
    assert found[3] - found[2] == pytest.approx(0.3, abs=1e-5), "each moves as far as the other"
    assert doubled.sdr(found).mean() == pytest.approx(products.sdr(alone).mean(), abs=1e-9)
    for constraints in EVERY:
        assert np.isfinite(best(doubled, published, constraints)).all()


def test_a_silent_signal_keeps_its_weight() -> None:
    products = simulated(5, 3)
    heard = np.array([1, 1, 0])
    silenced = replace(products, cross=products.cross * heard, gram=products.gram * np.outer(heard, heard))
    assert best(silenced, np.array([0.4, 0.4, 0.2]))[2] == pytest.approx(0.2, abs=1e-6)
