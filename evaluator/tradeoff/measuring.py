"""Measures the score and the time of plans.

The time is the real-time factor of a long song, as :mod:`kmdx.benchmark` predicts it: the time of one window
of each network, times the windows per second. It does not depend on the length of the data set's songs, and
leaves out what happens between networks, such as sums and reading files. Windows of all networks and
precisions are timed in turns, so that other work on the machine affects all of them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluator import dataset, metrics
from evaluator.blend_search.inner_products import is_silent
from evaluator.dataset import Track
from evaluator.layouts import reference_of
from evaluator.results import describe_weights
from evaluator.run_folder import RunFolder
from evaluator.tradeoff.variants import Variant
from kmdx import benchmark, devices, engines, speeds
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError
from kmdx.plan import Plan
from kmdx.precisions import NAMES, fast_halves
from kmdx.separator import Separator

FORM = 1
"""Version of the records: a folder with scores of another version is not used."""

Report = Callable[[str], None]
WindowKey = tuple[str, int, str]
"""Weights, length in samples and precision of a network's windows."""


@dataclass(frozen=True)
class Running:
    """How networks run: arguments of :class:`kmdx.separator.Separator`."""

    device: str = "auto"
    engine: str = engines.DEFAULT
    folder: Path | None = None

    def separator(self, plan: Plan, precision: str, speed: str = speeds.DEFAULT) -> Separator:
        """A separator for a plan."""
        return Separator(plan, precision=precision, speed=speed, **vars(self))

    def precisions(self) -> tuple[str, ...]:
        """Float32, and the half precision that the device is fast at."""
        halves = fast_halves(devices.choose(self.device))[:1]
        return ("fp32", *(NAMES[dtype] for dtype in halves))


@dataclass(frozen=True)
class Setting:
    """A way to run an ensemble."""

    name: str
    kind: str
    """As for :class:`Variant`, or ``level`` for a speed level."""
    precision: str
    """Argument of :class:`kmdx.separator.Separator`."""
    plan: Plan
    speed: str = speeds.DEFAULT


@dataclass(frozen=True)
class Measured:
    """A setting with its scores and its time."""

    setting: Setting
    precision: str  # in which its networks compute, such as ``fp32`` or ``bf16 and fp32``
    factor: float  # seconds of work per second of a long song
    sdr: Mapping[str, float]  # global SDR of each stem in dB, mean over songs

    @property
    def score(self) -> float:
        """The mean over stems, in dB."""
        return float(np.mean([*self.sdr.values()]))

    @property
    def name(self) -> str:
        """Its name, which no other setting has."""
        return self.setting.name if self.setting.kind == "level" else f"{self.setting.name}, {self.precision}"


def settings_of(variants: Sequence[Variant], precisions: Sequence[str]) -> list[Setting]:
    """Each variant in each precision, and the speed levels of the published plan, which is the first."""
    found = [
        Setting(variant.name, variant.kind, precision, variant.plan)
        for precision in precisions
        for variant in variants
    ]
    return found + [Setting(f"--speed {name}", "level", "auto", variants[0].plan, name) for name in LEVELS]


LEVELS = tuple(name for name in speeds.levels() if name != speeds.DEFAULT)


class WindowTimes:
    """Times windows of networks in turns."""

    def __init__(self) -> None:
        self._networks: dict[WindowKey, benchmark.TimedNetwork] = {}

    def add(self, separator: Separator) -> Mapping[str, WindowKey]:
        """Add the networks of a separator that are not yet known; return the key of each."""
        keys = {}
        for name in separator.networks:
            use = separator.plan.networks[name]
            keys[name] = (use.weight.name, use.chunking.length, separator.precisions[name])
            if keys[name] not in self._networks:
                self._networks[keys[name]] = benchmark.TimedNetwork(separator, name)
        return keys

    def measure(self, rounds: int, on_step: Report = lambda line: None) -> dict[WindowKey, float]:
        """The median seconds per window of each network over some rounds, in alternating order."""
        keys = [*self._networks]
        times: dict[WindowKey, list[float]] = {key: [] for key in keys}
        for number in range(rounds + 1):
            on_step(f"timing windows, round {number} of {rounds}" if number else "warming up")
            for key in keys if number % 2 else reversed(keys):
                network = self._networks[key]
                with benchmark.warm(network.device):
                    seconds = network.seconds()
                if number:  # the first round only loads caches
                    times[key].append(seconds)
        return {key: statistics.median(found) for key, found in times.items()}


