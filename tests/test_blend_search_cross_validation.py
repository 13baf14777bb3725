"""Held-out songs: their folds, their priors, and the scores of weights found without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blend_cases import EVERY, FREE, SIMPLEX, SUM, pretended, simulated, stacked, two_maxima

from evaluator.blend_search.cross_validation import (
    UNCHOSEN,
    BlendProblem,
    choose,
    deal,
    held_out,
    validate,
)
from evaluator.blend_search.inner_products import InnerProducts
from evaluator.blend_search.search import SearchOptions, find_weights
from evaluator.blend_search.solving import Constraints, best
from kmdx.errors import KmdxError


def test_held_out_songs_are_scored_with_weights_found_without_them() -> None:
    products, published = simulated(6, 3), np.full(3, 1 / 3)
    problem = BlendProblem(products, published, np.arange(6))
    values = held_out(problem, deal([problem], 3)[0], FREE, [0.0])[0]
    for fold in range(3):
        inside = np.arange(6) % 3 == fold
        weights = best(products.of_songs(~inside), published)
        assert values[inside] == pytest.approx(products.of_songs(inside).sdr(weights), abs=1e-9)
    assert values.mean() < products.sdr(best(products, published)).mean()


def test_the_prior_of_a_held_out_songs_weights_is_chosen_without_it() -> None:
    products, published = simulated(7, 4), np.full(4, 0.25)
    validation = validate([BlendProblem(products, published, np.arange(7))], 7, FREE, None)
    for song in range(7):
        others = np.arange(7) != song
        rest = BlendProblem(products.of_songs(others), published, np.arange(6))
        prior = choose([rest], FREE)
        weights = best(rest.products, published, FREE, prior)
        expected = products.of_songs(~others).sdr(weights)
        assert validation.sdr[0][song] == pytest.approx(expected[0], abs=1e-6)


@pytest.mark.parametrize(
    ("prior", "constraints"), [*((0.0, each) for each in EVERY), (0.1, SUM), (None, FREE), (None, SIMPLEX)]
)
@pytest.mark.parametrize("products", [simulated(6, 3, bias=0.2), two_maxima()])
def test_validation_scores_the_weights_that_a_search_would_use(
    products: InnerProducts, prior: float | None, constraints: Constraints, tmp_path: Path
) -> None:
    """Each held-out song's score is that of the weights that the search takes from the other songs."""
    whole = pretended(tmp_path, bass=products)
    published = np.eye(products.cross.shape[1])[0]
    whole = replace(whole, stems=(replace(whole.stems[0], published=published),))
    (found,) = find_weights(whole, SearchOptions(constraints, prior)).found
    for song in range(6):
        others = np.arange(6) != song
        rest = replace(
            whole,
            songs=whole.songs[1:],
            stems=(replace(whole.stems[0], products=products.of_songs(others), values=np.full(5, 600.0)),),
        )
        (taken,) = find_weights(rest, SearchOptions(constraints, prior, folds=2)).found
        expected = best(products.of_songs(others), published, constraints, taken.prior)
        assert taken.weights == pytest.approx(expected, abs=1e-6)
        assert found.validated[song] == pytest.approx(products.of_songs(~others).sdr(expected)[0], abs=1e-6)


def test_a_single_start_would_find_a_different_maximum() -> None:
    products, published = two_maxima(), np.array([1.0, 0.0])
    problem = BlendProblem(products, published, np.arange(6))
    stuck = best(products, published, SIMPLEX, 0.0, [published])
    assert problem.weights(SIMPLEX, 0.0) != pytest.approx(stuck, abs=0.5)


@pytest.mark.parametrize("constraints", [FREE, SIMPLEX])
@pytest.mark.parametrize("signals", [1, 2])
def test_signals_that_are_all_zero_keep_their_weights(
    signals: int, constraints: Constraints, tmp_path: Path
) -> None:
    silent = stacked([(np.ones(50), np.zeros((signals, 50)))] * 4)
    (found,) = find_weights(pretended(tmp_path, bass=silent), SearchOptions(constraints)).found
    assert found.weights == pytest.approx(found.stem.published, abs=1e-6)
    assert not found.recommended
    assert any("collinear" in note for note in found.notes)
    assert best(silent, np.full(signals, 0.7), FREE) == pytest.approx(np.full(signals, 0.7))


def test_folds_are_made_only_of_songs_with_a_score(tmp_path: Path) -> None:
    halved = simulated(10, 3, bias=0.4)
    for values in (halved.energy, halved.constant, halved.cross):
        values[1::2] = 0
    for joint in (False, True):
        bass, vocals = find_weights(
            pretended(tmp_path, bass=halved, vocals=simulated(10, 3)), SearchOptions(folds=2, joint=joint)
        ).found
        assert len(bass.validated) == 5
        assert len(vocals.validated) == 10
        assert list(bass.problem.songs) == [0, 2, 4, 6, 8]
    one, all_ten = (BlendProblem(simulated(n, 2), np.full(2, 0.5), np.arange(10 - n, 10)) for n in (5, 10))
    alone, both = deal([one], 2), deal([one, all_ten], 2)
    assert list(alone[0]) == [0, 1, 0, 1, 0]
    assert np.array_equal(both[0], both[1][5:]), "a song is in one fold for all stems"
    assert np.ptp(np.bincount(both[0])) <= 1


def test_two_songs_are_too_few_to_choose_a_prior(tmp_path: Path) -> None:
    products = simulated(2, 3, bias=0.4)
    (found,) = find_weights(pretended(tmp_path, bass=products), SearchOptions()).found
    (given,) = find_weights(pretended(tmp_path, bass=products), SearchOptions(prior=UNCHOSEN)).found
    assert found.prior == UNCHOSEN
    assert found.validated == pytest.approx(given.validated)
    assert np.array_equal(found.weights, given.weights)
    assert any("too few songs to choose the prior" in note for note in found.notes)
    assert not any("prior" in note for note in given.notes)
    (three,) = find_weights(pretended(tmp_path, bass=simulated(3, 3)), SearchOptions()).found
    assert not any("prior" in note for note in three.notes)


def test_the_prior_that_does_best_on_held_out_songs_is_chosen() -> None:
    far, published = simulated(40, 3, bias=0.5), np.full(3, 1 / 3)
    assert validate([BlendProblem(far, published, np.arange(40))], 10, FREE, None).prior <= 1
    few = simulated(4, 3, seed=1)
    right = best(simulated(400, 3, seed=1), published)
    strict = validate([BlendProblem(few, right, np.arange(4))], 4, FREE, None).prior
    assert strict >= 10, "four songs do not beat weights that four hundred gave"


def test_impossible_numbers_of_folds_are_refused(tmp_path: Path) -> None:
    whole = pretended(tmp_path, bass=simulated(3, 3))
    for folds in (1, 4):
        with pytest.raises(KmdxError, match=f"--folds {folds}: expected 2 to 3"):
            find_weights(whole, SearchOptions(folds=folds))


def test_every_stem_has_songs_in_at_least_two_folds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        songs = int(rng.integers(4, 12))
        problems = []
        for _ in range(int(rng.integers(1, 5))):
            own = np.flatnonzero(rng.random(songs) < 0.6)
            if len(own) > 1:
                problems.append(BlendProblem(simulated(len(own), 2), np.full(2, 0.5), own))
        folds = int(rng.integers(2, 6))
        if not problems:
            continue
        for of in deal(problems, folds):
            assert len(np.unique(of)) > 1
            assert of.max() < folds
        one = deal(problems[:1], folds)[0]
        assert np.ptp(np.bincount(one, minlength=folds)) <= 1
