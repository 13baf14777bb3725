"""Running a plan, against a plain implementation of the published computation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
from conftest import decibels, is_scratch, noise
from torch import Tensor

from kmdx import chunking, ensemble, signals
from kmdx.build import load_network
from kmdx.devices import NetworkCache
from kmdx.errors import PlanError
from kmdx.networks.network import Network
from kmdx.nodes import Sum
from kmdx.plan import Plan
from kmdx.plan_file import load
from kmdx.signals import Signal
from kmdx.windows import OverlapAdd

CPU = torch.device("cpu")
NOTHING = NetworkCache({}, CPU)


@pytest.fixture(scope="module")
def plan(leaderboard: Path) -> Plan:
    return load(leaderboard)


@pytest.fixture(scope="module")
def networks(plan: Plan) -> dict[str, Network]:
    return {name: load_network(use, plan.sample_rate, CPU) for name, use in plan.networks.items()}


@pytest.fixture
def cache(networks: dict[str, Network]) -> NetworkCache:
    return NetworkCache(networks, CPU)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, every song counts as long."""
    return lambda: monkeypatch.setattr(signals, "LIMIT", 4096)


@pytest.fixture(params=["short", "long"])
def either(request: pytest.FixtureRequest, long: Callable[[], None]) -> str:
    """Songs as they are, or long ones."""
    if request.param == "long":
        long()
    return request.param


class Spy:
    """Records the requests to each network."""

    def __init__(self, networks: dict[str, Network]) -> None:
        self.asked: dict[str, tuple[str, ...]] = {}
        self.networks = {name: self._spied(name, network) for name, network in networks.items()}
        self.cache = NetworkCache(self.networks, CPU)

    def _spied(self, name: str, network: Network):
        spy = self

        class Spied:
            def narrow(self, sources: Sequence[str]) -> Network:
                spy.asked[name] = tuple(sources)
                return network.narrow(sources)

        return Spied()


def song(samples: int) -> Tensor:
    return torch.from_numpy(noise(samples).T.copy()) + 0.01


def open_files() -> int:
    """How many scratch files are in use."""
    gc.collect()
    return len(signals._mapped)


def run(plan: Plan, cache: NetworkCache, mixture: Tensor, *options: Any) -> dict[str, Tensor]:
    made = ensemble.run(plan, cache, Signal(mixture), *options)
    return {name: signal.tensor for name, signal in made.items()}


def test_every_signal_matches_the_plain_implementation(
    plan: Plan, networks: dict[str, Network], cache: NetworkCache
) -> None:
    mixture = song(30_000)
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
    found = run(plan, cache, mixture, list(expected))
    assert set(found) == set(expected)
    for name, signal in expected.items():
        assert signal.std() > 1e-3, "a signal too quiet to prove anything"
        assert decibels(signal, found[name]) > 90, name


def test_pruned_runs_give_the_same_signals_and_compute_nothing_else(
    plan: Plan, networks: dict[str, Network], cache: NetworkCache
) -> None:
    mixture = song(8_000)
    everything = run(plan, cache, mixture, plan.stems)
    for stem in plan.stems:
        spy = Spy(networks)
        alone = run(plan, spy.cache, mixture, [stem])
        assert decibels(everything[stem], alone[stem]) > 110
        assert set(spy.asked) == set(plan.networks_used([stem]))
        if stem == "vocals":
            assert spy.asked == dict.fromkeys(("mdx_vocals", "ft_vocals", "mmi", "extra"), ("vocals",))


def test_silence_gives_silence_and_runs_nothing(plan: Plan, either: str) -> None:
    before = open_files()
    stems = run(plan, NOTHING, torch.zeros(2, 1000), plan.stems)
    assert set(stems) == set(plan.stems)
    for signal in stems.values():
        assert signal.shape == (2, 1000)
        assert not signal.any()
        assert is_scratch(signal.numpy()) == (either == "long")
    del stems, signal
    assert open_files() == before


@pytest.mark.parametrize("kind", ["channels that cancel", "a constant", "one loud sample"])
def test_signals_whose_mono_sum_has_no_deviation_stay_finite(
    plan: Plan, cache: NetworkCache, kind: str, either: str
) -> None:
    mixture = torch.zeros(2, 3_000)
    if kind == "channels that cancel":
        mixture[0] = torch.from_numpy(noise(3_000, 1)[:, 0])
        mixture[1] = -mixture[0]
    elif kind == "a constant":
        mixture += 0.25
    else:
        mixture[0, 7] = 0.5
    for signal in run(plan, cache, mixture, plan.stems).values():
        assert signal.isfinite().all()


