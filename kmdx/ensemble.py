"""Runs a plan: each network on its input, residuals and blends between them.

Signals are float32 ``(2, samples)``. Those of most songs lie on the device; longer ones are worked on
block by block and lie in scratch files, and only what is being worked on is in memory. A node runs when
something wanted needs it, and its signals are let go after the last node that needs them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kmdx import scratch
from kmdx.device import SIGNALS_SHARE, NetworkCache
from kmdx.errors import AudioError
from kmdx.plan import MIXTURE, Plan

Progress = Callable[[float, float], None]
"""Called with seconds of audio done and seconds in all."""

ALIVE = 16  # signals at once, as in leaderboard C
BLOCK = 2**20  # samples of a signal that sums are made of at a time
# The same on the CPU: few enough that they stay in its cache and torch uses one thread. On a busy machine,
# threads that wait for each other take up to 40 ms for each operation, and a plan may have 2,000 sums.
CACHED = 2**13


class NotFinite(ArithmeticError):
    """NaN or infinity in an estimate of the network of that name."""

    def __init__(self, network: str) -> None:
        super().__init__(f"{network} gave NaN or infinity")
        self.network = network


@dataclass(frozen=True)
class Level:
    """Mean and standard deviation that a signal was normalized with."""

    mean: float
    std: float


@torch.inference_mode()
def run(
    plan: Plan,
    cache: NetworkCache,
    mixture: Tensor,
    wanted: Collection[str],
    progress: Progress | None = None,
    known: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the wanted signals of a plan.

    Parameters
    ----------
    plan : Plan
    cache : NetworkCache
        At least the networks that ``wanted`` need.
    mixture : Tensor
        Float32 ``(2, samples)`` at the plan's rate, on the CPU.
    wanted : collection of str
        Stems, signals, or ``NODE.SOURCE``.
    progress : callable, optional
        Called after every window with ``(seconds of audio done, seconds in all)``; each network's
        share is its share of the arithmetic.
    known : mapping of str to Tensor, optional
        Signals that an earlier run of the same song gave, float32 ``(2, samples)`` on the CPU, by their
        references: sums or ``NODE.SOURCE``. What only they need does not run again.

    Returns
    -------
    dict of str to Tensor
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
    home = _Home(mixture, cache.device, cache.budget)
    if home.is_silent(mixture):
        return {name: home.zeros() for name in wanted}

    order = plan.order(wanted, known)
    pending = Counter(reference for name in order for reference in plan.nodes[name].inputs)
    pending.update(wanted)
    meter = _Meter(plan, order, mixture.shape[-1], progress)
    song = SongSignals(plan, cache, home, plan.sources_used(wanted, known), meter)
    song.signals[MIXTURE] = home.bring(mixture)
    song.signals.update({name: home.bring(signal) for name, signal in known.items() if pending[name]})

    for name in order:
        node = plan.nodes[name]
        made = node.run(name, song)
        if not all(map(home.is_finite, made.values())):
            if node.network is not None:
                raise NotFinite(node.network)
            raise AudioError(
                f"{name} of {plan.name} is not finite: the song is too loud, or the plan's weights are too "
                f"large; the song peaks at {home.peak(mixture):.3g}, expected about 1"
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
    signals : dict of str to Tensor
        ``(2, samples)`` by reference; those that no later node needs are gone.
    levels : dict of str to Level
        Of normalized signals, by node.
    """

    plan: Plan
    cache: NetworkCache
    home: _Home
    used: Mapping[str, Sequence[str]]
    meter: _Meter
    signals: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, Level] = field(default_factory=dict)

    def estimate(self, name: str, network: str, reference: str) -> dict[str, Tensor]:
        """A network's estimates of the sources that something uses, by reference."""
        window = self.plan.networks[network].chunking
        runner = self.cache.runner(network, self.used[name], window.length)
        estimates = {f"{name}.{source}": self.home.empty() for source in self.used[name]}
        window.run(runner, self.signals[reference], [*estimates.values()], self.meter(network))
        return estimates

    def measure(self, name: str, reference: str) -> Level:
        """The level of a signal, kept under the node's name."""
        self.levels[name] = self.home.level(self.signals[reference])
        return self.levels[name]

    def make(self, function: Callable[..., None], references: Sequence[str]) -> Tensor:
        """A signal whose samples depend on the same samples of others.

        ``function`` fills blocks: it gets one of the new signal, and those of the others.
        """
        return self.home.make(function, [self.signals[reference] for reference in references])


