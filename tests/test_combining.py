"""Estimates combined by sample or by spectrogram bin, against a plain implementation in numpy and scipy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from conftest import decibels
from numpy.typing import NDArray
from scipy import signal as scipy_signal

from kmdx import combining, signals
from kmdx.nodes import MODES
from kmdx.signals import Signal

N_FFT, HOP = 2048, 1024


def estimates(count: int, samples: int) -> list[NDArray[np.float64]]:
    generator = np.random.default_rng(count)
    return [0.1 * generator.standard_normal((2, samples)) for _ in range(count)]


def plain(mode: str, waves: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The whole song at once, with zeros around it."""
    reduction, domain = mode.split("_")
    samples = waves[0].shape[-1]
    stack = np.stack(waves)
    window = scipy_signal.get_window("hann", N_FFT)
    if domain == "fft":
        padded = np.pad(stack, ((0, 0), (0, 0), (N_FFT, 2 * N_FFT + -samples % HOP)))
        frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT, axis=-1)[..., ::HOP, :]
        stack = np.fft.rfft(frames * window)
    if reduction == "avg":
        value = stack.mean(0)
    elif reduction == "median":
        value = np.median(stack.real, 0) + (1j * np.median(stack.imag, 0) if domain == "fft" else 0)
    else:
        choose = np.argmax if reduction == "max" else np.argmin
        value = np.take_along_axis(stack, choose(abs(stack), 0)[None], 0)[0]
    if domain == "wave":
        return value
    wave, weight = np.zeros(padded.shape[1:]), np.zeros(padded.shape[-1])
    for number in range(value.shape[-2]):
        part = slice(number * HOP, number * HOP + N_FFT)
        wave[:, part] += np.fft.irfft(value[:, number]) * window
        weight[part] += window**2
    return (wave / np.maximum(weight, 1e-9))[:, N_FFT : N_FFT + samples]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("count", "samples"), [(2, 1), (3, 700), (4, 2048), (3, 10_001)])
def test_every_mode_equals_the_plain_implementation(mode: str, count: int, samples: int) -> None:
    waves = estimates(count, samples)
    inputs = [Signal(torch.from_numpy(wave.astype(np.float32))) for wave in waves]
    made = combining.run(mode, inputs).tensor
    assert decibels(plain(mode, waves), made.double().numpy()) > 110


@pytest.mark.parametrize("mode", MODES)
def test_a_long_song_is_combined_block_by_block_with_the_same_result(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [Signal(torch.from_numpy(wave.astype(np.float32))) for wave in estimates(3, 10_001)]
    whole = combining.run(mode, inputs).tensor
    monkeypatch.setattr(signals, "LIMIT", 1000)
    monkeypatch.setattr(combining, "SIGNAL_BLOCK", 4 * HOP)
    made = combining.run(mode, [Signal(signal.tensor, long=True) for signal in inputs])
    assert made.long
    assert torch.allclose(made.tensor, whole, atol=1e-7)


def test_the_maximum_keeps_what_one_estimate_misses_and_the_minimum_what_both_have() -> None:
    time = torch.arange(44100) / 44100
    low, high = (torch.sin(2 * torch.pi * hertz * time).expand(2, -1) for hertz in (220, 3000))
    both, one = Signal(low + high), Signal(low.clone())
    middle = slice(4096, -4096)
    assert decibels((low + high)[:, middle], combining.run("max_fft", [both, one]).tensor[:, middle]) > 60
    assert decibels(low[:, middle], combining.run("min_fft", [both, one]).tensor[:, middle]) > 60
