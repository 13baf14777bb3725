"""Signals of any length through networks of fixed length, against Demucs' own and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import plain
import pytest
import tiny
import torch
from conftest import decibels
from demucs.apply import apply_model

from kmdx.chunking import overlap_add, trim_and_join
from kmdx.networks.demucs import DemucsNetwork
from kmdx.plan import OverlapAdd, TrimAndJoin


class Echo(torch.nn.Module):
    """A network that gives back what it hears, and keeps what it heard."""

    def __init__(self, length: int | None) -> None:
        super().__init__()
        self.sources = ("echo",)
        self.length = length
        self.heard: list[torch.Tensor] = []

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        assert self.length is None or batch.shape[-1] == self.length
        self.heard.append(batch)
        return batch[:, None]

    def narrow(self, sources: Sequence[str]) -> Echo:
        return self


def ramp(samples: int) -> torch.Tensor:
    return torch.arange(1.0, samples + 1).expand(2, -1)


@pytest.mark.parametrize("architecture", [tiny.HTDEMUCS, tiny.HDEMUCS, tiny.HYBRID_OLD])
@pytest.mark.parametrize("overlap", [0.85, 0.25, 0.0])
@pytest.mark.parametrize("samples", [60_001, 22_050, 9_000])
@torch.inference_mode()
def test_overlap_add_is_demucs_apply_model(architecture: dict, overlap: float, samples: int) -> None:
    model = tiny.demucs(architecture, seed=1)
    torch.manual_seed(0)
    signal = 0.1 * torch.randn(2, samples)
    segment = architecture["segment"]
    how = OverlapAdd(overlap, segment, int(segment * 44100))
    steps = []
    ours = overlap_add(DemucsNetwork(model), signal, how.length, how.stride, lambda: steps.append(1))
    theirs = apply_model(model, signal[None], shifts=0, split=True, overlap=overlap)[0]
    assert decibels(theirs, ours) > 110
    assert len(steps) == how.windows(samples)


def test_a_short_segment_hears_the_song_around_it_and_zeros_beyond() -> None:
    network = Echo(length=10)
    overlap_add(network, ramp(14), length=10, stride=8)
    first, second = (heard[0, 0] for heard in network.heard)
    assert first.tolist() == list(range(1, 11))
    # Samples 8..13 of the song: two of the four missing ones before it, the rest beyond its end.
    assert second.tolist() == [7, 8, 9, 10, 11, 12, 13, 14, 0, 0]


def test_a_network_of_any_length_hears_a_short_segment_as_it_is() -> None:
    network = Echo(length=None)
    overlap_add(network, ramp(14), length=10, stride=8)
    assert [heard.shape[-1] for heard in network.heard] == [10, 6]


@pytest.mark.parametrize("samples", [1, 9, 10, 11, 33, 40])
def test_overlap_add_of_an_echo_is_the_signal(samples: int) -> None:
    signal = ramp(samples)
    assert torch.allclose(overlap_add(Echo(10), signal, 10, 3)[0], signal)


@pytest.mark.parametrize("samples", [1, 5, 6, 7, 11, 12, 13, 60])
def test_trim_and_join_of_an_echo_is_the_signal(samples: int) -> None:
    network, signal = Echo(10), ramp(samples)
    how = TrimAndJoin(chunk=10, trim=2)
    assert torch.equal(trim_and_join(network, signal, how.chunk, how.trim)[0], signal)
    assert len(network.heard) == how.windows(samples) == samples // 6 + 1, "one more where it divides evenly"


@pytest.mark.parametrize("samples", [20_000, 3 * (tiny.CHUNK - 2 * 109), 500])
@torch.inference_mode()
def test_trim_and_join_is_the_plain_reading(samples: int) -> None:
    network = tiny.unet("bass", 4, seed=2)
    torch.manual_seed(0)
    signal = 0.1 * torch.randn(2, samples)
    ours = trim_and_join(network, signal, tiny.CHUNK, 109)[0]
    assert torch.equal(ours, plain.mdx(network, signal, tiny.CHUNK, 109))


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
def test_published_strides_in_samples(segment: float, overlap: float, length: int, stride: int) -> None:
    how = OverlapAdd(overlap, segment, int(segment * 44100))
    assert (how.length, how.stride) == (length, stride)
