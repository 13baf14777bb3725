"""Count the arithmetic of the ensemble's networks, in GFLOP per second of signal.

The numbers are in ``kmdx/registry.yaml`` as ``gflops``. A multiplication and an addition are two operations.
Convolutions, matrix products, attention and recurrent layers are counted; elementwise operations and Fourier
transforms are not. Run ``python benchmarks/count_arithmetic.py``; it needs no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kmdx import terminal, weights
from kmdx.challenge import RATE
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig


def lstm_flops(x: torch.Size, w_input: torch.Size, w_hidden: torch.Size, *_: object, **__: object) -> int:
    """Operations of one direction of an LSTM layer; ``x`` is (steps, batch, inputs)."""
    steps, batch, inputs = x
    gates, hidden = w_hidden
    return 2 * steps * batch * gates * (inputs + hidden)


def count(module: torch.nn.Module, batch: torch.Tensor) -> float:
    """GFLOP of one forward pass; gradients are enabled, because fused implementations are not counted."""
    mapping = {torch.ops.aten.mkldnn_rnn_layer: lstm_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        module.eval()(batch)
    return counter.get_total_flops() / 1e9


class Unet(torch.nn.Module):
    """The network without the transforms around it."""

    def __init__(self, network: TfcTdf) -> None:
        super().__init__()
        self.network = network

    def forward(self, spectrum: torch.Tensor) -> torch.Tensor:
        """Map a mixture's spectrogram to the source's."""
        return self.network.unet(spectrum)


def demucs_gflops(architecture: dict, seconds: float) -> float:
    """Count a Demucs network on one segment."""
    options = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    network = {"htdemucs": HTDemucs, "hdemucs": HDemucs}[architecture["type"]](**options)
    return count(network, torch.randn(1, 2, int(seconds * RATE))) / seconds


def unet_gflops(architecture: dict, **sizes: Any) -> float:
    """Count a TFC-TDF U-Net on one chunk."""
    transform = SpectrogramConfig(**{key: architecture[key] for key in ("n_fft", "hop", "bins", "frames")})
    with torch.device("meta"):
        network = TfcTdf(TfcTdfConfig(transform, **sizes), "vocals")
        spectrum = torch.zeros(1, 4, transform.bins, transform.frames)
    return count(Unet(network), spectrum) / (transform.chunk / RATE)


def main() -> None:
    """Print one line per network of the registry."""
    counted: dict[str, float] = {}
    for name, weight in weights.published().items():
        architecture = dict(weight.architecture)
        if architecture["type"] == "onnx":
            sizes: dict = {"layers": 11, "convolutions": 3, "growth": 48, "norm_groups": None}
            gflops = unet_gflops(architecture, **sizes)
        elif architecture["type"] == "tfc_tdf":
            sizes = {key: architecture[key] for key in ("layers", "convolutions", "growth", "norm_groups")}
            gflops = unet_gflops(architecture, **sizes)
        else:
            key = f"{architecture['type']} {architecture.get('cac')}"
            if key not in counted:
                # HDemucs accepts any length, and its cost is proportional to it, so ten seconds are enough.
                seconds = architecture["segment"] if architecture["type"] == "htdemucs" else 10.0
                counted[key] = demucs_gflops(architecture, seconds)
            gflops = counted[key]
        print(f"{name:22s} {gflops:7.2f} GFLOP per second of signal", flush=True)


if __name__ == "__main__":
    terminal.run(main)
