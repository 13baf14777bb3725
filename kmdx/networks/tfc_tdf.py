"""TFC-TDF U-Net v2, the network of the MDX-Net half.

Source: KUIELab-MDX-Net (Kim et al. 2021, arXiv 2111.12203). The same class has batch normalization (vocals)
or group normalization with any number of groups (bass, drums, other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kmdx.networks import architecture, fast
from kmdx.networks.architecture import TRANSFORM
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.state import NoInitialization, load_strictly

UNET = (*architecture.UNET, "bottleneck")
WAVE_CHANNELS = 2
SPECTRUM_CHANNELS = 2 * WAVE_CHANNELS  # real and imaginary part of each
TRANSFORM_CONSTANTS = ("window", "freq_pad")  # stored in the author's files next to the parameters


@dataclass(frozen=True)
class TfcTdfConfig:
    """Sizes of the U-Net, in the paper's terms."""

    spectrogram: SpectrogramConfig  # the transform around the network
    layers: int  # ``L``: total number of blocks in encoder, bottleneck and decoder; odd
    convolutions: int  # ``l``: 3×3 convolutions of one block
    growth: int  # ``g``: channels of the first level, and added by each level below it
    norm_groups: int | None  # groups of the group normalization; ``None`` for batch normalization
    bottleneck: int = 8  # the frequency layers narrow to ``bins // bottleneck`` and widen again

    def __post_init__(self) -> None:
        sizes = asdict(self)
        architecture.check_unet({**sizes.pop("spectrogram"), **sizes})

    @property
    def levels(self) -> int:
        """The number of times that the U-Net halves both axes."""
        return self.layers // 2

    def norm(self, channels: int) -> nn.Module:
        """Build a normalization layer."""
        if self.norm_groups is None:
            return nn.BatchNorm2d(channels)
        return nn.GroupNorm(self.norm_groups, channels)


class TimeFrequencyConvolutions(nn.Module):
    """TFC: a chain of 3×3 convolutions, each with normalization and ReLU; ``(B, C, T, F)``."""

    def __init__(self, config: TfcTdfConfig, channels: int) -> None:
        super().__init__()
        self.H = nn.ModuleList(  # `H` is the name in the published state dicts
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), config.norm(channels), nn.ReLU(inplace=True)
            )
            for _ in range(config.convolutions)
        )
        self.has_batch_norms = config.norm_groups is None

    def forward(self, x: Tensor) -> Tensor:
        if self.has_batch_norms and channels_last_is_faster(x):
            x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.H:
            x = layer(x)
        return x.contiguous()


def channels_last_is_faster(x: Tensor) -> bool:
    """Whether convolutions would otherwise change their input's and output's layout: on tensor cores.

    A group normalization on a GPU would change it back after every convolution.
    """
    return x.is_cuda and x.dtype != torch.float32


