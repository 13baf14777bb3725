"""Check the sizes of each family of networks, and compute the memory that a window needs.

The table in :mod:`kmdx.networks.types` uses these functions. This module builds no networks and does not
import torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kmdx.errors import listed, quoted

MAX_PARAMETERS = 10**9  # 4 GB in float32; the largest published network has 228 million
MAX_VALUES = 2**29  # in one tensor between two layers, or in all tensors of a graph: 2 GiB in float32
MAX_LENGTH = 2**23  # samples of one window: 190 s at 44.1 kHz
MAX_NAME = 100  # bytes in UTF-8, so that it can be a file name

TRANSFORM = ("n_fft", "hop", "bins", "frames")
UNET = ("layers", "convolutions", "growth", "norm_groups")


@dataclass(frozen=True)
class Range:
    """The allowed values of a size: integers by default."""

    low: float
    high: float
    whole: bool = True
    optional: bool = False  # whether it may be None

    def __contains__(self, value: object) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float | Fraction):
            return False
        return bool(self.low <= value <= self.high)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}{' or null' if self.optional else ''}"


@dataclass(frozen=True)
class ListOf:
    """A size that is a list of values."""

    values: Range
    longest: int

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, list | tuple)
            and 0 < len(value) <= self.longest
            and all(each in self.values for each in value)
        )

    def __str__(self) -> str:
        return f"a list of 1 to {self.longest} values, each {self.values}"


Size = Range | ListOf | str
SWITCH, TEXT = "true or false", "a string"
LISTS = ("sources", "multi_freqs", "t_cape_glob_loc_scale")
COMMON = {"segment": Range(1e-3, 3600, whole=False), "gflops": Range(1e-6, 1e6, whole=False)}
UNET_SIZES: Mapping[str, Size] = {
    "n_fft": Range(4, 2**17),
    "hop": Range(1, 2**17),
    "bins": Range(1, 2**16 + 1),
    "frames": Range(2, 2**16),
    "layers": Range(3, 63),
    "convolutions": Range(1, 64),
    "growth": Range(1, 2**12),
    "norm_groups": Range(1, 2**12, optional=True),
    "bottleneck": Range(1, 2**16),
    "sample_rate": Range(1000, 384_000),
}
HDEMUCS_SIZES: Mapping[str, Size] = {
    "audio_channels": Range(2, 2),
    "channels": Range(1, 2**13),
    "channels_time": Range(1, 2**13, optional=True),
    "growth": Range(1, 8, whole=False),
    "nfft": Range(16, 2**16),
    "wiener_iters": Range(0, 16),
    "end_iters": Range(0, 16),
    "wiener_residual": SWITCH,
    "cac": SWITCH,
    "depth": Range(1, 12),
    "rewrite": SWITCH,
    "hybrid": SWITCH,
    "hybrid_old": SWITCH,
    "multi_freqs_depth": Range(0, 12),
    "freq_emb": Range(0, 100, whole=False, optional=True),
    "emb_scale": Range(1e-3, 1e4, whole=False),
    "emb_smooth": SWITCH,
    "kernel_size": Range(1, 64),
    "time_stride": Range(1, 64),
    "stride": Range(1, 64),
    "context": Range(0, 16),
    "context_enc": Range(0, 16),
    "norm_starts": Range(0, 100),
    "norm_groups": Range(1, 2**12),
    "dconv_mode": Range(0, 3),
    "dconv_depth": Range(-16, 16),
    "dconv_comp": Range(0.1, 1000, whole=False),
    "dconv_attn": Range(0, 100),
    "dconv_lstm": Range(0, 100),
    "dconv_init": Range(0, 1e3, whole=False),
    "samplerate": Range(1, 768_000),
    "rescale": Range(0, 1e3, whole=False),
}
HTDEMUCS_SIZES: Mapping[str, Size] = {
    **HDEMUCS_SIZES,
    "bottom_channels": Range(0, 2**13),
    "t_layers": Range(0, 64),
    "t_emb": TEXT,
    "t_hidden_scale": Range(0.01, 64, whole=False),
    "t_heads": Range(1, 256),
    "t_dropout": Range(0, 1, whole=False),
    "t_max_positions": Range(1, 10**6),
    "t_max_period": Range(1, 1e9, whole=False),
    "t_weight_pos_embed": Range(-1e3, 1e3, whole=False),
    "t_sin_random_shift": Range(0, 10**6),
}
TRANSFORMER_SWITCHES = (
    "t_norm_in", "t_norm_in_group", "t_group_norm", "t_norm_first", "t_norm_out", "t_weight_decay", "t_lr",
    "t_layer_scale", "t_gelu", "t_cape_mean_normalize", "t_cape_augment", "t_cape_glob_loc_scale",
    "t_sparse_self_attn", "t_sparse_cross_attn", "t_mask_type", "t_mask_random_seed", "t_sparse_attn_window",
    "t_global_window", "t_sparsity", "t_auto_sparsity", "t_cross_first", "use_train_segment",
)  # fmt: skip
"""Arguments of HTDemucs with little or no effect on its size."""

EMBEDDINGS = ("sin", "cape", "scaled")
# The constructors' default arguments that affect the checks and the largest tensor.
HDEMUCS = dict(
    channels=48, channels_time=None, growth=2, nfft=4096, depth=6, kernel_size=8, time_stride=2, stride=4,
    dconv_mode=1, dconv_comp=4, dconv_attn=4,
)  # fmt: skip
HTDEMUCS = {
    **HDEMUCS,
    **dict(depth=4, dconv_comp=8, dconv_attn=math.inf, bottom_channels=0, t_layers=5, t_emb="sin"),
}


def check_unet(sizes: Mapping[str, Any]) -> None:
    """Check the sizes of a TFC-TDF U-Net, or only of its transform if ``sizes`` has no layers.

    Raises :class:`ValueError` if a size is impossible, or sizes are inconsistent or too large.
    """
    check_sizes(UNET_SIZES, sizes)
    n_fft, hop, bins, frames = (sizes[key] for key in TRANSFORM)
    if n_fft % 2:
        raise ValueError(f"n_fft must be even, not {n_fft}")
    if bins > n_fft // 2 + 1:
        raise ValueError(f"bins must be from 1 to {n_fft // 2 + 1}, not {bins}")
    if 10 * hop > 9 * n_fft:
        raise ValueError(f"a hop of {hop} leaves gaps between windows of {n_fft} samples")
    if n_fft // 2 >= hop * (frames - 1):
        window = hop * (frames - 1)
        raise ValueError(
            f"n_fft must be below {2 * window}, twice the window of {window} samples, not {n_fft}"
        )
    needed = ("layers", "convolutions", "growth")
    stated = [key for key in needed if key in sizes]
    if stated and len(stated) < len(needed):
        lacking = [key for key in needed if key not in sizes]
        raise ValueError(f"{listed(stated)} given without {listed(lacking)}: state all of them, or none")
    if stated:
        _check_levels(sizes)
    check_tensor(largest_tensor_of_unet(sizes, hop * (frames - 1)), hop * (frames - 1))


def check_hdemucs(options: Mapping[str, Any]) -> None:
    """Check the arguments of an HDemucs; unknown arguments are checked by its constructor.

    Raises :class:`ValueError` if an argument has the wrong type or is out of range.
    """
    _check_branches(options, HDEMUCS_SIZES, HDEMUCS)


def check_htdemucs(options: Mapping[str, Any]) -> None:
    """Check the arguments of an HTDemucs, as :func:`check_hdemucs` does."""
    _check_branches(options, HTDEMUCS_SIZES, HTDEMUCS)
    sizes = {**HTDEMUCS, **options}
    if sizes["t_emb"] not in EMBEDDINGS:
        raise ValueError(f"t_emb must be {' or '.join(EMBEDDINGS)}, not {quoted(sizes['t_emb'])}")
    if sizes["t_layers"] and _width(sizes) % 4:
        raise ValueError(f"a transformer of {_width(sizes)} channels: expected a multiple of 4")
    for key in ("t_sparse_self_attn", "t_sparse_cross_attn"):
        if options.get(key):
            raise ValueError(f"{key} is not supported: it needs the package xformers")


def check_tensor(values: int, length: int) -> None:
    """Raise ValueError if a window is too long, or its largest tensor between two layers is too large."""
    if length > MAX_LENGTH:
        raise ValueError(f"windows of {length} samples are too long; expected at most {MAX_LENGTH}")
    if values > MAX_VALUES:
        raise ValueError(
            f"a window of {length} samples needs a tensor of {4 * values / 1e9:.3g} GB in the network; "
            f"expected at most {4 * MAX_VALUES / 1e9:.1f} GB"
        )


def largest_tensor_of_unet(sizes: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor between two layers of a U-Net."""
    channels = max(4, sizes.get("growth", 4))
    return int(sizes["frames"] * max(channels * sizes["bins"], 2 * sizes["n_fft"]))


