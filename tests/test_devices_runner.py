"""Windows in batches: the batch size, and what happens when memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from kmdx import chunking, devices
from kmdx.devices import BatchProfile, Runner
from kmdx.signals import Signal

CPU = torch.device("cpu")
LENGTH = 10  # samples of a window

OUT_OF_MEMORY = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 9663676416 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "cuDNN": RuntimeError("GET was unable to find an engine to execute this computation"),
    "Python": MemoryError(),
}
ERRORS = pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)


class Network(torch.nn.Module):
    """Returns exact estimates in any batch; runs out of memory on request."""

    sources = ("twice",)
    length = LENGTH

    def __init__(
        self, fails: Callable[[int, int], bool] = lambda call, size: False, error: Exception | None = None
    ):
        super().__init__()
        self.fails = fails  # by the number of the call and the size of its batch
        self.error = error
        self.sizes: list[int] = []

    def forward(self, batch: Tensor) -> Tensor:
        self.sizes.append(len(batch))
        if self.fails(len(self.sizes), len(batch)):
            raise self.error or torch.OutOfMemoryError("CUDA out of memory")
        return 2 * batch[:, None]

    def narrow(self, sources: Sequence[str]) -> Network:
        return self


def windows(count: int) -> Tensor:
    return torch.randn(count, 2, LENGTH, generator=torch.Generator().manual_seed(0))


def song(run: Runner, count: int = 24) -> None:
    """Send a song of n windows through the network and check the result."""
    signal = windows(count).transpose(0, 1).flatten(1)[:, :-1]
    estimate = Signal(torch.full_like(signal, torch.nan))
    chunking.trim_and_join(run, Signal(signal), [estimate], LENGTH, trim=0)
    assert torch.equal(estimate.tensor, 2 * signal)


# Out of memory


@ERRORS
def test_a_song_is_finished_with_half_as_many_windows_at_once(error: Exception) -> None:
    network = Network(lambda call, size: call == 2, error)  # in the middle
    profile = BatchProfile(sizes={LENGTH: 8})
    song(Runner(network, CPU, profile))
    # The second batch fails, its eight windows are done again by fours, and the last eight go so, too.
    assert network.sizes == [8, 8, 4, 4, 4, 4]
    assert profile.sizes == {LENGTH: 4}


@ERRORS
@pytest.mark.parametrize(("size", "fits", "end"), [(8, 1, 1), (8, 2, 2), (7, 3, 3), (5, 1, 1), (3, 2, 1)])
def test_batches_are_halved_until_they_fit(error: Exception, size: int, fits: int, end: int) -> None:
    network = Network(lambda call, size: size > fits, error)
    run = Runner(network, CPU, BatchProfile(sizes={LENGTH: size}))
    song(run)
    assert run.size(LENGTH) == end
    assert len(network.sizes) < 2 * 24 + 2 * size, "tries that cannot succeed"


def test_the_batch_size_of_each_window_length_is_separate() -> None:
    run = Runner(Network(lambda call, size: call == 1), CPU, BatchProfile(sizes={LENGTH: 4, 7: 6}))
    run(windows(4))
    assert (run.size(LENGTH), run.size(7), run.size(8)) == (2, 6, 1)


@ERRORS
def test_a_window_that_does_not_fit_is_retried_after_eviction(error: Exception) -> None:
    made: list[bool] = []

    def evict() -> bool:
        made.append(not made)
        return made[-1]

    network = Network(lambda call, size: call == 3, error)
    song(Runner(network, CPU, evict=evict))
    assert made == [True]
    assert network.sizes == [1] * 25

    made.clear()
    network = Network(lambda call, size: True, error)
    with pytest.raises(type(error)) as caught:
        Runner(network, CPU, evict=evict)(windows(1))
    assert caught.value is error
    assert made == [True, False]
    assert network.sizes == [1, 1]


@ERRORS
def test_a_window_that_does_not_fit_anywhere_is_an_error(error: Exception) -> None:
    network = Network(lambda call, size: True, error)
    with pytest.raises(type(error)) as caught:
        Runner(network, CPU, BatchProfile(sizes={LENGTH: 4}))(windows(4))
    assert caught.value is error
    assert network.sizes == [4, 2, 1]


def test_networks_are_evicted_only_for_a_single_window() -> None:
    run = Runner(
        Network(lambda call, size: size > 1),
        CPU,
        BatchProfile(sizes={LENGTH: 4}),
        evict=lambda: pytest.fail("room was made"),
    )
    song(run)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("can't allocate memory"),
    ],
    ids=str,
)
def test_other_errors_pass_through(error: Exception) -> None:
    network = Network(lambda call, size: True, error)
    run = Runner(network, CPU, BatchProfile(sizes={LENGTH: 4}), evict=lambda: pytest.fail("room was made"))
    with pytest.raises(type(error)) as caught:
        run(windows(4))
    assert caught.value is error
    assert network.sizes == [4]
    assert run.size(LENGTH) == 4


def test_memory_of_a_failed_batch_is_freed_before_the_retry() -> None:
    held: list[weakref.ref[Tensor]] = []

    class Hoarder(Network):
        def forward(self, batch: Tensor) -> Tensor:
            assert all(tensor() is None for tensor in held), "still held"
            large = batch.repeat(1, 100, 1)
            held.append(weakref.ref(large))
            return super().forward(batch)

    network = Hoarder(lambda call, size: call == 1)
    assert torch.equal(
        Runner(network, CPU, BatchProfile(sizes={LENGTH: 4}))(windows(4))[:, 0], 2 * windows(4)
    )
    assert len(held) == 3


# How many windows go together


class Gpu:
    """The memory of a GPU, as torch reports it: bytes for each window in addition to the weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weights: int, window: int) -> None:
        self.weights, self.window = weights, window
        self.resets = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: weights)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: weights + window)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)

    def _reset(self, device: torch.device) -> None:
        self.resets += 1


