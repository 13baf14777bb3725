"""Count the arithmetic of the ensemble's networks, in GFLOP per second of signal.

The numbers are in ``kmdx/registry.yaml`` as ``gflops``. A multiplication and an addition are two operations.
Convolutions, matrix products, attention and recurrent layers are counted; elementwise operations and Fourier
transforms are not. Run ``python benchmarks/count_arithmetic.py``; it needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from demucs.hdemucs import HDemucs
from demucs.htdemucs import HTDemucs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kmdx import terminal, weights
from kmdx.challenge import RATE
from kmdx.networks import types
from kmdx.networks.mdx23c import Mdx23c, Mdx23cConfig
from kmdx.networks.roformer import Roformer, RoformerConfig
from kmdx.networks.scnet import Scnet, ScnetConfig
from kmdx.networks.spectrogram import SpectrogramConfig
from kmdx.networks.tfc_tdf import TfcTdf, TfcTdfConfig


def lstm_flops(x: torch.Size, w_input: torch.Size, w_hidden: torch.Size, *_: object, **__: object) -> int:
    """Operations of one direction of an LSTM layer; ``x`` is (steps, batch, inputs)."""
    steps, batch, inputs = x
    gates, hidden = w_hidden
    return 2 * steps * batch * gates * (inputs + hidden)


def count(function: Callable[[torch.Tensor], object], batch: torch.Tensor) -> float:
    """GFLOP of one forward pass; gradients are enabled, because fused implementations are not counted."""
    mapping = {torch.ops.aten.mkldnn_rnn_layer: lstm_flops}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function(batch)
    return counter.get_total_flops() / 1e9


def roformer_gflops(architecture: dict, seconds: float) -> float:
    """Count a RoFormer on one window; the cost of attention over time grows with its length."""
    config = RoformerConfig.of({**types.TYPES[architecture["type"]].defaults, **architecture})
    frames = int(seconds * architecture.get("sample_rate", RATE)) // config.hop + 1
    with torch.device("meta"):
        network = Roformer(config, architecture["sources"]).eval()
        spectrum = torch.zeros(1, frames, config.bins, config.channels, dtype=torch.complex64)

    def masks(spectrum: torch.Tensor) -> list[torch.Tensor]:
        features = network.features(spectrum)
        return [estimator(features) for estimator in network.mask_estimators]

    return count(masks, spectrum) / seconds


def scnet_gflops(architecture: dict) -> float:
    """Count an SCNet on about ten seconds; its cost is proportional to the length."""
    config = ScnetConfig.of({**types.TYPES["scnet"].defaults, **architecture})
    samples = config.extended(10 * RATE)
    with torch.device("meta"):
        network = Scnet(config, architecture["sources"]).eval()
        spectrum = torch.zeros(1, config.dims[0], config.nfft // 2 + 1, samples // config.hop_size + 1)
    return count(network.unet, spectrum) / (samples / RATE)


def mdx23c_gflops(architecture: dict) -> float:
    """Count an MDX23C on about ten seconds; its cost is proportional to the number of frames."""
    config = Mdx23cConfig.of({**types.TYPES["mdx23c"].defaults, **architecture})
    frames = config.extended(10 * RATE) // config.hop_length + 1
    with torch.device("meta"):
        network = Mdx23c(config, architecture["sources"]).eval()
        spectrum = torch.zeros(1, config.inputs, frames, config.dim_f // config.num_subbands)
    return count(network.unet, spectrum) / (frames * config.hop_length / RATE)


def demucs_gflops(architecture: dict, seconds: float) -> float:
    """Count a Demucs network on one segment."""
    options = {key: value for key, value in architecture.items() if key not in ("type", "gflops")}
    network = {"htdemucs": HTDemucs, "hdemucs": HDemucs}[architecture["type"]](**options)
    return count(network.eval(), torch.randn(1, 2, int(seconds * RATE))) / seconds


def unet_gflops(architecture: dict, **sizes: Any) -> float:
    """Count a TFC-TDF U-Net on one chunk."""
    transform = SpectrogramConfig(**{key: architecture[key] for key in ("n_fft", "hop", "bins", "frames")})
    with torch.device("meta"):
        network = TfcTdf(TfcTdfConfig(transform, **sizes), "vocals").eval()
        spectrum = torch.zeros(1, 4, transform.bins, transform.frames)
    return count(network.unet, spectrum) / (transform.chunk / RATE)


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
        elif "roformer" in architecture["type"]:
            gflops = roformer_gflops(architecture, architecture.get("segment", 8.0))
        elif architecture["type"] == "mdx23c":
            gflops = mdx23c_gflops(architecture)
        elif architecture["type"].startswith("scnet"):
            gflops = scnet_gflops(architecture)
        else:
            key = f"{architecture['type']} {architecture.get('cac')} {architecture.get('bottom_channels')}"
            if key not in counted:
                # HDemucs accepts any length, and its cost is proportional to it, so ten seconds are enough.
                seconds = architecture["segment"] if architecture["type"] == "htdemucs" else 10.0
                counted[key] = demucs_gflops(architecture, seconds)
            gflops = counted[key]
        print(f"{name:22s} {gflops:7.2f} GFLOP per second of signal", flush=True)


if __name__ == "__main__":
    terminal.run(main)
