"""The table of network types: required and optional keys of an architecture, and the code of each type.

The registry, plans, the builder, stand-ins and the docs use it. This module does not import torch. A new type
needs one module with a network (:class:`kmdx.networks.network.Network`), a ``build`` and a ``stand_in``, and
one entry in the table.

An architecture is a mapping in a plan or the registry: ``type``, ``sources``, and sizes named like the
arguments of the network's class.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kmdx.challenge import CHANNELS, RATE
from kmdx.errors import listed, quoted, shown, suggest
from kmdx.networks import architecture as sizes_of
from kmdx.networks.architecture import COMMON, LISTS, SWITCH, TEXT, ListOf, Range, Size


@dataclass(frozen=True)
class NetworkType:
    """One type of network."""

    name: str  # its name in architectures
    title: str  # its name in the literature
    file: Literal["state", "graph"]  # ``state`` for a state dict, ``graph`` for an ONNX graph
    build: str
    stand_in: str
    """``build`` and ``stand_in``: functions, as ``module:name``. ``build(architecture, segment, state)``
    makes the network with its weights, for windows of ``segment`` seconds if their length can be chosen.
    ``stand_in(architecture, seed)`` makes a module with random weights, whose state dict or graph replaces
    real weights."""
    precisions: tuple[str, ...]  # half precisions that it supports
    needed: tuple[str, ...]  # keys that an architecture must contain, in addition to the type and the sources
    sizes: Mapping[str, Size]  # keys that an architecture may contain, and their allowed values
    check: Callable[[Mapping[str, Any]], None]
    """Raises :class:`ValueError` if sizes are inconsistent or too large."""
    largest_tensor: Callable[[Mapping[str, Any], int], int]
    """Values in the largest tensor between two layers, from a checked architecture and a window's length."""
    one_source: bool = True  # whether it has only one source
    rate: str = "sample_rate"  # the key of the sample rate
    tensor: str | None = None  # a tensor by which a state dict of this type is recognized
    infer: str | None = None
    """Function ``module:name``. ``infer(state, stated)`` returns the type and the sizes that a state dict
    determines; an architecture ``stated`` decides what it leaves open. It raises :class:`ValueError` if the
    network is not of its types."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of the keys that an architecture may omit and the state dict does not determine."""
    arguments: bool = False
    """Whether a weight file may contain constructor arguments, which then replace the architecture."""
    others: tuple[str, ...] = ()  # more allowed keys, whose values the constructor checks


@dataclass(frozen=True)
class Architecture:
    """The properties of a network that are known before it is built."""

    type: NetworkType
    sources: tuple[str, ...]  # the sources it estimates, in the order of its output
    sample_rate: int = RATE  # Hz
    channels: int = CHANNELS  # channels of its input
    length: int | None = None  # the only number of samples that it accepts; ``None`` if it accepts any


HTDEMUCS = NetworkType(
    "htdemucs",
    title="HTDemucs",
    file="state",
    build="kmdx.networks.demucs:build",
    stand_in="kmdx.stand_in:demucs",
    precisions=("bf16", "fp16"),
    needed=(),
    sizes=sizes_of.HTDEMUCS_SIZES,
    check=sizes_of.check_htdemucs,
    largest_tensor=sizes_of.largest_tensor_of_htdemucs,
    one_source=False,
    rate="samplerate",
    arguments=True,
    others=("multi_freqs", *sizes_of.TRANSFORMER_SWITCHES),
)
HDEMUCS = replace(
    HTDEMUCS,
    name="hdemucs",
    title="HDemucs",
    sizes=sizes_of.HDEMUCS_SIZES,
    check=sizes_of.check_hdemucs,
    largest_tensor=sizes_of.largest_tensor_of_hdemucs,
    others=("multi_freqs",),
)
TFC_TDF = NetworkType(
    "tfc_tdf",
    title="TFC-TDF U-Net v2",
    file="state",
    build="kmdx.networks.tfc_tdf:build",
    stand_in="kmdx.stand_in:unet",
    precisions=("fp16",),
    needed=(*sizes_of.TRANSFORM, *sizes_of.UNET),
    sizes=sizes_of.UNET_SIZES,
    check=sizes_of.check_unet,
    largest_tensor=sizes_of.largest_tensor_of_unet,
)
ONNX = replace(
    TFC_TDF,
    name="onnx",
    title="ONNX graph",
    file="graph",
    precisions=(),
    needed=sizes_of.TRANSFORM,
)


