"""Runs the baseline, on the CPU in a process of its own.

The engine keeps large blocks of memory while it works, and what it leaves behind serves whatever runs in the
same process afterwards: the baseline would seem faster than it is (HDemucs 21.9 s a window instead of 28.3 s,
two cores of an AMD EPYC).
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from kmdx import memory, plan_file
from kmdx.benchmark import baseline, machine
from kmdx.loading import load_network
from kmdx.networks.network import Network
from kmdx.plan import Hear
from kmdx.precision import exact

Result = TypeVar("Result")
Samples = NDArray[np.float32]


class Plain:
    """An ensemble in the plainest form.

    Parameters
    ----------
    ensemble : str or Path
    device : torch.device
    folder : Path, optional
        Where weight files lie.

    Attributes
    ----------
    plan : Plan
    """

    def __init__(self, ensemble: str | Path, device: torch.device, folder: Path | None = None) -> None:
        self.plan = plan_file.load(str(ensemble))
        self.setting = (str(ensemble), str(device), folder)
        self._pool = None
        if device.type == "cpu":
            threads = (torch.get_num_threads(),)
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, torch.set_num_threads, threads)

    def __enter__(self) -> Plain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def song(self, mixture: Samples) -> tuple[float, dict[str, Samples]]:
        """Seconds for a song ``(2, samples)``, and every sum of the plan."""
        return self._call(_song, mixture)

    def window(self, name: str, sources: Sequence[str], window: Samples) -> tuple[float, Samples]:
        """Seconds for one window ``(1, 2, T)`` in a network, all of its sources, and its estimate of some."""
        return self._call(_window, name, list(sources), window)

    def _call(self, function: Callable[..., Result], *arguments: object) -> Result:
        if self._pool is None:
            return function(*self.setting, *arguments)
        return self._pool.submit(function, *self.setting, *arguments).result()


def _song(
    ensemble: str, device: str, folder: Path | None, mixture: Samples
) -> tuple[float, dict[str, Samples]]:
    plan, where = plan_file.load(ensemble), torch.device(device)
    names = {node.network for node in plan.nodes.values() if isinstance(node, Hear)}
    networks = {name: load_network(plan.networks[name], plan.sample_rate, where, folder) for name in names}
    signal = torch.from_numpy(mixture)
    if where.type == "cuda":  # its kernels are loaded, and chosen, when they first run
        baseline.run(plan, networks, signal, where, folder)
    seconds, signals = timed(lambda: baseline.run(plan, networks, signal, where, folder), where)
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


def timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Do it; returns the seconds it took, and its result."""
    machine.synchronize(device)
    began = time.perf_counter()
    result = work()
    machine.synchronize(device)
    return time.perf_counter() - began, result


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer needed."""
    gc.collect()
    memory.empty_cache(device)
