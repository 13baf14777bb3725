"""A plan in the plainest form: every network on one window at a time, in float32, nothing left out.

It is what the published submission did, for any plan: Demucs' own ``apply_model``, MDX-Net chunk by chunk,
all four sources of every network computed, nodes that nobody asks for too, each window moved to the GPU
and back, an ONNX Runtime session built for each song. The engine's result and its time are held against
it; the two share nothing but the plan and the networks as they are before they are made fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from demucs.apply import apply_model
from torch import Tensor, nn

from kmdx import weights
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.plan import MIXTURE, Hear, NetworkUse, Normalize, Plan, Sum, TrimAndJoin
from kmdx.precision import exact


@torch.no_grad()
def run(
    plan: Plan,
    networks: Mapping[str, Network],
    mixture: Tensor,
    device: torch.device,
    folder: Path | None = None,
) -> dict[str, Tensor]:
    """Compute every sum of a plan, its stems among them.

    Parameters
    ----------
    plan : Plan
    networks : mapping of str to Network
        Those of :func:`kmdx.loading.load_network`, on ``device``; all that the plan's nodes name.
    mixture : Tensor
        Float32 ``(2, samples)`` at the plan's rate. Silence gives NaN, as it did.
    device : torch.device
        Where networks run; signals stay on the CPU.
    folder : Path, optional
        Where weight files lie, from which ONNX sessions are built; the models folder if not given.

    Returns
    -------
    dict of str to Tensor
        ``(2, samples)`` each, on the CPU.

    Source: the published submission's ``separate_music_file``.
    """
    signals = {MIXTURE: mixture.float().cpu()}
    levels: dict[str, tuple[Tensor, Tensor]] = {}
    with exact():
        for name in plan.order(plan.nodes):
            match plan.nodes[name]:
                case Hear(network, signal):
                    use, plain = plan.networks[network], networks[network]
                    if isinstance(plain, OnnxNetwork):
                        plain = _session_for_this_song(plain, use, device, folder)
                    for source, estimate in zip(
                        plain.sources, _hear(plain, use, plan, signals[signal], device), strict=True
                    ):
                        signals[f"{name}.{source}"] = estimate
                case Normalize(signal):
                    mono = signals[signal].mean(0)
                    levels[name] = mono.mean(), mono.std()
                    signals[name] = (signals[signal] - levels[name][0]) / levels[name][1]
                case Sum(terms, denormalize):
                    total = torch.zeros_like(signals[MIXTURE])
                    for reference, weight in terms.items():
                        total = total + weight * signals[reference]
                    if denormalize is not None:
                        total = total * levels[denormalize][1] + levels[denormalize][0]
                    signals[name] = total
    return {name: signals[name] for name, node in plan.nodes.items() if isinstance(node, Sum)}


def _hear(network: Network, use: NetworkUse, plan: Plan, signal: Tensor, device: torch.device) -> Tensor:
    """All sources of a network for ``(2, samples)``: ``(sources, 2, samples)``."""
    how = use.chunking
    if isinstance(how, TrimAndJoin):
        return _trim_and_join(network, signal, how.chunk, how.trim, device)
    model: Any = (
        network.model
        if isinstance(network, DemucsNetwork)
        else _AsDemucs(network, how.length, plan.sample_rate)
    )
    return apply_model(model, signal[None], shifts=0, split=True, overlap=how.overlap, device=device)[0]


def _trim_and_join(network: Network, signal: Tensor, chunk: int, trim: int, device: torch.device) -> Tensor:
    """Chunks of the zero-padded signal, both ends of each dropped, what is left joined."""
    samples = signal.shape[-1]
    keep = chunk - 2 * trim
    padding = keep - samples % keep
    padded = torch.cat([torch.zeros(2, trim), signal, torch.zeros(2, padding + trim)], dim=1)
    pieces = []
    for start in range(0, samples + padding, keep):
        heard = padded[None, :, start : start + chunk].to(device)
        estimate = network(heard)[0].cpu()
        pieces.append(estimate[..., trim : chunk - trim])
    return torch.cat(pieces, dim=-1)[..., :samples]


class _AsDemucs(nn.Module):
    """Another network with what ``apply_model`` asks of one of Demucs'."""

    def __init__(self, network: Network, length: int, rate: int) -> None:
        super().__init__()
        self.network = network
        self.sources = list(network.sources)
        self.samplerate = rate
        self.segment = Fraction(length, rate)
        self.length = network.length

    def valid_length(self, length: int) -> int:
        """The length at which a segment of so many samples is heard."""
        return self.length or length

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: ``(B, 2, T)`` in, ``(B, sources, 2, T)`` out."""
        return self.network(batch)


def _session_for_this_song(
    network: OnnxNetwork, use: NetworkUse, device: torch.device, folder: Path | None
) -> OnnxNetwork:
    """The same graph, opened anew."""
    path = weights.find(use.weight, folder).path
    again = OnnxNetwork(path, network.spectrogram.config, network.sources[0], device)
    return again.to(device).eval()
