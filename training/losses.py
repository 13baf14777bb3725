"""The terms of the loss: how far an estimated waveform is from the true one.

One entry in :data:`LOSSES` is all that a new term takes. Its name becomes a key of the config's section
``loss``, a column of ``steps.csv`` and a curve on the page.
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
    """One term of the loss.

    Attributes
    ----------
    title : str
        Its name on the page.
    function : callable
        Takes the estimate and the target, float32 waveforms ``(B, 2, T)``, and the config's section
        ``loss``; returns a scalar that falls as the estimate gets better.
    weight : float
        Its weight where the config gives none; 0 leaves it out.
    uses_windows : bool
        Whether it needs signals as long as the longest of ``loss.windows``.
    """

    title: str
    function: Callable[[Tensor, Tensor, Loss], Tensor]
    weight: float = 0.0
    uses_windows: bool = False


def _spectral(estimate: Tensor, target: Tensor, config: Loss) -> Tensor:
    """Mean absolute difference of complex spectra, real and imaginary part apart, over several windows.

    It is linear in the signals: the spectrum of the difference is the difference of the spectra. Spectra
    are normalized so that noise weighs the same in each.
    """
    difference = (estimate - target).flatten(0, 1)  # (B·2, T)
    values = []
    for size in config.windows:
        window = torch.hann_window(size, device=difference.device)
        spectrum = torch.stft(  # not centered, since reflection has no deterministic gradient on GPUs
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
    """Terms of the loss that have a weight, unweighted, by name.

    Parameters
    ----------
    config : Loss
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
