"""From a weight to a network that runs: finds the file, reads it safely, loads it strictly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from kmdx import engine as engines
from kmdx import precision as precisions
from kmdx import speed as speeds
from kmdx import weights
from kmdx.errors import WeightsError
from kmdx.networks import demucs, fast
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import SPECTRUM_CHANNELS, TfcTdf, TfcTdfConfig
from kmdx.plan import NetworkUse
from kmdx.weights import FoundWeight

TRANSFORM = ("n_fft", "hop", "bins", "frames")
UNET = ("layers", "convolutions", "growth", "norm_groups", "bottleneck")

Built = OnnxNetwork | TfcTdf | demucs.DemucsNetwork


def load_network(use: NetworkUse, rate: int, device: torch.device, folder: Path | None = None) -> Network:
    """Build a network of a plan and load its weights, in the form that was published.

    Parameters
    ----------
    use : NetworkUse
        Its weights, whose ``architecture`` says how to build it, and how signals go through it.
    rate : int
        Rate in Hz of those signals.
    device : torch.device
        Where it will run.
    folder : Path, optional
        Where weight files lie; the models folder if not given.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, unsafe, holds another network's weights, or the network works
        at another rate or length than the plan.
    """
    return _load(use, rate, folder, lambda found: _build(use, found, device)).to(device)


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
    """Build a network of a plan as :func:`load_network` does, and make it ready for an engine.

    A published ONNX graph becomes the torch network that it was exported from, for every engine. The
    network stays in the host's memory until something brings it to ``device``; only a graph that has to
    be run by ONNX Runtime is there from the beginning.

    Parameters
    ----------
    use, rate, device, folder
        As for :func:`load_network`, and so are the errors.
    engine : str
        See :mod:`kmdx.engine`.
    precision, speed
        As for :func:`kmdx.precision.choose`.
    """
    network = _load(use, rate, folder, lambda found: _ported(use, found.path) or _build(use, found, device))
    fast.prepare(network, precisions.choose(precision, device, network.bears, speed), engine)
    return network


def _load(use: NetworkUse, rate: int, folder: Path | None, build: Callable[[FoundWeight], Built]) -> Built:
    """Build a network from its weights' file, and see that it works at the plan's rate and length."""
    found = weights.find(use.weight, folder)
    try:
        network = build(found)
        _check(network, use, rate)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{found.path} cannot be used as {use.weight.name}: {error}") from error
    return network


def _check(network: Network, use: NetworkUse, rate: int) -> None:
    """Raise :class:`ValueError` if a network does not work at the plan's rate and length."""
    own_rate = getattr(getattr(network, "model", None), "samplerate", rate)
    if own_rate != rate:
        raise ValueError(f"it works at {own_rate} Hz, and the plan at {rate} Hz")
    if network.length not in (None, use.chunking.length):
        raise ValueError(f"it takes in {network.length} samples at once, not {use.chunking.length}")


def _ported(use: NetworkUse, path: Path) -> TfcTdf | None:
    """The network that a published ONNX graph was exported from; None if it is not such a graph."""
    architecture = dict(use.weight.architecture)
    if architecture["type"] != "onnx":
        return None
    try:
        spectrogram = _spectrogram(architecture)
        graph = weights.unet(path, (spectrogram.bins, spectrogram.frames))
    except WeightsError:  # ONNX Runtime may know it, or will say what is wrong with it
        return None
    if (graph.bins, graph.frames) != (spectrogram.bins, spectrogram.frames):
        return None
    return TfcTdf.of_state(TfcTdfConfig(spectrogram, **graph.sizes), architecture["sources"][0], graph.state)


def _build(use: NetworkUse, found: FoundWeight, device: torch.device) -> Built:
    path, architecture = found.path, dict(use.weight.architecture)
    kind = architecture["type"]
    if kind == "onnx":
        spectrogram = _spectrogram(architecture)
        if not found.known:  # published ones are safe
            weights.check_graph(path, (SPECTRUM_CHANNELS, spectrogram.bins, spectrogram.frames))
        return OnnxNetwork(path, spectrogram, architecture["sources"][0], device).eval()

    checkpoint = weights.load(path)
    if checkpoint.state is None:
        raise ValueError(f"it is an ONNX graph, and {kind} weights are needed")
    if kind == "tfc_tdf":
        sizes = {key: architecture[key] for key in UNET if key in architecture}
        config = TfcTdfConfig(_spectrogram(architecture), **sizes)
        return TfcTdf.of_state(config, architecture["sources"][0], checkpoint.state)

    if checkpoint.klass is not None and checkpoint.klass != kind:
        raise ValueError(f"it holds a network of class {checkpoint.klass}, and {kind} is needed")
    own = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    return demucs.build(kind, checkpoint.kwargs or own, use.chunking.segment, checkpoint.state)


def _spectrogram(architecture: dict) -> SpectrogramConfig:
    return SpectrogramConfig(**{key: architecture[key] for key in TRANSFORM})