def _largest_tensor_of_roformer(sizes: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor; sizes that are not stated have common values."""
    frames = length // sizes.get("stft_hop_length", 512) + 1
    bands = sizes.get("num_bands") or len(sizes.get("freqs_per_bands", range(62)))
    dim, inner = sizes.get("dim", 512), sizes.get("heads", 8) * sizes.get("dim_head", 64)
    return int(frames * max(bands * max(4 * dim, 3 * inner), 4 * sizes.get("stft_n_fft", 2048)))


ROFORMER_SIZES: Mapping[str, Size] = {
    "num_stems": Range(1, 64),
    "dim": Range(1, 2**13),
    "depth": Range(1, 64),
    "stereo": SWITCH,
    "linear_transformer_depth": Range(0, 16),
    "time_transformer_depth": Range(1, 16),
    "freq_transformer_depth": Range(1, 16),
    "heads": Range(1, 128),
    "dim_head": Range(2, 2**10),
    "stft_n_fft": Range(16, 2**15),
    "stft_hop_length": Range(1, 2**14),
    "stft_win_length": Range(16, 2**15),
    "stft_normalized": SWITCH,
    "mask_estimator_depth": Range(1, 16),
    "mlp_expansion_factor": Range(1, 64),
    "skip_connection": SWITCH,
    "zero_dc": SWITCH,
    "sample_rate": Range(1000, 384_000),
}
ROFORMER_DEFAULTS: Mapping[str, Any] = {
    "stereo": True,
    "time_transformer_depth": 2,
    "freq_transformer_depth": 2,
    "linear_transformer_depth": 0,
    "heads": 8,
    "dim_head": 64,
    "stft_n_fft": 2048,
    "stft_hop_length": 512,
    "stft_win_length": 2048,
    "stft_normalized": False,
    "mlp_expansion_factor": 4,
    "skip_connection": False,
    "zero_dc": True,
    "sample_rate": RATE,
}
BS_ROFORMER = NetworkType(
    "bs_roformer",
    title="BS-RoFormer",
    file="state",
    build="kmdx.networks.roformer:build",
    stand_in="kmdx.networks.roformer:stand_in",
    tensor="band_split.to_features.0.0.gamma",
    infer="kmdx.networks.roformer:infer",
    precisions=("bf16", "fp16"),
    needed=(),
    sizes={**ROFORMER_SIZES, "freqs_per_bands": ListOf(Range(1, 2**14), 512)},
    check=lambda sizes: None,  # sizes are checked against the weights when it is built
    largest_tensor=_largest_tensor_of_roformer,
    one_source=False,
    defaults={
        **ROFORMER_DEFAULTS,
        "freqs_per_bands": (*[2] * 24, *[4] * 12, *[12] * 8, *[24] * 8, *[48] * 8, 128, 129),
        "mask_estimator_depth": 2,
    },
)
MEL_BAND_ROFORMER = replace(
    BS_ROFORMER,
    name="mel_band_roformer",
    title="Mel-Band RoFormer",
    sizes={**ROFORMER_SIZES, "num_bands": Range(1, 512)},
    defaults={**ROFORMER_DEFAULTS, "num_bands": 60, "mask_estimator_depth": 1},
)


def _largest_tensor_of_scnet(sizes: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor; sizes that are not stated have common values."""
    bins, frames = sizes.get("nfft", 4096) // 2 + 1, length // sizes.get("hop_size", 1024) + 2
    ratios, strides = sizes.get("band_SR", (0.175, 0.392)), sizes.get("band_stride", (1, 4))
    below = sum(ratio / stride for ratio, stride in zip(ratios, strides, strict=False))  # of the lower bands
    outputs = max(4 * len(sizes["sources"]), 64 if sizes["type"] == "scnet_masked" else 0)
    first = sizes.get("dims", (4, 64))[1]
    return int(bins * frames * max(outputs, 2 * first * (below + 0.05)))


SCNET = NetworkType(
    "scnet",
    title="SCNet",
    file="state",
    build="kmdx.networks.scnet:build",
    stand_in="kmdx.networks.scnet:stand_in",
    tensor="encoder.0.SDlayer.convs.0.weight",
    infer="kmdx.networks.scnet:infer",
    precisions=("fp16",),
    needed=(),
    sizes={
        "num_stems": Range(1, 64),
        "dims": ListOf(Range(1, 2**13), 12),
        "nfft": Range(16, 2**15),
        "hop_size": Range(1, 2**14),
        "win_size": Range(16, 2**15),
        "normalized": SWITCH,
        "band_SR": ListOf(Range(0, 1, whole=False), 3),
        "band_stride": ListOf(Range(1, 2**10), 3),
        "band_kernel": ListOf(Range(1, 2**10), 3),
        "conv_depths": ListOf(Range(0, 64), 3),
        "compress": Range(1, 2**10),
        "conv_kernel": Range(1, 2**10),
        "num_dplayer": Range(0, 64),
        "expand": Range(1, 64),
        "sample_rate": Range(1000, 384_000),
    },
    check=lambda sizes: None,  # sizes are checked against the weights when it is built
    largest_tensor=_largest_tensor_of_scnet,
    one_source=False,
    defaults={
        "nfft": 4096,
        "hop_size": 1024,
        "win_size": 4096,
        "normalized": True,
        "band_SR": (0.175, 0.392, 0.433),
        "compress": 4,
        "conv_kernel": 3,
        "sample_rate": RATE,
    },
)
SCNET_MASKED = replace(SCNET, name="scnet_masked", title="masked SCNet")


def _largest_tensor_of_mdx23c(sizes: Mapping[str, Any], length: int) -> int:
    """Approximate number of values in the largest tensor; sizes that are not stated have common values."""
    frames = length // sizes["hop_length"] + 2
    bins = sizes.get("dim_f", sizes["n_fft"] // 2) // sizes.get("num_subbands", 4)
    spectra = 2 * len(sizes["sources"]) * (sizes["n_fft"] + 2)
    return int(frames * max(bins * 2 * sizes.get("num_channels", 128), spectra))


MDX23C = NetworkType(
    "mdx23c",
    title="MDX23C",
    file="state",
    build="kmdx.networks.mdx23c:build",
    stand_in="kmdx.networks.mdx23c:stand_in",
    tensor="encoder_blocks.0.tfc_tdf.blocks.0.shortcut.weight",
    infer="kmdx.networks.mdx23c:infer",
    precisions=("fp16",),
    needed=("n_fft", "hop_length", "norm", "act"),
    sizes={
        "num_stems": Range(1, 64),
        "n_fft": Range(16, 2**15),
        "hop_length": Range(1, 2**14),
        "dim_f": Range(1, 2**14 + 1),
        "num_subbands": Range(1, 2**10),
        "num_channels": Range(1, 2**13),
        "growth": Range(0, 2**13),
        "num_scales": Range(1, 12),
        "num_blocks_per_scale": Range(1, 64),
        "bottleneck_factor": Range(1, 2**13),
        "scale": ListOf(Range(1, 16), 2),
        "norm": TEXT,
        "act": TEXT,
        "stereo": SWITCH,
        "sample_rate": Range(1000, 384_000),
    },
    check=lambda sizes: None,  # sizes are checked against the weights when it is built
    largest_tensor=_largest_tensor_of_mdx23c,
    one_source=False,
    defaults={"stereo": True, "sample_rate": RATE},
)

TYPES: dict[str, NetworkType] = {
    each.name: each
    for each in (
        HTDEMUCS,
        HDEMUCS,
        ONNX,
        TFC_TDF,
        BS_ROFORMER,
        MEL_BAND_ROFORMER,
        MDX23C,
        SCNET,
        SCNET_MASKED,
    )
}
"""All types by name."""


def function(place: str) -> Callable[..., Any]:
    """Import and return the function ``module:name``."""
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def type_of(architecture: Mapping[str, Any]) -> NetworkType:
    """The type of an architecture; raises :class:`ValueError` if the type is unknown."""
    name = architecture.get("type")
    if not isinstance(name, str) or name not in TYPES:
        hint = suggest(str(name), TYPES)
        raise ValueError(f"unknown type {quoted(name)}{hint}; available: {', '.join(TYPES)}")
    return TYPES[name]


def infer(state: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Recognize a network by its state dict: its type, and the sizes that the state dict determines.

    Raises :class:`ValueError` if it is of no type that can be recognized.
    """
    from kmdx.networks.state import without_prefixes

    names = without_prefixes(state)
    for kind in TYPES.values():
        if kind.infer and kind.tensor in names:
            found: dict[str, Any] = function(kind.infer)(state, stated)
            return found
    known = ", ".join(kind.title for kind in TYPES.values() if kind.infer)
    first = shown(next(iter(state), "missing"))
    raise ValueError(f"not a network that can be recognized ({known}); its first tensor is {first}")


def read(architecture: Mapping[str, Any]) -> Architecture:
    """Check an architecture from a plan or a models folder.

    Raises :class:`ValueError` if its type is unknown, a key is missing or unknown, a size is impossible, or
    the network would be too large.
    """
    kind = type_of(architecture)
    lacking = [key for key in ("sources", *kind.needed) if key not in architecture]
    if lacking:
        raise ValueError(f"missing {', '.join(lacking)}")
    sizes_of.check_sources(architecture["sources"])
    if kind.one_source and len(architecture["sources"]) > 1:
        raise ValueError(
            f"a network of type {kind.name} must have one source, not {listed(architecture['sources'])}"
        )
    known = {*COMMON, *kind.sizes}
    for key, value in architecture.items():
        if key not in ("type", "sources", *known, *kind.others):
            hint = suggest(key, kind.sizes) or f"; expected {', '.join(kind.sizes)}"
            raise ValueError(f"unknown key {quoted(key)} of type {kind.name}{hint}")
        is_list = key in LISTS or isinstance(kind.sizes.get(key), ListOf)
        if isinstance(value, Mapping) or (isinstance(value, list) and not is_list):
            raise ValueError(f"{shown(key)} must be a number, a string, true or false, not {quoted(value)}")
    sizes_of.check_sizes(kind.sizes, architecture)
    kind.check(architecture)
    frames = architecture.get("frames")
    length = None if frames is None else architecture["hop"] * (frames - 1)
    rate = architecture.get(kind.rate, RATE)
    return Architecture(kind, tuple(architecture["sources"]), int(rate), CHANNELS, length)


def check_window(architecture: Mapping[str, Any], length: int) -> None:
    """Check the memory that a network needs for an input of ``length`` samples of two channels.

    Raises :class:`ValueError` if the input, or a tensor between two of its layers, is too large.
    """
    sizes_of.check_tensor(type_of(architecture).largest_tensor(architecture, length), length)
