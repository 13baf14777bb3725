"""Measures how fast an ensemble runs on this machine, against the same ensemble in the plainest form.

What the numbers mean stands in :mod:`kmdx.benchmark.report`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kmdx import engine as engines
from kmdx import memory, plan_file
from kmdx.benchmark import machine, stand_in, synthetic
from kmdx.benchmark.plain import Plain, free, timed
from kmdx.benchmark.report import EQUAL, LIMIT, NetworkSpeed, PlanSpeed, Prediction, Report
from kmdx.errors import KmdxError, PlanError
from kmdx.plan import Hear, Plan, suggest
from kmdx.precision import exact
from kmdx.separator import DEFAULT_ENSEMBLE, Separator, Stems

LONG_SONG = 240.0  # seconds of the song that the prediction is for
SHORTEST, LONGEST = 0.1, 3600.0  # seconds of a synthetic song
FEWEST, MOST, BUDGET = 2, 5, 20.0  # measurements of a network: at least, at most, and seconds for them

Tell = Callable[[str], None]
Result = TypeVar("Result")


class Engine:
    """The engine, as far as the benchmark knows it: the one place to change when the engine does.

    Parameters are those of :class:`kmdx.separator.Separator`.

    Attributes
    ----------
    plan : Plan
        What it runs: a speed level may have other overlaps than the ensemble's file.
    device : torch.device
    load_seconds : float
        Reading the weights and making the networks fast.
    """

    def __init__(
        self,
        ensemble: str | Path,
        device: str,
        precision: str,
        speed: str,
        folder: Path | None,
        engine: str = engines.DEFAULT,
    ) -> None:
        began = time.perf_counter()
        self.separator = Separator(
            ensemble, device=device, folder=folder, precision=precision, speed=speed, engine=engine
        )
        self.plan = self.separator.plan
        self.device = self.separator.device
        machine.synchronize(self.device)
        self.load_seconds = time.perf_counter() - began

    def separate(self, song: NDArray[np.float32]) -> Stems:
        """All stems of a song ``(n, 2)`` at the plan's rate."""
        return self.separator.separate(song, self.plan.sample_rate)

    def network(self, name: str, sources: Sequence[str]) -> EngineNetwork:
        """A network of the plan, ready on the device to estimate ``sources``."""
        longest = self.plan.networks[name].chunking.length
        runner = self.separator.residents.runner(name, sources, longest)

        @torch.inference_mode()
        def run(windows: Tensor) -> Tensor:
            with exact():
                return runner(windows)

        return EngineNetwork(run, runner.size, self.separator.precisions[name])


class EngineNetwork(NamedTuple):
    """A network as the engine runs it.

    Attributes
    ----------
    run : callable
        Windows ``(B, 2, T)`` in, ``(B, sources, 2, T)`` out, on the device.
    size : callable
        How many windows of so many samples go together, once one has run.
    precision : str
        ``fp32``, ``fp16`` or ``bf16``.
    """

    run: Callable[[Tensor], Tensor]
    size: Callable[[int], int]
    precision: str


