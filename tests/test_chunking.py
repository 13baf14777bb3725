"""Signals of any length through networks of fixed length, against Demucs' own and by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import plain
import pytest
import tiny
import torch
from conftest import decibels
from demucs.apply import apply_model

from kmdx import chunking, signals, weights
from kmdx.chunking import overlap_add, trim_and_join
from kmdx.devices import BatchProfile, Runner
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.network import Network
from kmdx.signals import Signal
from kmdx.windows import FadeAndAdd, OverlapAdd, TrimAndJoin

CPU = torch.device("cpu")


class Echo(torch.nn.Module):
    """A network that returns its input and records it."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.sources: tuple[str, ...] = ("echo",)
        self.length = length
        self.heard: list[torch.Tensor] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert self.length is None or batch.shape[-1] == self.length
        self.heard.append(batch.clone())
        return batch[:, None]

    def narrow(self, sources: Sequence[str]) -> Echo:
        return self


class Shades(Echo):
    """Two sources, each sample of which depends on its place in the window; exact in any batch."""

    def __init__(self, length: int | None) -> None:
        super().__init__(length)
        self.sources = ("louder", "backwards")

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        super().forward(batch)
        return torch.stack([batch * torch.linspace(0.3, 1.7, batch.shape[-1]), batch.flip(-1)], 1)


