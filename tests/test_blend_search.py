"""The blend search: exact weights, honest scores, what it refuses, and the plans that it writes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise

from evaluator.blend_search import collecting, command, inner_products, plan_writer, stage_moves, stage_search
from evaluator.blend_search.ablation import Ensemble, share, within
from evaluator.blend_search.collection import Collection, StemProducts, load
from evaluator.blend_search.cross_validation import (
    UNCHOSEN,
    BlendProblem,
    can_choose,
    choose,
    deal,
    held_out,
    validate,
)
from evaluator.blend_search.flat_plan import flatten
from evaluator.blend_search.inner_products import InnerProducts
from evaluator.blend_search.search import SearchOptions, search
from evaluator.blend_search.solving import Constraints, Objective, best
from evaluator.dataset import find_tracks
from evaluator.metrics import global_sdr
from evaluator.scoring import score_song
from kmdx import Separator, audio, cli, ensemble, plan_file
from kmdx.errors import KmdxError, PlanError
from kmdx.nodes import Sum
from kmdx.signals import Signal

STEMS = ("bass", "drums", "other", "vocals")
FREE, SUM, POSITIVE, SIMPLEX = (Constraints(*flags) for flags in ((0, 0), (1, 0), (0, 1), (1, 1)))
EVERY = [FREE, SUM, POSITIVE, SIMPLEX]


# Constructed inner products


def stacked(songs: list[tuple[np.ndarray, np.ndarray]]) -> InnerProducts:
    """Of songs ``(truth (samples,), signals (signals, samples))``."""
    return InnerProducts(
        energy=np.array([truth @ truth for truth, _ in songs]),
        constant=np.array([truth @ truth for truth, _ in songs]),
        cross=np.array([signals @ truth for truth, signals in songs]),
        gram=np.array([signals @ signals.T for _, signals in songs]),
    )


def simulated(songs: int, signals: int, seed: int = 0, bias: float = 0.0) -> InnerProducts:
    """Signals that are the truth with errors of their own and errors in common, each song of its own level."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((signals, 3))
    quality = rng.uniform(0.2, 0.6, (signals, 1))
    made = []
    for _ in range(songs):
        truth = rng.lognormal(0, 1) * rng.standard_normal(300)
        errors = common @ rng.standard_normal((3, 300)) + 2 * rng.standard_normal((signals, 300))
        level = rng.lognormal(-0.5, 0.5) * np.abs(truth).mean()
        made.append((truth, (1 + bias) * truth + level * quality * errors))
    return stacked(made)


def known_best(weights: np.ndarray, songs: int = 7) -> InnerProducts:
    """Songs whose truth is the blend itself, and noise that no signal has anything of."""
    rng = np.random.default_rng(3)
    made = []
    for song in range(songs):
        basis = np.linalg.qr(rng.standard_normal((200, len(weights) + 1)))[0].T
        signals = rng.standard_normal((len(weights), len(weights))) @ basis[1:]
        made.append(((1 + song) * (weights @ signals + 0.3 * basis[0]), (1 + song) * signals))
    return stacked(made)


@pytest.mark.parametrize("constraints", EVERY)
def test_a_known_best_blend_is_found_to_the_sixth_digit(constraints: Constraints) -> None:
    known = np.array([0.5, 0.2, 0.0, 0.3]) if constraints == SIMPLEX else np.array([0.6, -0.3, 0.1, 0.6])
    if constraints == POSITIVE:
        known = np.array([0.9, 0.0, 0.4, 0.2])
    found = best(known_best(known), np.full(4, 0.25), constraints)
    assert np.abs(found - known).max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_gradient_and_hessian_are_those_of_finite_differences(seed: int) -> None:
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
    for _ in range(50):  # the bound lies above the objective and touches it
        other = weights + rng.normal(0, 0.5, 4)
        move = other - weights
        assert objective(other) <= objective(weights) + gradient @ move + move @ bound @ move / 2 + 1e-9