SONG = song(3000)
LEVELS = {  # a mixture, and what it is divided by
    "a song": (SONG, SONG.mean(0).std()),
    "a quiet song far from zero": (1e-3 * SONG + 0.5, 1e-3 * SONG.mean(0).std()),
    "channels that cancel": (torch.stack([SONG[0], -SONG[0]]), torch.cat([SONG[0], -SONG[0]]).std()),
    "two constants": (torch.tensor([[0.5], [-0.5]]).repeat(1, 3000), torch.tensor([0.5, -0.5] * 3000).std()),
    "a constant": (torch.full((2, 3000), 0.3), 1.0),
    "two samples": (torch.tensor([[0.5, 0.25], [0.5, 0.25]]), 0.25 / 2**0.5),
}


@pytest.mark.parametrize("kind", LEVELS)
@pytest.mark.parametrize("block", [2**20, 700])
def test_signals_are_normalized_by_their_mono_deviation_or_else_their_stereo_one(
    plan: Plan, kind: str, block: int, either: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the mono sum has no deviation, that of both channels is used; otherwise none."""
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", block)
    mixture, deviation = LEVELS[kind]
    normalized = run(plan, NOTHING, mixture, ["x"])["x"]
    expected = (mixture.double() - mixture.double().mean()) / deviation
    assert (normalized - expected).abs().max() < 1e-6 * max(1.0, mixture.abs().max() / deviation)


def test_progress_grows_to_the_songs_duration(plan: Plan, cache: NetworkCache, either: str) -> None:
    steps: list[tuple[float, float]] = []
    run(plan, cache, torch.ones(2, 4410), ["bass"], lambda done, total: steps.append((done, total)))
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert done[-1] == pytest.approx(0.1)
    assert {total for _, total in steps} == {0.1}
    windows = sum(plan.networks[name].chunking.windows(4410) for name in plan.networks_used(["bass"]))
    assert len(steps) == windows


def test_an_unknown_signal_is_refused(plan: Plan, cache: NetworkCache) -> None:
    with pytest.raises(PlanError, match="did you mean"):
        run(plan, cache, torch.ones(2, 100), ["demucs_vocal"])


# Long songs


def test_a_long_song_gives_the_same_samples(
    plan: Plan, cache: NetworkCache, long: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 5000)
    mixture = song(12_000)
    wanted = [*plan.stems, "mdx_bass", "x1", "M.vocals", "mixture"]
    expected = run(plan, cache, mixture, wanted)
    assert not any(is_scratch(signal.numpy()) for signal in expected.values())

    long()
    before = open_files()
    monkeypatch.setattr(chunking, "SPAN", 5000)
    found = run(plan, cache, mixture, wanted)
    assert list(found) == wanted
    for name, signal in found.items():
        assert torch.equal(signal, expected[name]), name
        assert is_scratch(signal.numpy()) == (name != "mixture")
    del signal
    assert open_files() == before + len(wanted) - 1, "files are left of signals that nobody wants"
    del found
    assert open_files() == before


def test_signals_are_freed_after_the_last_node_that_needs_them(
    plan: Plan, long: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {"s0": Sum({"mixture": 1.0}), **{f"s{n + 1}": Sum({f"s{n}": 2.0}) for n in range(10)}}
    long()
    before = open_files()
    in_use: list[int] = []
    make = signals.empty
    monkeypatch.setattr(
        signals, "empty", lambda shape: (in_use.append(len(signals._mapped) - before), make(shape))[1]
    )
    mixture = song(2000)
    found = run(replace(plan, nodes=nodes), NOTHING, mixture, ["s10", "s3"])
    assert torch.equal(found["s10"], 1024 * mixture)
    assert torch.equal(found["s3"], 8 * mixture)
    assert in_use == [0, 1, 1, 1, 1, *[2] * 6], "the one before, and s3, which is wanted"


@pytest.mark.slow
def test_signals_are_freed_when_an_error_ends_a_long_song(
    plan: Plan, cache: NetworkCache, long: Callable[[], None]
) -> None:
    long()
    before = open_files()
    in_use: list[int] = []

    def progress(done: float, total: float) -> None:
        if done > 0.6 * total:
            in_use.append(open_files() - before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, cache, song(5_000), plan.stems, progress)
    assert in_use[0] > 3
    assert open_files() == before


def test_the_mixture_is_not_changed(plan: Plan, cache: NetworkCache, either: str) -> None:
    mixture = song(3_000)
    before = mixture.clone()
    found = run(plan, cache, mixture, [*plan.stems, "x", "x1", "x2", "x3"])
    assert torch.equal(mixture, before)
    assert all(signal.data_ptr() != mixture.data_ptr() for signal in found.values())