class ScoreKeeper:
    """Scores songs, and keeps the scores in a folder.

    Parameters
    ----------
    folder : RunFolder
        Locked.
    songs : sequence of Track
    seconds : float, optional
        Separate only the beginning of each song.
    """

    def __init__(self, folder: RunFolder, songs: Sequence[Track], seconds: float | None) -> None:
        self.folder, self.songs, self.seconds = folder, songs, seconds
        self._fingerprints = {track.name: dataset.fingerprint(track) for track in songs}

    def start(self, plan: Plan, running: Running) -> None:
        """Record what all scores depend on; raises :class:`KmdxError` if the folder has those of others."""
        self.folder.start(
            {
                "form": FORM,
                "tradeoff": True,
                "ensemble": plan.name,
                "seconds": self.seconds,
                "device": devices.choose(running.device).type,
                "engine": engines.check(running.engine),
                "weights": {
                    weight["name"]: weight["sha256"] for weight in describe_weights(plan, running.folder)
                },
            }
        )

    def sdr(self, separator: Separator, on_song: Report = lambda name: None) -> dict[str, float]:
        """The global SDR of each stem in dB: the mean over the songs in which it is not silent."""
        setting = f"{separator.plan.checksum(separator.stems)[:24]} {' '.join(separator.precisions.values())}"
        found: dict[str, list[float]] = {stem: [] for stem in separator.stems}
        for track in self.songs:
            for stem, value in self._song(separator, setting, track, on_song).items():
                found[stem].append(value)
        return {stem: float(np.mean(values)) for stem, values in found.items() if values}

    def _song(self, separator: Separator, setting: str, track: Track, on_song: Report) -> Mapping[str, float]:
        record: dict[str, Any] = self.folder.record(track.name) or {}
        if record.get("fingerprint") != self._fingerprints[track.name]:
            record = {"song": track.name, "fingerprint": self._fingerprints[track.name], "sdr": {}}
        if setting not in record["sdr"]:
            on_song(track.name)
            record["sdr"][setting] = score(separator, track, self.seconds)
            self.folder.add(record)
        return record["sdr"][setting]


def score(separator: Separator, track: Track, seconds: float | None = None) -> dict[str, float]:
    """The global SDR in dB of each stem of a song, or of its beginning; without stems that are silent."""
    count = None if seconds is None else int(seconds * track.rate)
    made = separator.separate(dataset.read(track, MIXTURE).samples[:count], track.rate, name=track.name)
    found = {}
    for stem, estimate in made.items():
        reference = reference_of(stem, separator.stems)
        if reference not in track.available:
            continue
        truth = dataset.read(track, reference).samples[:count]
        energy = np.square(truth, dtype=np.float64).sum(keepdims=True)
        if not is_silent(energy, np.array([truth.size])).any():
            found[stem] = metrics.global_sdr(truth, estimate)
    return found


def measure(
    settings: Sequence[Setting], running: Running, scores: ScoreKeeper, rounds: int, on_step: Report
) -> list[Measured]:
    """Measure settings; scores that were kept earlier are not measured again.

    Raises :class:`KmdxError` if no song has a stem of the plan.
    """
    times = WindowTimes()
    found: list[tuple[Setting, str, dict[str, float], Mapping[WindowKey, int]]] = []
    for number, setting in enumerate(settings, 1):
        separator = running.separator(setting.plan, setting.precision, setting.speed)
        keys = times.add(separator)
        precision = " and ".join(dict.fromkeys(separator.precisions.values()))
        line = f"[{number}/{len(settings)}] {setting.name}, {precision}"
        on_step(line)
        sdr = scores.sdr(separator, lambda name, line=line: on_step(f"{line}: {name}"))  # type: ignore[misc]
        if not sdr:
            raise KmdxError(f"no song has one of the stems {', '.join(separator.stems)}")
        windows = benchmark.windows_of(separator.plan, separator.stems)
        found.append((setting, precision, sdr, {keys[name]: count for name, count in windows.items()}))
    seconds = times.measure(rounds, on_step)
    return [
        Measured(
            setting,
            precision,
            sum(seconds[key] * count for key, count in windows.items()) / benchmark.LONG_SONG,
            sdr,
        )
        for setting, precision, sdr, windows in found
    ]
