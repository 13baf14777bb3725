"""Variants of a song: what is rotated, swapped or inverted is undone, and estimates are averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from conftest import decibels, noise
from numpy.typing import NDArray

from kmdx import Separator, ensemble, plan_file, signals
from kmdx.devices import NetworkCache
from kmdx.errors import PlanError
from kmdx.nodes import Estimate, Sum
from kmdx.plan import NetworkUse, Plan
from kmdx.signals import Signal
from kmdx.variants import Variant, variants
from kmdx.weights import own
from kmdx.windows import FadeAndAdd

CPU = torch.device("cpu")
SIGNAL = torch.arange(1.0, 8).expand(2, -1) * torch.tensor([[1.0], [10.0]])


def test_a_signal_is_rotated_to_the_right() -> None:
    assert Variant(3).of(Signal(SIGNAL)).tensor[0].tolist() == [5, 6, 7, 1, 2, 3, 4]
    assert Variant(0).of(Signal(SIGNAL)).tensor is SIGNAL


@pytest.mark.parametrize("block", [1, 2, 3, 100])
@pytest.mark.parametrize("shift", [0, 1, 3, 6, 7])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_every_variant_is_undone(
    block: int, shift: int, swapped: bool, inverted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", block)
    variant = Variant(shift, swapped, inverted)
    expected = SIGNAL.roll(shift, -1)
    expected = expected.flip(0) if swapped else expected
    made = variant.of(Signal(SIGNAL.clone()))
    assert torch.equal(made.tensor, -expected if inverted else expected)
    assert torch.equal(variant.undone(made).tensor, SIGNAL)


def test_shifts_divide_the_song_evenly_and_each_is_augmented() -> None:
    found = [*variants(1000, 3, tta=True)]
    assert [variant.shift for variant in found] == [0, 0, 0, 333, 333, 333, 666, 666, 666]
    assert [(variant.is_swapped, variant.is_inverted) for variant in found[:3]] == [
        (False, False),
        (True, False),
        (False, True),
    ]


class Skewed(torch.nn.Module):
    """A network whose error depends on the position, the channel and the polarity."""

    sources, length, dtype = ("vocals",), None, torch.float32

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        left, right = batch[:, :1], batch[:, 1:]
        return torch.cat([left.abs(), right * torch.linspace(0, 1, batch.shape[-1])], 1)[:, None]

    def narrow(self, sources: tuple[str, ...]) -> Skewed:
        return self


def plan_of(shifts: int, tta: bool) -> Plan:
    weight = own(Path("x"), {**tiny.HDEMUCS, "sources": ["vocals"]})
    return Plan(
        name="plan",
        title="",
        description="",
        sample_rate=44100,
        networks={"net": NetworkUse(weight, FadeAndAdd(100, 1), shifts, tta)},
        nodes={"V": Estimate("net", "mixture"), "vocals": Sum({"V.vocals": 1.0})},
        stems=("vocals",),
        digest="",
    )


@pytest.mark.parametrize(("shifts", "tta"), [(1, False), (2, False), (1, True), (3, True)])
def test_the_estimates_of_all_variants_are_averaged(shifts: int, tta: bool) -> None:
    network, song = Skewed(), torch.from_numpy(noise(1000).T.copy())
    seen: list[float] = []
    cache = NetworkCache({"net": network}, CPU)
    stems = ensemble.run(
        plan_of(shifts, tta),
        cache,
        Signal(song),
        ["vocals"],
        progress=lambda done, total: seen.append(done / total),
    )

    def estimate(signal: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part[None])[0, 0] for part in signal.split(100, -1)], -1)

    found = []
    for index in range(shifts):
        shift = index * (1000 // shifts)
        turned = song.roll(shift, -1)
        of_shift = [estimate(turned)]
        if tta:
            of_shift += [estimate(turned.flip(0)).flip(0), -estimate(-turned)]
        found += [each.roll(-shift, -1) for each in of_shift]
    expected = torch.stack(found).mean(0)
    assert torch.allclose(stems["vocals"].tensor, expected, atol=1e-7)
    assert len(seen) == 10 * len(found)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_a_plan_states_shifts_and_test_time_augmentation(small: Path) -> None:
    tree = yaml.safe_load(small.read_text("utf-8"))
    (name,) = tree["networks"]
    once = plan_file.load(small)
    tree["networks"][name] |= {"shifts": 2, "tta": True}
    plan = plan_file.parse(yaml.safe_dump(tree, sort_keys=False), "small", small.parent)
    use = plan.networks[name]
    assert (use.shifts, use.tta, use.passes) == (2, True, 6)
    assert plan_file.parse(plan_file.dump(plan), "again").networks == plan.networks
    assert plan.load(plan.stems) == pytest.approx(6 * once.load(plan.stems))
    assert plan.checksum(plan.stems) != once.checksum(plan.stems)
    assert once.augmented(2, tta=True).networks[name] == use
    assert once.augmented().checksum(plan.stems) == once.checksum(plan.stems)
    assert plan.augmented(5).networks[name].tta, "what the plan states is kept"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shifts": 0}, "shifts: expected a whole number of at least 1 and below 101, not 0"),
        ({"shifts": 101}, "below 101"),
        ({"shifts": 2.5}, "expected a whole number"),
        ({"tta": "often"}, "tta: "),
    ],
)
def test_a_wrong_number_of_passes_is_a_one_line_error(
    small: Path, entry: dict[str, object], message: str
) -> None:
    tree = yaml.safe_load(small.read_text("utf-8"))
    (name,) = tree["networks"]
    tree["networks"][name] |= entry
    with pytest.raises(PlanError, match=message) as caught:
        plan_file.parse(yaml.safe_dump(tree, sort_keys=False), "small", small.parent)
    assert "\n" not in str(caught.value)


def test_an_augmented_estimate_of_the_mixture_is_the_average_of_three_separations(small: Path) -> None:
    song = noise(30_000)
    plan = plan_file.load(small)

    def vocals(plan: Plan, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        return Separator(plan, device="cpu", stems=["vocals"]).separate(samples, 44100)["vocals"]

    expected = (vocals(plan, song) + vocals(plan, song[:, ::-1].copy())[:, ::-1] - vocals(plan, -song)) / 3
    assert decibels(expected, vocals(plan.augmented(tta=True), song)) > 90
