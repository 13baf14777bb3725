"""How far an estimated waveform is from the true one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from training.config import Loss


def terms(config: Loss, estimate: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Terms of the loss that have a weight, unweighted, by name.

    Parameters
    ----------
    config : Loss
    estimate, target : Tensor
        Float32 waveforms ``(B, 2, T)``.
    """
    found = {}
    if config.mse:
        found["mse"] = F.mse_loss(estimate, target)
    if config.l1:
        found["l1"] = F.l1_loss(estimate, target)
    if config.spectral:
        found["spectral"] = _spectral(estimate, target, config.windows)
    return found


def total(config: Loss, found: dict[str, Tensor]) -> Tensor:
    """Their weighted sum."""
    return torch.stack([getattr(config, name) * value for name, value in found.items()]).sum()


def _spectral(estimate: Tensor, target: Tensor, windows: tuple[int, ...]) -> Tensor:
    """Mean absolute difference of complex spectra, real and imaginary part apart, over several windows.

    It is linear in the signals: the spectrum of the difference is the difference of the spectra. Spectra
    are normalized so that noise weighs the same in each.
    """
    difference = (estimate - target).flatten(0, 1)  # (B·2, T)
    values = []
    for size in windows:
        window = torch.hann_window(size, device=difference.device)
        spectrum = torch.stft(  # not centred, since reflection has no deterministic gradient on GPUs
            difference, size, size // 4, window=window, normalized=True, return_complex=True, center=False
        )
        values.append(torch.view_as_real(spectrum).abs().mean())
    return torch.stack(values).mean()
