"""The spectrogram that MDX-Net hears: complex numbers as channels, the lowest bins only.

Source: KUIELab-MDX-Net (Kim et al. 2021, arXiv 2111.12203), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_FFT, MAX_FRAMES = 1 << 16, 1 << 14  # the published networks have 16,384 and 512 at most


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
        How many of the ``n_fft // 2 + 1`` bins are kept, from the lowest.
    frames : int
        Frames of one chunk.
    """

    n_fft: int
    hop: int
    bins: int
    frames: int

    def __post_init__(self) -> None:
        for name, most in (("n_fft", MAX_FFT), ("hop", self.n_fft // 2), ("frames", MAX_FRAMES)):
            if not 0 < getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in 1..{most}, not {getattr(self, name)}")
        if not 0 < self.bins <= self.n_fft // 2 + 1:
            raise ValueError(f"bins must lie in 1..{self.n_fft // 2 + 1}, not {self.bins}")
        if self.chunk <= self.n_fft // 2:
            raise ValueError(
                f"{self.frames} frames are {self.chunk} samples, and n_fft {self.n_fft} needs more"
            )

    @property
    def chunk(self) -> int:
        """Samples of one chunk: centred frames lie at both ends, so one hop fewer than frames."""
        return self.hop * (self.frames - 1)


class Spectrogram(nn.Module):
    """Waveforms ``(B, 2, T)`` to channels ``(B, 4, bins, frames)`` and back.

    Channels are left-real, left-imaginary, right-real, right-imaginary. Frames are centred with
    reflect padding and not normalised; the inverse fills the bins above ``bins`` with zeros.
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
