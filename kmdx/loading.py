"""From a weight to a network that runs: finds the file, reads it safely, loads it strictly."""

from __future__ import annotations

from pathlib import Path

import torch

from kmdx import weights
from kmdx.errors import WeightsError
from kmdx.networks import demucs
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig
from kmdx.plan import NetworkUse, OverlapAdd

TRANSFORM = ("n_fft", "hop", "bins", "frames")
UNET = ("layers", "convolutions", "growth", "norm_groups", "bottleneck")


def load_network(use: NetworkUse, rate: int, device: torch.device, folder: Path | None = None) -> Network:
    """Build a network of a plan and load its weights, ready to run.

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
    path = weights.find(use.weight, folder).path
    try:
        network = _build(use, path, device)
        own_rate = getattr(getattr(network, "model", None), "samplerate", rate)
        if own_rate != rate:
            raise ValueError(f"it works at {own_rate} Hz, and the plan at {rate} Hz")
        if network.length not in (None, use.chunking.length):
            raise ValueError(f"it hears {network.length} samples at once, not {use.chunking.length}")
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path} cannot be used as {use.weight.name}: {error}") from error
    return network


def _build(use: NetworkUse, path: Path, device: torch.device) -> Network:
    architecture = dict(use.weight.architecture)
    kind = architecture["type"]
    if kind == "onnx":
        network = OnnxNetwork(path, _spectrogram(architecture), architecture["sources"][0], device)
        return network.to(device).eval()

    checkpoint = weights.load(path)
    if checkpoint.state is None:
        raise ValueError(f"it is an ONNX graph, and {kind} weights are needed")
    if kind == "tfc_tdf":
        sizes = {key: architecture[key] for key in UNET if key in architecture}
        unet = TfcTdf(TfcTdfConfig(_spectrogram(architecture), **sizes), architecture["sources"][0])
        unet.load(checkpoint.state)
        return unet.requires_grad_(False).to(device).eval()

    if checkpoint.klass is not None and checkpoint.klass != kind:
        raise ValueError(f"it holds a network of class {checkpoint.klass}, and {kind} is needed")
    own = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    segment = use.chunking.segment if isinstance(use.chunking, OverlapAdd) else None
    return demucs.build(kind, checkpoint.kwargs or own, segment, checkpoint.state).to(device)


def _spectrogram(architecture: dict) -> SpectrogramConfig:
    return SpectrogramConfig(**{key: architecture[key] for key in TRANSFORM})
