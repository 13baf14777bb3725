"""Copies between a GPU and the host, on a simulated GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise
from simulated_gpu import GPU, Gpu, OnGpu

from kmdx import Separator, chunking, ensemble, signals
from kmdx.devices import BatchProfile, Runner
from kmdx.signals import Signal
from kmdx.transfers import Background, host_blocks, to_device

CPU = torch.device("cpu")
SONG = torch.arange(200.0).reshape(2, 100)
PATIENCE = 60  # seconds until a test that hangs fails


@pytest.fixture(params=["late", "early"])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU whose copies are done as late, or as early, as possible."""
    return Gpu(monkeypatch, is_early=request.param == "early")


@pytest.mark.parametrize("step", [30, 50, 100, 1000])
def test_a_block_is_read_after_its_copy_and_its_memory_is_not_used_again_before(gpu: Gpu, step: int) -> None:
    tensor = SONG.clone().as_subclass(OnGpu)
    blocks = []
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        for number, block in enumerate(host_blocks(tensor, step)):
            assert torch.equal(block, SONG[:, number * step : (number + 1) * step])
            blocks.append(block.shape[-1])
    assert sum(blocks) == 100
    assert len(gpu.pinned) == min(2, len(blocks))
    assert gpu.waits == []


def test_the_next_block_is_copied_while_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    blocks = host_blocks(SONG.clone().as_subclass(OnGpu), 30)
    next(blocks)
    assert len(gpu.default.work) == 3, "copies of two channels, and their event"


def test_what_is_uploaded_is_copied_in_the_order_of_the_stream(gpu: Gpu) -> None:
    made = to_device(SONG, GPU)
    assert gpu.default.work
    assert gpu.pinned == [200]
    assert torch.equal(made + 0, SONG)
    assert gpu.waits == []


@pytest.mark.parametrize("is_gpu", [True, False])
def test_without_pinned_memory_or_a_gpu_blocks_are_the_same(gpu: Gpu, is_gpu: bool) -> None:
    gpu.can_pin = False
    tensor = SONG.clone().as_subclass(OnGpu) if is_gpu else SONG
    assert torch.equal(torch.cat([block.clone() for block in host_blocks(tensor, 30)], 1), SONG)
    assert to_device(SONG, CPU) is SONG


# In the background


def test_results_are_copied_when_they_are_computed_and_nothing_waits_for_it(gpu: Gpu) -> None:
    may_compute = threading.Event()
    with torch.inference_mode():  # as during a song; elsewhere, it could not be changed
        target = Signal(torch.zeros(2, 100), long=True)
    values = gpu.computing(SONG, lambda: may_compute.wait(PATIENCE))
    with Background(GPU, CPU) as background:
        future = background.submit(target.put, 0, values)
        assert not future.done()
        may_compute.set()
    assert torch.equal(target.tensor, SONG)
    assert gpu.waits == []


def test_only_so_many_results_are_held(gpu: Gpu) -> None:
    may_copy = threading.Event()
    with Background(GPU, CPU, most=2) as background:
        first = background.submit(may_copy.wait, PATIENCE)
        second = background.submit(may_copy.wait, PATIENCE)
        threading.Timer(0.05, may_copy.set).start()
        stream = background.submit(torch.cuda.current_stream)
        assert first.done()
    assert second.result()
    assert stream.result() is not gpu.default


@pytest.mark.parametrize("source", [GPU, CPU])
def test_an_error_ends_the_context(gpu: Gpu, source: torch.device) -> None:
    with pytest.raises(ZeroDivisionError), Background(source, CPU) as background:
        background.submit(lambda: 1 / 0)


def test_after_an_error_of_the_caller_nothing_more_is_copied(gpu: Gpu) -> None:
    may_copy, waiting = threading.Event(), []

    def failing() -> None:
        with Background(GPU, CPU) as background:
            background.submit(may_copy.wait, PATIENCE)
            waiting.append(background.submit(may_copy.wait, PATIENCE))
            threading.Timer(0.05, may_copy.set).start()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert waiting[0].cancelled()


@pytest.mark.parametrize(("source", "target"), [(CPU, CPU), (GPU, GPU)])
def test_what_does_not_leave_the_device_is_done_at_once(
    gpu: Gpu, source: torch.device, target: torch.device
) -> None:
    with Background(source, target) as background:
        assert background.submit(threading.get_ident).result() == threading.get_ident()


# Songs


class Twice(torch.nn.Module):
    """Two sources that are exact in any batch."""

    sources, length = ("twice", "backwards"), None

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([2 * batch, batch.flip(-1)], 1)


METHODS: dict[str, tuple[Callable[..., None], tuple[int, ...]]] = {
    "overlap_add": (chunking.overlap_add, (10, 4)),
    "fade_and_add": (chunking.fade_and_add, (20, 5, 15)),
    "trim_and_join": (chunking.trim_and_join, (10, 2)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_long", [True, False])
def test_a_song_on_the_gpu_equals_one_on_the_cpu_and_nothing_waits(
    gpu: Gpu, method: str, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "SPAN", 40)
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 7)
    run, sizes = METHODS[method]

    def estimates(song: Signal, device: torch.device) -> Any:
        made = [Signal(torch.full_like(song.tensor, torch.nan), song.long) for _ in Twice.sources]
        run(Runner(Twice(), device, BatchProfile(sizes={sizes[0]: 3})), song, made, *sizes)
        return torch.stack([each.tensor for each in made])

    expected = estimates(Signal(SONG), CPU)
    song = Signal(SONG, long=True) if is_long else Signal(SONG.clone().as_subclass(OnGpu))
    assert torch.equal(estimates(song, GPU), expected)
    assert gpu.waits == []
    assert bool(gpu.pinned) == is_long


def test_the_stems_of_a_song_are_copied_while_later_networks_run(
    gpu: Gpu, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    separator = Separator(small, device="cpu", precision="fp32")
    separator.device = GPU
    stems = {name: torch.randn(2, 5000) for name in separator.stems}
    copied, to_samples = threading.Event(), Signal.to_samples

    def noted(signal: Signal, channels: int) -> Any:
        samples = to_samples(signal, channels)
        copied.set()
        return samples

    def run(*arguments: Any) -> dict[str, Signal]:
        made = {}
        for name, wave in stems.items():
            made[name] = Signal(gpu.computing(wave))
            copied.clear()
            arguments[-1](name, made[name])
            assert copied.wait(PATIENCE), "the run goes on, and the stem is copied"
        return made

    monkeypatch.setattr(Signal, "to_samples", noted)
    monkeypatch.setattr(ensemble, "run", run)
    monkeypatch.setattr(signals, "SIGNAL_BLOCK", 1000)
    found = separator.separate(noise(5000), 44_100)
    assert all(np.array_equal(found[name], wave.T) for name, wave in stems.items())
    assert gpu.pinned == 2 * len(stems) * [2000]
    assert gpu.waits == []


def test_wanted_signals_are_announced_before_later_networks_run(leaderboard: Path) -> None:
    separator = Separator(leaderboard, device="cpu", precision="fp32")
    events: list[str] = []
    made = ensemble.run(
        separator.plan,
        separator.cache,
        Signal(torch.randn(2, 5000)),
        separator.stems,
        lambda done, total: events.append("window"),
        None,
        lambda name, signal: events.append(name),
    )
    assert [event for event in events if event != "window"] == list(made)
    assert "window" in events[events.index(next(iter(made))) :]
