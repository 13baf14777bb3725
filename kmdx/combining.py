"""Combine several estimates of one source sample by sample, or bin by bin of their spectrograms.

The modes have the names that users of Music-Source-Separation-Training and audio-separator know. Spectrograms
are short-time Fourier transforms with a Hann window of 2048 samples and a hop of 1024, and zeros around the
signal. They are made and inverted block by block, so memory does not grow with the song.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kmdx.networks.spectrogram import inverse_stft
from kmdx.signals import SIGNAL_BLOCK, Signal, combine

N_FFT, HOP = 2048, 1024  # samples; a block of a signal is a multiple of the hop

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg": lambda values: values.mean(0),
    "median": lambda values: _median(values),
    "min": lambda values: _chosen(values, values.abs().argmin(0)),
    "max": lambda values: _chosen(values, values.abs().argmax(0)),
}
"""How to reduce estimates ``(n, …)``, real or complex, to one."""


def run(mode: str, signals: Sequence[Signal]) -> Signal:
    """Combine signals ``(channels, samples)`` in one of :data:`kmdx.nodes.MODES`."""
    reduction, _, domain = mode.partition("_")
    reduce = REDUCTIONS[reduction]
    if domain == "wave":
        return combine(lambda target, *parts: target.copy_(reduce(torch.stack(parts))), signals)
    made = signals[0].new_empty()
    device = made.tensor.device
    window = torch.hann_window(N_FFT, device=device)
    for start in range(0, made.length, SIGNAL_BLOCK):
        end = min(start + SIGNAL_BLOCK, made.length)
        # A margin of one window, so that every frame that overlaps the block is complete.
        parts = [signal.span(start - N_FFT, end + N_FFT, device) for signal in signals]
        spectra = torch.stack([_stft(part, window) for part in parts])  # (n, channels, bins, frames)
        wave = inverse_stft(reduce(spectra), N_FFT, HOP, window, parts[0].shape[-1])
        made.put(start, wave[:, N_FFT : N_FFT + end - start])
        for signal in (made, *signals):
            signal.release()
    return made


def _stft(wave: Tensor, window: Tensor) -> Tensor:
    return torch.stft(wave, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True)


def _median(values: Tensor) -> Tensor:
    """The median; of complex numbers, that of the real and of the imaginary parts."""
    if values.is_complex():
        return torch.view_as_complex(_median(torch.view_as_real(values)))
    ordered, middle = values.sort(0).values, len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _chosen(values: Tensor, index: Tensor) -> Tensor:
    """For each element, the value of the estimate with this index."""
    return values.gather(0, index[None])[0]
