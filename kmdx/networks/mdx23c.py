"""TFC-TDF U-Net v3, known as MDX23C: convolutions and layers along frequency, for several sources at once.

Reference: Kim, Lee and Jung 2023, "Sound Demixing Challenge 2023 Music Demixing Track Technical Report:
TFC-TDF-UNet v3" (arXiv 2306.09382). Structure and names are those of the checkpoints that are published for
Music-Source-Separation-Training. :mod:`kmdx.networks.tfc_tdf` is version 2.

Shapes: B batch, C channels of the sound, S sources, K sub-bands, D features, T frames, F bins of a sub-band,
n samples. Inside the U-Net, frequency is the last axis.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.challenge import RATE
from kmdx.errors import quoted
from kmdx.networks import architecture as sizes_of
from kmdx.networks import fast, types
from kmdx.networks.random_weights import gain_to_level, random_state
from kmdx.networks.spectrogram import Spectrogram
from kmdx.networks.state import NoInitialization, Shapes, complete, load_strictly

_NO_NORM = ("none", "None", "Identity")  # in the published code, any unknown name means none
_NORM = re.compile(rf"InstanceNorm|BatchNorm|GroupNorm([1-9]\d{{0,3}})|{'|'.join(_NO_NORM)}")
_ACT = re.compile(r"gelu|relu|elu(\d{1,4}(?:\.\d{1,4})?)")


@dataclass(frozen=True)
class Mdx23cConfig:
    """Sizes of a network, named as in a published configuration."""

    n_fft: int
    hop_length: int
    """``n_fft`` and ``hop_length``: the transform, in samples; its window is a Hann window."""
    dim_f: int  # number of bins kept, beginning with the lowest
    num_subbands: int  # neighboring parts into which the bins are cut; they become features
    num_channels: int  # features of the first level
    growth: int  # features added by each level below it
    num_scales: int  # levels below the first one
    num_blocks_per_scale: int  # blocks of each level
    bottleneck_factor: int  # the frequency layers narrow to ``F / bottleneck_factor`` and widen again
    scale: tuple[int, int]  # by which each level shortens time and frequency
    norm: str  # ``InstanceNorm``, ``BatchNorm``, ``GroupNorm`` and the number of groups, or ``none``
    act: str  # ``gelu``, ``relu``, or ``elu`` and its alpha
    stereo: bool  # whether it takes two channels together, instead of each alone

    def __post_init__(self) -> None:
        if self.n_fft % 2:
            raise ValueError(f"n_fft must be even, not {self.n_fft}")
        if 10 * self.hop_length > 9 * self.n_fft:
            raise ValueError(
                f"a hop_length of {self.hop_length} leaves gaps between windows of {self.n_fft} samples"
            )
        if self.dim_f > self.n_fft // 2 + 1:
            raise ValueError(f"dim_f must be from 1 to {self.n_fft // 2 + 1}, not {self.dim_f}")
        if len(self.scale) != 2:
            raise ValueError(f"scale must have 2 values, not {len(self.scale)}")
        divisor = self.num_subbands * self.scale[1] ** self.num_scales
        if self.dim_f % divisor:
            raise ValueError(f"dim_f must be divisible by {divisor}, not {self.dim_f}")
        if self.dim_f // divisor < self.bottleneck_factor:
            raise ValueError(
                f"bottleneck_factor must be at most {self.dim_f // divisor}, the bins of the lowest level, "
                f"not {self.bottleneck_factor}"
            )
        if not _ACT.fullmatch(self.act):
            raise ValueError(f"act must be gelu, relu or elu and a number, not {quoted(self.act)}")
        norm = _NORM.fullmatch(self.norm)
        if not norm:
            raise ValueError(
                "norm must be InstanceNorm, BatchNorm, GroupNorm and a number, or none, "
                f"not {quoted(self.norm)}"
            )
        if norm[1] and (self.num_channels % int(norm[1]) or self.growth % int(norm[1])):
            raise ValueError(
                f"num_channels and growth must be divisible by the groups of {self.norm}: "
                f"{self.num_channels} and {self.growth} do not fit"
            )

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> Mdx23cConfig:
        """Make one from an architecture; ``stereo`` is true by default.

        Raises :class:`ValueError` if a size is missing, or sizes are inconsistent.
        """
        sizes = {"stereo": True, **sizes}
        names = [field.name for field in fields(cls)]
        if lacking := [name for name in names if name not in sizes]:
            raise ValueError(f"missing {', '.join(lacking)}: only the real weights determine them")
        own: dict[str, Any] = {name: sizes[name] for name in names}
        return cls(**{**own, "scale": tuple(own["scale"])})

    @property
    def channels(self) -> int:
        """Channels of the sound that it takes together."""
        return 2 if self.stereo else 1

    @property
    def inputs(self) -> int:
        """Features of its input: real and imaginary part of each channel and sub-band."""
        return 2 * self.channels * self.num_subbands

    @property
    def dims(self) -> list[int]:
        """Features of each level."""
        return [self.num_channels + self.growth * level for level in range(self.num_scales + 1)]

    def make_norm(self, dim: int) -> nn.Module:
        """Build a normalization layer."""
        if self.norm in _NO_NORM:
            return nn.Identity()
        if self.norm == "InstanceNorm":
            return nn.InstanceNorm2d(dim, affine=True)
        if self.norm == "BatchNorm":
            return nn.BatchNorm2d(dim)
        return nn.GroupNorm(int(self.norm.removeprefix("GroupNorm")), dim)

    def make_act(self) -> nn.Module:
        """Build an activation."""
        if self.act == "gelu":
            return nn.GELU()
        return nn.ReLU() if self.act == "relu" else nn.ELU(float(self.act.removeprefix("elu")))

    def extended(self, samples: int) -> int:
        """Length to which zeros extend a wave, so that every level can shorten its frames."""
        needed = max(samples, self.n_fft // 2 + 1)  # reflection extends a wave by half a transform
        step = self.scale[0] ** self.num_scales
        frames = -(-(-(-needed // self.hop_length) + 1) // step) * step
        return self.hop_length * (max(2, frames) - 1)


class Mdx23cBlock(nn.Module):
    """Convolutions before and after layers along frequency; ``(B, D, T, F)``."""

    def __init__(self, config: Mdx23cConfig, dim: int, out: int, bins: int) -> None:
        super().__init__()
        narrow = bins // config.bottleneck_factor

        def prepared(features: int, layer: nn.Module) -> list[nn.Module]:
            return [config.make_norm(features), config.make_act(), layer]

        self.tfc1 = nn.Sequential(*prepared(dim, nn.Conv2d(dim, out, 3, padding=1, bias=False)))
        self.tdf = nn.Sequential(
            *prepared(out, nn.Linear(bins, narrow, bias=False)),
            *prepared(out, nn.Linear(narrow, bins, bias=False)),
        )
        self.tfc2 = nn.Sequential(*prepared(out, nn.Conv2d(out, out, 3, padding=1, bias=False)))
        self.shortcut = nn.Conv2d(dim, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)
        x = self.tfc1(x)
        x = self.tfc2(x + self.tdf(x))
        return x + shortcut


class Blocks(nn.Module):
    """The blocks of one level; ``(B, dim, T, F)`` to ``(B, D, T, F)``."""

    def __init__(self, config: Mdx23cConfig, level: int, dim: int) -> None:
        super().__init__()
        bins = config.dim_f // config.num_subbands // config.scale[1] ** level
        out = config.dims[level]
        inputs = (dim, *[out] * (config.num_blocks_per_scale - 1))
        self.blocks = nn.Sequential(*(Mdx23cBlock(config, each, out, bins) for each in inputs))

    def forward(self, x: Tensor) -> Tensor:
        mapped: Tensor = self.blocks(x)
        return mapped


class Rescaling(nn.Module):
    """The way from one level to the next one below or above."""

    def __init__(self, config: Mdx23cConfig, start: int, end: int) -> None:
        super().__init__()
        layer = nn.Conv2d if end > start else nn.ConvTranspose2d
        dim, out, scale = config.dims[start], config.dims[end], config.scale
        conv = layer(dim, out, scale, stride=scale, bias=False)
        self.conv = nn.Sequential(config.make_norm(dim), config.make_act(), conv)

    def forward(self, x: Tensor) -> Tensor:
        rescaled: Tensor = self.conv(x)
        return rescaled


class Mdx23cEncoder(nn.Module):
    """One level on the way down."""

    def __init__(self, config: Mdx23cConfig, level: int) -> None:
        super().__init__()
        self.tfc_tdf = Blocks(config, level, config.dims[level])
        self.downscale = Rescaling(config, level, level + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, D, T, F)`` to the level below and the skip connection."""
        skip = self.tfc_tdf(x)
        return self.downscale(skip), skip


