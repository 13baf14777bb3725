"""The spectrogram that MDX-Net takes as input: complex numbers as channels, only the lowest bins.

Source: KUIELab-MDX-Net (Kim et al. 2021, arXiv 2111.12203), section 3.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.networks import architecture


@dataclass(frozen=True)
class SpectrogramConfig:
    """Sizes of the transform.

    Attributes
    ----------
    n_fft : int
        Window and transform length in samples (periodic Hann).
    hop : int
        Samples between frames.
    bins : int
        Number of bins kept of all ``n_fft // 2 + 1``, beginning with the lowest.
    frames : int
        Frames of one chunk.
    """

    n_fft: int
    hop: int
    bins: int
    frames: int

    def __post_init__(self) -> None:
        architecture.check_unet(asdict(self))

    @property
    def chunk(self) -> int:
        """Samples of one chunk: with centered frames at both ends, one hop fewer than frames."""
        return self.hop * (self.frames - 1)


class Spectrogram(nn.Module):
    """Waveforms ``(B, 2, T)`` to channels ``(B, 4, bins, frames)`` and back.

    Channels are left-real, left-imaginary, right-real, right-imaginary. Frames are centered with reflect
    padding and not normalized. The inverse fills the bins above ``bins`` with zeros.
    """

    window: Tensor

    def __init__(self, config: SpectrogramConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("window", torch.hann_window(config.n_fft, periodic=True), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """Transform float32 waveforms ``(B, 2, T)`` into ``(B, 4, bins, frames)``."""
        n_fft, hop, bins = self.config.n_fft, self.config.hop, self.config.bins
        batch, channels, length = wave.shape
        spectrum = torch.stft(  # (B·2, n_fft // 2 + 1, frames) complex
            wave.reshape(batch * channels, length),
            n_fft,
            hop,
            window=self.window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )[:, :bins]
        parts = torch.view_as_real(spectrum).permute(0, 3, 1, 2)  # (B·2, 2, bins, frames)
        return parts.reshape(batch, 2 * channels, bins, -1)

    def inverse(self, channels: Tensor) -> Tensor:
        """Transform ``(B, 4, bins, frames)`` back into waveforms ``(B, 2, hop · (frames − 1))``."""
        n_fft, hop, bins = self.config.n_fft, self.config.hop, self.config.bins
        batch, count, _, frames = channels.shape
        padded = F.pad(channels, (0, 0, 0, n_fft // 2 + 1 - bins))
        parts = padded.reshape(batch * count // 2, 2, n_fft // 2 + 1, frames).permute(0, 2, 3, 1)
        wave = torch.istft(
            torch.view_as_complex(parts.contiguous()), n_fft, hop, window=self.window, center=True
        )
        return wave.reshape(batch, count // 2, -1)
