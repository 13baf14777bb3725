"""SCNet and its masked form: a spectrogram in three bands, each with its own resolution of frequency.

Reference: SCNet (Tong et al. 2024, arXiv 2401.13276). Structure and names are those of the checkpoints that
are published for Music-Source-Separation-Training. The masked form estimates complex masks instead of
spectrograms, and adds a learned offset to each bin of its input.

Shapes: B batch, C channels of the sound, S sources, D features, F bins, T frames, n samples.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.challenge import RATE
from kmdx.networks import architecture as sizes_of
from kmdx.networks import fast, types
from kmdx.networks.random_weights import gain_to_level, random_state
from kmdx.networks.spectrogram import Spectrogram
from kmdx.networks.state import NoInitialization, Shapes, complete, load_strictly

PLAIN, MASKED = "scnet", "scnet_masked"
BANDS = 3
MASK_FEATURES = 64


@dataclass(frozen=True)
class ScnetConfig:
    """Sizes of a network, named as in a published configuration."""

    type: str  # ``scnet`` or ``scnet_masked``
    dims: tuple[int, ...]
    """Features of the spectrogram, 2 for each channel of the sound, and after each step of the encoder."""
    nfft: int
    hop_size: int
    win_size: int
    """``nfft``, ``hop_size`` and ``win_size``: the transform, in samples. Its window is a rectangle, or a
    Hann window in the masked form."""
    normalized: bool  # whether the transform is divided by the root of ``nfft``
    band_SR: tuple[float, ...]  # fractions of the bins in each band, from low to high frequencies
    band_stride: tuple[int, ...]
    band_kernel: tuple[int, ...]
    """``band_stride`` and ``band_kernel``: of the convolutions along frequency in each band."""
    conv_depths: tuple[int, ...]
    """Blocks of convolutions along time in each band, in every step of the encoder."""
    compress: int  # these blocks have ``dims / compress`` features
    conv_kernel: int  # frames of their kernels
    num_dplayer: int  # dual-path layers between encoder and decoder
    expand: int  # their recurrent layers have ``expand`` times as many features as their input

    def __post_init__(self) -> None:
        for key in ("band_SR", "band_stride", "band_kernel", "conv_depths"):
            if len(getattr(self, key)) != BANDS:
                raise ValueError(f"{key} must have {BANDS} values, not {len(getattr(self, key))}")
        if self.nfft % 2:
            raise ValueError(f"nfft must be even, not {self.nfft}")
        if not 2 * self.hop_size <= self.win_size <= self.nfft:
            raise ValueError(
                f"win_size must be from {2 * self.hop_size}, twice hop_size, to {self.nfft}, which is nfft, "
                f"not {self.win_size}"
            )
        if self.dims[0] not in (2, 4) or len(self.dims) < 2:
            raise ValueError(f"dims must begin with 4 (stereo) or 2 (mono), not {self.dims[0]}")
        if self.compress > min(self.dims[1:]):
            raise ValueError(f"compress must be at most {min(self.dims[1:])}, not {self.compress}")
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"conv_kernel must be odd, not {self.conv_kernel}")
        if self.num_dplayer % 2:
            raise ValueError(f"num_dplayer must be even, not {self.num_dplayer}")
        _ = self.levels

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> ScnetConfig:
        """Make one from an architecture, with the published code's defaults.

        By default, ``band_stride`` is 1 in the lowest band and equal to the kernel in the others, as in all
        published networks. Raises :class:`ValueError` if a size without default is missing, or sizes are
        inconsistent.
        """
        kernels = sizes.get("band_kernel", ())
        sizes = {**types.TYPES["scnet"].defaults, "band_stride": (1, *kernels[1:]), **sizes}
        names = [field.name for field in fields(cls)]
        if lacking := [name for name in names if name not in sizes]:
            raise ValueError(f"missing {', '.join(lacking)}: only the real weights determine them")
        own: dict[str, Any] = {
            name: tuple(sizes[name]) if isinstance(sizes[name], list) else sizes[name] for name in names
        }
        return cls(**own)

    @property
    def masked(self) -> bool:
        """Whether it estimates masks."""
        return self.type == MASKED

    @property
    def levels(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Bins of each band before and after each step of the encoder."""
        levels, bins = [], self.nfft // 2 + 1
        for _ in self.dims[1:]:
            low, middle = self.band_SR[0], self.band_SR[0] + self.band_SR[1]
            ends = (0, math.ceil(bins * low), math.ceil(bins * middle), bins)
            before = tuple(end - start for start, end in pairwise(ends))
            if min(before) < 1:
                raise ValueError(f"band_SR {list(self.band_SR)} leaves a band of {bins} bins empty")
            after = []
            for size, stride, kernel in zip(before, self.band_stride, self.band_kernel, strict=True):
                padded = size + sum(padding(size, stride, kernel))
                after.append((padded - kernel) // stride + 1)
                if kernel > padded or (after[-1] - 1) * stride + kernel < size:
                    raise ValueError(
                        f"a band of {size} bins does not fit a kernel of {kernel} and a stride of {stride}"
                    )
            levels.append((before, tuple(after)))
            bins = sum(after)
        return levels

    def extended(self, samples: int) -> int:
        """Length to which zeros extend a wave: an odd number of hops, for an even number of frames."""
        least = self.nfft // 2 // self.hop_size + 1  # reflection extends a wave by half a transform
        return self.hop_size * (max(samples // self.hop_size + 1, least) | 1)


def padding(bins: int, stride: int, kernel: int) -> tuple[int, int]:
    """Zeros below and above a band before its convolution."""
    total = kernel - 1 if stride == 1 else -bins % stride
    return total // 2, total - total // 2


class Convolutions(nn.Module):
    """Residual blocks of convolutions along time; ``(B, D, T)``."""

    def __init__(self, config: ScnetConfig, dim: int, depth: int) -> None:
        super().__init__()
        hidden, kernel = dim // config.compress, config.conv_kernel
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, dim),
                nn.Conv1d(dim, 2 * hidden, kernel, padding=kernel // 2),
                nn.GLU(1),
                nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden),
                nn.GroupNorm(1, hidden),
                nn.SiLU(),
                nn.Conv1d(hidden, dim, 1),
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class BandDownsampling(nn.Module):
    """Shortens the frequency axis of each band; ``(B, D, F, T)``."""

    def __init__(self, config: ScnetConfig, level: int) -> None:
        super().__init__()
        low, high = config.dims[level : level + 2]
        bands = list(zip(config.band_stride, config.band_kernel, strict=True))
        self.sizes = config.levels[level][0]
        self.paddings = [padding(size, *band) for size, band in zip(self.sizes, bands, strict=True)]
        self.convs = nn.ModuleList(
            nn.Conv2d(low, high, (kernel, 1), stride=(stride, 1)) for stride, kernel in bands
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        bands = zip(x.split(self.sizes, 2), self.paddings, self.convs, strict=True)
        return [conv(F.pad(band, (0, 0, *zeros))) for band, zeros, conv in bands]


class ScnetEncoder(nn.Module):
    """One step of the encoder: fewer bins in each band, then convolutions along time in each bin."""

    def __init__(self, config: ScnetConfig, level: int) -> None:
        super().__init__()
        dim = config.dims[level + 1]
        self.SDlayer = BandDownsampling(config, level)  # the name in the published state dicts
        self.conv_modules = nn.ModuleList(Convolutions(config, dim, depth) for depth in config.conv_depths)
        self.globalconv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, D, F, T)`` to the next step and the skip connection, of equal shapes."""
        bands = []
        for band, convolutions in zip(self.SDlayer(x), self.conv_modules, strict=True):
            rows = band.transpose(1, 2)  # (B, F, D, T)
            rows = F.gelu(convolutions(rows.flatten(0, 1))).unflatten(0, rows.shape[:2])
            bands.append(rows.transpose(1, 2))
        skip = torch.cat(bands, 2)
        return self.globalconv(skip), skip


class Fusion(nn.Module):
    """Adds the skip connection, and lets a gate choose from the sum; ``(B, D, F, T)``.

    The published convolution takes two copies of the sum as input. :meth:`fold` adds its weights for both
    copies, which halves the arithmetic.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = x + skip
        if self.conv.in_channels != x.shape[1]:
            x = x.repeat(1, 2, 1, 1)
        return F.glu(self.conv(x), 1)

    def fold(self) -> None:
        """Let the convolution take only one copy of the sum as input."""
        first, second = self.conv.weight.detach().chunk(2, dim=1)
        self.conv.weight = nn.Parameter(first + second, requires_grad=False)
        self.conv.in_channels //= 2


class BandUpsampling(nn.Module):
    """Restores the bins of each band; ``(B, D, F, T)``."""

    def __init__(self, config: ScnetConfig, level: int, dim: int) -> None:
        super().__init__()
        self.before, self.after = config.levels[level]
        self.convtrs = nn.ModuleList(
            nn.ConvTranspose2d(config.dims[level + 1], dim, (kernel, 1), stride=(stride, 1))
            for stride, kernel in zip(config.band_stride, config.band_kernel, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        bands = []
        for band, size, conv in zip(x.split(self.after, 2), self.before, self.convtrs, strict=True):
            y = conv(band)
            bands.append(y.narrow(2, (y.shape[2] - size) // 2, size))
        return torch.cat(bands, 2)


class ScnetDecoder(nn.ModuleList):
    """One step of the decoder."""

    def __init__(self, config: ScnetConfig, level: int, dim: int) -> None:
        super().__init__([Fusion(config.dims[level + 1]), BandUpsampling(config, level, dim)])

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map ``(B, D, F, T)`` and the skip connection to the step above."""
        fusion, upsampling = self
        restored: Tensor = upsampling(fusion(x, skip))
        return restored


class DualPath(nn.Module):
    """Recurrent layers over the bins of each frame, then over the frames of each bin; ``(B, D, F, T)``."""

    def __init__(self, dim: int, expand: int) -> None:
        super().__init__()
        hidden = expand * dim
        self.norm_layers = nn.ModuleList(nn.GroupNorm(1, dim) for _ in range(2))
        self.lstm_layers = nn.ModuleList(
            nn.LSTM(dim, hidden, batch_first=True, bidirectional=True) for _ in range(2)
        )
        self.linear_layers = nn.ModuleList(nn.Linear(2 * hidden, dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self._path(0, self.norm_layers[0](x).permute(0, 3, 2, 1))  # (B, T, F, D)
        x = x + y.permute(0, 3, 2, 1)
        y = self._path(1, self.norm_layers[1](x).permute(0, 2, 3, 1))  # (B, F, T, D)
        return x + y.permute(0, 3, 1, 2)

    def _path(self, index: int, x: Tensor) -> Tensor:
        # On a CPU, torch's recurrent layers are not faster in bfloat16 and do not exist in float16.
        on_cpu = x.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            y, _ = self.lstm_layers[index](x.flatten(0, 1))
        mapped: Tensor = self.linear_layers[index](y)
        return mapped.unflatten(0, x.shape[:2])


class ScnetSeparation(nn.Module):
    """Dual-path layers, each second one on the spectrum of the features along time; ``(B, D, F, T)``."""

    def __init__(self, config: ScnetConfig) -> None:
        super().__init__()
        dim = config.dims[-1]
        self.dp_modules = nn.ModuleList(
            DualPath(dim * (1 + index % 2), config.expand) for index in range(config.num_dplayer)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        for index, layer in enumerate(self.dp_modules):
            x = layer(x)
            if index % 2 == 0:
                spectrum = torch.fft.rfft(x, norm="ortho")
                x = torch.cat([spectrum.real, spectrum.imag], 1)  # (B, 2·D, F, T / 2 + 1)
            else:
                x = torch.fft.irfft(torch.complex(*x.chunk(2, 1)), norm="ortho")
        return x


class Scnet(nn.Module):
    """An SCNet of either form.

    ``sources`` are in the order of its output.
    """

    # Stand-ins have an error of -46 to -51 dB in float16, and of -29 to -33 dB in bfloat16.
    supported_dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    def __init__(self, config: ScnetConfig, sources: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # precision of its convolutions, recurrent layers and matrix products
        self.sources: tuple[str, ...] = tuple(sources)
        self.length: int | None = None
        bins, steps = config.nfft // 2 + 1, range(len(config.dims) - 1)
        outputs = config.dims[0] * len(sources)
        window = torch.hann_window(config.win_size) if config.masked else torch.ones(config.win_size)
        self.spectrogram = Spectrogram(config.nfft, config.hop_size, bins, window, config.normalized)
        self.encoder = nn.ModuleList(ScnetEncoder(config, level) for level in steps)
        self.separation_net = ScnetSeparation(config)
        self.decoder = nn.ModuleList(
            ScnetDecoder(config, level, config.dims[level] if level else outputs) for level in reversed(steps)
        )
        if config.masked:
            self.pos_embed_f = nn.Parameter(torch.zeros(1, config.dims[0], bins, 1))
            self.mask_layer = nn.Sequential(
                nn.Conv2d(outputs, MASK_FEATURES, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(MASK_FEATURES, outputs, 1),
            )

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, C, n)`` in, ``(B, S, C, n)`` out.

        A stereo network needs two channels; a mono network takes each of any number of channels alone. Raises
        :class:`ValueError` if a stereo network gets another number of channels.
        """
        count, channels, samples = batch.shape
        own = self.config.dims[0] // 2
        if channels % own:
            raise ValueError(f"this network needs {own} channels, not {channels}")
        wave = F.pad(batch.reshape(-1, own, samples), (0, self.config.extended(samples) - samples))
        spectrum = self.spectrogram(wave)  # (B, 2·C, F, T)
        # Autocast leaves Fourier transforms, sums and the statistics of normalizations in float32.
        with torch.autocast(batch.device.type, self.dtype, enabled=self.dtype != torch.float32):
            x = self.unet(spectrum + self.pos_embed_f if self.config.masked else spectrum)
        estimates = x.float().unflatten(1, (len(self.sources), own, 2))  # (B, S, C, 2, F, T)
        if self.config.masked:
            real, imag = estimates.tanh().unbind(3)
            of_real, of_imag = spectrum.unflatten(1, (1, own, 2)).unbind(3)
            estimates = torch.stack([real * of_real - imag * of_imag, real * of_imag + imag * of_real], 3)
        waves = self.spectrogram.inverse(estimates.flatten(0, 1).flatten(1, 2))[..., :samples]  # (B·S, C, n)
        by_source = waves.reshape(count, channels // own, len(self.sources), own, samples).transpose(1, 2)
        return by_source.reshape(count, len(self.sources), channels, samples)

    def unet(self, x: Tensor) -> Tensor:
        """Map a spectrogram ``(B, 2·C, F, T)`` to spectrograms or masks ``(B, S·2·C, F, T)``."""
        skips = []
        for step in self.encoder:
            x, skip = step(x)
            skips.append(skip)
        x = self.separation_net(x)
        for step in self.decoder:
            x = step(x, skips.pop())
        return self.mask_layer(x) if self.config.masked else x

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        if tuned:
            for module in self.modules():
                if isinstance(module, Fusion):
                    module.fold()
            fast.accelerate(self, winograd=False)  # saves 4 to 9% of the time, but costs 17 dB of accuracy
            fast.store_others(self.encoder, dtype)
        self.dtype = dtype
        fast.store_products(self, dtype)

    def last_layers(self) -> list[nn.modules.conv._ConvNd]:
        """The layers in which each source has channels of its own."""
        last = self.mask_layer[-1] if self.config.masked else self.decoder[-1]
        kind = nn.Conv2d if self.config.masked else nn.ConvTranspose2d
        return [layer for layer in last.modules() if isinstance(layer, kind)]

    def narrow(self, sources: Sequence[str]) -> Scnet:
        """Return a network that computes only ``sources`` and shares all weights except the last layers'."""
        if tuple(sources) == self.sources:
            return self
        indices = fast.source_indices(self.sources, sources)
        network = fast.shared_copy(self)
        network.sources = tuple(sources)
        for layer in network.last_layers():
            fast.keep_sources(layer, indices, len(self.sources))
        return network


_NAMES = re.compile(
    r"encoder\.\d+\.(SDlayer\.convs\.\d+|conv_modules\.\d+\.layers\.\d+\.[01346]|globalconv)\.(weight|bias)"
    r"|decoder\.\d+\.(0\.conv|1\.convtrs\.\d+)\.(weight|bias)"
    r"|separation_net\.dp_modules\.\d+\.(lstm_layers\.\d+\.(weight|bias)_(ih|hh)_l0(_reverse)?"
    r"|(linear|norm)_layers\.\d+\.(weight|bias))"
    r"|mask_layer\.[02]\.(weight|bias)|pos_embed_f"
)
"""The names of an SCNet's tensors."""


def infer(state: Mapping[str, Tensor], stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Infer a network's type and sizes from its state dict, named as in an architecture.

    Raises :class:`ValueError` if it is not an SCNet, or has parts that SCNet does not have.

    Parameters
    ----------
    state : mapping
        Its names may have prefixes that trainers add.
    stated : mapping, optional
        An architecture. It decides between values of ``compress`` that give the same features.
    """
    shapes = Shapes(state, "an SCNet", "encoder.0.SDlayer.convs.0.weight", _NAMES)
    steps = shapes.count(r"encoder\.(\d+)\.")
    kernels = [shapes(f"encoder.0.SDlayer.convs.{band}.weight", 4) for band in range(BANDS)]
    wide = [shapes(f"encoder.{step}.SDlayer.convs.0.weight", 4)[0] for step in range(steps)]
    dims = [kernels[0][1], *wide]
    depths = [shapes.count(rf"encoder\.0\.conv_modules\.{band}\.layers\.(\d+)\.") for band in range(BANDS)]
    outputs = shapes(f"decoder.{steps - 1}.1.convtrs.0.weight", 4)[1]
    sizes: dict[str, Any] = {
        "type": MASKED if "pos_embed_f" in shapes else PLAIN,
        "num_stems": outputs // dims[0],
        "dims": dims,
        "band_kernel": [kernel[2] for kernel in kernels],
        "conv_depths": depths,
        "num_dplayer": shapes.count(r"separation_net\.dp_modules\.(\d+)\."),
        "expand": shapes("separation_net.dp_modules.0.lstm_layers.0.weight_hh_l0", 2)[1] // dims[-1],
    }
    if sizes["type"] == MASKED:
        sizes["nfft"] = 2 * (shapes("pos_embed_f", 4)[2] - 1)
    if any(depths):
        band = depths.index(max(depths))
        convs = [shapes(f"encoder.{step}.conv_modules.{band}.layers.0.1.weight", 3) for step in range(steps)]
        sizes["conv_kernel"] = convs[0][2]
        hidden = [conv[0] // 2 for conv in convs]
        compress = [ratio for ratio in range(1, min(wide) + 1) if [dim // ratio for dim in wide] == hidden]
        if not compress:
            raise ValueError(f"not an SCNet: no compress gives its hidden features {hidden}")
        wanted = (stated or {}).get("compress", types.TYPES["scnet"].defaults["compress"])
        sizes["compress"] = wanted if wanted in compress else compress[0]
    return sizes


def build(architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]) -> Scnet:
    """Build an SCNet and load its weights strictly.

    Raises :class:`ValueError` if the state dict belongs to another network or differs from the architecture,
    a size is impossible, or a window needs too much memory.

    Parameters
    ----------
    architecture : mapping
        Sizes that the state dict determines may be omitted; the others have the published code's defaults.
    segment : float or None
        Length of its windows in seconds, if known.
    state : mapping
        Its state dict, in any floating type.
    """
    types.read(architecture)
    sizes = complete(infer(state, architecture), architecture)
    sizes_of.check_sizes(types.TYPES[sizes["type"]].sizes, sizes)
    config = ScnetConfig.of(sizes)
    if segment is not None:
        types.check_window(sizes, int(segment * sizes.get("sample_rate", RATE)))
    with NoInitialization.for_state(state):
        network = Scnet(config, sizes["sources"])
    load_strictly(network, state)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def stand_in(architecture: Mapping[str, Any], seed: str) -> Scnet:
    """An SCNet with random weights.

    Raises :class:`ValueError` if the architecture does not state all sizes without default.
    """
    types.read(architecture)
    config = ScnetConfig.of(architecture)
    with torch.device("meta"):
        shapes = Scnet(config, architecture["sources"]).state_dict()
    with NoInitialization():
        network = Scnet(config, architecture["sources"])
    load_strictly(network, random_state(shapes, seed))
    gain = gain_to_level(network.eval(), 4 * config.nfft)
    for layer in network.last_layers():
        for parameter in layer.parameters():
            parameter.mul_(gain)
    return network.requires_grad_(False)
