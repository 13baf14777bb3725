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
from kmdx.weights import Weight

TRANSFORM = ("n_fft", "hop", "bins", "frames")
UNET = ("layers", "convolutions", "growth", "norm_groups", "bottleneck")


def load_network(
    weight: Weight, device: torch.device, segment: float | None = None, folder: Path | None = None
) -> Network:
    """Build the network of a weight and load it, ready to run.

    Parameters
    ----------
    weight : Weight
        What to load; its ``architecture`` says how to build it.
    device : torch.device
        Where it will run.
    segment : float, optional
        Seconds that a Demucs network is run at, in place of its own.
    folder : Path, optional
        Where weight files lie; the models folder if not given.

    Raises
    ------
    WeightsError
        If the file is missing, damaged, unsafe or holds another network's weights.
    """
    path = weights.find(weight, folder).path
    try:
        network = _build(weight, path, device, segment)
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(f"{path} cannot be used as {weight.name}: {error}") from error
    return network


def _build(weight: Weight, path: Path, device: torch.device, segment: float | None) -> Network:
    architecture = dict(weight.architecture)
    kind = architecture["type"]
    if kind == "onnx":
        network = OnnxNetwork(path, _spectrogram(architecture), architecture["sources"][0], device)
        return network.to(device).eval()

    checkpoint = weights.load(path)
    if checkpoint.state is None:
        raise ValueError(f"it is an ONNX graph, and {kind} weights are needed")
    if kind == "tfc_tdf":
        sizes = {key: architecture[key] for key in UNET if key in architecture}
        with torch.device("meta"):
            unet = TfcTdf(TfcTdfConfig(_spectrogram(architecture), **sizes), architecture["sources"][0])
        unet.spectrogram = type(unet.spectrogram)(unet.config.spectrogram)
        unet.load(checkpoint.state)
        return unet.requires_grad_(False).to(device).eval()

    if checkpoint.klass is not None and checkpoint.klass != kind:
        raise ValueError(f"it holds a network of class {checkpoint.klass}, and {kind} is needed")
    own = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    return demucs.build(kind, checkpoint.kwargs or own, segment, checkpoint.state).to(device)


def _spectrogram(architecture: dict) -> SpectrogramConfig:
    return SpectrogramConfig(**{key: architecture[key] for key in TRANSFORM})
