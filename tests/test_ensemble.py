"""The graph in motion, against a plain reading of the published computation."""

from __future__ import annotations

from pathlib import Path

import plain
import pytest
import torch
from conftest import decibels, noise

from kmdx import ensemble
from kmdx.errors import PlanError
from kmdx.loading import load_network
from kmdx.plan import OverlapAdd, Plan
from kmdx.plan_file import load

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def plan(leaderboard: Path) -> Plan:
    return load(leaderboard)


@pytest.fixture(scope="module")
def networks(plan: Plan) -> dict:
    return {name: load_network(use, plan.sample_rate, CPU) for name, use in plan.networks.items()}


class Spy:
    """Notes which networks were asked for what."""

    def __init__(self, networks: dict) -> None:
        self.asked: dict[str, tuple[str, ...]] = {}
        self.networks = {name: self._spied(name, network) for name, network in networks.items()}

    def _spied(self, name: str, network):
        spy = self

        class Spied:
            def narrow(self, sources):
                spy.asked[name] = tuple(sources)
                return network.narrow(sources)

        return Spied()


def test_every_signal_is_that_of_the_plain_reading(plan: Plan, networks: dict) -> None:
    mixture = torch.from_numpy(noise(70_000).T.copy()) + 0.01
    demucs = {
        name: networks[name].model
        for name in networks
        if isinstance(plan.networks[name].chunking, OverlapAdd)
    }
    overlaps = {name: plan.networks[name].chunking.overlap for name in demucs}
    stems = ("vocals", "drums", "other", "bass")
    expected = plain.leaderboard_c(
        demucs,
        overlaps,
        {stem: networks[f"mdx_{stem}"] for stem in stems},
        {stem: plan.networks[f"mdx_{stem}"].chunking.trim for stem in stems},
        plan.networks["mdx_bass"].chunking.chunk,
        mixture,
    )
    signals = ensemble.run(plan, networks, mixture, list(expected))
    assert set(signals) == set(expected)
    for name, signal in expected.items():
        assert signal.std() > 1e-3, "a signal too quiet to tell anything"
        assert decibels(signal, signals[name]) > 90, name


def test_pruned_runs_give_the_same_and_ask_for_no_more(plan: Plan, networks: dict) -> None:
    mixture = torch.from_numpy(noise(20_000).T.copy())
    everything = ensemble.run(plan, networks, mixture, plan.stems)
    for stem in plan.stems:
        spy = Spy(networks)
        alone = ensemble.run(plan, spy.networks, mixture, [stem])
        assert decibels(everything[stem], alone[stem]) > 110
        assert set(spy.asked) == set(plan.networks_used([stem]))
    vocals = Spy(networks)
    ensemble.run(plan, vocals.networks, mixture, ["vocals"])
    assert vocals.asked == {
        "mdx_vocals": ("vocals",), "ft_vocals": ("vocals",), "mmi": ("vocals",), "extra": ("vocals",),
    }  # fmt: skip


def test_silence_gives_silence_and_runs_nothing(plan: Plan) -> None:
    stems = ensemble.run(plan, {}, torch.zeros(2, 1000), plan.stems)
    assert set(stems) == set(plan.stems)
    assert all(not signal.any() for signal in stems.values())


@pytest.mark.parametrize("kind", ["channels that cancel", "a constant", "one loud sample"])
def test_signals_whose_mono_sum_has_no_deviation_stay_finite(plan: Plan, networks: dict, kind: str) -> None:
    mixture = torch.zeros(2, 20_000)
    if kind == "channels that cancel":
        mixture[0] = torch.from_numpy(noise(20_000, 1)[:, 0])
        mixture[1] = -mixture[0]
    elif kind == "a constant":
        mixture += 0.25
    else:
        mixture[0, 7] = 0.5
    for signal in ensemble.run(plan, networks, mixture, plan.stems).values():
        assert signal.isfinite().all()


def test_progress_grows_to_the_songs_duration(plan: Plan, networks: dict) -> None:
    steps: list[tuple[float, float]] = []
    ensemble.run(
        plan, networks, torch.ones(2, 22_050), ["bass"], lambda done, total: steps.append((done, total))
    )
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(0.5)
    assert {total for _, total in steps} == {0.5}
    windows = sum(plan.networks[name].chunking.windows(22_050) for name in plan.networks_used(["bass"]))
    assert len(steps) == windows


def test_an_unknown_signal_is_refused(plan: Plan, networks: dict) -> None:
    with pytest.raises(PlanError, match="did you mean"):
        ensemble.run(plan, networks, torch.ones(2, 100), ["demucs_vocal"])
