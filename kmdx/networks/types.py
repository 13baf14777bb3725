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
from dataclasses import dataclass, replace
from typing import Any, Literal

from kmdx.challenge import CHANNELS, RATE
from kmdx.errors import listed, quoted, shown, suggest
from kmdx.networks import architecture as sizes_of
from kmdx.networks.architecture import COMMON, LISTS, ListOf, Size


@dataclass(frozen=True)
class NetworkType:
    """One type of network.

    Attributes
    ----------
    name : str
        Its name in architectures.
    file : str
        ``state`` for a state dict, ``graph`` for an ONNX graph.
    build, stand_in : str
        Functions, as ``module:name``. ``build(architecture, segment, state)`` makes the network with its
        weights, for windows of ``segment`` seconds if their length can be chosen. ``stand_in(architecture,
        seed)`` makes a module with random weights, whose state dict or graph replaces real weights.
    precisions : tuple of str
        Half precisions that it supports.
    needed : tuple of str
        Keys that an architecture must contain, in addition to the type and the sources.
    sizes : mapping of str to Range, ListOf or str
        Keys that an architecture may contain, and their allowed values.
    check : callable
        Raises :class:`ValueError` if sizes are inconsistent or too large.
    largest_tensor : callable
        Values in the largest tensor between two layers, from a checked architecture and a window's length.
    one_source : bool
        Whether it has only one source.
    rate : str
        The key of the sample rate.
    arguments : bool
        Whether a weight file may contain constructor arguments, which then replace the architecture.
    others : tuple of str
        More allowed keys, whose values the constructor checks.
    """

    name: str
    file: Literal["state", "graph"]
    build: str
    stand_in: str
    precisions: tuple[str, ...]
    needed: tuple[str, ...]
    sizes: Mapping[str, Size]
    check: Callable[[Mapping[str, Any]], None]
    largest_tensor: Callable[[Mapping[str, Any], int], int]
    one_source: bool = True
    rate: str = "sample_rate"
    arguments: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The properties of a network that are known before it is built.

    Attributes
    ----------
    type : NetworkType
    sources : tuple of str
        The sources it estimates, in the order of its output.
    sample_rate : int
        Hz.
    channels : int
        Channels of its input.
    length : int or None
        The only number of samples that it accepts; ``None`` if it accepts any.
    """

    type: NetworkType
    sources: tuple[str, ...]
    sample_rate: int = RATE
    channels: int = CHANNELS
    length: int | None = None


HTDEMUCS = NetworkType(
    "htdemucs",
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
    sizes=sizes_of.HDEMUCS_SIZES,
    check=sizes_of.check_hdemucs,
    largest_tensor=sizes_of.largest_tensor_of_hdemucs,
    others=("multi_freqs",),
)
TFC_TDF = NetworkType(
    "tfc_tdf",
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
    file="graph",
    precisions=(),
    needed=sizes_of.TRANSFORM,
)

TYPES: dict[str, NetworkType] = {each.name: each for each in (HTDEMUCS, HDEMUCS, ONNX, TFC_TDF)}
"""All types by name."""


def function(place: str) -> Callable[..., Any]:
    """Import and return the function ``module:name``."""
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def type_of(architecture: Mapping[str, Any]) -> NetworkType:
    """The type of an architecture.

    Raises
    ------
    ValueError
        If the type is unknown.
    """
    name = architecture.get("type")
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(f"unknown type {quoted(name)}; available: {', '.join(TYPES)}")
    return TYPES[name]


def read(architecture: Mapping[str, Any]) -> Architecture:
    """Check an architecture from a plan or a models folder.

    Raises
    ------
    ValueError
        If its type is unknown, a key is missing or unknown, a size is impossible, or the network would be too
        large.
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

    Raises
    ------
    ValueError
        If the input, or a tensor between two of its layers, is too large.
    """
    sizes_of.check_tensor(type_of(architecture).largest_tensor(architecture, length), length)