def measure(
    ensemble: str | Path = DEFAULT_ENSEMBLE,
    *,
    device: str = "auto",
    precision: str = "auto",
    speed: str = "leaderboard",
    engine: str = engines.DEFAULT,
    seconds: float = 12.0,
    networks: Collection[str] = (),
    with_baseline: bool = True,
    with_stand_in: bool = False,
    folder: Path | None = None,
    tell: Tell = lambda message: None,
) -> Report:
    """Measure an ensemble on this machine.

    Parameters
    ----------
    ensemble, device, precision, speed, engine, folder
        As for :class:`kmdx.separator.Separator`.
    seconds : float
        Length of the synthetic song.
    networks : collection of str
        Measure only these networks of the plan, and no song.
    with_baseline : bool
        Whether the plainest form is run too.
    with_stand_in : bool
        Whether to take random weights in the place of the ensemble's own.
    tell : callable
        Called with a line about what comes next.

    Raises
    ------
    KmdxError
        If there is no such ensemble, network, engine, weight file or device, or the song is of no sensible
        length.
    """
    published = plan_file.load(ensemble)
    names = _check_networks(published, networks)
    check_seconds(seconds)
    engines.check(engine)
    with ExitStack() as stack:
        if with_stand_in:
            tell("making stand-in weights")
            temporary = tempfile.TemporaryDirectory(prefix="kmdx-", ignore_cleanup_errors=True)
            ensemble = stand_in.write(ensemble, Path(stack.enter_context(temporary)))
        tell("loading the weights")
        running = Engine(ensemble, device, precision, speed, folder, engine)
        tell("measuring the machine")
        here, peaks = machine.describe(running.device), machine.peak_gflops(running.device)
        plain = stack.enter_context(Plain(ensemble, running.device, folder)) if with_baseline else None
        whole = None
        if not networks:
            song = synthetic.song(seconds, published.sample_rate)
            whole, _ = compare_plan(running, plain, song, tell)
        measured = {}
        for name in names:
            tell(f"network {name}")
            measured[name] = compare_network(running, name, peaks, plain)
        return Report(
            kmdx=version("kmdx-net"),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            ensemble=published.name,
            digest=published.digest[:16],
            stand_in=with_stand_in,
            device=str(running.device),
            precision=precision,
            speed=speed,
            engine=engine,
            machine=here,
            peak_gflops=peaks,
            load_seconds=running.load_seconds,
            networks=measured,
            plan=whole,
            prediction=None if networks else predict(running.plan, measured, plain.plan if plain else None),
        )


