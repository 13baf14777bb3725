"""Run a plan as it was published: each network on one window at a time, in float32, without shortcuts.

For any plan, this does what the published submission did: Demucs' ``apply_model``, MDX-Net chunk by chunk,
all four sources of every network, all nodes even if unused, each window moved to the GPU and back, and a new
ONNX Runtime session for each song. It shares only the plan and the unaccelerated networks with the engine, so
that the engine's results and times can be compared with it.

On the CPU, it runs in a separate process (:class:`Published`). Otherwise, memory kept by the engine would
make it faster than it is (HDemucs 21.9 s per window instead of 28.3 s, on two cores of an AMD EPYC).
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from demucs.apply import apply_model
from numpy.typing import NDArray
from torch import Tensor, nn

from kmdx import devices, plan_file, weights
from kmdx.benchmark import timed
from kmdx.build import load_network
from kmdx.challenge import MIXTURE
from kmdx.networks.demucs import DemucsNetwork
from kmdx.networks.network import Network
from kmdx.networks.onnx import OnnxNetwork
from kmdx.networks.tfc_tdf import spectrogram_of
from kmdx.nodes import Estimate, Normalize, Sum
from kmdx.plan import NetworkUse, Plan
from kmdx.precisions import exact
from kmdx.windows import OverlapAdd, TrimAndJoin

Result = TypeVar("Result")
Samples = NDArray[np.float32]


@torch.no_grad()
def run(
    plan: Plan,
    networks: Mapping[str, Network],
    mixture: Tensor,
    device: torch.device,
    folder: Path | None = None,
) -> dict[str, Tensor]:
    """Compute all sums of a plan, including its stems.

    Parameters
    ----------
    networks : mapping of str to Network
        All networks of the plan's nodes from :func:`kmdx.build.load_network`, on ``device``.
    mixture : Tensor
        Float32 ``(2, samples)`` at the plan's rate. Silence gives NaN, as in the published submission.
    device : torch.device
        The device of the networks; signals stay on the CPU.
    folder : Path, optional
        Folder of the weight files, for ONNX sessions; by default the models folder.

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
                case Estimate(network, signal):
                    use, plain = plan.networks[network], networks[network]
                    if isinstance(plain, OnnxNetwork):
                        plain = _session_for_this_song(plain, use, device, folder)
                    for source, estimate in zip(
                        plain.sources, _estimate(plain, use, plan, signals[signal], device), strict=True
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
    return {name: signals[name] for name, node in plan.nodes.items() if node.terms}


def _estimate(network: Network, use: NetworkUse, plan: Plan, signal: Tensor, device: torch.device) -> Tensor:
    """Estimate all sources of a network: ``(2, samples)`` in, ``(sources, 2, samples)`` out."""
    how = use.chunking
    if isinstance(how, TrimAndJoin):
        return _trim_and_join(network, signal, how.chunk, how.trim, device)
    model: Any = (
        network.model
        if isinstance(network, DemucsNetwork)
        else _AsDemucs(network, how.length, plan.sample_rate)
    )
    assert isinstance(how, OverlapAdd)
    return apply_model(model, signal[None], shifts=0, split=True, overlap=how.overlap, device=device)[0]


def _trim_and_join(network: Network, signal: Tensor, chunk: int, trim: int, device: torch.device) -> Tensor:
    """Run chunks of the zero-padded signal, drop both ends of each, and join them."""
    samples = signal.shape[-1]
    keep = chunk - 2 * trim
    padding = keep - samples % keep
    padded = torch.cat([torch.zeros(2, trim), signal, torch.zeros(2, padding + trim)], dim=1)
    pieces = []
    for start in range(0, samples + padding, keep):
        batch = padded[None, :, start : start + chunk].to(device)
        estimate = network(batch)[0].cpu()
        pieces.append(estimate[..., trim : chunk - trim])
    return torch.cat(pieces, dim=-1)[..., :samples]


class _AsDemucs(nn.Module):
    """A network with the interface that ``apply_model`` needs."""

    def __init__(self, network: Network, length: int, rate: int) -> None:
        super().__init__()
        self.network = network
        self.sources = list(network.sources)
        self.samplerate = rate
        self.segment = Fraction(length, rate)
        self.length = network.length

    def valid_length(self, length: int) -> int:
        """The length of the network's input for a segment of ``length`` samples."""
        return self.length or length

    def forward(self, batch: Tensor) -> Tensor:
        """Estimate the sources: ``(B, 2, T)`` in, ``(B, sources, 2, T)`` out."""
        return self.network(batch)


def _session_for_this_song(
    network: OnnxNetwork, use: NetworkUse, device: torch.device, folder: Path | None
) -> OnnxNetwork:
    """The same graph in a new session."""
    path = weights.find(use.weight, folder).path
    again = OnnxNetwork(path, spectrogram_of(use.weight.architecture), network.sources[0], device)
    return again.to(device).eval()


class Published:
    """An ensemble as it was published, with the weight files of a folder."""

    def __init__(self, ensemble: str | Path, device: torch.device, folder: Path | None = None) -> None:
        self.plan = plan_file.load(str(ensemble))
        self.setting = (str(ensemble), str(device), folder)
        self._pool = None
        if device.type == "cpu":
            threads = (torch.get_num_threads(),)
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads)

    def __enter__(self) -> Published:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def song(self, mixture: Samples) -> tuple[float, dict[str, Samples]]:
        """Separate a song ``(2, samples)``; return the seconds, and all sums of the plan."""
        return self._call(_song, mixture)

    def window(self, name: str, sources: Sequence[str], window: Samples) -> tuple[float, Samples]:
        """Run a network on one window ``(1, 2, T)``; return the seconds, and its estimates of ``sources``."""
        return self._call(_window, name, list(sources), window)

    def _call(self, function: Callable[..., Result], *arguments: object) -> Result:
        if self._pool is None:
            return function(*self.setting, *arguments)
        return self._pool.submit(function, *self.setting, *arguments).result()


def _song(
    ensemble: str, device: str, folder: Path | None, mixture: Samples
) -> tuple[float, dict[str, Samples]]:
    plan, where = plan_file.load(ensemble), torch.device(device)
    names = plan.networks_used(plan.nodes)
    networks = {name: load_network(plan.networks[name], plan.sample_rate, where, folder) for name in names}
    signal = torch.from_numpy(mixture)
    if where.type == "cuda":  # a first run loads and chooses kernels
        run(plan, networks, signal, where, folder)
    seconds, signals = timed(lambda: run(plan, networks, signal, where, folder), where)
    networks.clear()
    free(where)
    return seconds, {name: found.numpy() for name, found in signals.items()}


@torch.no_grad()
def _window(
    ensemble: str, device: str, folder: Path | None, name: str, sources: list[str], window: Samples
) -> tuple[float, Samples]:
    where = torch.device(device)
    network = _network(ensemble, device, folder, name)
    batch = torch.from_numpy(window).to(where)
    with exact():
        seconds, estimate = timed(lambda: network(batch), where)
    indices = [network.sources.index(source) for source in sources]
    return seconds, estimate[:, indices].cpu().numpy()


@functools.lru_cache(maxsize=1)
def _network(ensemble: str, device: str, folder: Path | None, name: str) -> Network:
    plan = plan_file.load(ensemble)
    return load_network(plan.networks[name], plan.sample_rate, torch.device(device), folder)


def free(device: torch.device) -> None:
    """Free unused memory."""
    gc.collect()
    devices.empty_cache(device)