def through(
    method: Callable[..., None],
    network: Network,
    signal: torch.Tensor,
    *sizes: int,
    together: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Estimates ``(sources, 2, samples)`` of a signal, n windows at once."""
    runner = Runner(network, CPU, BatchProfile(sizes=dict.fromkeys(range(1, sizes[0] + 1), together)))
    estimates = [Signal(torch.full_like(signal, torch.nan)) for _ in network.sources]
    method(runner, Signal(signal), estimates, *sizes, advance)
    return torch.stack([estimate.tensor for estimate in estimates])


def ramp(samples: int) -> torch.Tensor:
    return torch.arange(1.0, samples + 1).expand(2, -1)


def noise(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", [tiny.HTDEMUCS, tiny.HDEMUCS, tiny.HYBRID_OLD])
@pytest.mark.parametrize("overlap", [0.85, 0.25, 0.0])
@pytest.mark.parametrize("samples", [18_001, 11_025, 4_500])
@torch.inference_mode()
def test_overlap_add_equals_apply_model_of_demucs(architecture: dict, overlap: float, samples: int) -> None:
    segment = 0.25
    model = tiny.demucs({**architecture, "segment": segment}, seed=1)
    signal = noise(samples)
    how = OverlapAdd(overlap, segment, int(segment * 44100))
    steps: list[int] = []
    count = partial(steps.append, 1)
    ours = through(overlap_add, DemucsNetwork(model), signal, how.length, how.stride, advance=count)
    theirs = apply_model(model, signal[None], shifts=0, split=True, overlap=overlap)[0]
    assert decibels(theirs, ours) > 110
    assert len(steps) == how.windows(samples)


def test_a_short_segment_is_padded_with_the_song_around_it_and_zeros_beyond() -> None:
    network = Echo(length=10)
    through(overlap_add, network, ramp(14), 10, 8)
    first, second = (heard[0, 0] for heard in network.heard)
    assert first.tolist() == list(range(1, 11))
    # Samples 8..13 of the song: two of the four missing ones before it, the rest beyond its end.
    assert second.tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 0, 0]


def test_a_network_of_any_length_gets_a_short_segment_without_padding() -> None:
    network = Echo(length=None)
    through(overlap_add, network, ramp(14), 10, 8)
    assert [heard.shape[-1] for heard in network.heard] == [10, 6]


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 33, 40])
def test_overlap_add_of_an_identity_network_returns_the_signal(samples: int) -> None:
    signal = ramp(samples)
    assert torch.allclose(through(overlap_add, Echo(10), signal, 10, 3)[0], signal)


@pytest.mark.parametrize("samples", [1, 5, 6, 7, 11, 12, 13, 60])
def test_trim_and_join_of_an_identity_network_returns_the_signal(samples: int) -> None:
    network, signal = Echo(10), ramp(samples)
    how = TrimAndJoin(chunk=10, trim=2)
    assert torch.equal(through(trim_and_join, network, signal, how.chunk, how.trim)[0], signal)
    assert len(network.heard) == how.windows(samples) == samples // 6 + 1, "one more where it divides evenly"


@pytest.mark.parametrize("samples", [20_000, 3 * (tiny.CHUNK - 2 * 109), 500])
@torch.inference_mode()
def test_trim_and_join_equals_the_plain_implementation(samples: int) -> None:
    network = tiny.unet("bass", 4, seed=2)
    signal = noise(samples)
    ours = through(trim_and_join, network, signal, tiny.CHUNK, 109)[0]
    assert torch.equal(ours, plain.mdx(network, signal, tiny.CHUNK, 109))


def faded(
    runner: Runner,
    signal: Signal,
    estimates: Sequence[Signal],
    chunk: int,
    overlap: int,
    advance: Callable[[], None],
) -> None:
    FadeAndAdd(chunk, overlap).run(runner, signal, estimates, advance)


@pytest.mark.parametrize("overlap", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 2, 30, 59, 60, 61, 90, 91, 119, 121, 400, 431])
@pytest.mark.parametrize("chunk", [7, 60, 61])
def test_fade_and_add_equals_the_plain_implementation(chunk: int, overlap: int, samples: int) -> None:
    signal = noise(samples)
    ours = through(faded, Shades(chunk), signal, chunk, overlap)
    assert decibels(plain.fades(Shades(chunk), signal, chunk, overlap), ours) > 120


@pytest.mark.parametrize("overlap", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 60, 120, 121, 400])
def test_fade_and_add_of_an_identity_network_returns_every_sample(overlap: int, samples: int) -> None:
    network, signal, how = Echo(60), ramp(samples), FadeAndAdd(60, overlap)
    assert torch.allclose(through(faded, network, signal, 60, overlap)[0], signal), (
        "also where chunks only touch"
    )
    assert len(network.heard) == how.windows(samples)


def test_the_ends_of_a_song_are_reflected_unless_it_is_short() -> None:
    network = Echo(8)
    through(faded, network, ramp(13), 8, 4)
    assert network.heard[0][0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 2]
    assert network.heard[-1][0, 0].tolist() == [7, 0, 0, 0, 0, 0, 0, 0], "six samples beyond the end"
    network = Echo(8)
    through(faded, network, ramp(12), 8, 4)
    assert network.heard[0][0, 0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(("most", "expected"), [(0.0, 2), (0.25, 2), (0.5, 2), (0.75, 4), (0.9, 8), (1.0, 8)])
def test_less_overlap_leaves_at_least_two_chunks_that_fade(most: float, expected: int) -> None:
    assert FadeAndAdd(352_800, 8).capped(most).overlap == expected
    assert FadeAndAdd(352_800, 1).capped(most).overlap == 1


def test_a_network_that_needs_another_length_is_refused() -> None:
    weight = weights.own(Path("x.onnx"), {**tiny.UNET, "type": "onnx", "sources": ["vocals"]})
    with pytest.raises(ValueError, match=f"accepts only chunks of {tiny.CHUNK} samples, not 9"):
        FadeAndAdd.read(weight, 44100, chunk=9, overlap=2)
    with pytest.raises(ValueError, match="a chunk of 3 samples is too short for an overlap of 4"):
        FadeAndAdd.read(weight, 44100, chunk=3, overlap=4)


@pytest.mark.parametrize(
    ("segment", "overlap", "length", "stride"),
    [
        (7.7, 0.85, 339570, 50935),
        (7.8, 0.85, 343980, 51597),
        (7.8, 0.80, 343980, 68795),
        (44, 0.85, 1940400, 291060),
        (40, 0.80, 1764000, 352799),
    ],
)
def test_strides_match_the_published_ones(segment: float, overlap: float, length: int, stride: int) -> None:
    how = OverlapAdd(overlap, segment, int(segment * 44100))
    assert (how.length, how.stride) == (length, stride)


# However the windows are grouped

METHODS = pytest.mark.parametrize(
    ("method", "length", "sizes"),
    [
        pytest.param(overlap_add, 20, (20, 7), id="overlap-add"),
        pytest.param(overlap_add, 20, (20, 20), id="no overlap"),
        pytest.param(overlap_add, 20, (20, 2), id="almost all overlaps"),
        pytest.param(overlap_add, None, (20, 7), id="overlap-add, any length"),
        pytest.param(overlap_add, None, (21, 13), id="overlap-add, odd lengths"),
        pytest.param(faded, 20, (20, 4), id="fade-and-add"),
        pytest.param(faded, 20, (20, 1), id="chunks that only touch"),
        pytest.param(trim_and_join, 20, (20, 3), id="trim-and-join"),
        pytest.param(trim_and_join, 20, (20, 0), id="nothing to trim"),
    ],
)


@METHODS
@pytest.mark.parametrize("span", [1, 20, 47, 100])
def test_estimates_do_not_depend_on_how_windows_are_grouped(
    method: Callable[..., None],
    length: int | None,
    sizes: tuple[int, int],
    span: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = chunking.SPAN
    for samples in (1, 13, 20, 21, 140, 211):  # 140 are ten chunks without their ends, and whole strides
        signal = noise(samples)
        monkeypatch.setattr(chunking, "SPAN", whole)
        expected = through(method, Shades(length), signal, *sizes)
        assert expected.isfinite().all()
        monkeypatch.setattr(chunking, "SPAN", span)
        for together in (1, 2, 3, 5):
            grouped = through(method, Shades(length), signal, *sizes, together=together)
            assert torch.equal(grouped, expected), f"{samples} samples, {together} together"


@METHODS
def test_progress_is_reported_after_each_window(
    method: Callable[..., None], length: int | None, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sizes
    if method is overlap_add:
        windows = -(-211 // second)
    else:
        how = FadeAndAdd if method is faded else TrimAndJoin
        windows = how(first, second).windows(211)
    monkeypatch.setattr(chunking, "SPAN", 100)
    network = Echo(length)
    heard_before: list[int] = []

    def advance() -> None:
        heard_before.append(sum(map(len, network.heard)))

    through(method, network, noise(211), *sizes, together=3, advance=advance)
    assert len(heard_before) == heard_before[-1] == windows
    assert all(heard >= done for done, heard in enumerate(heard_before, 1)), "counted before it was heard"


@pytest.mark.parametrize("together", [1, 2, 3, 5])
def test_batches_are_as_large_as_the_runner_allows(together: int) -> None:
    network = Echo(20)
    through(trim_and_join, network, noise(11 * 14 - 1), 20, 3, together=together)  # eleven chunks
    sizes = [len(batch) for batch in network.heard]
    assert sizes == [together] * (11 // together) + [11 % together] * (11 % together > 0)


def test_windows_of_different_lengths_are_not_batched_together() -> None:
    network = Echo(None)
    through(overlap_add, network, ramp(30), 12, 4, together=3)
    shapes = [(len(batch), batch.shape[-1]) for batch in network.heard]
    assert shapes == [(3, 12), (2, 12), (1, 10), (1, 6), (1, 2)]


@pytest.mark.parametrize(("method", "sizes"), [(overlap_add, (20, 7)), (trim_and_join, (20, 3))])
def test_no_more_than_a_span_is_on_the_device(
    method: Callable[..., None], sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[int] = []
    bring = Signal.span

    def spied(signal: Signal, first: int, end: int, device: torch.device) -> torch.Tensor:
        brought.append(end - first)
        return bring(signal, first, end, device)

    monkeypatch.setattr(Signal, "span", spied)
    monkeypatch.setattr(chunking, "SPAN", 100)
    through(method, Echo(20), noise(1000), *sizes)
    assert max(brought) <= 100 + 20
    assert len(brought) <= 13, "far less than a span at a time"


@pytest.mark.parametrize(("method", "sizes"), [(overlap_add, (20, 7)), (trim_and_join, (20, 3))])
def test_signals_in_scratch_files_give_the_same_samples_and_are_released(
    method: Callable[..., None], sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunking, "SPAN", 100)
    signal = noise(1000)
    expected = through(method, Shades(20), signal, *sizes)

    heard, *estimates = (Signal(torch.from_numpy(signals.empty((2, 1000), limit=0))) for _ in range(3))
    heard.put(0, signal)
    released = []
    release = signals.release
    monkeypatch.setattr(
        signals,
        "release",
        lambda array: (released.append(array.__array_interface__["data"][0]), release(array)),
    )
    method(Runner(Shades(20), CPU), heard, estimates, *sizes)
    assert torch.equal(torch.stack([estimate.tensor for estimate in estimates]), expected)
    assert torch.equal(heard.tensor, signal)
    for place in (heard, *estimates):
        assert released.count(place.tensor.data_ptr()) >= 10, "not after every span"
