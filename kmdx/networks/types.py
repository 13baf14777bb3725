"""The table of network types: what an architecture must and may contain, and where the code of a type is.

The registry, plans, the builder, stand-ins and the docs read it; nothing here needs torch. A new type is one
module with a network (:class:`kmdx.networks.network.Network`), a ``build`` and a ``stand_in``, and one entry.

An architecture is a mapping as plans and the registry have it: ``type``, ``sources``, and sizes under the
names that the network's class has for them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from kmdx.errors import listed, quoted, shown, suggest
from kmdx.networks import architecture as sizes_of
from kmdx.networks.architecture import COMMON, LISTS, Range

DEFAULT_RATE = 44100  # Hz, of an architecture that states none
CHANNELS = 2


@dataclass(frozen=True)
class NetworkType:
    """One type of network.

    Attributes
    ----------
    name : str
        What architectures call it.
    file : str
        ``state`` for a state dict, ``graph`` for an ONNX graph.
    build, stand_in : str
        Functions, as ``module:name``. ``build(architecture, segment, state)`` makes the network with its
        weights, for windows of ``segment`` seconds if that can be chosen. ``stand_in(architecture, seed)``
        makes a module with random weights, whose state dict or graph takes the place of real weights.
    precisions : tuple of str
        Half precisions that it supports.
    needed : tuple of str
        What an architecture must contain besides the type and the sources.
    sizes : mapping of str to Range or str
        What it may contain, and the values that each may have.
    check : callable
        Raises :class:`ValueError` if sizes do not fit each other or are too large.
    parameters : callable
        Number of parameters from a checked architecture; 0 where only the file states them.
    largest_tensor : callable
        Values of the largest tensor between two layers, from a checked architecture and a window's length.
    one_source : bool
    rate : str
        The size that is the sample rate.
    arguments : bool
        Whether a weight file may have the constructor's arguments, which replace the architecture then.
    others : tuple of str
        More keys that it may contain, which its constructor checks.
    """

    name: str
    file: Literal["state", "graph"]
    build: str
    stand_in: str
    precisions: tuple[str, ...]
    needed: tuple[str, ...]
    sizes: Mapping[str, Range | str]
    check: Callable[[Mapping[str, Any]], None]
    parameters: Callable[[Mapping[str, Any]], int]
    largest_tensor: Callable[[Mapping[str, Any], int], int]
    one_source: bool = True
    rate: str = "sample_rate"
    arguments: bool = False
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """What is known of a network before it is built.

    Attributes
    ----------
    type : NetworkType
    sources : tuple of str
        What it estimates, in the order of its output.
    sample_rate : int
        Hz.
    channels : int
        Of its input.
    length : int or None
        The only number of samples that it accepts; ``None`` if any will do.
    """

    type: NetworkType
    sources: tuple[str, ...]
    sample_rate: int = DEFAULT_RATE
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
    parameters=sizes_of.parameters_of_htdemucs,
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
    parameters=sizes_of.parameters_of_hdemucs,
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
    parameters=sizes_of.parameters_of_unet,
    largest_tensor=sizes_of.largest_tensor_of_unet,
)
ONNX = replace(
    TFC_TDF,
    name="onnx",
    file="graph",
    precisions=(),
    needed=sizes_of.TRANSFORM,
    parameters=lambda sizes: 0,  # the graph alone states them
)

TYPES: dict[str, NetworkType] = {each.name: each for each in (HTDEMUCS, HDEMUCS, ONNX, TFC_TDF)}
"""Every type, by name."""


def function(place: str) -> Callable[..., Any]:
    """The function at ``module:name``, imported now."""
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def type_of(architecture: Mapping[str, Any]) -> NetworkType:
    """The type of an architecture.

    Raises
    ------
    ValueError
        If there is no such type.
    """
    name = architecture.get("type")
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(f"the type is {quoted(name)}; expected {', '.join(TYPES)}")
    return TYPES[name]


def read(architecture: Mapping[str, Any]) -> Architecture:
    """Check an architecture as a plan or a models folder states it, and that it is of a sane size.

    Raises
    ------
    ValueError
        If its type is unknown, a size is missing, unknown to the type, or impossible, or the network would
        be too large to be built.
    """
    kind = type_of(architecture)
    lacking = [key for key in ("sources", *kind.needed) if key not in architecture]
    if lacking:
        raise ValueError(f"it does not state its {', '.join(lacking)}")
    sizes_of.check_sources(architecture["sources"])
    if kind.one_source and len(architecture["sources"]) > 1:
        raise ValueError(
            f"a network of type {kind.name} has one source, not {listed(architecture['sources'])}"
        )
    known = {*COMMON, *kind.sizes}
    for key, value in architecture.items():
        if key not in ("type", "sources", *known, *kind.others):
            hint = suggest(key, kind.sizes) or f"; expected {', '.join(kind.sizes)}"
            raise ValueError(f"{quoted(key)} is no size of the type {kind.name}{hint}")
        if isinstance(value, Mapping) or (isinstance(value, list) and key not in LISTS):
            raise ValueError(f"{shown(key)} must be a number, a text or true or false, not {quoted(value)}")
    sizes_of.check_sizes(kind.sizes, architecture)
    kind.check(architecture)
    frames = architecture.get("frames")
    length = None if frames is None else architecture["hop"] * (frames - 1)
    rate = architecture.get(kind.rate, DEFAULT_RATE)
    return Architecture(kind, tuple(architecture["sources"]), int(rate), CHANNELS, length)


def check_window(architecture: Mapping[str, Any], length: int) -> None:
    """Check how much a network works on when its input has ``length`` samples of two channels.

    Raises
    ------
    ValueError
        If that, or a tensor between two of its layers, is too large.
    """
    sizes_of.check_tensor(type_of(architecture).largest_tensor(architecture, length), length)
