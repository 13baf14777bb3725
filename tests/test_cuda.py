"""The engine on a GPU: the same stems as on the CPU, also where the GPU's memory is short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import decibels, noise

from kmdx import Separator
from kmdx.devices import WEIGHTS_SHARE, NetworkCache, _bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

RATE = 44_100
SONG = noise(2 * RATE)
MANY = noise(20 * RATE)  # more windows of the small network than go together


def least(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> float:
    """The worst stem's agreement, in dB."""
    assert list(found) == list(expected)
    return min(decibels(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def expected(leaderboard: Path) -> dict[str, np.ndarray]:
    """Stems of ten networks, as the CPU computes them in fp32."""
    return Separator(leaderboard, device="cpu", precision="fp32").separate(SONG, RATE)


def test_stems_match_those_of_the_cpu(leaderboard: Path, expected: dict[str, np.ndarray]) -> None:
    separator = Separator(leaderboard, device="cuda", precision="fp32")
    assert separator.device.index is not None
    assert least(expected, separator.separate(SONG, RATE)) >= 80


def test_half_precision_changes_the_stems_a_little(small: Path) -> None:
    whole = Separator(small, device="cuda", precision="fp32").separate(SONG, RATE)
    half = Separator(small, device="cuda", precision="fp16").separate(SONG, RATE)
    assert 35 < least(whole, half) < 100


def test_networks_take_turns_if_only_one_fits(leaderboard: Path, expected: dict[str, np.ndarray]) -> None:
    separator = Separator(leaderboard, device="cuda", precision="fp32")
    largest = max(map(_bytes, separator.networks.values()))
    separator.cache = NetworkCache(separator.networks, separator.device, int(largest / WEIGHTS_SHARE))
    for _ in range(2):
        assert least(expected, separator.separate(SONG, RATE)) >= 80
    on_the_gpu = [
        name
        for name, network in separator.networks.items()
        if any(tensor.is_cuda for tensor in network.parameters())  # type: ignore[attr-defined]
    ]
    assert 1 <= len(on_the_gpu) < len(separator.networks)


def test_a_song_is_finished_if_memory_runs_short_in_the_middle(small: Path) -> None:
    separator = Separator(small, device="cuda", precision="fp32", stems=["vocals"])
    device, length = separator.device, separator.networks["htdemucs"].length
    expected = separator.separate(MANY, RATE)
    separator.cache = NetworkCache(separator.networks, device)  # which has no batch profiles yet
    profile = separator.cache.runner("htdemucs", ["vocals"]).profile
    calls: list[float] = []

    def shorten(done: float, total: float) -> None:
        """After the first window, leave memory for a few windows, but not for a whole batch."""
        calls.append(done)
        if len(calls) == 1:
            torch.cuda.empty_cache()
            room = 4 * profile.cost * length + 2**26
            allowed = torch.cuda.memory_reserved(device) + room
            whole = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / whole), device)

    found = separator.separate(MANY, RATE, progress=shorten)
    assert least(expected, found) >= 80
    assert profile.sizes[length] < 32, "memory did not run out"
    assert least(expected, separator.separate(MANY, RATE)) >= 80
    assert not profile.sizes, "the limit is what it was before the song"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_song_gives_the_same_bits_after_any_other_songs(leaderboard: Path, precision: str) -> None:
    separator = Separator(leaderboard, device="cuda", precision=precision)
    first = separator.separate(MANY, RATE)
    separator.separate(SONG, RATE)
    again = separator.separate(MANY, RATE)
    fresh = Separator(leaderboard, device="cuda", precision=precision).separate(MANY, RATE)
    for name, stem in first.items():
        assert np.array_equal(stem, again[name])
        assert np.array_equal(stem, fresh[name])