class Mdx23cDecoder(nn.Module):
    """One level on the way up."""

    def __init__(self, config: Mdx23cConfig, level: int) -> None:
        super().__init__()
        self.upscale = Rescaling(config, level + 1, level)
        self.tfc_tdf = Blocks(config, level, 2 * config.dims[level])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        mapped: Tensor = self.tfc_tdf(torch.cat([self.upscale(x), skip], 1))
        return mapped


class Mdx23c(nn.Module):
    """The U-Net with the transforms around it.

    ``sources`` are in the order of its output.
    """

    # A stand-in has an error of -55 dB in float16, and of -37 to -40 dB in bfloat16.
    supported_dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    def __init__(self, config: Mdx23cConfig, sources: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # precision between the first and the last convolution
        self.sources: tuple[str, ...] = tuple(sources)
        self.length: int | None = None
        self.spectrogram = Spectrogram(config.n_fft, config.hop_length, config.dim_f)

        first, levels = config.num_channels, range(config.num_scales)
        self.first_conv = nn.Conv2d(config.inputs, first, 1, bias=False)
        self.encoder_blocks = nn.ModuleList(Mdx23cEncoder(config, level) for level in levels)
        self.bottleneck_block = Blocks(config, config.num_scales, config.dims[-1])
        self.decoder_blocks = nn.ModuleList(Mdx23cDecoder(config, level) for level in reversed(levels))
        self.final_conv = nn.Sequential(
            nn.Conv2d(first + config.inputs, first, 1, bias=False),
            config.make_act(),
            nn.Conv2d(first, config.inputs * len(sources), 1, bias=False),
        )

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, C, n)`` in, ``(B, S, C, n)`` out.

        A stereo network needs two channels; a mono network takes each of any number of channels alone. Raises
        :class:`ValueError` if a stereo network gets another number of channels.
        """
        count, channels, samples = batch.shape
        own, stems = self.config.channels, len(self.sources)
        if channels % own:
            raise ValueError(f"this network needs {own} channels, not {channels}")
        wave = F.pad(batch.reshape(-1, own, samples), (0, self.config.extended(samples) - samples))
        spectrum = self.spectrogram(wave)  # (B, 2·C, K·F, T)
        parts = spectrum.unflatten(2, (self.config.num_subbands, -1)).flatten(1, 2)  # (B, 2·C·K, F, T)
        estimates = self.unet(parts.transpose(-1, -2).contiguous()).transpose(-1, -2)
        joined = estimates.reshape(-1, 2 * own, *spectrum.shape[2:])  # (B·S, 2·C, K·F, T)
        waves = self.spectrogram.inverse(joined)[..., :samples]
        by_source = waves.reshape(count, channels // own, stems, own, samples).transpose(1, 2)
        return by_source.reshape(count, stems, channels, samples)

    def unet(self, spectrum: Tensor) -> Tensor:
        """Map a spectrogram ``(B, 2·C·K, T, F)`` to those of the sources ``(B, S·2·C·K, T, F)``."""
        first = self.first_conv(spectrum)
        x = first.to(self.dtype)
        skips = []
        for encoder in self.encoder_blocks:
            x, skip = encoder(x)
            skips.append(skip)
        x = self.bottleneck_block(x)
        for decoder in self.decoder_blocks:
            x = decoder(x, skips.pop())
        estimates: Tensor = self.final_conv(torch.cat([spectrum, x.float() * first], 1))
        return estimates

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        if tuned:
            fast.accelerate(self)
        self.dtype = dtype
        for layers in (self.encoder_blocks, self.bottleneck_block, self.decoder_blocks):
            fast.store_all_but_batch_norms(layers, dtype)

    def narrow(self, sources: Sequence[str]) -> Mdx23c:
        """Return a network that computes only ``sources`` and shares all weights except the last layer's."""
        if tuple(sources) == self.sources:
            return self
        indices = fast.source_indices(self.sources, sources)
        network = fast.shared_copy(self)
        network.sources = tuple(sources)
        last = network.final_conv[2]
        assert isinstance(last, nn.Conv2d)
        fast.keep_sources(last, indices, len(self.sources))
        return network


