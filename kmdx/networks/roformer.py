"""BS-RoFormer and Mel-Band RoFormer: transformers over time and over the bands of a spectrogram.

References: BS-RoFormer (Lu et al. 2023, arXiv 2309.02612); Mel-Band RoFormer (Wang et al. 2023, arXiv
2310.01809); rotary angles (Su et al. 2021, arXiv 2104.09864); linear attention over features (El-Nouby et al.
2021, arXiv 2106.09681). Structure and names are those of the checkpoints that are published for
Music-Source-Separation-Training.

Shapes: B batch, C channels of the network, S sources, T frames, F bands, D features; N positions.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kmdx.challenge import RATE
from kmdx.networks import architecture as sizes_of
from kmdx.networks import fast, types
from kmdx.networks.attention import attend
from kmdx.networks.random_weights import gain_to_level, random_state
from kmdx.networks.spectrogram import inverse_stft
from kmdx.networks.state import NoInitialization, Shapes, complete, load_strictly

BS, MEL = "bs_roformer", "mel_band_roformer"
THETA = 10000  # base of the rotary frequencies
TOKENS = 4096  # positions that pass a transformer together on a CPU, so that its tensors stay in the cache


@dataclass(frozen=True)
class RoformerConfig:
    """Sizes of a network."""

    dim: int
    heads: int
    dim_head: int
    """``dim``, ``heads`` and ``dim_head``: features of a position, heads of the attention, and features of a
    head."""
    depth: int  # layers, each of a linear (optional), a time and a frequency transformer
    linear: int
    time: int
    freq: int
    """``linear``, ``time`` and ``freq``: blocks of these transformers."""
    inner_norms: bool
    """Whether every transformer ends with a norm (Mel-Band), instead of one after all layers."""
    bands: tuple[tuple[int, int], ...]  # first bin of each band, and the first one above it
    channels: int  # 2 for a stereo network, 1 for one that takes each channel alone
    mask_layers: int
    mask_width: int
    """``mask_layers`` and ``mask_width``: hidden layers of a mask estimator, and their width."""
    n_fft: int
    hop: int
    window: int
    """``n_fft``, ``hop`` and ``window``: the transform, in samples; the Hann window may be shorter than the
    transform."""
    normalized: bool  # whether the transform is divided by the root of ``n_fft``
    skips: bool  # whether a layer also takes as input the outputs of all layers before it
    zero_dc: bool  # whether the lowest bin of an estimate is zero

    def __post_init__(self) -> None:
        if self.n_fft % 2:
            raise ValueError(f"stft_n_fft must be even, not {self.n_fft}")
        if not 2 * self.hop <= self.window <= self.n_fft:
            raise ValueError(
                f"stft_win_length must be at least twice stft_hop_length ({self.hop}) and at most stft_n_fft "
                f"({self.n_fft}), not {self.window}"
            )
        if self.dim_head % 2:
            raise ValueError(f"dim_head must be even, not {self.dim_head}")
        if self.bands[-1][1] != self.bins:
            raise ValueError(
                f"freqs_per_bands must add up to {self.bins}, the bins of stft_n_fft, not to "
                f"{self.bands[-1][1]}"
            )

    @property
    def bins(self) -> int:
        """Bins of the spectrogram."""
        return self.n_fft // 2 + 1

    @property
    def widths(self) -> list[int]:
        """Real numbers in each band of one frame."""
        return [2 * self.channels * (end - start) for start, end in self.bands]

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> RoformerConfig:
        """Make one from a complete architecture."""
        mel = sizes["type"] == MEL
        return cls(
            dim=sizes["dim"],
            heads=sizes["heads"],
            dim_head=sizes["dim_head"],
            depth=sizes["depth"],
            linear=sizes["linear_transformer_depth"],
            time=sizes["time_transformer_depth"],
            freq=sizes["freq_transformer_depth"],
            inner_norms=mel,
            bands=(
                mel_bands(sizes["stft_n_fft"], sizes["num_bands"], sizes["sample_rate"])
                if mel
                else neighboring_bands(sizes["freqs_per_bands"])
            ),
            channels=2 if sizes["stereo"] else 1,
            mask_layers=sizes["mask_estimator_depth"] - (0 if mel else 1),
            mask_width=sizes["dim"] * sizes["mlp_expansion_factor"],
            n_fft=sizes["stft_n_fft"],
            hop=sizes["stft_hop_length"],
            window=sizes["stft_win_length"],
            normalized=sizes["stft_normalized"],
            skips=sizes["skip_connection"],
            zero_dc=sizes["zero_dc"],
        )


def neighboring_bands(widths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Bands of these numbers of bins, one after the other."""
    ends = np.cumsum(widths).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def mel_bands(n_fft: int, count: int, sample_rate: int) -> tuple[tuple[int, int], ...]:
    """The bins above 0 in each triangle of Slaney's mel bank, as librosa computes it.

    ``count`` triangles overlap by half between 0 Hz and half the sample rate. Below 1000 Hz, the scale is
    linear (200 / 3 Hz per mel); above it, it is logarithmic (27 mel per factor of 6.4). The first band begins
    at the first bin, and the last one ends at the last bin. Raises :class:`ValueError` if a band has no bins.
    """
    knee, hertz, step, top = 15, 200 / 3, np.log(6.4) / 27, sample_rate / 2
    mels = np.linspace(0, top / hertz if top < 1000 else knee + np.log(top / 1000) / step, count + 2)
    points = np.where(mels < knee, hertz * mels, 1000 * np.exp(step * (mels - knee)))  # Hz
    bins = np.linspace(0, top, n_fft // 2 + 1)
    starts, ends = np.searchsorted(bins, points[:-2], "right"), np.searchsorted(bins, points[2:], "left")
    starts[0], ends[-1] = 0, len(bins)
    if (starts >= ends).any():
        raise ValueError(f"num_bands is {count}, but stft_n_fft is {n_fft}: a band would have no bins")
    return tuple(zip(starts.tolist(), ends.tolist(), strict=True))


class Norm(nn.Module):
    """Scale the last axis to unit root mean square, then by a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(…, D)`` in the precision of the gain, with statistics in float32.

        A length far below 1e-12 is scaled up as if it were 1e-12.
        """
        return F.rms_norm(x, self.gamma.shape, self.gamma, 1e-24 / len(self.gamma))


class Attention(nn.Module):
    """Multi-head attention with rotary angles and a gate for each head and position."""

    def __init__(self, config: RoformerConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm = Norm(config.dim)
        self.to_qkv = nn.Linear(config.dim, 3 * inner, bias=False)
        self.to_gates = nn.Linear(config.dim, config.heads)
        self.to_out = nn.Sequential(nn.Linear(inner, config.dim, bias=False))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``(B, N, D)``; ``rotation`` has a complex number for each position and pair of features."""
        y = self.norm(x).to(self.to_qkv.weight.dtype)
        qkv = self.to_qkv(y).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, heads, D / head)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D / head)
        attended = attend(rotate(query, rotation), rotate(key, rotation), value)
        gated = attended.transpose(1, 2) * self.to_gates(y).sigmoid()[..., None]  # (B, N, heads, D / head)
        out: Tensor = self.to_out(gated.flatten(2))
        return out


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighboring pairs of features of ``(…, N, D)`` by the angles of their position, in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (…, N, D / 2)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


class LinearAttention(nn.Module):
    """Attention of features to features, over all positions; its cost grows linearly with their number."""

    def __init__(self, config: RoformerConfig) -> None:
        super().__init__()
        inner = config.heads * config.dim_head
        self.heads = config.heads
        self.norm = Norm(config.dim)
        self.temperature = nn.Parameter(torch.ones(config.heads, 1, 1))
        self.to_qkv = nn.Sequential(nn.Linear(config.dim, 3 * inner, bias=False))
        self.to_out = nn.Sequential(nn.Identity(), nn.Linear(inner, config.dim, bias=False))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``(B, N, D)``; attention itself is in float32, and positions have no angles."""
        dtype = self.to_qkv[0].weight.dtype
        qkv = self.to_qkv(self.norm(x).to(dtype)).float().unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 4, 1)  # (B, heads, D / head, N)
        query, key = F.normalize(query, dim=-1) * self.temperature.exp(), F.normalize(key, dim=-1)
        attended = (8 * query @ key.mT).softmax(-1) @ value  # (B, heads, D / head, N)
        out: Tensor = self.to_out(attended.permute(0, 3, 1, 2).flatten(2).to(dtype))
        return out


class FeedForward(nn.Module):
    """Two fully connected layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layers = (Norm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, D)``."""
        norm, widen, gelu, _, narrow = self.net
        out: Tensor = narrow(gelu(widen(norm(x).to(widen.weight.dtype))))
        return out


class RoformerBlock(nn.ModuleList):
    """Attention and a feed-forward layer, each added to its input; the sum has the input's precision."""

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map ``(B, N, D)``."""
        attention, feedforward = self
        x = x + attention(x, rotation)
        return x + feedforward(x)


class Transformer(nn.Module):
    """Some blocks."""

    def __init__(self, config: RoformerConfig, depth: int, linear: bool = False) -> None:
        super().__init__()
        kind = LinearAttention if linear else Attention
        self.layers = nn.ModuleList(
            RoformerBlock((kind(config), FeedForward(config.dim))) for _ in range(depth)
        )
        self.norm = Norm(config.dim) if config.inner_norms else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map sequences ``(B, N, D)``, on a CPU a few at a time."""
        together = max(1, TOKENS // x.shape[1]) if x.device.type == "cpu" else len(x)
        return torch.cat([self._some(sequences, rotation) for sequences in x.split(together)])

    def _some(self, x: Tensor, rotation: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x, rotation)
        out: Tensor = self.norm(x)
        return out


class Layer(nn.ModuleList):
    """Up to three transformers: over all positions (optional), over time, and over the bands."""

    def forward(self, x: Tensor, over_time: Tensor, over_bands: Tensor, skipped: Tensor | None) -> Tensor:
        """Map ``(B, T, F, D)``; ``skipped`` is added before the transformer over time."""
        _, frames, bands, _ = x.shape
        *linear, time, freq = self
        for transformer in linear:
            x = transformer(x.flatten(1, 2), over_time).unflatten(1, (frames, bands))
        if skipped is not None:
            x = x + skipped
        sequences = x.transpose(1, 2).flatten(0, 1)  # (B·F, T, D)
        x = time(sequences, over_time).unflatten(0, (-1, bands)).transpose(1, 2)  # (B, T, F, D)
        out: Tensor = freq(x.flatten(0, 1), over_bands).unflatten(0, (-1, frames))
        return out


class BandFeatures(nn.Sequential):
    """A norm and a fully connected layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map the numbers of a band ``(B, T, width)`` to ``(B, T, D)``."""
        norm, linear = self
        out: Tensor = linear(norm(x).to(linear.weight.dtype))
        return out


class BandSplit(nn.Module):
    """A vector of features for each band of each frame."""

    def __init__(self, config: RoformerConfig) -> None:
        super().__init__()
        self.bands = config.bands
        self.to_features = nn.ModuleList(
            BandFeatures(Norm(width), nn.Linear(width, config.dim)) for width in config.widths
        )

    def forward(self, spectrum: Tensor) -> Tensor:
        """Map a complex spectrum ``(B, T, bins, C)`` to ``(B, T, F, D)``."""
        numbers = torch.view_as_real(spectrum)  # (B, T, bins, C, 2)
        features = [
            layers(numbers[:, :, start:end].flatten(2))
            for (start, end), layers in zip(self.bands, self.to_features, strict=True)
        ]
        return torch.stack(features, 2)


class BandMask(nn.Sequential):
    """Fully connected layers, and a gate."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to the numbers of a band's mask ``(B, T, width)``."""
        layers, gate = self
        out: Tensor = gate(layers(x.to(next(layers.parameters()).dtype)).float())
        return out


class MaskEstimator(nn.Module):
    """The complex mask of one source."""

    covered: Tensor

    def __init__(self, config: RoformerConfig) -> None:
        super().__init__()
        self.bands = config.bands
        self.shape = (config.bins, config.channels, 2)
        hidden = [config.dim, *[config.mask_width] * config.mask_layers]
        self.to_freqs = nn.ModuleList()
        for width in config.widths:
            layers: list[nn.Module] = []
            for narrow, wide in pairwise(hidden):
                layers += [nn.Linear(narrow, wide), nn.Tanh()]
            mlp = nn.Sequential(*layers, nn.Linear(hidden[-1], 2 * width))
            self.to_freqs.append(BandMask(mlp, nn.GLU(-1)))
        covered = torch.zeros(config.bins, 1, 1)
        for start, end in config.bands:
            covered[start:end] += 1
        self.register_buffer("covered", covered, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, F, D)`` to ``(B, T, bins, C)`` complex; bins in several bands get the mean of them."""
        masks = torch.zeros(*x.shape[:2], *self.shape, device=x.device)
        for index, ((start, end), layers) in enumerate(zip(self.bands, self.to_freqs, strict=True)):
            masks[:, :, start:end] += layers(x[:, :, index]).unflatten(-1, (-1, *self.shape[1:]))
        return torch.view_as_complex(masks / self.covered)


class Roformer(nn.Module):
    """A RoFormer of either kind.

    ``sources`` are in the order of its mask estimators.
    """

    # At full size, with random weights, bfloat16 leaves an error of -41 dB, and float16 of -60 dB.
    supported_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)
    window: Tensor
    frequencies: Tensor

    def __init__(self, config: RoformerConfig, sources: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32  # precision of its matrix products
        self.sums = torch.float32  # precision of the sums over layers, and of the norms of these
        self.sources: tuple[str, ...] = tuple(sources)
        self.length: int | None = None
        linear = [config.linear] if config.linear else []
        self.band_split = BandSplit(config)
        self.layers = nn.ModuleList(
            Layer(
                [
                    *(Transformer(config, depth, linear=True) for depth in linear),
                    Transformer(config, config.time),
                    Transformer(config, config.freq),
                ]
            )
            for _ in range(config.depth)
        )
        self.final_norm = nn.Identity() if config.inner_norms else Norm(config.dim)
        self.mask_estimators = nn.ModuleList(MaskEstimator(config) for _ in sources)
        self.register_buffer("window", torch.hann_window(config.window), persistent=False)
        self.register_buffer("frequencies", rotary_frequencies(config.dim_head), persistent=False)

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: float32 ``(B, channels, n)`` in, ``(B, S, channels, n)`` out.

        A stereo network needs two channels; a mono network takes each of any number of channels alone. Raises
        :class:`ValueError` if a stereo network gets another number of channels.
        """
        count, channels, samples = batch.shape
        if self.config.channels == 2 != channels:
            raise ValueError(f"this network needs 2 channels, not {channels}")
        spectrum = self._transform(batch.reshape(-1, self.config.channels, samples))
        x = self.features(spectrum)
        estimates = [self._inverse(spectrum * mask(x), samples) for mask in self.mask_estimators]
        return torch.stack([each.reshape(count, channels, samples) for each in estimates], 1)

    def _transform(self, wave: Tensor) -> Tensor:
        """Transform ``(B, C, n)`` into a complex spectrum ``(B, T, bins, C)``; zeros extend a short wave."""
        config = self.config
        needed = config.n_fft // 2 + 1  # samples from which reflection can extend the wave by half a frame
        padded = F.pad(wave, (0, max(0, needed - wave.shape[-1])))
        spectrum = torch.stft(  # (B·C, bins, T)
            padded.flatten(0, 1), config.n_fft, config.hop, config.window, self.window,
            pad_mode="reflect", normalized=config.normalized, return_complex=True,
        )  # fmt: skip
        return spectrum.unflatten(0, (-1, config.channels)).permute(0, 3, 2, 1)

    def _inverse(self, spectrum: Tensor, samples: int) -> Tensor:
        """Transform a complex spectrum ``(B, T, bins, C)`` into ``(B·C, n)``."""
        config = self.config
        if config.zero_dc:
            spectrum[:, :, 0] = 0
        # Beyond the last frame's center, its window falls to zero: the last samples may be out of its reach.
        reach = (spectrum.shape[1] - 1) * config.hop + config.window * 15 // 32
        wave = inverse_stft(
            spectrum.permute(0, 3, 2, 1).flatten(0, 1), config.n_fft, config.hop, self.window,
            min(samples, reach), config.normalized,
        )  # fmt: skip
        return F.pad(wave, (0, samples - wave.shape[-1]))

    def features(self, spectrum: Tensor) -> Tensor:
        """Map a complex spectrum ``(B, T, bins, C)`` to ``(B, T, F, D)``, from which masks are estimated."""
        x = self.band_split(spectrum).to(self.sums)
        over_time, over_bands = self._rotation(x.shape[1]), self._rotation(x.shape[2])
        skipped: Tensor | None = None
        for layer in self.layers:
            x = layer(x, over_time, over_bands, skipped)
            if self.config.skips:
                skipped = x if skipped is None else skipped + x
        out: Tensor = self.final_norm(x)
        return out

    def _rotation(self, positions: int) -> Tensor:
        """Complex numbers ``(positions, D / head / 2)`` with the rotary angles."""
        angles = torch.outer(torch.arange(positions, device=self.frequencies.device), self.frequencies)
        return torch.polar(torch.ones_like(angles), angles)

    def accelerate(self, dtype: torch.dtype, tuned: bool = True) -> None:
        """Prepare it for inference in a precision, with faster layers if ``tuned``."""
        if tuned:
            fast.accelerate(self)
        self.dtype = dtype
        fast.store_products(self, dtype)
        if dtype == torch.float16:  # as in the published code on a GPU
            self.sums = dtype
            for module in (*self.layers.modules(), self.final_norm):
                if isinstance(module, Norm):
                    module.gamma.data = module.gamma.data.to(dtype)

    def narrow(self, sources: Sequence[str]) -> Roformer:
        """Return a network that computes only the masks of ``sources``, and shares all layers."""
        if tuple(sources) == self.sources:
            return self
        indices = fast.source_indices(self.sources, sources)
        network = copy.copy(self)
        network._modules = dict(self._modules)
        network.sources = tuple(sources)
        network.mask_estimators = nn.ModuleList(self.mask_estimators[index] for index in indices)
        return network

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy a published state dict strictly.

        It may contain the rotary frequencies, once for each attention; they are only compared, because a
        checkpoint in float16 has rounded them. Raises :class:`ValueError` if a parameter is missing, unknown
        or has the wrong shape, or the frequencies differ.
        """
        names = [
            f"{name}.rotary_embed.freqs"
            for name, module in self.named_modules()
            if isinstance(module, Attention)
        ]
        for name, stored in load_strictly(self, state, names).items():
            own = self.frequencies
            if stored.shape != own.shape or not torch.allclose(stored.float(), own, rtol=0.01, atol=1e-4):
                raise ValueError(f"{name} differs from the rotary frequencies of base {THETA}")


def rotary_frequencies(dim_head: int) -> Tensor:
    """Angles of the first position: one for each pair of features of a head."""
    return THETA ** -(torch.arange(0, dim_head, 2).float() / dim_head)


_KEY = re.compile(
    r"band_split\.to_features\.\d+\.(0\.gamma|1\.weight|1\.bias)"
    r"|layers\.\d+\.\d+\.(norm\.gamma|layers\.\d+\.(0\.norm\.gamma|1\.net\.(0\.gamma|[14]\.(weight|bias))))"
    r"|layers\.\d+\.\d+\.layers\.\d+\.0\."
    r"(to_qkv\.weight|to_gates\.(weight|bias)|to_out\.0\.weight|rotary_embed\.freqs"
    r"|temperature|to_qkv\.0\.weight|to_out\.1\.weight)"
    r"|final_norm\.gamma"
    r"|mask_estimators\.\d+\.to_freqs\.\d+\.0\.\d+\.(weight|bias)"
)
"""The names of a RoFormer's tensors."""


def infer(state: Mapping[str, Tensor], stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Infer a network's type and sizes from its state dict, named as in an architecture.

    Raises :class:`ValueError` if it is not a RoFormer, or has parts that the two kinds do not have.

    Parameters
    ----------
    state : mapping
        Its names may have prefixes that trainers add.
    stated : mapping, optional
        An architecture. It decides what the state leaves open: the sample rate of a mel bank, and whether
        a network of neighboring bands is stereo.
    """
    shape = Shapes(state, "a RoFormer", "band_split.to_features.0.1.weight", _KEY)
    mel = "layers.0.0.norm.gamma" in shape
    if mel == ("final_norm.gamma" in shape):
        raise ValueError("not a RoFormer: its norms are neither after each transformer nor after all layers")
    has_linear = "layers.0.0.layers.0.0.temperature" in shape
    time = 1 if has_linear else 0
    dim, _ = shape("band_split.to_features.0.1.weight", 2)
    heads, _ = shape(f"layers.0.{time}.layers.0.0.to_gates.weight", 2)
    inner = shape(f"layers.0.{time}.layers.0.0.to_qkv.weight", 2)[0] // 3
    mask_layers = shape.count(r"mask_estimators\.0\.to_freqs\.0\.0\.(\d+)\.weight") - 1
    sizes: dict[str, Any] = {
        "type": MEL if mel else BS,
        "num_stems": shape.count(r"mask_estimators\.(\d+)\."),
        "dim": dim,
        "depth": shape.count(r"layers\.(\d+)\."),
        "linear_transformer_depth": shape.count(r"layers\.0\.0\.layers\.(\d+)\.") if has_linear else 0,
        "time_transformer_depth": shape.count(rf"layers\.0\.{time}\.layers\.(\d+)\."),
        "freq_transformer_depth": shape.count(rf"layers\.0\.{time + 1}\.layers\.(\d+)\."),
        "heads": heads,
        "dim_head": inner // heads,
        "mask_estimator_depth": mask_layers + (0 if mel else 1),
    }
    if mask_layers > 0:
        sizes["mlp_expansion_factor"] = shape("mask_estimators.0.to_freqs.0.0.0.weight", 2)[0] // dim
    bands = range(shape.count(r"band_split\.to_features\.(\d+)\."))
    masks = 2 * sizes["num_stems"] * len(bands) * (mask_layers + 1)
    if masks > len(shape.tensors):  # checked before making a module for each
        raise ValueError(
            f"not a RoFormer: expected {masks} tensors of masks, found {len(shape.tensors)} in all"
        )
    widths = [shape(f"band_split.to_features.{band}.0.gamma", 1)[0] for band in bands]
    return {**sizes, **_infer_bands(widths, mel, {} if stated is None else stated)}


def _infer_bands(widths: Sequence[int], mel: bool, stated: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the transform and its bands; of several possible ones, those equal to ``stated``."""
    rate, own = stated.get("sample_rate", RATE), stated.get("stft_n_fft", 2048)
    possible: list[dict[str, Any]] = []
    for channels in (2, 1):
        bins = [width // (2 * channels) for width in widths]
        if [2 * channels * each for each in bins] != widths:
            continue
        if not mel:
            transform = {"stft_n_fft": 2 * (sum(bins) - 1), "freqs_per_bands": bins}
            possible.append({"stereo": channels == 2, **transform})
            continue
        for n_fft in (own, *(2**power for power in range(8, 16))):
            if _mel_widths(n_fft, len(bins), rate) == bins:
                possible.append({"stereo": channels == 2, "stft_n_fft": n_fft, "num_bands": len(bins)})
    if not possible:
        bank = f"of a mel bank at {rate} Hz" if mel else "of complex numbers"
        raise ValueError(f"not a RoFormer: its {len(widths)} bands are not those {bank}")

    def agrees(sizes: Mapping[str, Any]) -> bool:
        own = {key: stated.get(key, value) for key, value in sizes.items()}
        return all(
            (list(each) if isinstance(each, tuple) else each) == sizes[key] for key, each in own.items()
        )

    return next(filter(agrees, possible), possible[0])


def _mel_widths(n_fft: int, count: int, sample_rate: int) -> list[int] | None:
    try:
        return [end - start for start, end in mel_bands(n_fft, count, sample_rate)]
    except ValueError:
        return None


def build(architecture: Mapping[str, Any], segment: float | None, state: Mapping[str, Tensor]) -> Roformer:
    """Build a RoFormer and load its weights strictly.

    Raises :class:`ValueError` if the state dict belongs to another network or differs from the architecture,
    a size is impossible, or a window needs too much memory.

    Parameters
    ----------
    architecture : mapping
        It may omit sizes that the state dict determines; others have the defaults of the published code.
    segment : float or None
        Length of its windows in seconds, if known.
    state : mapping
        Its state dict, in any floating type.
    """
    types.read(architecture)
    found = infer(state, architecture)
    sizes = {**types.TYPES[found["type"]].defaults, **complete(found, architecture)}
    sizes_of.check_sizes(types.TYPES[sizes["type"]].sizes, sizes)
    if segment is not None:
        types.check_window(sizes, int(segment * sizes["sample_rate"]))
    with NoInitialization.for_state(state):
        network = Roformer(RoformerConfig.of(sizes), sizes["sources"])
    network.load(state)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def stand_in(architecture: Mapping[str, Any], seed: str) -> Roformer:
    """A RoFormer with random weights.

    Raises :class:`ValueError` if the architecture does not state ``dim`` and ``depth``, which have no
    default.
    """
    types.read(architecture)
    if lacking := [key for key in ("dim", "depth") if key not in architecture]:
        raise ValueError(f"missing {', '.join(lacking)}, which have no default")
    config = RoformerConfig.of({**types.TYPES[architecture["type"]].defaults, **architecture})
    with torch.device("meta"):
        shapes = Roformer(config, architecture["sources"]).state_dict()
    with NoInitialization():
        network = Roformer(config, architecture["sources"])
    network.load(random_state(shapes, seed))
    gain = gain_to_level(network, 4 * config.n_fft)
    for band in network.modules():
        if isinstance(band, BandMask):
            *_, weight, bias = band.parameters()
            for parameter in (weight, bias):
                parameter[: len(parameter) // 2] *= gain  # the other half gates
    return network.requires_grad_(False).eval()
