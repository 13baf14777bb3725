"""Ensembles without a member, and the best set of members within a budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import blend_cases as cases
import numpy as np
import pytest
import yaml
from blend_cases import COLLECT, FREE, Result, pretended, simulated
from conftest import noise

from evaluator.blend_search.ablation import Ensemble, share, within
from evaluator.blend_search.collection import Collection, load
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
from evaluator.blend_search.search import SearchOptions
from kmdx import Separator, plan_file
from kmdx.errors import KmdxError

collected, data, plan_of_two, run = cases.collected, cases.data, cases.plan_of_two, cases.run


def test_the_loss_of_a_member_is_measured_with_weights_refitted_without_it(collected: Path) -> None:
    whole = load(collected)
    ensemble = Ensemble(whole, SearchOptions(folds=2), by_run=True)
    assert set(ensemble.members) == {"V", "W", "D"}
    left = ensemble.without("D")
    assert left is not None
    for stem in whole.stems:
        kept = np.array([number for number, signal in enumerate(stem.signals) if "D" not in signal])
        if stem.name == "other":  # its residual also depends on D
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


def test_a_member_that_a_stem_depends_on_is_required(
    run: Callable[..., Result], plan_of_two: Path, data: Path, tmp_path: Path
) -> None:
    assert run("collect", plan_of_two, data, "-o", tmp_path / "own", *COLLECT[1:]).code == 0
    ensemble = Ensemble(load(tmp_path / "own"), SearchOptions(), by_run=True)
    assert ensemble.without("V") is None, "without --all-estimates, bass has no other signal"
    done = run("members", tmp_path / "own", "--runs")
    assert done.code == 0, done.err
    assert [line.split()[-1] for line in done.out.splitlines() if line.startswith("V ")] == ["needed"]


def test_remaining_weights_are_rescaled_to_the_same_sum() -> None:
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


def test_a_network_that_a_stem_needs_is_in_every_set(tmp_path: Path) -> None:
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
    made = pretended(tmp_path, vocals=simulated(6, 2), piano=simulated(6, 1)).stems
    stems = tuple(replace(stem, signals=plan.nodes[stem.name].inputs) for stem in made)
    costs = {"ONE": 1.0, "TWO": 2.0, "KEYS": 0.5}
    whole = Collection(tmp_path, plan, tuple("abcdef"), stems, {}, (), costs)
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
    run: Callable[..., Result], collected: Path, data: Path, tmp_path: Path
) -> None:
    whole = load(collected)
    ensemble = Ensemble(whole, SearchOptions(folds=2), by_run=True)
    sets = {each.members: each for each in ensemble.sets()}
    assert len(sets) == 5, "the input of D is what V leaves"
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
    titles = [element.text for element in drawn.iter() if element.tag.endswith("title")]
    assert len(titles) > len(sets)
    factors = [float(title.rpartition(", ")[2].rstrip(" ×")) for title in titles]
    assert factors[-1] == max(factors), "the whole costs most"
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
    run: Callable[..., Result], collected: Path, tmp_path: Path
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
    assert "no new weights improve held-out songs; the set keeps its published weights" in done.out
    plan = plan_file.load(path)
    shares = {stem.name: dict(zip(stem.signals, stem.published, strict=True)) for stem in whole.stems}
    if {"V_drums", "W_drums"} <= plan.nodes["drums"].terms.keys():
        assert shares["drums"]["D_drums"] == pytest.approx(0.2)
        assert plan.nodes["drums"].terms == pytest.approx({"V_drums": 0.75, "W_drums": 0.25})
    head = path.read_text("utf-8").partition("title")[0]
    assert "95%: " in head
    assert "the best of many" in head
