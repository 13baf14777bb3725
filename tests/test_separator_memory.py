"""The public class with little memory, and with long songs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import separator_cases
import soundfile
import torch
from conftest import decibels, is_scratch, noise

from kmdx import Separator, chunking, devices, ensemble, host, signals
from kmdx.devices import NetworkCache
from kmdx.errors import DeviceError
from kmdx.networks.demucs import DemucsNetwork
from kmdx.plan import Plan

separator = separator_cases.separator

CPU = torch.device("cpu")
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate\nmuch"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    MemoryError(),
]


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, when: Callable[[int], bool]) -> list[int]:
    """Make networks fail, by the number of the batch; return the batches' sizes."""
    sizes: list[int] = []
    forward = DemucsNetwork.forward

    def fails(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        if when(len(sizes)):
            raise error
        return forward(network, batch)

    monkeypatch.setattr(DemucsNetwork, "forward", fails)
    return sizes


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_song_is_finished_although_memory_runs_out_in_the_middle(
    separator: Separator, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(separator, "cache", NetworkCache(separator.networks, CPU))
    song = noise(75_000)  # five windows
    expected = separator.separate(song, 44100, stems=["vocals"])["vocals"]
    monkeypatch.setattr(devices, "CPU_BATCH", 2)
    sizes = failing(monkeypatch, error, lambda call: call == 2)
    assert decibels(expected, separator.separate(song, 44100, stems=["vocals"])["vocals"]) > 110
    assert sizes == [2, 2, 1, 1, 1], (
        "the second of two batches is done again, and the next one window at a time"
    )
    separator.separate(song, 44100, stems=["vocals"])
    assert sizes[5:] == [2, 2, 1], "the next song is as if it was the first"


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_window_too_big_for_the_memory_is_a_one_line_error(
    separator: Separator, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, error, lambda call: True)
    with pytest.raises(
        DeviceError, match="out of memory on cpu with a song of 1 s; separate it in parts"
    ) as caught:
        separator.separate(noise(44_100), 44_100)
    assert "\n" not in str(caught.value)
    assert str(error).partition("\n")[0] in str(caught.value), "which may be of another kind after all"
    assert caught.value.__cause__ is error


def test_a_failure_of_another_kind_is_not_reported_as_out_of_memory(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("the matrices do not fit each other")
    failing(monkeypatch, error, lambda call: True)
    with pytest.raises(RuntimeError) as caught:
        separator.separate(noise(1000), 44_100)
    assert caught.value is error


@pytest.mark.parametrize("fails", [False, True])
def test_the_heap_is_warm_while_the_cpu_computes(
    separator: Separator, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def warm_heap() -> Iterator[None]:
        events.append("warm")
        try:
            yield
        finally:
            events.append("cold")

    def run(plan: Plan, cache: NetworkCache, mixture: torch.Tensor, names: list[str], *_: object) -> dict:
        events.append("run")
        if fails:
            raise RuntimeError("the matrices do not fit each other")
        return dict.fromkeys(names, mixture)

    monkeypatch.setattr(host, "warm_heap", warm_heap)
    monkeypatch.setattr(ensemble, "run", run)
    with pytest.raises(RuntimeError) if fails else nullcontext():
        separator.separate(noise(1000), 44_100)
    assert events == ["warm", "run", "cold"]


def test_a_song_runs_in_exact_float32_and_within_the_devices_limit(
    separator: Separator, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[tuple] = []

    @contextmanager
    def limited(*given: object) -> Iterator[None]:
        limits.append(given)
        yield
        limits.clear()

    def run(plan: Plan, cache: NetworkCache, mixture: torch.Tensor, names: list[str], *_: object) -> dict:
        assert limits == [(CPU, 7)]
        assert not torch.backends.cudnn.allow_tf32
        return dict.fromkeys(names, mixture)

    monkeypatch.setattr(devices, "memory_limit", lambda device, own: 7)  # now, not when it was made
    monkeypatch.setattr(devices, "memory_budget", lambda device, own: None)
    monkeypatch.setattr(devices, "limited", limited)
    monkeypatch.setattr(ensemble, "run", run)
    assert torch.backends.cudnn.allow_tf32
    separator.separate(noise(1000), 44_100)
    assert not limits
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 2), (44_100, 1), (32_000, 2), (48_000, 1)])
@pytest.mark.slow
def test_a_long_song_gives_the_same_stems(
    separator: Separator, rate: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = noise(rate // 3, channels)
    before = song.copy()
    monkeypatch.setattr(signals, "BLOCK", 1000)
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 7000)
    expected = separator.separate(song, rate)
    monkeypatch.setattr(signals, "LIMIT", 4096)
    monkeypatch.setattr(chunking, "SPAN", 30_000)
    gc.collect()
    open_before = len(signals._mapped)
    stems = separator.separate(song, rate)
    assert list(stems) == list(expected)
    for name, stem in stems.items():
        assert stem.shape == song.shape
        assert stem.flags.c_contiguous
        assert is_scratch(stem)
        assert np.array_equal(stem, expected[name]), name
    assert np.array_equal(song, before)
    assert np.array_equal(stems["accompaniment"], song - stems["vocals"])
    gc.collect()
    assert len(signals._mapped) == open_before + len(stems), "files are left of signals that nobody asked for"
    del stems, stem
    gc.collect()
    assert len(signals._mapped) == open_before


def test_long_silence_gives_silence(separator: Separator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LIMIT", 4096)
    for stem in separator.separate(np.zeros((30_000, 1)), 48_000).values():
        assert stem.shape == (30_000, 1)
        assert not stem.any()


def test_a_part_of_a_long_file_is_separated(
    separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    song = noise(30_000)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    expected = separator.separate(song[4410:], 44100, stems=["vocals"])["vocals"]
    monkeypatch.setattr(signals, "LIMIT", 4096)
    stems, _ = separator.separate_file(tmp_path / "song.wav", start=0.1, stems=["vocals"])
    assert is_scratch(stems["vocals"])
    assert np.array_equal(stems["vocals"], expected)