class Block(nn.Module):
    """TFC, then ``x + TDF(x)``: fully connected layers along frequency; ``(B, C, T, F)``."""

    def __init__(self, config: TfcTdfConfig, channels: int, bins: int) -> None:
        super().__init__()
        narrow = bins // config.bottleneck
        self.tfc = TimeFrequencyConvolutions(config, channels)
        self.tdf = nn.Sequential(
            nn.Linear(bins, narrow, bias=False),
            config.norm(channels),
            nn.ReLU(inplace=True),
            nn.Linear(narrow, bins, bias=False),
            config.norm(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.tfc(x)
        return self.tdf(x).add_(x) if not torch.is_grad_enabled() else x + self.tdf(x)


class TfcTdf(nn.Module):
    """The U-Net between a spectrogram and its inverse; it estimates one source."""

    # The 8 bits of bfloat16 leave an error of -30 to -36 dB.
    supported_dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    def __init__(self, config: TfcTdfConfig, source: str) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # precision between the first and the last convolution
        self.sources: tuple[str, ...] = (source,)
        self.length: int | None = config.spectrogram.chunk
        self.spectrogram = config.spectrogram.build()

        growth, levels = config.growth, config.levels
        channels = [growth * (level + 1) for level in range(levels + 1)]
        bins = [config.spectrogram.bins >> level for level in range(levels + 1)]

        self.first_conv = nn.Sequential(
            nn.Conv2d(SPECTRUM_CHANNELS, growth, 1), config.norm(growth), nn.ReLU(inplace=True)
        )
        self.encoding_blocks = nn.ModuleList(Block(config, channels[i], bins[i]) for i in range(levels))
        self.ds = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[i], channels[i + 1], 2, stride=2),
                config.norm(channels[i + 1]),
                nn.ReLU(inplace=True),
            )
            for i in range(levels)
        )
        self.bottleneck_block = Block(config, channels[levels], bins[levels])
        self.us = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(channels[i + 1], channels[i], 2, stride=2),
                config.norm(channels[i]),
                nn.ReLU(inplace=True),
            )
            for i in reversed(range(levels))
        )
        self.decoding_blocks = nn.ModuleList(
            Block(config, channels[i], bins[i]) for i in reversed(range(levels))
        )
        self.final_conv = nn.Sequential(nn.Conv2d(growth, SPECTRUM_CHANNELS, 1))

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the source: float32 ``(B, 2, T)`` in, ``(B, 1, 2, T)`` out, ``T`` one chunk."""
        estimate = self.spectrogram.inverse(self.unet(self.spectrogram(batch)))
        return estimate[:, None]

    def unet(self, spectrum: Tensor) -> Tensor:
        """Map the mixture's spectrogram ``(B, 4, bins, frames)`` to the source's, same shape."""
        # The blocks need frequency as the last axis. Swapping the axes is cheapest outside the 1×1
        # convolutions at both ends, where there are only four channels.
        x = self.first_conv(spectrum.transpose(-1, -2).contiguous()).to(self.dtype)  # (B, g, frames, bins)
        skips = []
        for block, down in zip(self.encoding_blocks, self.ds, strict=True):
            x = block(x)
            skips.append(x)
            x = down(x)
        x = self.bottleneck_block(x)
        for up, block in zip(self.us, self.decoding_blocks, strict=True):
            x = block(up(x) * skips.pop())
        return self.final_conv(x.float()).transpose(-1, -2)

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        if tuned:
            fast.fold_batch_norms(self)
            fast.accelerate(self)
            if dtype == torch.bfloat16:  # CPUs convolve with channels last, and copy to other layouts slowly
                self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = dtype
        between = (*self.encoding_blocks, *self.ds, self.bottleneck_block, *self.us, *self.decoding_blocks)
        for layers in between:
            fast.store_all_but_batch_norms(layers, dtype)

    def narrow(self, sources: Sequence[str]) -> TfcTdf:
        """Return itself, because it has only one source."""
        if tuple(sources) != self.sources:
            raise ValueError(f"this network estimates {self.sources[0]}, not {', '.join(sources)}")
        return self

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a published state dict strictly.

        The author's files also contain the transform's constants (``window`` and ``freq_pad``), which must
        match this network's. Raises :class:`ValueError` if a constant differs, or a parameter is missing,
        unknown or has the wrong shape.
        """
        constants = load_strictly(self, state, TRANSFORM_CONSTANTS)
        window = constants.get("window")
        if window is not None and not (
            window.shape == self.spectrogram.window.shape
            and torch.allclose(window.float(), self.spectrogram.window, atol=1e-6)
        ):
            raise ValueError(
                f"its window is not the periodic Hann window of {len(self.spectrogram.window)} samples"
            )
        freq_pad = constants.get("freq_pad")
        if freq_pad is not None and (freq_pad.any() or freq_pad.shape[-2:] != self.padding_shape):
            raise ValueError(f"its freq_pad is not zeros of shape (…, {self.padding_shape})")

    @classmethod
    def of_state(cls, config: TfcTdfConfig, source: str, state: Mapping[str, Tensor]) -> TfcTdf:
        """Build a network for inference from a copy of a published state dict.

        Raises :class:`ValueError` if the state dict belongs to a network of other sizes.
        """
        convolutions = config.layers * config.convolutions
        if convolutions > len(state):  # checked before making a module for each
            raise ValueError(
                f"another network's weights: expected {config.layers} layers of {config.convolutions} "
                f"convolutions, found {len(state)} tensors"
            )
        with NoInitialization.for_state(state):
            network = cls(config, source)
        network.load(state)
        return network.requires_grad_(False).eval()

    @property
    def padding_shape(self) -> tuple[int, int]:
        """Shape ``(bins, frames)`` of the zeros that replace the bins above the network's."""
        spectrogram = self.config.spectrogram
        return (spectrogram.n_fft // 2 + 1 - spectrogram.bins, spectrogram.frames)


def build(architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]) -> TfcTdf:
    """Build a U-Net from its architecture and load its weights strictly; ``segment`` is not used.

    Raises :class:`ValueError` if the state dict belongs to a network of other sizes.
    """
    sizes = {key: architecture[key] for key in UNET if key in architecture}
    config = TfcTdfConfig(spectrogram_of(architecture), **sizes)
    return TfcTdf.of_state(config, architecture["sources"][0], state)


def spectrogram_of(architecture: Mapping[str, Any]) -> SpectrogramConfig:
    """The transform of an architecture."""
    return SpectrogramConfig(**{key: architecture[key] for key in TRANSFORM})
