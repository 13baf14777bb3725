"""The terms of the loss, each a distance between an estimated waveform and the true one.

A new term needs only an entry in :data:`LOSSES`. Its name becomes a key of the config's section ``loss``, a
column of ``steps.csv`` and a curve in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from training.config import Loss


@dataclass(frozen=True)
class Term:
    """One term of the loss."""

    title: str  # its name in the report
    function: Callable[[Tensor, Tensor, Loss], Tensor]
    """Takes the estimate and the target, float32 waveforms ``(B, 2, T)``, and the config's section ``loss``;
    returns a scalar that is lower for better estimates."""
    weight: float = 0.0  # its default weight; 0 disables it
    uses_windows: bool = False  # whether signals must be at least as long as the longest of ``loss.windows``


def _spectral(estimate: Tensor, target: Tensor, config: Loss) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of spectra, averaged over window lengths.

    The spectrum is linear, so the spectrum of the difference is the difference of the spectra. Spectra are
    normalized so that noise has the same weight at each window length.
    """
    difference = (estimate - target).flatten(0, 1)  # (B·2, T)
    values = []
    for size in config.windows:
        window = torch.hann_window(size, device=difference.device)
        spectrum = torch.stft(  # not centered: reflect padding has no deterministic gradient on GPUs
            difference, size, size // 4, window=window, normalized=True, return_complex=True, center=False
        )
        values.append(torch.view_as_real(spectrum).abs().mean())
    return torch.stack(values).mean()


LOSSES: dict[str, Term] = {
    "mse": Term("mean squared difference", lambda estimate, target, config: F.mse_loss(estimate, target)),
    "l1": Term(
        "mean absolute difference", lambda estimate, target, config: F.l1_loss(estimate, target), weight=1.0
    ),
    "spectral": Term("mean absolute difference of spectra", _spectral, uses_windows=True),
}


def terms(config: Loss, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The unweighted values of all terms with a nonzero weight, by name.

    Parameters
    ----------
    estimate, target : Tensor
        Float32 waveforms ``(B, 2, T)``.
    """
    return {
        name: LOSSES[name].function(estimate, target, config)
        for name, weight in config.weights.items()
        if weight
    }


def total(config: Loss, found: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum of the terms."""
    return torch.stack([config.weights[name] * value for name, value in found.items()]).sum()
