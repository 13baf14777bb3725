"""Run a plan: networks, and the residuals and blends between them.

Signals are :class:`~kmdx.signals.Signal`, ``(2, samples)``. Most songs are kept on the device; long songs are
processed block by block. A node runs only if a wanted signal needs it, and its signals are freed after the
last node that uses them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kmdx.challenge import MIXTURE
from kmdx.devices import SIGNALS_SHARE, NetworkCache
from kmdx.errors import AudioError
from kmdx.passes import variants
from kmdx.plan import Plan
from kmdx.signals import Level, Signal, combine

Progress = Callable[[float, float], None]
"""Called with the seconds of audio done, and in total."""

ALIVE = 16  # signals in memory at once, as in leaderboard C


class NotFinite(ArithmeticError):
    """A network's estimate contains NaN or infinity."""

    def __init__(self, network: str) -> None:
        super().__init__(f"{network} returned NaN or infinity")
        self.network = network


@torch.inference_mode()
def run(
    plan: Plan,
    cache: NetworkCache,
    mixture: Signal,
    wanted: Collection[str],
    progress: Progress | None = None,
    known: Mapping[str, Signal] | None = None,
    on_made: Callable[[str, Signal], None] = lambda name, signal: None,
) -> dict[str, Signal]:
    """Compute the wanted signals of a plan.

    Parameters
    ----------
    cache : NetworkCache
        Contains at least the networks that the wanted signals need.
    mixture : Signal
        ``(2, samples)`` at the plan's rate, on the CPU.
    wanted : collection of str
        Stems, signals, or ``NODE.SOURCE``.
    progress : callable, optional
        Called after every window with ``(seconds of audio done, seconds in total)``. Each network's share
        of the seconds is its share of the arithmetic.
    known : mapping of str to Signal, optional
        Signals from an earlier run of the same song, ``(2, samples)`` on the CPU. Keys are names of sums, or
        ``NODE.SOURCE``. Nodes that only these signals need do not run again.
    on_made : callable, optional
        Called with the name and each wanted signal that a node makes, before later nodes run.

    Returns
    -------
    dict of str to Signal
        ``(2, samples)`` each, on the device, or on the CPU if the song is long. Silence gives silence.

    Raises
    ------
    PlanError
        If the plan has no such signal, or a known one is the mixture or a normalized signal.
    NotFinite
        If an estimate of a network contains NaN or infinity.
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
    uses_left = Counter(reference for name in order for reference in plan.nodes[name].inputs)
    uses_left.update(wanted)
    meter = _Meter(plan, order, mixture.length, progress)
    song = SongSignals(plan, cache, plan.sources_used(wanted, known), uses_left, meter)
    song.signals[MIXTURE] = placed
    del placed  # so that `song` holds the only reference, and can free it
    needed = {name: signal for name, signal in known.items() if uses_left[name]}
    song.signals.update({name: signal.to(cache.device, limit) for name, signal in needed.items()})
    for name in order:
        for made in _run_node(name, song, mixture):
            if made in wanted:
                on_made(made, song.signals[made])
    return {name: song.signals[name] for name in wanted}


def _run_node(name: str, song: SongSignals, mixture: Signal) -> Collection[str]:
    """Add the signals that a node makes, check that they are finite, and free those of no further use.

    Returns the names of the new signals.
    """
    node = song.plan.nodes[name]
    made = node.run(name, song)
    if not all(signal.is_finite() for signal in made.values()):
        if node.network is not None:
            raise NotFinite(node.network)
        raise AudioError(
            f"{name} of {song.plan.name} is not finite: the song is too loud, or the plan's weights are too "
            f"large; the song peaks at {mixture.peak():.3g}, expected about 1"
        )
    song.signals.update(made)
    song.uses_left.subtract(node.inputs)
    for reference in node.inputs:
        if not song.uses_left[reference]:
            song.signals.pop(reference, None)
    return made.keys()


@dataclass
class SongSignals:
    """The signals of a song while a plan runs, and the operations that nodes use."""

    plan: Plan
    cache: NetworkCache
    used: Mapping[str, Sequence[str]]  # the sources of each node that are used
    uses_left: Counter[str]  # how often each signal will still be used, by reference
    meter: _Meter
    signals: dict[str, Signal] = field(default_factory=dict)
    """``(2, samples)``, by name or ``NODE.SOURCE``; a signal is removed when no later node needs it."""
    levels: dict[str, Level] = field(default_factory=dict)  # levels of normalized signals, by node

    def estimate(self, name: str, network: str, reference: str) -> dict[str, Signal]:
        """A network's estimates of the sources that are used, by ``NODE.SOURCE``."""
        use = self.plan.networks[network]
        runner = self.cache.runner(network, self.used[name], use.chunking.length)
        signal, advance = self.signals[reference], self.meter(network)
        totals: list[Signal] = []
        for variant in variants(signal.length, use.shifts, use.tta):
            estimates = [signal.new_empty() for _ in self.used[name]]
            use.chunking.run(runner, variant.of(signal), estimates, advance)
            estimates = [variant.undone(estimate) for estimate in estimates]
            for total, estimate in zip(totals, estimates, strict=bool(totals)):
                total.add(estimate)
            totals = totals or estimates
        if use.passes > 1:
            for total in totals:
                total.scale(1 / use.passes)
        return dict(zip((f"{name}.{source}" for source in self.used[name]), totals, strict=True))

    def measure(self, name: str, reference: str, unbiased: bool) -> Level:
        """The level of a signal; also stored under the node's name."""
        self.levels[name] = self.signals[reference].level(unbiased)
        return self.levels[name]

    def make(self, function: Callable[..., None], references: Sequence[str]) -> Signal:
        """See :func:`kmdx.signals.combine`."""
        return combine(function, [self.signals[reference] for reference in references])


class _Meter:
    """Converts finished windows to seconds of audio, weighting networks by their arithmetic."""

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
        """Relative arithmetic of a network; the mean of the others if it is not stated."""
        gflops = self.plan.networks[network].gflops
        return self.usual if gflops is None else gflops

    def __call__(self, network: str) -> Callable[[], None]:
        """Return a function to call after each window of a network's run."""
        windows = self.plan.networks[network].windows(self.samples)
        share = self.cost(network) / self.total / windows

        def advance() -> None:
            self.done += share
            if self.progress is not None:
                self.progress(min(self.done, 1.0) * self.seconds, self.seconds)

        return advance
