"""Which weights a search takes, and which songs it leaves out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blend_cases import known_best, pretended, simulated

from evaluator.blend_search import inner_products
from evaluator.blend_search.inner_products import InnerProducts
from evaluator.blend_search.search import SearchOptions, find_weights
from evaluator.blend_search.solving import best
from kmdx.errors import KmdxError


def test_only_weights_that_gain_on_held_out_songs_are_used(tmp_path: Path) -> None:
    gaining, idle = simulated(12, 3, bias=0.6), known_best(np.full(3, 1 / 3), 12)
    result = find_weights(pretended(tmp_path, bass=gaining, drums=idle), SearchOptions())
    bass, drums = result.found
    assert bass.recommended
    assert bass.gains.mean() > 1
    assert bass.fitted_sdr.mean() > bass.validated.mean() > bass.published_sdr.mean()
    assert bass.expected == bass.validated.mean()
    assert not drums.recommended, "equal shares are the best there is"
    assert drums.gains.mean() <= 0
    assert np.array_equal(drums.weights_to_use, drums.stem.published)
    assert drums.expected == drums.published_sdr.mean()
    overridden = find_weights(
        pretended(tmp_path, bass=gaining, drums=idle), SearchOptions(prior=0, anyway=True)
    )
    assert all(each.recommended for each in overridden.found)
    assert np.array_equal(overridden.found[1].weights_to_use, overridden.found[1].weights)


def test_a_joint_search_shares_the_prior_and_the_decision(tmp_path: Path) -> None:
    gaining, losing = simulated(12, 3, bias=0.6), simulated(12, 3, 1)
    apart = find_weights(pretended(tmp_path, bass=gaining, drums=losing), SearchOptions())
    jointly = find_weights(pretended(tmp_path, bass=gaining, drums=losing), SearchOptions(joint=True))
    assert apart.found[0].prior != apart.found[1].prior
    assert jointly.found[0].prior == jointly.found[1].prior
    assert {each.recommended for each in jointly.found} == {jointly.song_gains.mean() > 0}
    both = [jointly.found[0].gains, jointly.found[1].gains]
    assert jointly.song_gains == pytest.approx(np.mean(both, axis=0))


def test_songs_in_which_the_true_stem_is_silent_are_left_out_and_reported(tmp_path: Path) -> None:
    products = simulated(6, 3, bias=0.4)
    products.energy[2], products.constant[2], products.cross[2] = 0, 0, 0
    (found,) = find_weights(pretended(tmp_path, vocals=products), SearchOptions(prior=0)).found
    without = products.of_songs(np.arange(6) != 2)
    assert found.weights == pytest.approx(best(without, found.stem.published), abs=1e-6)
    assert found.weights != pytest.approx(best(products, found.stem.published), abs=1e-4)
    assert len(found.validated) == 5
    assert any("silent are left out" in note and note.endswith("song 2") for note in found.notes)

    silent = InnerProducts(
        *(0 * value for value in (products.energy, products.energy, products.cross)), products.gram
    )
    both = find_weights(pretended(tmp_path, vocals=silent, bass=simulated(6, 2)), SearchOptions())
    assert both.silent == ("vocals",)
    assert [each.stem.name for each in both.found] == ["bass"]
    with pytest.raises(KmdxError, match="every true stem is silent"):
        find_weights(pretended(tmp_path, vocals=silent), SearchOptions())


def test_dither_counts_as_silence(tmp_path: Path) -> None:
    """Plus and minus one 16-bit step: not zero, but any estimate of it is entirely error."""
    products = simulated(6, 3, bias=0.4)
    dithered = products.of_songs(np.arange(6))
    energy = 600 * inner_products.STEP**2
    dithered.energy[2], dithered.constant[2], dithered.cross[2] = energy, energy, 0
    (found,) = find_weights(pretended(tmp_path, vocals=dithered), SearchOptions(prior=0)).found
    without = products.of_songs(np.arange(6) != 2)
    assert found.weights == pytest.approx(best(without, found.stem.published), abs=1e-6)
    assert found.weights.sum() > 0.5
    assert any("silent are left out" in note and note.endswith("song 2") for note in found.notes)
    dithered.energy[2] *= 16
    (found,) = find_weights(pretended(tmp_path, vocals=dithered), SearchOptions(prior=0)).found
    assert len(found.validated) == 6


def test_one_song_is_refused_without_the_option_anyway(tmp_path: Path) -> None:
    alone = pretended(tmp_path, bass=simulated(1, 3, bias=0.5))
    with pytest.raises(KmdxError, match="has one song.*--anyway"):
        find_weights(alone, SearchOptions())
    (found,) = find_weights(alone, SearchOptions(anyway=True)).found
    assert found.validated is None
    assert found.expected is None
    assert found.fitted_sdr > found.published_sdr
    assert any("too few songs" in note for note in found.notes)


def test_collinear_signals_are_noted(tmp_path: Path) -> None:
    products = simulated(5, 3)
    (plain,) = find_weights(pretended(tmp_path, bass=products), SearchOptions()).found
    (doubled,) = find_weights(
        pretended(tmp_path, bass=products.of_signals(np.array([0, 1, 1]))), SearchOptions()
    ).found
    assert not plain.notes
    assert any("collinear" in note for note in doubled.notes)
