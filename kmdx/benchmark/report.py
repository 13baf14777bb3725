"""What the benchmark found: its numbers, as JSON and as tables.

Conventions
-----------
Times are wall-clock seconds. A *factor* is seconds of work per second of song, which the challenge limits to
:data:`LIMIT`; a *ratio* is the baseline's time over the engine's, the two measured in turns. GFLOP/s count
the published network's arithmetic, whatever the engine really computes: a way that needs fewer operations,
or fewer sources, can pass the measured peak. Differences are the energy of the baseline's signal over that
of the difference, in dB, at most :data:`EQUAL`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from kmdx.benchmark.machine import Machine

LIMIT = 1.57  # seconds of work per second of song that the challenge allows
EQUAL = 200.0  # dB: stands for no difference at all


@dataclass(frozen=True)
class NetworkSpeed:
    """One network on full windows.

    Attributes
    ----------
    precision : str
    window_seconds : float
        Seconds of signal in a window.
    windows_at_once : int
    seconds : float
        For one window, the median.
    throughput : float
        Seconds of signal per second.
    gflops : float or None
        GFLOP/s; ``None`` where the weights' entry does not state the arithmetic.
    peak_share : float or None
        Those over the machine's matrix products in that precision.
    baseline_seconds, ratio, difference : float or None
        For one window of the plain network, its time over the engine's, and dB between the two estimates;
        ``None`` without a baseline.
    """

    precision: str
    window_seconds: float
    windows_at_once: int
    seconds: float
    throughput: float
    gflops: float | None
    peak_share: float | None
    baseline_seconds: float | None
    ratio: float | None
    difference: float | None


@dataclass(frozen=True)
class PlanSpeed:
    """A whole song.

    Attributes
    ----------
    song_seconds : float
    seconds : float
        The mean of the engine's runs before and after the baseline's.
    factor : float
    peak_memory, peak_device_memory : int or None
        Bytes at most in the engine's first run, weights included: of the process where the system tells
        (not on Windows), and of a GPU's by torch. On macOS all that came before counts too.
    baseline_seconds, ratio : float or None
    difference : mapping of str to float, or None
        By stem.
    """

    song_seconds: float
    seconds: float
    factor: float
    peak_memory: int | None
    peak_device_memory: int | None
    baseline_seconds: float | None
    ratio: float | None
    difference: Mapping[str, float] | None


@dataclass(frozen=True)
class Prediction:
    """What a long song would take: each network's time for a window, times its windows.

    Attributes
    ----------
    song_seconds, seconds, factor : float
    limit : float
        What the challenge allows of ``factor``.
    passes : bool
    baseline_seconds, ratio : float or None
        The baseline's, reckoned in the same way. A short song's own ratio is another one: networks that hear
        any length run it in one short window.
    """

    song_seconds: float
    seconds: float
    factor: float
    limit: float
    passes: bool
    baseline_seconds: float | None
    ratio: float | None


@dataclass(frozen=True)
class Report:
    """All that was measured; ``plan`` and ``prediction`` are there when the whole ensemble was."""

    kmdx: str
    date: str
    ensemble: str
    digest: str
    stand_in: bool
    device: str
    precision: str
    speed: str
    engine: str
    machine: Machine
    peak_gflops: Mapping[str, float]
    load_seconds: float
    networks: Mapping[str, NetworkSpeed]
    plan: PlanSpeed | None
    prediction: Prediction | None

    def json(self) -> str:
        """The same as JSON, numbers to four digits."""
        return json.dumps(_rounded(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    @property
    def file_name(self) -> str:
        """A name that tells machines, ensembles and settings apart."""
        parts = [self.machine.name, self.ensemble]
        settings = (self.precision, self.speed, self.engine)
        parts += [part for part in settings if part not in ("auto", "leaderboard", "tuned")]
        return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts) + ".json"


def tables(report: Report) -> Iterator[RenderableType]:
    """The report for people, one thing to print after the other."""
    here = report.machine
    gigabytes = "" if here.memory is None else f", {here.memory / 1e9:.0f} GB"
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in report.peak_gflops.items())
    yield escape(f"{here.name}{gigabytes}; torch {here.torch}, {here.threads} threads")
    yield f"matrix products in GFLOP/s: {peaks}"
    weights = "stand-in weights" if report.stand_in else "weights"
    yield escape(
        f"{report.ensemble} on {report.device}, precision {report.precision}, speed {report.speed}, "
        f"engine {report.engine}; {weights} loaded in {report.load_seconds:.1f} s"
    )
    yield ""
    yield _networks(report.networks)
    yield ""
    if report.plan is not None:
        yield from _plan(report.plan)
    if report.prediction is not None:
        yield _verdict(report.prediction)


def _networks(networks: Mapping[str, NetworkSpeed]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("network")
    for column in ("in", "window", "at once", "takes", "signal/s", "GFLOP/s", "of peak"):
        table.add_column(column, justify="right")
    for column in ("baseline", "ratio", "difference"):
        table.add_column(column, justify="right")
    for name, speed in networks.items():
        table.add_row(
            escape(name),
            speed.precision,
            f"{speed.window_seconds:.1f} s",
            str(speed.windows_at_once),
            _seconds(speed.seconds),
            f"{speed.throughput:.2f} s",
            "" if speed.gflops is None else f"{speed.gflops:.0f}",
            "" if speed.peak_share is None else f"{speed.peak_share:.0%}",
            _seconds(speed.baseline_seconds),
            "" if speed.ratio is None else f"{speed.ratio:.2f} ×",
            "" if speed.difference is None else f"{speed.difference:.0f} dB",
        )
    return table


def _plan(speed: PlanSpeed) -> Iterator[str]:
    yield (
        f"{speed.song_seconds:.1f} s of song in {_seconds(speed.seconds)}, {speed.factor:.2f} × its duration"
    )
    if speed.baseline_seconds is not None and speed.difference is not None:
        stems = ", ".join(f"{stem} {value:.0f} dB" for stem, value in speed.difference.items())
        yield f"baseline {_seconds(speed.baseline_seconds)}: {speed.ratio:.2f} × as long; difference {stems}"
    peaks = {"host": speed.peak_memory, "device": speed.peak_device_memory}
    shown = [f"{size / 1e9:.2f} GB of {where} memory" for where, size in peaks.items() if size is not None]
    if shown:
        yield f"at most {' and '.join(shown)}"


def _verdict(prediction: Prediction) -> str:
    passes = "within" if prediction.passes else "over"
    baseline = "" if prediction.ratio is None else f"; the baseline takes {prediction.ratio:.2f} × as long"
    return (
        f"a song of {prediction.song_seconds / 60:.0f} minutes: {_seconds(prediction.seconds)}, "
        f"{prediction.factor:.2f} × its duration, {passes} the challenge's limit of {prediction.limit:g} ×"
        f"{baseline}"
    )


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _rounded(value: Any) -> Any:
    """Floats to four digits, in lists and mappings too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return value