_BLOCK = (
    r"blocks\.\d+\.(tfc[12]\.2\.weight|tdf\.[25]\.weight|shortcut\.weight|(tfc[12]\.0|tdf\.[03])\."
    r"(weight|bias|running_mean|running_var|num_batches_tracked))"
)
_NAMES = re.compile(
    rf"(first_conv|final_conv\.[02])\.weight|bottleneck_block\.{_BLOCK}"
    rf"|(encoder|decoder)_blocks\.\d+\.(tfc_tdf\.{_BLOCK}|(downscale|upscale)\.conv\.(2\.weight|0\."
    r"(weight|bias|running_mean|running_var|num_batches_tracked)))"
)
"""The names of an MDX23C's tensors."""


def infer(state: Mapping[str, Tensor], stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Infer a network's type and sizes from its state dict, named as in an architecture.

    Raises :class:`ValueError` if it is not an MDX23C, or has parts that MDX23C does not have.

    Parameters
    ----------
    state : mapping
        Its names may have prefixes that trainers add.
    stated : mapping, optional
        An architecture. Its ``stereo`` (by default true) decides how many sub-bands there are.
    """
    shapes = Shapes(state, "an MDX23C", "encoder_blocks.0.tfc_tdf.blocks.0.shortcut.weight", _NAMES)
    first, inputs = shapes("first_conv.weight", 4)[:2]
    below, _, *scale = shapes("encoder_blocks.0.downscale.conv.2.weight", 4)
    block = "encoder_blocks.0.tfc_tdf.blocks.0"
    narrow, bins = shapes(f"{block}.tdf.2.weight", 2)
    parts = 4 if (stated or {}).get("stereo", True) else 2
    if inputs % parts:
        raise ValueError(f"its input of {inputs} features cannot be cut into sub-bands of {parts}")
    sizes = {
        "type": "mdx23c",
        "num_stems": shapes("final_conv.2.weight", 4)[0] // inputs,
        "num_subbands": inputs // parts,
        "dim_f": bins * (inputs // parts),
        "num_channels": first,
        "growth": below - first,
        "num_scales": shapes.count(r"encoder_blocks\.(\d+)\."),
        "num_blocks_per_scale": shapes.count(r"bottleneck_block\.blocks\.(\d+)\."),
        "bottleneck_factor": bins // narrow,
        "scale": scale,
    }
    if f"{block}.tfc1.0.running_mean" in shapes:
        sizes["norm"] = "BatchNorm"
    elif f"{block}.tfc1.0.weight" not in shapes:
        norm = (stated or {}).get("norm")
        sizes["norm"] = norm if norm in _NO_NORM else "none"
    return sizes


def build(architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]) -> Mdx23c:
    """Build an MDX23C and load its weights strictly.

    Raises :class:`ValueError` if the state dict belongs to another network or differs from the architecture,
    a size is impossible, or a window needs too much memory.

    Parameters
    ----------
    architecture : mapping
        ``n_fft``, ``hop_length``, ``norm`` and ``act``; sizes that the state dict determines may be omitted.
    segment : float or None
        Length of its windows in seconds, if known.
    state : mapping
        Its state dict, in any floating type.
    """
    types.read(architecture)
    sizes = complete(infer(state, architecture), architecture)
    sizes_of.check_sizes(types.TYPES["mdx23c"].sizes, sizes)
    config = Mdx23cConfig.of(sizes)
    if segment is not None:
        types.check_window(sizes, int(segment * sizes.get("sample_rate", RATE)))
    with NoInitialization.for_state(state):
        network = Mdx23c(config, sizes["sources"])
    load_strictly(network, state)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def stand_in(architecture: Mapping[str, Any], seed: str) -> Mdx23c:
    """An MDX23C with random weights.

    Raises :class:`ValueError` if the architecture does not state all sizes.
    """
    types.read(architecture)
    config, sources = Mdx23cConfig.of(architecture), architecture["sources"]
    with torch.device("meta"):
        shapes = Mdx23c(config, sources).state_dict()
    with NoInitialization():
        network = Mdx23c(config, sources)
    load_strictly(network, random_state(shapes, seed))
    gain = gain_to_level(network.eval(), config.extended(0))
    for parameter in network.final_conv[2].parameters():
        parameter.mul_(gain)
    return network.requires_grad_(False)