def _check_networks(plan: Plan, asked: Collection[str]) -> list[str]:
    """Networks to measure, in the order in which they run first."""
    known = plan.networks_used(plan.stems)
    for name in asked:
        if name not in known:
            hint = suggest(name, known)
            raise PlanError(f"no network {name!r} in {plan.name}{hint}; there are {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def check_seconds(seconds: float) -> None:
    """Raise :class:`KmdxError` if a synthetic song cannot be that long."""
    if not SHORTEST <= seconds <= LONGEST:
        raise KmdxError(f"a song of {seconds:g} s: expected {SHORTEST:g} to {LONGEST:g} s")


def compare_plan(
    engine: Engine,
    plain: Plain | None,
    song: NDArray[np.float32],
    tell: Tell = lambda message: None,
) -> tuple[PlanSpeed, Stems]:
    """Run a song through the engine, and through the baseline between two runs of the engine.

    Parameters
    ----------
    engine : Engine
    plain : Plain, optional
        The baseline.
    song : ndarray
        Float32 ``(n, 2)`` at the plan's rate.

    Returns
    -------
    PlanSpeed
    dict of str to ndarray
        The engine's stems.
    """
    device = engine.device
    seconds = len(song) / engine.plan.sample_rate
    warm_up = device.type == "cuda"  # its kernels are loaded, and chosen, when they first run
    tell(f"the engine on {seconds:.1f} s")
    if warm_up:
        engine.separate(song)
    machine.reset_peaks(device)
    took, stems = timed(lambda: engine.separate(song), device)
    peak, device_peak = machine.peak_memory(), machine.peak_device_memory(device)

    plain_took = difference = None
    if plain is not None:
        tell(f"the baseline on {seconds:.1f} s")
        plain_took, signals = plain.song(song.T.copy())
        free(device)
        difference = {stem: decibels(signals[stem].T, stems[stem]) for stem in stems}
        tell("the engine again")
        took = (took + timed(lambda: engine.separate(song), device)[0]) / 2
    speed = PlanSpeed(
        song_seconds=seconds,
        seconds=took,
        factor=took / seconds,
        peak_memory=peak,
        peak_device_memory=device_peak,
        baseline_seconds=plain_took,
        ratio=None if plain_took is None else plain_took / took,
        difference=difference,
    )
    return speed, stems


def compare_network(
    engine: Engine,
    name: str,
    peaks: Mapping[str, float],
    plain: Plain | None = None,
) -> NetworkSpeed:
    """Run full windows of a synthetic song through one network, as the engine and as the baseline do.

    Parameters
    ----------
    engine : Engine
    name : str
        A network of its plan.
    peaks : mapping of str to float
        What :func:`kmdx.benchmark.machine.peak_gflops` gave.
    plain : Plain, optional
        The baseline.
    """
    plan, device = engine.plan, engine.device
    use = plan.networks[name]
    sources = next(
        used
        for node, used in plan.sources_used(plan.stems).items()
        if isinstance(hear := plan.nodes[node], Hear) and hear.network == name
    )
    fast = engine.network(name, sources)
    length = use.chunking.length
    times: list[float] = []
    plain_times: list[float] = []
    difference = None
    # As in the middle of a song; on the CPU the baseline has a process and a heap of its own.
    with memory.warm_heap() if device.type == "cpu" else nullcontext():
        window = _windows(1, length, plan.sample_rate).to(device)
        estimate = fast.run(window).cpu()  # the first run settles how many windows go together
        together = fast.size(length)
        windows = _windows(together, length, plan.sample_rate).to(device)
        if together > 1:
            fast.run(windows)

        if plain is not None:
            heard = window.cpu().numpy()
            difference = decibels(plain.window(name, sources, heard)[1], estimate.numpy())
        began = time.perf_counter()
        while len(times) < FEWEST or (len(times) < MOST and time.perf_counter() - began < BUDGET):
            if plain is not None:
                plain_times.append(plain.window(name, sources, heard)[0])
            times.append(timed(lambda: fast.run(windows), device)[0] / together)

    seconds = statistics.median(times)
    window_seconds = length / plan.sample_rate
    per_second = use.weight.architecture.get("gflops")
    gflops = None if per_second is None else per_second * window_seconds / seconds
    peak = peaks.get(fast.precision)
    ratios = [other / own for own, other in zip(times, plain_times, strict=bool(plain_times))]
    return NetworkSpeed(
        precision=fast.precision,
        window_seconds=window_seconds,
        windows_at_once=together,
        seconds=seconds,
        throughput=window_seconds / seconds,
        gflops=gflops,
        peak_share=None if gflops is None or peak is None else gflops / peak,
        baseline_seconds=statistics.median(plain_times) if plain_times else None,
        ratio=statistics.median(ratios) if ratios else None,
        difference=difference,
    )


def _windows(count: int, length: int, rate: int) -> Tensor:
    """Windows ``(count, 2, length)``: one of a synthetic song, shifted differently in each."""
    song = synthetic.song((length + 1) / rate, rate)[:length]
    window = torch.from_numpy(song.T.copy())
    return torch.stack([window.roll(number * length // count, -1) for number in range(count)])


def predict(
    plan: Plan, networks: Mapping[str, NetworkSpeed], plain: Plan | None = None, seconds: float = LONG_SONG
) -> Prediction:
    """Reckon what a long song takes from measured windows, and the baseline with the plan ``plain``.

    A short song's own factor is not a long one's: the last segments reach beyond its end, which hardly
    counts in a long song, and a network that hears any length gets it in one short window.
    """
    own = _reckoned(plan, {name: speed.seconds for name, speed in networks.items()}, seconds)
    other = None
    if plain is not None:
        other = _reckoned(
            plain, {name: speed.baseline_seconds or 0 for name, speed in networks.items()}, seconds
        )
    return Prediction(
        song_seconds=seconds,
        seconds=own,
        factor=own / seconds,
        limit=LIMIT,
        passes=own / seconds < LIMIT,
        baseline_seconds=other,
        ratio=None if other is None else other / own,
    )


def _reckoned(plan: Plan, window_seconds: Mapping[str, float], seconds: float) -> float:
    """Seconds that all windows of a song take."""
    samples = int(seconds * plan.sample_rate)
    nodes = [plan.nodes[name] for name in plan.order(plan.stems)]
    heard = [node.network for node in nodes if isinstance(node, Hear)]
    return sum(window_seconds[name] * plan.networks[name].chunking.windows(samples) for name in heard)


def decibels(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """10·log10 of the reference's energy over the difference's, from −200 (also for NaN) to 200 dB."""
    truth = np.asarray(reference, np.float64)
    error = float(np.square(truth - estimate).sum())
    if error == 0:
        return EQUAL
    with np.errstate(divide="ignore"):
        ratio = float(10 * np.log10(np.square(truth).sum() / error))
    return float(np.clip(ratio, -EQUAL, EQUAL)) if not np.isnan(ratio) else -EQUAL
