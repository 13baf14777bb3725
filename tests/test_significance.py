"""Tests of paired differences, against scipy and exhaustive enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from evaluator import bootstrap
from evaluator.significance import holm, sign_flip, signed_rank


def counted(differences: list[float], statistic) -> float:
    """The fraction of sign flips whose statistic is as extreme as the one found."""
    values = [
        statistic(np.array(signs) * np.abs(differences))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    found = abs(statistic(np.array(differences)))
    return float(np.mean([abs(value) >= found - 1e-9 for value in values]))


def ranks_with_signs(differences: np.ndarray) -> float:
    sizes = np.abs(differences)
    shared = [(np.sum(sizes < size) + 1 + np.sum(sizes <= size)) / 2 for size in sizes]
    return float(np.sum(np.sign(differences) * shared))


@pytest.mark.parametrize("number", [3, 6, 20, 50])
def test_the_signed_rank_test_matches_scipys_exact_one(number: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(number).normal(0.4, 1, number)
    assert signed_rank(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_for_many_songs_it_matches_scipys_normal_approximation() -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(0).normal(0.1, 1, 150).round(1)  # with ties and zeros
    expected = stats.wilcoxon(differences, method="asymptotic", correction=True, zero_method="wilcox").pvalue
    assert signed_rank(differences) == pytest.approx(expected)


@pytest.mark.parametrize("differences", [[1, 1, 2, -1, 3, 3, 4, -2], [0.5] * 7, [1, -1, 2, -2, 3, -3]])
def test_equal_differences_share_their_ranks(differences: list[float]) -> None:
    assert signed_rank(np.array(differences)) == pytest.approx(counted(differences, ranks_with_signs))


def test_differences_of_zero_are_left_out() -> None:
    kept = np.array([1.0, 2.0, -0.5, 3.0, 4.0, 5.0])
    assert signed_rank(np.concatenate([kept, np.zeros(4)])) == signed_rank(kept)
    assert signed_rank(np.zeros(5)) is None
    assert sign_flip(np.zeros(5)) is None


def test_all_sign_flips_are_enumerated() -> None:
    differences = [1.2, 0.4, -0.3, 2.0, 0.9, 0.1, -0.2, 1.1]
    assert sign_flip(np.array(differences)) == pytest.approx(counted(differences, np.sum))


def test_random_flips_agree_with_the_t_test_and_are_reproducible() -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(3).normal(0.3, 1, 60)
    found = sign_flip(differences, 20_000, 1)
    assert found == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert found == sign_flip(differences, 20_000, 1)


def test_six_songs_of_one_sign_are_the_fewest_that_decide() -> None:
    assert signed_rank(np.arange(1.0, 6)) == 2 / 32
    assert signed_rank(np.arange(1.0, 7)) == 2 / 64


def test_holm_corrects_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


def test_the_interval_of_a_median_ignores_one_huge_difference() -> None:
    values = np.array([0.9, 1.0, 1.1] * 10 + [1000.0])
    low, high = bootstrap.interval(values, statistic="median") or (0, 0)
    assert 0.9 <= low <= 1.0 <= high <= 1.1
    assert (bootstrap.interval(values) or (0, 0))[1] > 50