class _Home:
    """Where a song's signals lie: on the device, or those of a long song in scratch files."""

    def __init__(self, mixture: Tensor, device: torch.device, budget: int | None = None) -> None:
        self.shape = tuple(mixture.shape)
        most = scratch.LIMIT if budget is None else min(scratch.LIMIT, SIGNALS_SHARE * budget / ALIVE)
        self.long = 4 * math.prod(self.shape) > most
        self.device = torch.device("cpu") if self.long else device
        self.step = CACHED if self.device.type == "cpu" and not self.long else BLOCK

    def empty(self) -> Tensor:
        """A signal whose values are not set."""
        if self.long:  # in a file only where it is large for the host as well
            return torch.from_numpy(scratch.empty(self.shape))
        return torch.empty(self.shape, device=self.device)

    def zeros(self) -> Tensor:
        """Silence."""
        silence = self.empty()
        for block in self._blocks(silence):
            block.zero_()
        return silence

    def bring(self, signal: Tensor) -> Tensor:
        """A signal from the CPU."""
        return signal if self.long else signal.to(self.device)

    def make(self, function: Callable[..., None], signals: Sequence[Tensor]) -> Tensor:
        """A signal whose samples depend on the same samples of others; the function fills it in blocks."""
        made = self.empty()
        blocks = (self._blocks(signal, self.step) for signal in (made, *signals))
        for block, *parts in zip(*blocks, strict=True):
            function(block, *parts)
        return made

    def is_silent(self, signal: Tensor) -> bool:
        """Tell whether there is nothing but zeros."""
        return not any(block.any() for block in self._blocks(signal))

    def is_finite(self, signal: Tensor) -> bool:
        """Tell whether there is neither NaN nor infinity."""
        return all(bool(block.isfinite().all()) for block in self._blocks(signal, self.step))

    def peak(self, signal: Tensor) -> float:
        """The largest absolute sample."""
        return max(block.abs().max().item() for block in self._blocks(signal))

    def level(self, signal: Tensor) -> Level:
        """Mean and unbiased standard deviation of the mono sum.

        Where the mono sum is constant, as when the two channels cancel, the deviation is that of both
        channels; a constant signal keeps its level.
        """
        mean, std = self._moments(signal, lambda block: block.mean(0))
        if std == 0:
            _, std = self._moments(signal, lambda block: block.flatten())
        return Level(mean, std or 1.0)

    def _moments(self, signal: Tensor, values: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """Mean and unbiased standard deviation, exactly 0 where float32 cannot tell the values apart."""
        exact = torch.float32 if signal.device.type == "mps" else torch.float64  # which that has not
        count, total, low, high = 0, 0.0, math.inf, -math.inf
        for block in self._blocks(signal):
            found = values(block)
            count += found.numel()
            total += found.sum(dtype=exact).item()
            low, high = min(low, found.min().item()), max(high, found.max().item())
        mean = total / count
        if low == high:
            return mean, 0.0
        squares = sum(
            (values(block).to(exact) - mean).square().sum().item() for block in self._blocks(signal)
        )
        std = math.sqrt(squares / (count - 1))
        return mean, std if std >= torch.finfo(torch.float32).tiny else 0.0

    def _blocks(self, signal: Tensor, step: int = BLOCK) -> Iterator[Tensor]:
        """Parts of a signal one behind the other; those of a long song leave the memory after their use."""
        for start in range(0, signal.shape[-1], step):
            block = signal[:, start : start + step]
            yield block
            if self.long:
                scratch.release(block.numpy())


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
