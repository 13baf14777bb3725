"""The spectrogram that convolutional networks take as input: complex numbers as channels.

Source: KUIELab-MDX-Net (Kim et al. 2021, arXiv 2111.12203), section 3.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.networks import architecture


@dataclass(frozen=True)
class SpectrogramConfig:
    """Sizes of MDX-Net's transform."""

    n_fft: int  # window and transform length in samples (periodic Hann)
    hop: int  # samples between frames
    bins: int  # number of bins kept of all ``n_fft // 2 + 1``, beginning with the lowest
    frames: int  # frames of one chunk

    def __post_init__(self) -> None:
        architecture.check_unet(asdict(self))

    def build(self) -> Spectrogram:
        """Build the transform."""
        return Spectrogram(self.n_fft, self.hop, self.bins)

    @property
    def chunk(self) -> int:
        """Samples of one chunk: with centered frames at both ends, one hop fewer than frames."""
        return self.hop * (self.frames - 1)


class Spectrogram(nn.Module):
    """Waveforms ``(B, C, n)`` to channels ``(B, 2·C, bins, T)`` and back.

    Channels are left-real, left-imaginary, right-real, right-imaginary. Frames are centered with reflect
    padding. The inverse fills the bins above ``bins`` with zeros.

    Parameters
    ----------
    n_fft, hop, bins : int
        As in :class:`SpectrogramConfig`.
    window : Tensor, optional
        At most ``n_fft`` values; by default a periodic Hann window of ``n_fft``.
    normalized : bool
        Whether the transform is divided by the root of ``n_fft``.
    """

    window: Tensor

    def __init__(
        self, n_fft: int, hop: int, bins: int, window: Tensor | None = None, normalized: bool = False
    ) -> None:
        super().__init__()
        self.n_fft, self.hop, self.bins, self.normalized = n_fft, hop, bins, normalized
        window = torch.hann_window(n_fft) if window is None else window
        self.register_buffer("window", window, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Transform float32 waveforms ``(B, C, n)`` into ``(B, 2·C, bins, T)``."""
        batch, channels, length = wave.shape
        spectrum = torch.stft(  # (B·C, n_fft // 2 + 1, T) complex
            wave.reshape(batch * channels, length),
            self.n_fft,
            self.hop,
            len(self.window),
            self.window,
            center=True,
            pad_mode="reflect",
            normalized=self.normalized,
            return_complex=True,
        )[:, : self.bins]
        parts = torch.view_as_real(spectrum).permute(0, 3, 1, 2)  # (B·C, 2, bins, T)
        return parts.reshape(batch, 2 * channels, self.bins, -1)

    def inverse(self, channels: Tensor) -> Tensor:
        """Transform ``(B, 2·C, bins, T)`` back into waveforms ``(B, C, hop · (T − 1))``."""
        batch, count, _, frames = channels.shape
        padded = F.pad(channels, (0, 0, 0, self.n_fft // 2 + 1 - self.bins))
        parts = padded.reshape(batch * count // 2, 2, -1, frames).permute(0, 2, 3, 1)
        spectrum = torch.view_as_complex(parts.contiguous())
        length = self.hop * (frames - 1)
        wave = inverse_stft(spectrum, self.n_fft, self.hop, self.window, length, self.normalized)
        return wave.reshape(batch, count // 2, -1)


def inverse_stft(
    spectrum: Tensor, n_fft: int, hop: int, window: Tensor, length: int, normalized: bool = False
) -> Tensor:
    """Transform complex spectra ``(N, n_fft // 2 + 1, T)`` of centered frames into waves ``(N, length)``.

    Unlike ``torch.istft``, it does not wait for a GPU to check that the windows leave no gaps; sizes are
    checked when a network is built. ``length`` is at most ``hop · (T − 1) + n_fft // 2``.
    """
    frames, slots, missing = spectrum.shape[2], math.ceil(n_fft / hop), n_fft - len(window)
    window = F.pad(window, (missing // 2, missing - missing // 2))
    parts = torch.fft.irfft(spectrum.transpose(1, 2), n_fft, norm="ortho" if normalized else "backward")

    def overlapped(parts: Tensor) -> Tensor:
        """Add frames ``(N, T, n_fft)``, and return the samples that are asked for."""
        cut = F.pad(parts, (0, slots * hop - n_fft)).unflatten(-1, (slots, hop))
        added = parts.new_zeros(len(parts), frames + slots - 1, hop)
        for slot in range(slots):
            added[:, slot : slot + frames] += cut[:, :, slot]
        return added.flatten(1)[:, n_fft // 2 : n_fft // 2 + length]

    return overlapped(parts.mul_(window)).div_(overlapped(window.square().expand(1, frames, -1)))
