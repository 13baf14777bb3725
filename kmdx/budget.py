"""Chooses a speed level for a time budget: measures windows of the networks on this machine.

The time of each level is predicted as in :mod:`kmdx.benchmark`, for a long song. Reading and writing files
is not included, and a short song takes longer per second.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from rich.markup import escape

from kmdx import batch, benchmark, devices, inputs, manifest, speeds, terminal
from kmdx.errors import DeviceError, KmdxError, KmdxWarning, joined
from kmdx.separator import Separator
from kmdx.terminal import err

ENOUGH = 0.5  # seconds of repeated windows of a network


@dataclass(frozen=True)
class Choice:
    """A speed level, and the seconds of work per second of song that it is predicted to take."""

    speed: str
    factor: float
    fits: bool
    """Whether that is within the budget; otherwise, it is the level with the least work."""


def with_speed(job: batch.Job, songs: Sequence[inputs.InputSong], budget: float) -> batch.Job:
    """The job at the speed level that a budget allows, or at the level of the songs' finished stems.

    Prints which level it is, and why. Raises :class:`KmdxError` if finished stems were made at different
    levels, or the ensemble cannot run.
    """
    made = [] if job.options.overwrite else finished_at(job, songs)
    if len(made) > 1:
        raise KmdxError(
            f"{job.target} has stems of these songs at the speeds {joined(made)}, so --budget cannot choose "
            "one; use --speed instead, or --overwrite to make all stems again"
        )
    if made or not songs:
        speed = made[0] if made else job.options.speed
        if made:
            err.print(f"speed {speed}, as finished stems in {escape(str(job.target))}")
    else:
        with err.status("choosing a speed"):
            choice = choose(lambda speed: batch.load_separator(_at(job, speed)), budget)
        speed = choice.speed
        text = f"{choice.factor:.2f} × the duration of a song"
        if choice.fits:
            err.print(f"speed {speed}: about {text}")
        else:
            terminal.warn(f"no speed is within --budget {budget:g}; {speed} takes about {text}")
    return _at(job, speed)


def _at(job: batch.Job, speed: str) -> batch.Job:
    return replace(job, options=replace(job.options, speed=speed))


def finished_at(job: batch.Job, songs: Sequence[inputs.InputSong]) -> list[str]:
    """The speed levels of finished stems in the songs' folders that differ from the job's in nothing else."""
    made: set[str] = set()
    jobs = {name: _at(job, name) for name in speeds.levels()}
    for song in songs:
        with suppress(OSError):  # reported when the song's turn comes
            for stem, settings in manifest.finished(job.output / song.place):
                for name in jobs.keys() - made:
                    wanted = jobs[name].settings(stem) if name == settings.speed else None
                    if wanted is not None and wanted.difference(settings, ("format",)) is None:
                        made.add(name)
    return [name for name in jobs if name in made]


def choose(load: Callable[[str], Separator], budget: float) -> Choice:
    """The level with the most work that is predicted to be within a budget, or else that with the least.

    Parameters
    ----------
    load : callable
        Makes a separator for a speed level.
    budget : float
        Seconds of work per second of song.
    """
    windows = WindowTimes()

    for speed in speeds.levels():
        with warnings.catch_warnings():  # they are shown when the songs are separated
            warnings.simplefilter("ignore", KmdxWarning)
            separator = load(speed)
        predicted = windows.factor(separator, budget)
        if predicted <= budget:
            return Choice(speed, predicted, True)
    return Choice(speed, windows.factor(separator), False)


class WindowTimes:
    """The time of one window of each network, measured once for all networks of the same sizes."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int, str], float] = {}

    def factor(self, separator: Separator, limit: float = math.inf) -> float:
        """Seconds of work per second of song; infinity if they exceed a limit, as soon as that is known."""
        total = 0.0
        for name, count in benchmark.windows_of(separator.plan, separator.stems).items():
            total += count * self._window(separator, name) / benchmark.LONG_SONG
            if total > limit:
                return math.inf
        return total

    def _window(self, separator: Separator, name: str) -> float:
        use = separator.plan.networks[name]
        sizes = json.dumps(dict(use.weight.architecture), sort_keys=True, default=dict)
        key = (sizes, use.chunking.length, separator.precisions[name])
        if key not in self._seconds:
            self._seconds[key] = window_seconds(separator, name)
        return self._seconds[key]


def window_seconds(separator: Separator, name: str) -> float:
    """The time of one window of a network, after a first one that is not timed.

    Raises :class:`DeviceError` if the device does not have enough memory for it.
    """
    times: list[float] = []
    try:
        with benchmark.warm(separator.device):
            network = benchmark.TimedNetwork(separator, name)
            began = time.perf_counter()
            while not times or (len(times) < benchmark.MAX_RUNS and time.perf_counter() - began < ENOUGH):
                times.append(network.seconds())
    except (RuntimeError, MemoryError) as error:
        if not devices.is_out_of_memory(error):
            raise
        raise DeviceError(
            f"out of memory on {separator.device} with one window of {name}; choose another device"
        ) from error
    return statistics.median(times)
