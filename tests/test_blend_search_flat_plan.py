"""Flat plans give the same stems, and known signals replace the networks that make them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import blend_cases as cases
import numpy as np
import pytest
import yaml
from blend_cases import STEMS
from conftest import decibels, noise

from evaluator.blend_search import plan_writer
from evaluator.blend_search.flat_plan import flatten, indivisible, scored_stems
from kmdx import Separator, plan_file
from kmdx.errors import KmdxError, PlanError
from kmdx.nodes import Sum

plan_of_two, ran = cases.plan_of_two, cases.ran


def test_blends_are_expanded_and_residuals_stay_whole(plan_of_two: Path) -> None:
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


def test_flattening_a_flat_plan_changes_nothing(plan_of_two: Path) -> None:
    once = plan_writer.reweighted(flatten(plan_file.load(plan_of_two)).plan, {})
    twice = flatten(once).plan
    for stem in STEMS:
        assert twice.nodes[stem] == once.nodes[stem]


def test_leaderboard_c_flattened_gives_the_same_stems(leaderboard: Path, tmp_path: Path) -> None:
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
def test_the_packages_plans_can_be_written_read_and_flattened(name: str) -> None:
    plan = plan_file.load(name)
    again = plan_file.parse(plan_file.dump(plan), name)
    for field in ("title", "description", "sample_rate", "networks", "nodes", "stems"):
        assert getattr(again, field) == getattr(plan, field), field
    flat = flatten(plan, all_estimates=True)
    assert set(flat.own) == set(plan.stems)
    read = plan_file.parse(plan_file.dump(flat.plan), name)
    for stem in flat.own:
        blended = (name, stem) == ("mini", "other")  # of estimates that are taken quieter
        total = sum(plan.nodes[stem].terms.values()) if blended else 1
        assert sum(read.nodes[stem].terms.values()) == pytest.approx(total), stem
        assert read.networks_used([stem])


def test_a_users_weight_files_are_relative_to_the_plan(plan_of_two: Path, tmp_path: Path) -> None:
    plan = plan_file.load(plan_of_two)
    text = plan_file.dump(plan, tmp_path)
    again = plan_file.parse(text, "again", tmp_path)
    for name, use in again.networks.items():
        assert use.weight.path.resolve() == plan.networks[name].weight.path.resolve()
    assert not Path(yaml.safe_load(text)["networks"]["one"]["weights"]["file"]).is_absolute()


def test_networks_replaced_by_known_signals_do_not_run(plan_of_two: Path, ran: list[str]) -> None:
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


def test_invalid_known_signals_are_refused(plan_of_two: Path) -> None:
    separator = Separator(plan_of_two, device="cpu", precision="fp32")
    song = noise(2000)
    for name, message in (
        ("x", "'x' cannot be passed in"),
        ("mixture", "'mixture' cannot be passed in"),
        ("V.vocal", "did you mean 'V.vocals'"),
    ):
        with pytest.raises(KmdxError, match=message):
            separator.signals(song, 44100, ["bass"], known={name: song})
    with pytest.raises(KmdxError, match=r"V.bass: shape \(1999, 2\), expected the song's shape \(2000, 2\)"):
        separator.signals(song, 44100, ["bass"], known={"V.bass": song[1:]})


def test_blends_may_be_deep_but_their_expansion_is_bounded() -> None:
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


def test_a_combination_is_one_indivisible_signal_of_the_blend(plan_of_two: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(plan_of_two.read_text("utf-8"))
    tree["signals"]["both"] = {"combine": ["W.vocals", "mixture"], "mode": "min_fft"}
    tree["stems"]["vocals"] = {"sum": {"both": 0.5, "W.vocals": 0.5}}
    tree["stems"]["drums"] = {"combine": ["W.drums", "mixture"], "mode": "max_wave"}
    plan = plan_file.parse(yaml.safe_dump(tree, sort_keys=False), "plan", plan_of_two.parent)
    flat = flatten(plan)
    assert indivisible(flat.plan) == ["min_fft(W.vocals, mixture)", "max_wave(W.drums, mixture)"]
    assert flat.plan.nodes["drums"].terms == {"published_drums": 1}
    assert indivisible(flatten(plan_file.load(plan_of_two)).plan) == []
    song = noise(22_050)
    published = Separator(plan, device="cpu", precision="fp32").separate(song, 44100)
    stems = Separator(flat.plan, device="cpu", precision="fp32").separate(song, 44100)
    for stem in STEMS:
        assert stems[stem] == pytest.approx(published[stem], abs=1e-6), stem


def test_any_stems_can_be_blended_the_challenges_come_first() -> None:
    assert scored_stems(plan_file.load("six_stems")) == (
        "bass",
        "drums",
        "other",
        "vocals",
        "guitar",
        "piano",
    )
    assert scored_stems(plan_file.load("vocals")) == ("vocals", "instrumental")