def largest_tensor_of_htdemucs(options: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor between two layers of an HTDemucs."""
    return _largest_tensor_of_branches({**HTDEMUCS, **options}, length)


def largest_tensor_of_hdemucs(options: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor between two layers of an HDemucs."""
    return _largest_tensor_of_branches({**HDEMUCS, **options}, length)


def _largest_tensor_of_branches(options: Mapping[str, Any], length: int) -> int:
    frames, freqs = 4 * length // options["nfft"] + 1, options["nfft"] // 2
    sizes = [4 * len(options["sources"]) * frames * freqs]
    channels, growth = options["channels"], options["growth"]
    time = options["channels_time"] or channels
    for index in range(options["depth"]):
        is_last = 1 < freqs <= options["kernel_size"]  # of the spectral layers: the branches share it
        if is_last:
            time = channels = max(time, channels)
        below = max(1, freqs // options["stride"])
        sizes.append(2 * channels * below * frames)
        if index >= options["dconv_attn"]:
            sizes.append(4 * frames**2)
        time, channels, freqs = int(growth * time), int(growth * channels), 1 if is_last else below
    return int(max(sizes))


def check_sources(sources: Any) -> None:
    """Raise ValueError if sources are not a list of distinct names."""
    if not isinstance(sources, list | tuple) or not sources or not all(isinstance(s, str) for s in sources):
        raise ValueError(f"the sources must be a list of names, not {quoted(sources)}")
    for name in sources:
        if not (name.isprintable() and name.strip() == name and 0 < len(name.encode()) <= MAX_NAME):
            raise ValueError(f"expected a source name of 1 to {MAX_NAME} bytes, not {quoted(name)}")
    if len(set(sources)) < len(sources):
        raise ValueError(f"duplicate source in {quoted(sources)}")


def check_sizes(allowed: Mapping[str, Size], sizes: Mapping[str, Any]) -> None:
    """Raise ValueError if a size has the wrong type or is out of range."""
    kinds = {SWITCH: bool, TEXT: str}
    for key, expected in {**COMMON, **allowed}.items():
        if key in sizes:
            value = sizes[key]
            if not (
                value in expected
                if isinstance(expected, Range | ListOf)
                else isinstance(value, kinds[expected])
            ):
                raise ValueError(f"{key} must be {expected}, not {quoted(value)}")


def _check_levels(sizes: Mapping[str, Any]) -> None:
    """Check that the axes of a U-Net can be halved at each level."""
    layers, bins, frames, growth = (sizes[key] for key in ("layers", "bins", "frames", "growth"))
    if layers % 2 == 0:
        raise ValueError(f"layers must be odd and at least 3, not {layers}")
    shrink = 2 ** (layers // 2)
    divisor = shrink * sizes.get("bottleneck", 8)
    if bins % divisor or frames % shrink:
        raise ValueError(
            f"{layers // 2} levels need bins divisible by {divisor} and frames divisible by {shrink}, "
            f"not {bins} and {frames}"
        )
    groups = sizes.get("norm_groups")
    if groups is not None and growth % groups:
        raise ValueError(f"growth must be divisible by norm_groups: {growth} and {groups} do not fit")


def _check_branches(
    options: Mapping[str, Any], allowed: Mapping[str, Size], defaults: Mapping[str, Any]
) -> None:
    """Check the arguments that both kinds of Demucs have."""
    check_sources(options.get("sources"))
    check_sizes(allowed, options)
    ratios = options.get("multi_freqs")
    if ratios is not None and not (
        isinstance(ratios, list | tuple) and len(ratios) < 16 and all(r in Range(0, 1, False) for r in ratios)
    ):
        raise ValueError(f"multi_freqs must be a list of fewer than 16 fractions, not {quoted(ratios)}")
    sizes = {**defaults, **options}
    channels, divisor = min(sizes["channels"], sizes["channels_time"] or math.inf), sizes["dconv_comp"]
    if sizes["dconv_mode"] and channels < divisor:
        raise ValueError(f"dconv_comp must be at most the number of channels, {channels}, not {divisor}")


def _outside(options: Mapping[str, Any]) -> int:
    """Channels before and after an HTDemucs' transformer."""
    return int(options["channels"] * options["growth"] ** (options["depth"] - 1))


def _width(options: Mapping[str, Any]) -> int:
    """Channels in an HTDemucs' transformer."""
    return options["bottom_channels"] or _outside(options)
