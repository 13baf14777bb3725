"""Runs a plan: each network on its input, residuals and blends between them.

Signals are :class:`~kmdx.signals.Signal`, ``(2, samples)``: those of most songs are on the device, those of
long songs are worked on block by block. A node runs when something wanted needs it, and its signals are freed
after the last node that needs them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kmdx.challenge import MIXTURE
from kmdx.device import SIGNALS_SHARE, NetworkCache
from kmdx.errors import AudioError
from kmdx.plan import Plan
from kmdx.signals import Level, Signal, combine

Progress = Callable[[float, float], None]
"""Called with seconds of audio done and seconds in all."""

ALIVE = 16  # signals at once, as in leaderboard C


class NotFinite(ArithmeticError):
    """NaN or infinity in an estimate of the network of that name."""

    def __init__(self, network: str) -> None:
        super().__init__(f"{network} gave NaN or infinity")
        self.network = network


@torch.inference_mode()
def run(
    plan: Plan,
    cache: NetworkCache,
    mixture: Signal,
    wanted: Collection[str],
    progress: Progress | None = None,
    known: Mapping[str, Signal] | None = None,
) -> dict[str, Signal]:
    """Compute the wanted signals of a plan.

    Parameters
    ----------
    plan : Plan
    cache : NetworkCache
        At least the networks that ``wanted`` need.
    mixture : Signal
        ``(2, samples)`` at the plan's rate, on the CPU.
    wanted : collection of str
        Stems, signals, or ``NODE.SOURCE``.
    progress : callable, optional
        Called after every window with ``(seconds of audio done, seconds in all)``; each network's
        share is its share of the arithmetic.
    known : mapping of str to Signal, optional
        Signals that an earlier run of the same song gave, ``(2, samples)`` on the CPU, by their references:
        sums or ``NODE.SOURCE``. What only they need does not run again.

    Returns
    -------
    dict of str to Signal
        ``(2, samples)`` each, on the device, or on the CPU where they are long. Silence gives silence.

    Raises
    ------
    PlanError
        If the plan has no such signal, or a known one is the mixture or a normalized signal.
    NotFinite
        If a network gives NaN or infinity, in whatever it computes.
    AudioError
        If a sum or normalized signal is not finite although all estimates are.
    """
    known = known or {}
    plan.check_wanted(wanted)
    plan.check_known(known)
    limit = None if cache.budget is None else SIGNALS_SHARE * cache.budget / ALIVE
    placed = mixture.to(cache.device, limit)
    if placed.is_silent():
        return {name: placed.new_zeros() for name in wanted}

    order = plan.order(wanted, known)
    pending = Counter(reference for name in order for reference in plan.nodes[name].inputs)
    pending.update(wanted)
    meter = _Meter(plan, order, mixture.length, progress)
    song = SongSignals(plan, cache, plan.sources_used(wanted, known), meter)
    song.signals[MIXTURE] = placed
    del placed  # so that the song alone decides when it is freed
    needed = {name: signal for name, signal in known.items() if pending[name]}
    song.signals.update({name: signal.to(cache.device, limit) for name, signal in needed.items()})

    for name in order:
        node = plan.nodes[name]
        made = node.run(name, song)
        if not all(signal.is_finite() for signal in made.values()):
            if node.network is not None:
                raise NotFinite(node.network)
            raise AudioError(
                f"{name} of {plan.name} is not finite: the song is too loud, or the plan's weights are too "
                f"large; the song peaks at {mixture.peak():.3g}, expected about 1"
            )
        song.signals.update(made)
        pending.subtract(node.inputs)
        for reference in node.inputs:
            if not pending[reference]:
                song.signals.pop(reference, None)
    return {name: song.signals[name] for name in wanted}


@dataclass
class SongSignals:
    """The signals of a song while a plan runs, and what nodes compute them with.

    Attributes
    ----------
    signals : dict of str to Signal
        ``(2, samples)`` by reference; those that no later node needs are gone.
    levels : dict of str to Level
        Of normalized signals, by node.
    """

    plan: Plan
    cache: NetworkCache
    used: Mapping[str, Sequence[str]]
    meter: _Meter
    signals: dict[str, Signal] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)

    def estimate(self, name: str, network: str, reference: str) -> dict[str, Signal]:
        """A network's estimates of the sources that something uses, by reference."""
        window = self.plan.networks[network].chunking
        runner = self.cache.runner(network, self.used[name], window.length)
        signal = self.signals[reference]
        estimates = {f"{name}.{source}": signal.new_empty() for source in self.used[name]}
        window.run(runner, signal, [*estimates.values()], self.meter(network))
        return estimates

    def measure(self, name: str, reference: str) -> Level:
        """The level of a signal, kept under the node's name."""
        self.levels[name] = self.signals[reference].level()
        return self.levels[name]

    def make(self, function: Callable[..., None], references: Sequence[str]) -> Signal:
        """See :func:`kmdx.signals.combine`."""
        return combine(function, [self.signals[reference] for reference in references])


class _Meter:
    """Turns finished windows into seconds of audio, each network weighing what its arithmetic weighs."""

    def __init__(self, plan: Plan, order: Collection[str], samples: int, progress: Progress | None) -> None:
        self.plan = plan
        self.samples = samples
        self.progress = progress
        self.seconds = samples / plan.sample_rate
        self.done = 0.0
        runs = [name for node in order if (name := plan.nodes[node].network) is not None]
        known = [cost for name in runs if (cost := plan.networks[name].gflops) is not None]
        self.usual = sum(known) / len(known) if known else 1.0
        self.total = sum(map(self.cost, runs))

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
