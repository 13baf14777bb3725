"""Build networks from weights: find the file, read it safely, and load it strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kmdx import engines, precisions, speeds, weights
from kmdx.errors import WeightsError
from kmdx.networks import types
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, TfcTdf, TfcTdfConfig, spectrogram_of
from kmdx.plan import NetworkUse
from kmdx.weights import FoundWeight


def load_network(use: NetworkUse, rate: int, device: torch.device, folder: Path | None = None) -> Network:
    """Build a network of a plan in its published form, and load its weights.

    Raises :class:`WeightsError` if the file is missing, damaged or unsafe, or belongs to another network, or
    if the network's sample rate or length differs from the plan's.

    Parameters
    ----------
    use : NetworkUse
        Its weights, whose ``architecture`` describes the network, and its window.
    rate : int
        Sample rate of the plan's signals, in Hz.
    device : torch.device
        The device to run on.
    folder : Path, optional
        Folder of the weight files; by default the models folder.
    """
    network = _load(use, rate, folder, lambda found: _build(use, found, device))
    assert isinstance(network, nn.Module)
    return network.to(device)


def load_for_inference(
    use: NetworkUse,
    rate: int,
    device: torch.device,
    folder: Path | None = None,
    *,
    engine: str = engines.DEFAULT,
    precision: str = "fp32",
    speed: str = speeds.DEFAULT,
) -> Network:
    """Build a network of a plan as :func:`load_network` does, and prepare it for an engine.

    With every engine, a published ONNX graph becomes the torch network that it was exported from. The
    network is built in host memory and moved to ``device`` later; only a graph that needs ONNX Runtime is
    built on the device.

    Parameters
    ----------
    use, rate, device, folder
        As for :func:`load_network`, which raises the same errors.
    engine : str
        See :mod:`kmdx.engines`.
    precision, speed
        As for :func:`kmdx.precisions.choose`.
    """
    network = _load(use, rate, folder, lambda found: _ported(use, found.path) or _build(use, found, device))
    dtype = precisions.choose(precision, device, network.supported_dtypes, speed)
    # On a CPU, torch's compiler does without the project's kernels, which it could not change.
    tuned = engine == engines.TUNED or (engine in engines.COMPILING and device.type != "cpu")
    network.accelerate(dtype, tuned)
    return network


def _load(
    use: NetworkUse, rate: int, folder: Path | None, build: Callable[[FoundWeight], Network]
) -> Network:
    """Build a network from its weight file, and check that its rate and length match the plan."""
    found = weights.find(use.weight, folder)
    try:
        network = build(found)
        _check(network, use, rate)
    except WeightsError:
        raise
    except ValueError as error:
        purpose = "" if use.weight.path else f" as {use.weight.name}"
        raise WeightsError(f"{found.path} cannot be used{purpose}: {error}") from error
    return network


def _check(network: Network, use: NetworkUse, rate: int) -> None:
    """Raise :class:`ValueError` if a network's rate or length differs from the plan's."""
    own_rate = getattr(getattr(network, "model", None), "samplerate", rate)
    if own_rate != rate:
        raise ValueError(f"it needs {own_rate} Hz, but the plan's sample rate is {rate} Hz")
    if network.length not in (None, use.chunking.length):
        raise ValueError(f"it accepts only windows of {network.length} samples, not {use.chunking.length}")


def _ported(use: NetworkUse, path: Path) -> TfcTdf | None:
    """The network that a published ONNX graph was exported from; None if it is not such a graph."""
    architecture = use.weight.architecture
    if types.type_of(architecture).file != "graph":
        return None
    try:
        spectrogram = spectrogram_of(architecture)
        graph = weights.unet(path, (spectrogram.bins, spectrogram.frames))
    except WeightsError:  # ONNX Runtime may run it, or reports the error
        return None
    if (graph.bins, graph.frames) != (spectrogram.bins, spectrogram.frames):
        return None
    return TfcTdf.of_state(TfcTdfConfig(spectrogram, **graph.sizes), architecture["sources"][0], graph.state)


def _build(use: NetworkUse, found: FoundWeight, device: torch.device) -> Network:
    path, architecture = found.path, use.weight.architecture
    kind = types.type_of(architecture)
    if kind.file == "graph":
        spectrogram = spectrogram_of(architecture)
        if not found.known:  # published graphs are safe
            weights.check_graph(path, (SPECTRUM_CHANNELS, spectrogram.bins, spectrogram.frames))
        return OnnxNetwork(path, spectrogram, architecture["sources"][0], device).eval()

    checkpoint = weights.load(path)
    if checkpoint.state is None:
        raise ValueError(f"expected {kind.name} weights, found an ONNX graph")
    if checkpoint.klass is not None and checkpoint.klass != kind.name:
        raise ValueError(f"expected a network of class {kind.name}, found {checkpoint.klass}")
    own = checkpoint.kwargs if kind.arguments else None
    stated = {**(own or architecture), "type": kind.name}
    network: Network = types.function(kind.build)(stated, use.chunking.segment, checkpoint.state)
    return network
