"""Runs a plan: each network on the signal it hears, residuals and blends between them.

Signals are float32 ``(2, samples)`` on one device. A node runs when something wanted needs it, and
its signals are let go after the last node that needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from kmdx import chunking
from kmdx.networks.network import Network
from kmdx.plan import MIXTURE, Hear, NetworkUse, Normalize, OverlapAdd, Plan, Sum

Progress = Callable[[float, float], None]
"""Called with seconds of audio done and seconds in all."""


@torch.inference_mode()
def run(
    plan: Plan,
    networks: Mapping[str, Network],
    mixture: Tensor,
    wanted: Collection[str],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compute the wanted signals of a plan.

    Parameters
    ----------
    plan : Plan
    networks : mapping of str to Network
        At least those that ``wanted`` need, on the device of ``mixture``.
    mixture : Tensor
        Float32 ``(2, samples)`` at the plan's rate.
    wanted : collection of str
        Stems, signals, or ``NODE.SOURCE``.
    progress : callable, optional
        Called after every window with ``(seconds of audio done, seconds in all)``; each network's
        share is its share of the arithmetic.

    Returns
    -------
    dict of str to Tensor
        ``(2, samples)`` each. Silence gives silence.

    Raises
    ------
    PlanError
        If the plan has no such signal.
    """
    plan.check_wanted(wanted)
    if not mixture.any():
        return {name: torch.zeros_like(mixture) for name in wanted}

    order = plan.order(wanted)
    used = plan.sources_used(wanted)
    pending = Counter(reference for name in order for reference in plan.nodes[name].inputs)
    pending.update(wanted)
    meter = _Meter(plan, order, mixture.shape[-1], progress)
    signals: dict[str, Tensor] = {MIXTURE: mixture}
    levels: dict[str, tuple[Tensor, Tensor]] = {}

    for name in order:
        match plan.nodes[name]:
            case Hear(network, signal):
                narrowed = networks[network].narrow(used[name])
                estimates = _hear(narrowed, plan.networks[network], signals[signal], meter(network))
                signals.update({f"{name}.{source}": estimates[i] for i, source in enumerate(used[name])})
            case Normalize(signal):
                mean, std = levels[name] = _level(signals[signal])
                signals[name] = (signals[signal] - mean) / std
            case Sum(terms, denormalize):
                total = sum(weight * signals[reference] for reference, weight in terms.items())
                assert isinstance(total, Tensor)
                if denormalize is not None:
                    mean, std = levels[denormalize]
                    total = total * std + mean
                signals[name] = total
        pending.subtract(plan.nodes[name].inputs)
        for reference in plan.nodes[name].inputs:
            if not pending[reference]:
                signals.pop(reference, None)
    return {name: signals[name] for name in wanted}


def _hear(network: Network, use: NetworkUse, signal: Tensor, advance: Callable[[], None]) -> Tensor:
    """Send a signal through a network in the plan's way; ``(sources, 2, samples)``."""
    how = use.chunking
    if isinstance(how, OverlapAdd):
        return chunking.overlap_add(network, signal, how.length, how.stride, advance)
    return chunking.trim_and_join(network, signal, how.chunk, how.trim, advance)


def _level(signal: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the mono sum.

    Where the mono sum is constant, as when the two channels cancel, the deviation is that of both
    channels; a constant signal keeps its level.
    """
    mono = signal.mean(0)
    std = next((std for std in (mono.std(), signal.std()) if std > 0), torch.ones_like(mono[0]))
    return mono.mean(), std


class _Meter:
    """Turns finished windows into seconds of audio, each network weighing what its arithmetic weighs."""

    def __init__(self, plan: Plan, order: Collection[str], samples: int, progress: Progress | None) -> None:
        self.plan = plan
        self.samples = samples
        self.progress = progress
        self.seconds = samples / plan.sample_rate
        self.done = 0.0
        hears = [node.network for node in map(plan.nodes.__getitem__, order) if isinstance(node, Hear)]
        known = [cost for name in hears if (cost := plan.networks[name].gflops) is not None]
        self.usual = sum(known) / len(known) if known else 1.0
        self.total = sum(self.cost(name) for name in hears)

    def cost(self, network: str) -> float:
        """Arithmetic of a network in any one unit; the others' mean where it is not stated."""
        gflops = self.plan.networks[network].gflops
        return self.usual if gflops is None else gflops

    def __call__(self, network: str) -> Callable[[], None]:
        """Return what to call after each window of a network's run."""
        windows = self.plan.networks[network].chunking.windows(self.samples)
        share = self.cost(network) / self.total / windows

        def advance() -> None:
            self.done += share
            if self.progress is not None:
                self.progress(min(self.done, 1.0) * self.seconds, self.seconds)

        return advance