@pytest.mark.parametrize("constraints", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_no_blend_of_a_grid_is_better(constraints: Constraints, seed: int) -> None:
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
    """One song is nearly all the first signal, where the published weights are; one is even more the second."""
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
def test_climbs_are_short(constraints: Constraints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newton steps: of 13 starts on 150 songs and 10 signals each takes few."""
    calls = 0
    derivatives = Objective.derivatives

    def counted(self: Objective, weights: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        return derivatives(self, weights)

    monkeypatch.setattr(Objective, "derivatives", counted)
    best(simulated(150, 10), np.full(10, 0.1), constraints)
    assert calls <= 13 * 10


def test_what_is_maximised_is_decibels_not_squared_errors() -> None:
    loud, quiet = np.eye(4)[0], np.eye(4)[1]
    songs = [
        (100 * loud, np.stack([100 * loud + 50 * np.eye(4)[2], 100 * loud])),
        *[(quiet, np.stack([quiet, quiet + 0.5 * np.eye(4)[3]]))] * 2,
    ]
    found = best(stacked(songs), np.array([0.5, 0.5]), SIMPLEX)
    assert found[0] > 0.9, "two quiet songs say the first signal, the loud one the second"


def test_a_stronger_prior_stays_nearer_and_an_endless_one_stays() -> None:
    products, published = simulated(4, 3, bias=0.3), np.array([0.5, 0.3, 0.2])
    distances = [
        np.linalg.norm(best(products, published, FREE, prior) - published)
        for prior in (0, 0.1, 1, 10, 100, math.inf)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.1
    assert distances[-1] == 0


def test_of_collinear_signals_the_nearest_weights_are_taken() -> None:
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


# Cross-validation


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


def two_maxima(songs: int = 6) -> InnerProducts:
    """All songs have a maximum at the first signal and a higher one at the second."""
    rng = np.random.default_rng(5)
    first, second = np.eye(8)[:2]
    made = []
    for song in range(songs):
        error = rng.standard_normal(8) * (3e-2 if song % 2 else 1e-3)
        made.append(((first if song % 2 else second) + error, np.stack([first, second])))
    return stacked(made)


@pytest.mark.parametrize(
    ("prior", "constraints"), [*((0.0, each) for each in EVERY), (0.1, SUM), (None, FREE), (None, SIMPLEX)]
)
@pytest.mark.parametrize("products", [simulated(6, 3, bias=0.2), two_maxima()])
def test_what_is_validated_is_what_is_taken(
    products: InnerProducts, prior: float | None, constraints: Constraints, tmp_path: Path
) -> None:
    """Each held-out song's score is that of the weights that the search takes from the other songs."""
    whole = pretended(tmp_path, bass=products)
    published = np.eye(products.cross.shape[1])[0]
    whole = replace(whole, stems=(replace(whole.stems[0], published=published),))
    (found,) = search(whole, SearchOptions(constraints, prior)).found
    for song in range(6):
        others = np.arange(6) != song
        rest = replace(
            whole,
            songs=whole.songs[1:],
            stems=(replace(whole.stems[0], products=products.of_songs(others), values=np.full(5, 600.0)),),
        )
        (taken,) = search(rest, SearchOptions(constraints, prior, folds=2)).found
        expected = best(products.of_songs(others), published, constraints, taken.prior)
        assert taken.weights == pytest.approx(expected, abs=1e-6)
        assert found.validated[song] == pytest.approx(products.of_songs(~others).sdr(expected)[0], abs=1e-6)


def test_climbs_from_one_start_alone_would_be_another_estimate() -> None:
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
    (found,) = search(pretended(tmp_path, bass=silent), SearchOptions(constraints)).found
    assert found.weights == pytest.approx(found.stem.published, abs=1e-6)
    assert not found.recommended
    assert any("collinear" in note for note in found.notes)
    assert best(silent, np.full(signals, 0.7), FREE) == pytest.approx(np.full(signals, 0.7))


def test_folds_are_dealt_among_the_songs_that_count(tmp_path: Path) -> None:
    halved = simulated(10, 3, bias=0.4)
    for values in (halved.energy, halved.constant, halved.cross):
        values[1::2] = 0
    for joint in (False, True):
        bass, vocals = search(
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


def test_of_two_songs_no_prior_is_chosen_inside_or_outside(tmp_path: Path) -> None:
    products = simulated(2, 3, bias=0.4)
    (found,) = search(pretended(tmp_path, bass=products), SearchOptions()).found
    (given,) = search(pretended(tmp_path, bass=products), SearchOptions(prior=UNCHOSEN)).found
    assert found.prior == UNCHOSEN
    assert found.validated == pytest.approx(given.validated)
    assert np.array_equal(found.weights, given.weights)
    assert any("too few songs to choose the prior" in note for note in found.notes)
    assert not any("prior" in note for note in given.notes)
    (three,) = search(pretended(tmp_path, bass=simulated(3, 3)), SearchOptions()).found
    assert not any("prior" in note for note in three.notes)


def test_the_prior_that_does_best_on_held_out_songs_is_chosen() -> None:
    far, published = simulated(40, 3, bias=0.5), np.full(3, 1 / 3)
    assert validate([BlendProblem(far, published, np.arange(40))], 10, FREE, None).prior <= 1
    few = simulated(4, 3, seed=1)
    right = best(simulated(400, 3, seed=1), published)
    strict = validate([BlendProblem(few, right, np.arange(4))], 4, FREE, None).prior
    assert strict >= 10, "four songs do not beat weights that four hundred gave"


def test_folds_of_another_number_than_songs_allow_are_refused(tmp_path: Path) -> None:
    whole = pretended(tmp_path, bass=simulated(3, 3))
    for folds in (1, 4):
        with pytest.raises(KmdxError, match=f"--folds {folds}: expected 2 to 3"):
            search(whole, SearchOptions(folds=folds))


def pretended(folder: Path, published: float | None = None, **products: InnerProducts) -> Collection:
    """A collection of constructed inner products; published weights are equal shares, or all the same."""
    stems = []
    for name, each in products.items():
        count = each.cross.shape[1]
        weights = np.full(count, 1 / count if published is None else published)
        values = np.full(len(each.energy), 600.0)
        stems.append(
            StemProducts(name, tuple(f"{name}_{number}" for number in range(count)), weights, each, values)
        )
    songs = tuple(f"song {number}" for number in range(len(stems[0].products.energy)))
    return Collection(folder, plan_file.load("htdemucs"), songs, tuple(stems), {}, (), {})


def test_weights_that_gain_on_held_out_songs_are_taken_and_others_not(tmp_path: Path) -> None:
    gaining, idle = simulated(12, 3, bias=0.6), known_best(np.full(3, 1 / 3), 12)
    result = search(pretended(tmp_path, bass=gaining, drums=idle), SearchOptions())
    bass, drums = result.found
    assert bass.recommended
    assert bass.gains.mean() > 1
    assert bass.fitted_sdr.mean() > bass.validated.mean() > bass.published_sdr.mean()
    assert bass.expected == bass.validated.mean()
    assert not drums.recommended, "equal shares are the best there is"
    assert drums.gains.mean() <= 0
    assert np.array_equal(drums.weights_to_use, drums.stem.published)
    assert drums.expected == drums.published_sdr.mean()
    overridden = search(pretended(tmp_path, bass=gaining, drums=idle), SearchOptions(prior=0, anyway=True))
    assert all(each.recommended for each in overridden.found)
    assert np.array_equal(overridden.found[1].weights_to_use, overridden.found[1].weights)


def test_jointly_stems_share_the_prior_and_the_verdict(tmp_path: Path) -> None:
    gaining, losing = simulated(12, 3, bias=0.6), simulated(12, 3, 1)
    apart = search(pretended(tmp_path, bass=gaining, drums=losing), SearchOptions())
    jointly = search(pretended(tmp_path, bass=gaining, drums=losing), SearchOptions(joint=True))
    assert apart.found[0].prior != apart.found[1].prior
    assert jointly.found[0].prior == jointly.found[1].prior
    assert {each.recommended for each in jointly.found} == {jointly.song_gains.mean() > 0}
    both = [jointly.found[0].gains, jointly.found[1].gains]
    assert jointly.song_gains == pytest.approx(np.mean(both, axis=0))


def test_songs_in_which_the_true_stem_is_silent_are_left_out_and_named(tmp_path: Path) -> None:
    products = simulated(6, 3, bias=0.4)
    products.energy[2], products.constant[2], products.cross[2] = 0, 0, 0
    (found,) = search(pretended(tmp_path, vocals=products), SearchOptions(prior=0)).found
    without = products.of_songs(np.arange(6) != 2)
    assert found.weights == pytest.approx(best(without, found.stem.published), abs=1e-6)
    assert found.weights != pytest.approx(best(products, found.stem.published), abs=1e-4)
    assert len(found.validated) == 5
    assert any("silent are left out" in note and note.endswith("song 2") for note in found.notes)

    silent = InnerProducts(
        *(0 * value for value in (products.energy, products.energy, products.cross)), products.gram
    )
    both = search(pretended(tmp_path, vocals=silent, bass=simulated(6, 2)), SearchOptions())
    assert both.silent == ("vocals",)
    assert [each.stem.name for each in both.found] == ["bass"]
    with pytest.raises(KmdxError, match="every true stem is silent"):
        search(pretended(tmp_path, vocals=silent), SearchOptions())


def test_dither_alone_is_silence(tmp_path: Path) -> None:
    """A step of 16 bits up and down: not a zero, but any estimate of it is all error."""
    products = simulated(6, 3, bias=0.4)
    dithered = products.of_songs(np.arange(6))
    energy = 600 * inner_products.STEP**2
    dithered.energy[2], dithered.constant[2], dithered.cross[2] = energy, energy, 0
    (found,) = search(pretended(tmp_path, vocals=dithered), SearchOptions(prior=0)).found
    without = products.of_songs(np.arange(6) != 2)
    assert found.weights == pytest.approx(best(without, found.stem.published), abs=1e-6)
    assert found.weights.sum() > 0.5
    assert any("silent are left out" in note and note.endswith("song 2") for note in found.notes)
    dithered.energy[2] *= 16
    (found,) = search(pretended(tmp_path, vocals=dithered), SearchOptions(prior=0)).found
    assert len(found.validated) == 6


def test_one_song_is_refused_unless_it_is_to_be_taken_anyway(tmp_path: Path) -> None:
    alone = pretended(tmp_path, bass=simulated(1, 3, bias=0.5))
    with pytest.raises(KmdxError, match="has one song.*--anyway"):
        search(alone, SearchOptions())
    (found,) = search(alone, SearchOptions(anyway=True)).found
    assert found.validated is None
    assert found.expected is None
    assert found.fitted_sdr > found.published_sdr
    assert any("too few songs" in note for note in found.notes)


def test_collinear_signals_are_noted(tmp_path: Path) -> None:
    products = simulated(5, 3)
    (plain,) = search(pretended(tmp_path, bass=products), SearchOptions()).found
    (doubled,) = search(
        pretended(tmp_path, bass=products.of_signals(np.array([0, 1, 1]))), SearchOptions()
    ).found
    assert not plain.notes
    assert any("collinear" in note for note in doubled.notes)


# Flat plans and known signals


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weight files of networks that run, in their order."""
    files: list[str] = []
    estimate = ensemble.SongSignals.estimate

    def noted(song: ensemble.SongSignals, name: str, network: str, reference: str) -> dict[str, Signal]:
        files.append(song.plan.networks[network].weight.path.stem)
        return estimate(song, name, network, reference)

    monkeypatch.setattr(ensemble.SongSignals, "estimate", noted)
    return files


@pytest.fixture(scope="module")
def plan_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small networks in stages, with blends at two levels and a residual in which vocals prevail."""
    folder = tmp_path_factory.mktemp("two")
    for name, seed in (("one", 1), ("two", 2)):
        torch.save({"state": tiny.demucs(tiny.HTDEMUCS, seed).state_dict()}, folder / f"{name}.ckpt")
    networks = {
        name: {
            "weights": {"file": f"{name}.ckpt", "architecture": tiny.HTDEMUCS},
            "overlap_add": {"overlap": 0.1},
        }
        for name in ("one", "two")
    }
    signals = {
        "x": {"normalize": "mixture"},
        "V": {"network": "one", "hears": "x"},
        "W": {"network": "two", "hears": "mixture"},
        "rest": {"sum": {"mixture": 1, "W.drums": -0.05}},
        "x1": {"sum": {"x": 1, "V.vocals": -0.3, "V.other": -0.1}},
        "D": {"network": "two", "hears": "x1"},
        "normal_drums": {"sum": {"V.drums": 0.75, "D.drums": 0.25}, "denormalize": "x"},
    }
    stems = {
        "bass": {"sum": {"V.bass": 1}, "denormalize": "x"},
        "drums": {"sum": {"normal_drums": 0.8, "W.drums": 0.2}},
        "other": {"sum": {"x1": 0.1, "D.drums": -0.02}, "denormalize": "x"},
        "vocals": {"sum": {"rest": 0.9, "W.vocals": 0.1}},
    }
    path = folder / "two.yaml"
    content = {
        "title": "Two",
        "description": "Tiny.",
        "networks": networks,
        "signals": signals,
        "stems": stems,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def test_blends_are_written_out_and_residuals_stay_whole(plan_of_two: Path) -> None:
    flat = flatten(plan_file.load(plan_of_two)).plan
    terms = {stem: dict(flat.nodes[stem].terms) for stem in STEMS}
    assert terms["drums"] == pytest.approx({"V_drums": 0.6, "D_drums": 0.2, "W_drums": 0.2})
    assert terms["vocals"] == {"rest": 0.9, "W_vocals": 0.1}
    assert terms["other"] == {"published_other": 1}
    assert flat.nodes["D_drums"] == Sum({"D.drums": 1.0}, "x")
    assert flat.nodes["W_drums"] == Sum({"W.drums": 1.0}, None)
    everything = flatten(plan_file.load(plan_of_two), all_estimates=True).plan
    assert dict(everything.nodes["bass"].terms) == {"V_bass": 1, "W_bass": 0, "D_bass": 0}


def test_flat_plans_give_the_same_stems(plan_of_two: Path, tmp_path: Path) -> None:
    flat = flatten(plan_file.load(plan_of_two), all_estimates=True)
    path = tmp_path / "flat.yaml"
    path.write_text(plan_file.dump(flat.plan), "utf-8")
    song = noise(22_050)
    published = Separator(plan_of_two, device="cpu", precision="fp32").separate(song, 44100)
    stems = Separator(path, device="cpu", precision="fp32").separate(song, 44100)
    for stem in STEMS:
        assert stems[stem] == pytest.approx(published[stem], abs=1e-6), stem


def test_a_flat_plan_is_flat_already(plan_of_two: Path) -> None:
    once = plan_writer.reweighted(flatten(plan_file.load(plan_of_two)).plan, {})
    twice = flatten(once).plan
    for stem in STEMS:
        assert twice.nodes[stem] == once.nodes[stem]


def test_leaderboard_c_made_flat_gives_the_same_stems(leaderboard: Path, tmp_path: Path) -> None:
    path = tmp_path / "flat.yaml"
    path.write_text(plan_file.dump(flatten(plan_file.load(leaderboard)).plan), "utf-8")
    flat = plan_file.load(path)
    assert dict(flat.nodes["drums"].terms) == pytest.approx(
        {"mdx_drums": 0.08, "D_drums": 0.92 * 0.6, "M_drums": 0.92 * 0.26, "A_drums": 0.92 * 0.14}
    )
    assert dict(flat.nodes["other"].terms) == pytest.approx(
        {"mdx_other": 0.4, "x3_": 0.6 * 0.68, "M_other": 0.6 * 0.04, "O_other": 0.6 * 0.28}
    )
    song = noise(12_000)
    published = Separator(leaderboard, device="cpu", precision="fp32").separate(song, 44100)
    for stem, samples in Separator(path, device="cpu", precision="fp32").separate(song, 44100).items():
        assert decibels(published[stem], samples) > 100, stem


@pytest.mark.parametrize("name", plan_file.names())
def test_the_packages_plans_can_be_written_and_read_and_made_flat(name: str) -> None:
    plan = plan_file.load(name)
    again = plan_file.parse(plan_file.dump(plan), name)
    for field in ("title", "description", "sample_rate", "networks", "nodes", "stems"):
        assert getattr(again, field) == getattr(plan, field), field
    flat = flatten(plan, all_estimates=True)
    assert set(flat.own) == set(plan.stems) & set(STEMS)
    read = plan_file.parse(plan_file.dump(flat.plan), name)
    for stem in flat.own:
        blended = (name, stem) == ("mini", "other")  # of estimates that are taken quieter
        total = sum(plan.nodes[stem].terms.values()) if blended else 1
        assert sum(read.nodes[stem].terms.values()) == pytest.approx(total), stem
        assert read.networks_used([stem])


def test_weights_of_ones_own_are_named_from_the_plans_folder(plan_of_two: Path, tmp_path: Path) -> None:
    plan = plan_file.load(plan_of_two)
    text = plan_file.dump(plan, tmp_path)
    again = plan_file.parse(text, "again", tmp_path)
    for name, use in again.networks.items():
        assert use.weight.path.resolve() == plan.networks[name].weight.path.resolve()
    assert not Path(yaml.safe_load(text)["networks"]["one"]["weights"]["file"]).is_absolute()


def test_networks_that_known_signals_make_needless_do_not_run(plan_of_two: Path, ran: list[str]) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    song = noise(22_050)
    whole = separator.signals(song, 44100, [*STEMS, "V.vocals", "V.other", "V.drums", "V.bass", "D.drums"])
    assert ran == ["one", "two", "two"]

    ran.clear()
    known = {name: whole[name] for name in ("V.vocals", "V.other", "V.drums", "V.bass")}
    again = separator.signals(song, 44100, STEMS, known=known)
    assert ran == ["two", "two"]
    for stem in STEMS:
        assert np.array_equal(again[stem], whole[stem]), stem

    ran.clear()
    changed = separator.signals(song, 44100, ["other"], known={**known, "D.drums": whole["D.drums"] * 0})
    assert ran == []
    assert not np.array_equal(changed["other"], whole["other"])

    ran.clear()
    assert np.array_equal(
        separator.signals(song, 44100, ["bass"], known={"bass": whole["drums"]})["bass"], whole["drums"]
    )
    assert ran == []


def test_known_signals_that_cannot_be_are_refused(plan_of_two: Path) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    song = noise(2000)
    for name, message in (
        ("x", "'x' cannot be given"),
        ("mixture", "'mixture' cannot be given"),
        ("V.vocal", "did you mean 'V.vocals'"),
    ):
        with pytest.raises(KmdxError, match=message):
            separator.signals(song, 44100, ["bass"], known={name: song})
    with pytest.raises(KmdxError, match=r"V.bass: shape \(1999, 2\), but the song's is \(2000, 2\)"):
        separator.signals(song, 44100, ["bass"], known={"V.bass": song[1:]})


# Collected from files


class Done(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


SONGS = ("a", "b, quiet", "c, no bass", "d")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short songs in which vocals prevail; one is some steps of 16 bits loud, one has no bass."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(SONGS):
        song = folder / "test" / name
        song.mkdir(parents=True)
        level = 1.6e-3 if "quiet" in name else 0.1
        stems = {
            stem: noise(
                24_000 + 100 * number,
                seed=10 * number + index,
                level=level * (1 if stem == "vocals" else 0.1),
            )
            for index, stem in enumerate(STEMS)
        }
        if "no bass" in name:
            stems["bass"][:] = 0
        stems = {stem: np.round(samples * 32767) / 32768 for stem, samples in stems.items()}
        for stem, samples in {**stems, "mixture": sum(stems.values())}.items():
            soundfile.write(song / f"{stem}.wav", samples, 44100)
    return folder


COLLECT = ("--all-estimates", "--device", "cpu", "--precision", "fp32")


def call(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["blend_search", *map(str, arguments)])
        try:
            command.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run the command and take what it prints."""

    def run(*arguments: object) -> Done:
        code = call(*arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def collected(plan_of_two: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection of these songs."""
    folder = tmp_path_factory.mktemp("collected") / "two"
    assert call("collect", plan_of_two, data, "-o", folder, *COLLECT) == 0
    return folder


@pytest.fixture
def copied(collected: Path, tmp_path: Path) -> Path:
    """A collection to change."""
    return shutil.copytree(collected, tmp_path / "copied")


def separated(plan: Path, data: Path, output: Path) -> None:
    """Let the package's own command write 16-bit stems of all songs."""
    arguments = [
        "separate",
        str(data),
        "-o",
        str(output),
        "-e",
        str(plan),
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kmdx", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code


def measured(data: Path, output: Path) -> dict[str, dict[str, float]]:
    """What the evaluator says of each song's stems from the files."""
    return {
        name: score_song(
            {stem: data / "test" / name / f"{stem}.wav" for stem in STEMS},
            {stem: output / "test" / name / f"{stem}.wav" for stem in STEMS},
        ).scores["global_sdr"]
        for name in SONGS
    }


def test_what_is_foretold_is_what_the_evaluator_measures_on_16_bit_files(
    run: Callable[..., Done], plan_of_two: Path, collected: Path, data: Path, tmp_path: Path
) -> None:
    found = tmp_path / "found.yaml"
    done = run(
        "solve", collected, "-o", found, "--anyway", "--prior", "0.01", "--json", tmp_path / "all.json"
    )
    assert done.code == 0, done.err
    said = json.loads((tmp_path / "all.json").read_text("utf-8"))["stems"]
    for plan, key in ((plan_of_two, "published_sdr"), (found, "fitted_sdr")):
        output = tmp_path / key
        separated(plan, data, output)
        scores = measured(data, output)
        for stem in STEMS:
            for song, sdr in said[stem][key].items():
                # Of stems of a few steps of 16 bits, rounding errors are not quite those of noise.
                few = "quiet" in song and stem != "vocals"
                assert sdr == pytest.approx(scores[song][stem], abs=0.1 if few else 0.01), (key, song, stem)
    assert set(said["bass"]["published_sdr"]) == set(SONGS) - {"c, no bass"}
    assert min(said["vocals"]["fitted_sdr"].values()) > 10, "vocals prevail, and errors are small"


@pytest.mark.parametrize("offset", [0.0, -0.5])
def test_what_16_bits_do_to_a_very_quiet_stem_is_foretold(offset: float, tmp_path: Path) -> None:
    """Also where the true stem was itself rounded down, so that half a step is no error."""
    truth, error = noise(40_000, level=1e-3), noise(40_000, seed=1, level=1e-4)
    truth += np.float32(offset * inner_products.STEP)
    estimate = truth + error - np.float32(offset * inner_products.STEP)
    audio.write(tmp_path / "estimate.wav", estimate, 44100)
    scored = global_sdr(truth, soundfile.read(tmp_path / "estimate.wav", dtype="float32")[0])
    (foretold,) = inner_products.measure(truth, [estimate]).sdr(np.ones(1))
    assert foretold == pytest.approx(scored, abs=0.01)
    assert abs(global_sdr(truth, estimate) - scored) > 0.02


def test_inner_products_are_those_of_whole_signals(
    collected: Path, plan_of_two: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(collected)
    song = data / "test" / "d"
    mixture = soundfile.read(song / "mixture.wav", dtype="float32")[0]
    truth = soundfile.read(song / "drums.wav", dtype="float32")[0]
    stem = next(stem for stem in whole.stems if stem.name == "drums")
    separator = Separator(collected / "plan.yaml", device="cpu", precision="fp32")
    found = separator.signals(mixture, 44100, stem.signals)
    exact = np.stack([found[name].ravel() for name in stem.signals], dtype=np.float64)
    number = whole.songs.index("d")
    assert stem.products.gram[number] == pytest.approx(exact @ exact.T, rel=1e-5, abs=1e-7)
    assert stem.products.cross[number] == pytest.approx(
        exact @ (truth.astype(float).ravel() + inner_products.STEP / 2), rel=1e-4, abs=1e-6
    )
    assert stem.products.energy[number] == pytest.approx(np.square(truth.astype(float)).sum())
    assert stem.published == pytest.approx([0.6, 0.2, 0.2])
    assert whole.costs.keys() == {"V", "W", "D"}
    assert all(cost > 0 for cost in whole.costs.values())
    monkeypatch.setattr("kmdx.signals.BLOCK", 1000)
    rows = [truth, *(found[name] for name in stem.signals)]
    for name, value in vars(inner_products.measure(rows[0], rows[1:])).items():
        assert value[0] == pytest.approx(getattr(stem.products, name)[number], rel=1e-6, abs=1e-9), name


def test_each_network_runs_once_a_song(
    run: Callable[..., Done], plan_of_two: Path, data: Path, tmp_path: Path, ran: list[str]
) -> None:
    arguments = ("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT)
    assert run(*arguments, "--tracks", "a").code == 0
    assert sorted(ran) == ["one", "two", "two"]
    assert run(*arguments).code == 0
    assert len(ran) == 3 * len(SONGS), "the first song was there"
    done = run(*arguments)
    assert done.err.count("already collected") == len(SONGS)
    assert len(ran) == 3 * len(SONGS)


def test_a_collection_goes_on_after_an_interruption(
    run: Callable[..., Done], collected: Path, plan_of_two: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    measure = collecting.measure_song

    def interrupted(separator: Separator, own: Any, track: Any) -> Any:
        if track.name == SONGS[2]:
            raise KeyboardInterrupt
        return measure(separator, own, track)

    monkeypatch.setattr(collecting, "measure_song", interrupted)
    arguments = ("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT)
    done = run(*arguments)
    assert done.code == 130
    assert "repeat the command to resume" in done.err
    assert load(tmp_path / "new").songs == SONGS[:2]
    monkeypatch.setattr(collecting, "measure_song", measure)
    assert run(*arguments).code == 0
    for again, before in zip(load(tmp_path / "new").stems, load(collected).stems, strict=True):
        assert np.array_equal(again.products.gram, before.products.gram)


def test_a_collection_of_other_things_is_refused(
    run: Callable[..., Done], plan_of_two: Path, data: Path, copied: Path, small: Path, tmp_path: Path
) -> None:
    for plan, options, difference in (
        (small, COLLECT, "ensemble was two, is small"),
        (plan_of_two, COLLECT[1:], "all_estimates was True, is False"),
        (plan_of_two, (*COLLECT, "--speed", "fast"), "speed was leaderboard, is fast"),
        (plan_of_two, (*COLLECT, "--engine", "plain"), "engine was tuned, is plain"),
    ):
        done = run("collect", plan, data, "-o", copied, *options)
        assert (done.code, done.out) == (2, "")
        assert difference in done.err
    other = shutil.copytree(plan_of_two.parent, tmp_path / "other")
    torch.save({"state": tiny.demucs(tiny.HTDEMUCS, 9).state_dict()}, other / "two.ckpt")
    done = run("collect", other / "two.yaml", data, "-o", copied, *COLLECT)
    assert done.code == 2
    assert "weights." in done.err


def test_a_song_that_changed_is_collected_again(
    run: Callable[..., Done], plan_of_two: Path, data: Path, copied: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(data, tmp_path / "data")
    for stem in (*STEMS, "mixture"):
        path = changed / "test" / "a" / f"{stem}.wav"
        samples, rate = soundfile.read(path)
        soundfile.write(path, samples * 0.5, rate)
    before = load(copied).stems[0].products.energy
    done = run("collect", plan_of_two, changed, "-o", copied, *COLLECT)
    assert done.code == 0
    assert done.err.count("already collected") == 3
    after = load(copied).stems[0].products.energy
    assert after[0] == pytest.approx(before[0] / 4, rel=1e-2)
    assert np.array_equal(after[1:], before[1:])


def test_signals_are_kept_if_asked_for(
    run: Callable[..., Done], plan_of_two: Path, data: Path, copied: Path
) -> None:
    arguments = ("collect", plan_of_two, data, "-o", copied, *COLLECT, "--tracks", "d", "--keep")
    assert not (copied / "signals").exists()
    assert run(*arguments).code == 0
    stem = next(stem for stem in load(copied).stems if stem.name == "vocals")
    rows = [soundfile.read(copied / "signals" / "d" / "vocals" / f"{name}.wav")[0] for name in stem.signals]
    exact = np.stack([row.ravel() for row in rows])
    assert stem.products.gram[SONGS.index("d")] == pytest.approx(exact @ exact.T, rel=1e-9)
    assert "already collected" in run(*arguments).err


def test_a_record_outlives_signals_that_cannot_be_kept(
    run: Callable[..., Done], plan_of_two: Path, data: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copied / "songs" / "d.json").read_text("utf-8")
    arguments = ("collect", plan_of_two, data, "-o", copied, *COLLECT, "--tracks", "d", "--keep")

    def full(*_: Any) -> None:
        raise KmdxError("no space left on device")

    monkeypatch.setattr(audio, "write_all", full)
    done = run(*arguments)
    assert done.code == 1
    assert "1 of 1 songs are in" in done.out
    assert "d: collected, but its signals could not be kept: no space left" in done.err
    assert "warning: not all signals were kept" in done.err
    record = json.loads((copied / "songs" / "d.json").read_text("utf-8"))
    assert record["status"] == "ok"
    assert record["stems"] == json.loads(before)["stems"]

    def broken(*_: Any) -> None:
        raise KmdxError("the network is gone")

    monkeypatch.setattr(collecting, "measure_song", broken)
    unchanged = (copied / "songs" / "d.json").read_text("utf-8")
    assert run(*arguments).code == 1
    assert (copied / "songs" / "d.json").read_text("utf-8") == unchanged


def test_a_song_with_nan_is_named_and_left_out(
    run: Callable[..., Done], plan_of_two: Path, data: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(data, tmp_path / "data")
    samples, rate = soundfile.read(spoilt / "test" / "a" / "drums.wav", dtype="float32")
    samples[100] = np.nan
    soundfile.write(spoilt / "test" / "a" / "drums.wav", samples, rate, "FLOAT")
    done = run("collect", plan_of_two, spoilt, "-o", tmp_path / "new", *COLLECT)
    assert done.code == 1
    assert "3 of 4 songs are in" in done.out
    assert "a: NaN or infinity in its samples, left out" in done.err
    solved = run("solve", tmp_path / "new", "--json", tmp_path / "all.json")
    assert "a is left out: NaN or infinity" in solved.err
    assert json.loads((tmp_path / "all.json").read_text("utf-8"))["songs"] == [*SONGS[1:]]
    alone = run("collect", plan_of_two, spoilt, "-o", tmp_path / "alone", *COLLECT, "--tracks", "a")
    assert alone.code == 2
    assert "none of 1 songs can be used; a: NaN" in alone.err


def test_a_network_that_gives_nan_fails_the_song(
    run: Callable[..., Done], plan_of_two: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = ensemble.SongSignals.estimate

    def spoilt(song: ensemble.SongSignals, name: str, network: str, reference: str) -> dict[str, Signal]:
        estimates = estimate(song, name, network, reference)
        next(iter(estimates.values())).tensor[0, 5] = math.nan
        return estimates

    monkeypatch.setattr(ensemble.SongSignals, "estimate", spoilt)
    done = run("collect", plan_of_two, data, "-o", tmp_path / "new", *COLLECT, "--tracks", "a")
    assert done.code == 1
    assert "NaN" in done.err
    solved = run("solve", tmp_path / "new")
    assert solved.code == 2
    assert "none of its 1 songs was collected; a: " in solved.err


def test_the_written_plan_says_where_it_is_from_and_has_what_is_needed(
    run: Callable[..., Done], collected: Path, plan_of_two: Path, tmp_path: Path
) -> None:
    path = tmp_path / "found.yaml"
    done = run("solve", collected, "-o", path, "--non-negative", "--sum-to-one", "--anyway", "--folds", "2")
    assert done.code == 0, done.err
    assert "cross-validated" in done.out
    assert str(path) in done.out.replace("\n", "")
    text = path.read_text("utf-8")
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert plan_file.load(plan_of_two).digest[:12] in head
    for said in (
        "4 songs",
        *SONGS,
        "2 folds",
        "weights sum to one",
        "none is negative",
        "Expected",
        "fitted",
    ):
        assert said in head, said
    plan = plan_file.load(path)
    assert "found by evaluator.blend_search" in plan.description
    for stem in STEMS:
        terms = plan.nodes[stem].terms
        assert sum(terms.values()) == pytest.approx(1, abs=1e-5)
        assert all(weight > 0 for weight in terms.values())
    assert set(plan.networks) == set(plan.networks_used(plan.stems)), "no network that nothing needs"
    again = tmp_path / "again.yaml"
    run("solve", collected, "-o", again, "--non-negative", "--sum-to-one", "--anyway", "--folds", "2")
    assert again.read_text("utf-8") == text


def test_stems_that_gain_nothing_keep_their_published_weights_in_the_plan(
    run: Callable[..., Done], copied: Path, tmp_path: Path
) -> None:
    idle = known_best(np.array([0.6, 0.2, 0.2]), len(SONGS))
    for number, path in enumerate(sorted((copied / "songs").glob("*.json"))):
        record = json.loads(path.read_text("utf-8"))
        record["stems"]["drums"] |= {
            "energy": idle.energy[number],
                "constant": idle.energy[number], "cross": idle.cross[number].tolist(), "gram": idle.gram[number].tolist(),
        }  # fmt: skip
        path.write_text(json.dumps(record), "utf-8")
    done = run("solve", copied, "-o", tmp_path / "found.yaml")
    assert done.code == 0, done.err
    assert "published: no gain on held-out songs" in done.out
    terms = plan_file.load(tmp_path / "found.yaml").nodes["drums"].terms
    assert terms == pytest.approx({"V_drums": 0.6, "D_drums": 0.2, "W_drums": 0.2})
    assert "predicted" in done.err, "what was rendered is not what these inner products say"


def test_nothing_is_written_when_nothing_gains(
    run: Callable[..., Done], copied: Path, tmp_path: Path
) -> None:
    done = run("solve", copied, "-o", tmp_path / "found.yaml", "--prior", "inf")
    assert done.code == 1
    assert "no weights are recommended" in done.out
    assert not (tmp_path / "found.yaml").exists()


def test_mistakes_are_one_line(
    run: Callable[..., Done], collected: Path, copied: Path, data: Path, plan_of_two: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")
    strings = tmp_path / "strings.yaml"
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    content["stems"] = {"strings": content["stems"]["other"]}
    strings.write_text(yaml.safe_dump(content).replace("one.ckpt", str(plan_of_two.with_name("one.ckpt"))))
    (copied / "songs" / "a.json").write_text("{")
    for arguments, message in (
        (("solve", tmp_path), "is not a collection"),
        (("solve", tmp_path / "other"), "is another kind of run"),
        (("solve", copied), "a.json is damaged"),
        (("solve", collected, "--prior", "much"), "--prior much: expected auto"),
        (("solve", collected, "--prior", "-1"), "--prior -1: expected auto"),
        (("solve", collected, "--prior", "nan"), "--prior nan: expected auto"),
        (("solve", collected, "--folds", "9"), "--folds 9: expected 2 to 4"),
        (("solve", collected, "-o", tmp_path / "found.txt"), "ends in .yaml"),
        (("solve", collected, "-o", tmp_path / "no" / "found.yaml"), "no folder"),
        (("collect", "htdemuks", data, "-o", tmp_path / "new"), "unknown ensemble 'htdemuks'"),
        (("collect", strings, data, "-o", tmp_path / "new"), "its stems are strings; expected bass"),
        (("collect", plan_of_two, tmp_path / "nowhere", "-o", tmp_path / "new"), "cannot be read"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--tracks", "zz"), "is named 'zz'"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--speed", "slow"), "unknown speed 'slow'"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--engine", "slow"), "unknown engine 'slow'"),
        (("collect", plan_of_two, data, "-o", tmp_path / "new", "--device", "moon"), "no device 'moon'"),
        (("collect", plan_of_two, data, "-o", data), "contains other files"),
    ):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert message in done.err, (message, done.err)
        assert len([line for line in done.err.splitlines() if not line.startswith("warning")]) == 1, done.err
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".txt"]


def test_plans_of_others_are_not_written_over(
    run: Callable[..., Done], copied: Path, plan_of_two: Path, staged: Path, data: Path, tmp_path: Path
) -> None:
    source, other = tmp_path / "source.yaml", tmp_path / "other.yaml"
    source.write_bytes(plan_of_two.read_bytes())
    other.write_text("title: mine\n", "utf-8")
    own = (copied / "plan.yaml").read_bytes()
    arguments = ("solve", copied, "--anyway", "--prior", "1", "-o")
    for path, message in (
        (copied / "plan.yaml", "is in the collection"),
        (source, "is the plan that the weights are for"),
    ):
        for force in ((), ("--force",)):
            done = run(*arguments, path, *force)
            assert done.code == 2
            assert message in done.err
    assert (copied / "plan.yaml").read_bytes() == own
    assert source.read_bytes() == plan_of_two.read_bytes()
    done = run("stages", staged, data, "-o", staged, "--force")
    assert "is the plan that the weights are for" in done.err
    done = run(*arguments, other)
    assert done.code == 2
    assert "use --force to overwrite it" in done.err
    assert other.read_text("utf-8") == "title: mine\n"
    assert run(*arguments, other, "--force").code == 0
    assert run(*arguments, other).code == 0, "its own plan is written over"
    assert "title: mine" not in other.read_text("utf-8")


def test_reports_and_pictures_spare_collections_and_plans(
    run: Callable[..., Done], copied: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    for asked, option in (("solve", "--json"), ("members", "--json"), ("members", "--svg")):
        for path, message in (
            (copied / "run.json", "is in the collection"),
            (copied / "songs" / "new.json", "is in the collection"),
            (tmp_path / "x.yaml", "has the file name of a plan"),
        ):
            done = run(asked, copied, option, path)
            assert (done.code, done.out) == (2, "")
            assert message in done.err
    twice = tmp_path / "x"
    assert "given for two outputs" in run("members", copied, "--json", twice, "--svg", twice).err
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("budget", ["0", "-1", "inf", "nan", "1e308"])
def test_budgets_that_cannot_be(
    run: Callable[..., Done], collected: Path, tmp_path: Path, budget: str
) -> None:
    done = run("members", collected, "--budget", budget, "--svg", tmp_path / "x.svg")
    assert done.code == 2
    assert "expected a real-time factor above 0" in done.err


def test_scratch_that_cannot_be_written_to(run: Callable[..., Done], staged: Path, data: Path) -> None:
    done = run("stages", staged, data, "--scratch", "/proc", "--dry-run")
    assert done.code == 2
    assert "name another folder with --scratch" in done.err


def test_songs_are_dealt_so_that_every_stem_has_some_in_two_folds() -> None:
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


def test_where_nothing_can_be_written_is_said_before_any_work(
    run: Callable[..., Done], collected: Path, tmp_path: Path
) -> None:
    for arguments in (("solve", "--json"), ("members", "--json"), ("members", "--svg")):
        done = run(arguments[0], collected, arguments[1], tmp_path / "no" / "file")
        assert (done.code, done.out) == (2, "")
        assert "no folder" in done.err
        assert "is a folder" in run(arguments[0], collected, arguments[1], tmp_path).err


# Members


def test_a_members_loss_is_that_of_weights_found_anew_without_its_signals(collected: Path) -> None:
    whole = load(collected)
    ensemble = Ensemble(whole, SearchOptions(folds=2), by_run=True)
    assert set(ensemble.members) == {"V", "W", "D"}
    left = ensemble.without("D")
    assert left is not None
    for stem in whole.stems:
        kept = np.array([number for number, signal in enumerate(stem.signals) if "D" not in signal])
        if stem.name == "other":  # its residual hears D as well
            kept = np.array([stem.signals.index("V_other"), stem.signals.index("W_other")])
        published = stem.published[kept]
        scale = stem.published.sum() / published.sum() if published.sum() else 0
        published = published * scale if scale else np.full(len(kept), stem.published.sum() / len(kept))
        problem = BlendProblem(stem.products.of_songs(stem.counted).of_signals(kept), published, stem.counted)
        (fold_of,) = deal([problem], 2)
        prior = choose([problem], FREE) if can_choose([problem], 2) else UNCHOSEN
        expected = held_out(problem, fold_of, FREE, [prior]).mean()
        assert left.sdr[stem.name] == pytest.approx(expected), stem.name
    assert left.real_time_factor == pytest.approx(whole.costs["V"] + whole.costs["W"])
    assert ensemble.whole.real_time_factor == pytest.approx(sum(whole.costs.values()))
    by_network = Ensemble(whole, SearchOptions(folds=2))
    assert by_network.members == {"one": {"V"}, "two": {"W", "D"}}
    without = by_network.without("two")
    assert without is not None
    assert without.plan.networks.keys() == {"one"}
    assert without.real_time_factor == pytest.approx(whole.costs["V"])


def test_a_member_that_a_stem_cannot_do_without_is_needed(
    run: Callable[..., Done], plan_of_two: Path, data: Path, tmp_path: Path
) -> None:
    assert run("collect", plan_of_two, data, "-o", tmp_path / "own", *COLLECT[1:]).code == 0
    ensemble = Ensemble(load(tmp_path / "own"), SearchOptions(), by_run=True)
    assert ensemble.without("V") is None, "without --all-estimates, bass has no other signal"
    done = run("members", tmp_path / "own", "--runs")
    assert done.code == 0, done.err
    assert [line.split()[-1] for line in done.out.splitlines() if line.startswith("V ")] == ["needed"]


def test_weights_of_what_is_left_are_brought_to_the_same_sum() -> None:
    for published, kept, expected in (
        ([0.5, 0.3, 0.2], [0, 1], [0.625, 0.375]),
        ([1.0, 0.0, 0.0], [1, 2], [0.5, 0.5]),
        ([1.0, 0.1 + 0.2, -0.3], [1, 2], [0.8, 0.2]),  # they cancel but for rounding
        ([1.0, 0.3, -0.4], [1, 2], [0.8, 0.1]),  # of the other sign
        ([-1.0, 0.5, 0.5], [0, 1], [-0.75, 0.75]),
    ):
        found = share(np.array(published), np.array(kept))
        assert found == pytest.approx(expected), published
        assert found.sum() == pytest.approx(sum(published), abs=1e-9)


def test_sets_with_a_stem_that_is_not_scored_are_all_tried(tmp_path: Path) -> None:
    """Piano is needed and not scored: its network is in every set, the others are still chosen among."""
    names = ("one", "two", "keys")
    networks = {
        name: {"weights": "mini_vocals", "trim_and_join": {"chunk": 130048, "trim": 2048}} for name in names
    }
    content = {
        "title": "Piano",
        "description": "Of three networks.",
        "networks": networks,
        "signals": {name.upper(): {"network": name, "hears": "mixture"} for name in names},
        "stems": {
            "vocals": {"sum": {"ONE.vocals": 0.5, "TWO.vocals": 0.5}},
            "piano": {"sum": {"KEYS.vocals": 1}},
        },
    }
    plan = flatten(plan_file.parse(yaml.safe_dump(content, sort_keys=False), "piano")).plan
    stem = replace(pretended(tmp_path, vocals=simulated(6, 2)).stems[0], signals=("ONE_vocals", "TWO_vocals"))
    costs = {"ONE": 1.0, "TWO": 2.0, "KEYS": 0.5}
    whole = Collection(tmp_path, plan, tuple("abcdef"), (stem,), {}, (), costs)
    sets = [*Ensemble(whole, SearchOptions(prior=1)).sets()]
    assert {each.members for each in sets} == {
        frozenset({"one", "keys"}),
        frozenset({"two", "keys"}),
        frozenset(names),
    }
    assert within(sets, 1.5).members == {"one", "keys"}
    with pytest.raises(KmdxError, match="no set of members can estimate every stem"):
        within([], 1.5)


def test_the_best_set_within_a_budget_is_found_written_and_runs(
    run: Callable[..., Done], collected: Path, data: Path, tmp_path: Path
) -> None:
    whole = load(collected)
    ensemble = Ensemble(whole, SearchOptions(folds=2), by_run=True)
    sets = {each.members: each for each in ensemble.sets()}
    assert len(sets) == 5, "D hears what V leaves"
    budget = 1.001 * (whole.costs["V"] + whole.costs["W"])
    affordable = [each for each in sets.values() if each.real_time_factor <= budget]
    best_of_them = within([*sets.values()], budget)
    assert best_of_them.score == max(each.score for each in affordable)
    path, svg = tmp_path / "cheap.yaml", tmp_path / "members.svg"
    arguments = ("members", collected, "--runs", "--folds", "2", "--budget", budget)
    done = run(*arguments, "-o", path, "--svg", svg, "--json", tmp_path / "members.json")
    assert done.code == 0, done.err
    assert f"Within a real-time factor of {budget:g}" in done.out
    plan = plan_file.load(path)
    assert {name for name in plan.nodes if name in ("V", "W", "D")} == best_of_them.members
    stems = Separator(path, device="cpu", precision="fp32").separate(noise(8000), 44100)
    assert all(np.isfinite(stem).all() for stem in stems.values())
    said = json.loads((tmp_path / "members.json").read_text("utf-8"))
    assert said["whole"]["score"] == pytest.approx(ensemble.whole.score)
    assert said["without"]["D"]["score"] == pytest.approx(ensemble.without("D").score)

    drawn = ElementTree.fromstring(svg.read_text("utf-8"))
    names = {element.tag.rpartition("}")[2] for element in drawn.iter()}
    assert {"circle", "path", "text"} <= names
    dots = [
        (float(dot.get("cx")), float(dot.get("cy"))) for dot in drawn.iter() if dot.tag.endswith("circle")
    ]
    everything = dots[-1]
    assert everything[0] == max(x for x, _ in dots), "the whole costs most"
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert {"all", "without D", "without V", f"budget {budget:g} ×"} <= set(texts)

    everything = run("members", collected, "--runs", "--folds", "2", "--budget", 1e9).out
    best_of_all = within([*sets.values()], 1e9)
    said = [float(number) for number in re.findall(r"(\d+\.\d+) (?:dB|×)", everything.partition("Within")[2])]
    assert said[0] == pytest.approx(best_of_all.score, abs=6e-4)
    assert best_of_all.score == max(each.score for each in sets.values())
    done = run("members", collected, "--budget", 1e-9)
    assert done.code == 2
    assert "the fastest set that estimates every stem" in done.err


def test_the_chosen_sets_weights_are_validated_against_its_share_of_the_published_ones(
    run: Callable[..., Done], collected: Path, tmp_path: Path
) -> None:
    whole = load(collected)
    ensemble = Ensemble(whole, SearchOptions(prior=0.1), by_run=True)
    part, result = ensemble.validated(ensemble.without("D"))
    for stem, each in zip(part.stems, result.found, strict=True):
        assert not any("D" in signal for signal in stem.signals)
        problem = BlendProblem(stem.products.of_songs(stem.counted), stem.published, stem.counted)
        (expected,) = validate([problem], 4, FREE, 0.1).sdr
        assert each.validated == pytest.approx(expected)
        assert each.published_sdr == pytest.approx(problem.products.sdr(stem.published))
        gain = (expected - each.published_sdr).mean()
        assert each.recommended == (gain > 1e-6)
    path = tmp_path / "share.yaml"
    budget = 1.001 * (whole.costs["V"] + whole.costs["W"])
    done = run("members", collected, "--runs", "--budget", budget, "--prior", "inf", "-o", path)
    assert done.code == 0, done.err
    assert "no new weights gain on held-out songs; the set keeps its share" in done.out
    plan = plan_file.load(path)
    shares = {stem.name: dict(zip(stem.signals, stem.published, strict=True)) for stem in whole.stems}
    if {"V_drums", "W_drums"} <= plan.nodes["drums"].terms.keys():
        assert shares["drums"]["D_drums"] == pytest.approx(0.2)
        assert plan.nodes["drums"].terms == pytest.approx({"V_drums": 0.75, "W_drums": 0.25})
    head = path.read_text("utf-8").partition("title")[0]
    assert "95%: " in head
    assert "the best of many" in head


# Stages


def test_moves_are_those_of_residuals_and_of_what_networks_hear() -> None:
    plan = plan_file.load("leaderboard_c")
    found = stage_moves.moves(plan)
    assert {move.node for move in found} == {"mdx_rest", "x1", "x2", "x3"}
    of_x1 = [dict(move.changes) for move in found if move.node == "x1"]
    assert of_x1 == [{"V.vocals": 1}, {"M.vocals": 1}, {"V.vocals": 1, "M.vocals": -1}]
    changed = found[-1].applied(plan, -0.1)
    assert changed.nodes["x3"].terms == {"x2": 1, "B.bass": -1.1}
    search = stage_moves.Search(plan, [], [], found)
    assert search.dependent_runs(next(move for move in found if move.node == "x1")) == ["D", "B"]
    assert search.dependent_runs(next(move for move in found if move.node == "x3")) == []
    assert {move.node for move in stage_moves.moves(plan, ["x2"])} == {"x2"}
    with pytest.raises(KmdxError, match="'x9' is not a sum that later stages take as input; available:"):
        stage_moves.moves(plan, ["x9"])


@pytest.fixture(scope="module")
def staged(plan_of_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan whose last stage is a residual that could be far better: vocals are to be left out of bass."""
    folder = tmp_path_factory.mktemp("staged")
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    for network in content["networks"].values():
        network["weights"]["file"] = str(plan_of_two.parent / network["weights"]["file"])
    content["signals"]["rest"] = {"sum": {"mixture": 1, "W.drums": -0.4, "V.drums": 0.1}}
    content["stems"]["vocals"] = {"sum": {"rest": 1}}
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def test_a_search_of_stages_costs_what_it_said_and_runs_only_what_changes(
    run: Callable[..., Done], staged: Path, data: Path, tmp_path: Path, ran: list[str]
) -> None:
    arguments = ("stages", staged, data, "--device", "cpu", "--precision", "fp32", "--search", 3)
    dry = run(*arguments, "--dry-run")
    assert dry.code == 0
    assert ran == []
    # x1 has three moves, each tried twice on three songs, and D hears it; rest costs nothing.
    said = 3 * 3 + 3 * 2 * 3 + 1 * (3 + 1)
    assert f"at most {said} network runs on 3 songs, plus 1 held out for the result" in dry.out
    assert "time unknown" in dry.out

    output = tmp_path / "found.yaml"
    done = run(*arguments, "-o", output)
    assert dry.out.strip() in done.out
    assert done.code == 0, done.err
    assert said - 1 <= len(ran) <= said
    assert ran.count("one") == 4, "the first network hears nothing that changes"
    found, published = plan_file.load(output), plan_file.load(staged)
    assert found.nodes["rest"].terms["W.drums"] > -0.4, "less of a random network is better"
    scores = {}
    for plan in (staged, output):
        separator = Separator(plan, device="cpu", precision="fp32")
        for song in SONGS:
            folder = data / "test" / song
            stems = separator.separate(soundfile.read(folder / "mixture.wav", dtype="float32")[0], 44100)
            truths = {stem: soundfile.read(folder / f"{stem}.wav", dtype="float32")[0] for stem in STEMS}
            sdr = [global_sdr(truths[stem], stems[stem]) for stem in STEMS if truths[stem].any()]
            scores[plan, song] = np.mean(sdr)
    held = [song for song in SONGS if f"Held out: {song}" in output.read_text("utf-8")]
    assert len(held) == 1
    searched = [song for song in SONGS if song not in held]
    for songs, name in ((searched, "searched"), (held, "held out")):
        (row,) = [line for line in done.out.splitlines() if line.startswith(name)]
        before, after = (np.mean([scores[plan, song] for song in songs]) for plan in (staged, output))
        said_count, said_before, said_after, said_gain = map(float, row.removeprefix(name).split()[:4])
        assert said_count == len(songs)
        assert said_before == pytest.approx(before, abs=0.02)
        assert said_after == pytest.approx(after, abs=0.02)
        assert said_gain == pytest.approx(said_after - said_before, abs=2e-3)
        assert after > before
    for name, node in published.nodes.items():
        if name not in {move.node for move in stage_moves.moves(published)}:
            assert found.nodes[name] == node, "only sums that stages hear, or residuals, are moved"


def test_estimates_of_a_search_have_their_room_on_the_disk(
    run: Callable[..., Done], staged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("stages", staged, data, "--device", "cpu", "--precision", "fp32", "--only", "x1")
    arguments = (*arguments, "--tracks", "[ad]", "--search", 1, "--scratch", tmp_path)
    most = 0
    play = stage_search._Song.score

    def watched(self: Any, *rest: Any) -> float:
        nonlocal most
        score = play(self, *rest)
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*.npy")))
        return score

    monkeypatch.setattr(stage_search._Song, "score", watched)
    done = run(*arguments)
    assert done.code in (0, 1), done.err
    tracks = find_tracks(data, "test", "[ad]")
    published = plan_file.load(staged)
    search = stage_moves.Search(published, tracks[:1], tracks[1:], stage_moves.moves(published, ["x1"]))
    assert 0.5 * search.cost().disk < most <= search.cost().disk + 128 * 20, "a file's head on top"
    assert "GB of disk" in done.out
    assert not [*tmp_path.iterdir()]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage_search.np, "save", full)
    done = run(*arguments)
    assert done.code == 2
    assert "estimates cannot be written (No space left on device)" in done.err
    monkeypatch.setattr(stage_search.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    done = run(*arguments)
    assert done.code == 2
    assert "only 0.00 GB are free; name another folder with --scratch" in done.err
    assert "no such folder" in run(*arguments[:-1], tmp_path / "no").err


def test_what_a_search_of_stages_refuses(
    run: Callable[..., Done], staged: Path, plan_of_two: Path, data: Path, copied: Path, tmp_path: Path
) -> None:
    flat = tmp_path / "flat.yaml"
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    for network in content["networks"].values():
        network["weights"]["file"] = str(plan_of_two.parent / network["weights"]["file"])
    content["signals"] = {"V": {"network": "one", "hears": "mixture"}}
    content["stems"] = {"bass": {"sum": {"V.bass": 1}}}
    flat.write_text(yaml.safe_dump(content), "utf-8")
    for arguments, message in (
        (("stages", flat, data), "no later stage takes a sum of estimates as input"),
        (("stages", staged, data, "--only", "rust"), "'rust' is not a sum"),
        (("stages", staged, data, "--step", "0"), "--step 0: expected"),
        (("stages", staged, data, "--search", "5"), "--search 5: expected 1 to 4"),
        (("stages", staged, data, "--collected", tmp_path), "is not a collection"),
        (("stages", "leaderboard_c", data, "--collected", copied), "a collection of another plan"),
        (("members", copied, "-o", tmp_path / "found.yaml"), "needs a --budget"),
        (("members", copied, "--budget", "-1"), "--budget -1: expected"),
    ):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert message in done.err, (message, done.err)
    for path in sorted((copied / "songs").glob("*.json"))[1:]:
        path.unlink()
    for command_name, message in (
        ("solve", "has one song, so weights found on it cannot be validated on another"),
        ("members", "too few songs to hold one out"),
    ):
        done = run(command_name, copied)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    alone = run(
        "stages",
        staged,
        data,
        "--tracks",
        "a",
        "--only",
        "rest",
        "--device",
        "cpu",
        "-o",
        tmp_path / "x.yaml",
    )
    assert alone.code == 1
    assert "no song was held out" in alone.out
    assert not (tmp_path / "x.yaml").exists()


def test_a_separator_goes_under_another_plan_of_its_networks(plan_of_two: Path, small: Path) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    plan = plan_file.load(plan_of_two)
    doubled = replace(plan, nodes={**plan.nodes, "bass": Sum({"V.bass": 2.0})})
    song = noise(8000)
    own, other = separator.separate(song, 44100), separator.under(doubled).separate(song, 44100)
    assert other["drums"] == pytest.approx(own["drums"], abs=1e-7)
    assert other["bass"].std() > 1.1 * own["bass"].std()
    assert separator.plan == plan
    with pytest.raises(KmdxError, match="not those that were loaded"):
        separator.under(plan_file.load(small))


def test_blends_may_be_deep_and_are_bounded_when_they_are_written_out() -> None:
    plan = plan_file.load("htdemucs")
    deep = {f"s{number}": Sum({f"s{number + 1}": 1.0}) for number in range(2000)}
    deep |= {"s2000": Sum({"V.vocals": 0.5}), "vocals": Sum({"s0": 1.0}, "x")}
    flat = flatten(replace(plan, nodes={**plan.nodes, **deep}), all_estimates=True).plan
    assert flat.nodes["vocals"].terms == {"V_vocals": 0.5, "D_vocals": 0.0, "B_vocals": 0.0}
    wide = {f"s{number}": Sum({f"s{number + 1}": 1.0, f"t{number}": 1.0}) for number in range(40)}
    wide |= {f"t{number}": Sum({f"s{number + 1}": 1.0}) for number in range(40)}
    wide |= {"s40": Sum({"V.vocals": 0.5}), "vocals": Sum({"s0": 1.0}, "x")}
    with pytest.raises(PlanError, match="vocals expands to more than 100000 terms"):
        flatten(replace(plan, nodes={**plan.nodes, **wide}))