@pytest.mark.parametrize(
    ("window", "room", "size"),
    [
        (50, 1000, 16),  # 0.8 · 1000 / 50
        (300, 1000, 2),
        (801, 1000, 1),
        (5000, 1000, 1),
        (50, 0, 1),  # weights and signals leave nothing
        (1, 10**9, devices.MAX_BATCH),
    ],
)
def test_the_batch_size_follows_from_the_available_memory(
    window: int, room: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch, 100, window)
    network = Network()
    run = Runner(network, CPU, room=room)
    song(run, 3 * size)
    assert network.sizes == [1, size, size, size], "silence alone, then the song"
    assert gpu.resets == 1, "measured once"
    assert run.size(LENGTH) == size


def test_batches_do_not_depend_on_earlier_songs_or_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 100, 50)
    network, profile = Network(), BatchProfile()
    for allocated in (100, 600, 0):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device, bytes=allocated: bytes)
        song(Runner(network, CPU, profile, room=300))
    assert network.sizes == [1, *[4] * 18]


@pytest.mark.parametrize("first", [3, 5, LENGTH])
def test_a_network_of_any_length_is_measured_at_the_longest_window(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever window of whichever song comes first."""
    Gpu(monkeypatch, 0, 100)
    network = Network()
    network.length = None
    run = Runner(network, CPU, room=1000, longest=LENGTH)
    run.size(first)
    assert [run.size(length) for length in (4, 5, 8, LENGTH)] == [20, 16, 10, 8]
    assert network.sizes == [1]


def test_without_memory_windows_run_one_by_one_and_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(monkeypatch, 0, 1)
    network = Network()
    song(Runner(network, CPU))
    assert network.sizes == [1] * 24
    assert gpu.resets == 0


def test_a_measured_batch_size_is_halved_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 0, 100)
    network = Network(lambda call, size: call == 2)
    song(Runner(network, CPU, room=1000), 16)
    assert network.sizes == [1, 8, 4, 4, 4, 4]


def test_a_measurement_that_ran_out_of_memory_is_repeated_later(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, 0, 100)
    run = Runner(Network(lambda call, size: call == 1), CPU, room=1000)
    assert [run.size(LENGTH), run.size(LENGTH)] == [1, 8]
