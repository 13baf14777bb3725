"""Measure an ensemble's speed on this machine: each network on full windows, and a whole song.

Times are wall-clock seconds. A *factor* is the seconds of work per second of song. GFLOP/s count the
arithmetic of the published network, not of its implementation, so a method with fewer operations can exceed
the hardware's peak.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kmdx import devices, engines, host, plan_file, stand_in, synthetic
from kmdx.errors import KmdxError, PlanError, suggest
from kmdx.plan import Plan
from kmdx.precisions import exact
from kmdx.separator import Separator

LONG_SONG = 240.0  # seconds of the song whose time is predicted
SHORTEST, LONGEST = 0.1, 3600.0  # seconds of a synthetic song
MIN_RUNS, MAX_RUNS, BUDGET = 2, 5, 20.0  # runs of a network, and seconds for them


@dataclass(frozen=True)
class Machine:
    """The hardware and software that determine speed; sizes are in bytes, and ``None`` means unknown."""

    cpu: str
    cores: int
    """Cores that this process may use."""
    threads: int
    """Threads that torch uses."""
    memory: int | None
    features: tuple[str, ...]
    """Instruction sets for arithmetic, the widest last."""
    gpu: str | None
    gpu_memory: int | None
    compute_capability: str | None
    system: str
    python: str
    torch: str
    onnxruntime: str | None

    @property
    def name(self) -> str:
        """The GPU's name, or the CPU's name with its widest instruction set and number of cores."""
        widest = f" ({self.features[-1]})" if self.features else ""
        return self.gpu or f"{self.cpu}{widest}, {self.cores} core{'s' if self.cores > 1 else ''}"


@dataclass(frozen=True)
class NetworkSpeed:
    """The speed of one network on full windows."""

    precision: str
    window_seconds: float
    windows_at_once: int
    seconds: float
    """Median time of one window."""
    throughput: float
    """Seconds of signal per second."""
    gflops: float | None
    """GFLOP/s; ``None`` if the weights' entry does not state the arithmetic."""


@dataclass(frozen=True)
class SongSpeed:
    """The speed of a whole song; ``peak_memory`` is the process's, ``peak_device_memory`` a GPU's."""

    song_seconds: float
    seconds: float
    factor: float
    peak_memory: int | None = None
    peak_device_memory: int | None = None


@dataclass(frozen=True)
class Report:
    """All measurements; ``plan`` and ``prediction`` are None unless the whole ensemble was measured."""

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
    load_seconds: float
    networks: Mapping[str, NetworkSpeed]
    plan: SongSpeed | None
    prediction: SongSpeed | None

    @property
    def file_name(self) -> str:
        """A name that distinguishes machines, ensembles and settings."""
        settings = (self.precision, self.speed, self.engine)
        parts = [self.machine.name, self.ensemble]
        parts += [part for part in settings if part not in ("auto", "leaderboard", "tuned")]
        return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts) + ".json"


def as_json(report: Any) -> str:
    """A report, or a dict of one, as JSON, with numbers rounded to four digits."""
    content = report if isinstance(report, dict) else asdict(report)
    rounded = json.loads(json.dumps(content), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    return json.dumps(rounded, indent=2, ensure_ascii=False) + "\n"


def describe(device: torch.device | str = "cpu") -> Machine:
    """The machine that this process runs on, including the GPU if ``device`` is one."""
    device = torch.device(device)
    gpu = devices.gpu_properties(device)
    return Machine(
        cpu=host.cpu_name(),
        cores=host.usable_cores(),
        threads=torch.get_num_threads(),
        memory=host.memory(),
        features=host.arithmetic(),
        gpu=gpu and gpu.name,
        gpu_memory=gpu and gpu.total_memory,
        compute_capability=gpu and f"{gpu.major}.{gpu.minor}",
        system=platform.platform(),
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=_version("onnxruntime-gpu") or _version("onnxruntime"),
    )


@dataclass(frozen=True)
class Settings:
    """How an ensemble is run: arguments of :class:`kmdx.separator.Separator`."""

    device: str
    precision: str
    speed: str
    engine: str


def measure(
    ensemble: str | Path,
    settings: Settings,
    *,
    seconds: float = 12.0,
    networks: Collection[str] = (),
    with_stand_in: bool = False,
    on_step: Callable[[str], None] = lambda message: None,
) -> Report:
    """Measure an ensemble on this machine.

    Raises :class:`KmdxError` if the ensemble, network, engine or device is unknown, a weight file is missing,
    or the song's length is not allowed.

    Parameters
    ----------
    ensemble
        As for :class:`kmdx.separator.Separator`.
    seconds : float
        Length of the synthetic song.
    networks : collection of str
        Measure only these networks of the plan, and no song.
    with_stand_in : bool
        Use random weights instead of the ensemble's own.
    on_step : callable
        Called with a one-line description of each step before it begins.
    """
    published = plan_file.load(ensemble)
    names = check_networks(published, networks)
    check_seconds(seconds)
    engines.check(settings.engine)
    with ExitStack() as stack:
        if with_stand_in:
            on_step("making stand-in weights")
            temporary = tempfile.TemporaryDirectory(prefix="kmdx-", ignore_cleanup_errors=True)
            ensemble = stand_in.write(ensemble, Path(stack.enter_context(temporary)))
        on_step("loading the weights")
        separator, loaded = _time_loading(ensemble, settings)
        whole = None
        if not networks:
            on_step(f"measuring a song of {seconds:.1f} s")
            whole = time_song(separator, seconds)
        measured = {name: _time_network(separator, name, on_step) for name in names}
    return Report(
        kmdx=version("kmdx-net"),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        ensemble=published.name,
        digest=published.digest[:16],
        stand_in=with_stand_in,
        **asdict(replace(settings, device=str(separator.device))),
        machine=describe(separator.device),
        load_seconds=loaded,
        networks=measured,
        plan=whole,
        prediction=None if networks else predict(separator.plan, measured),
    )


def _time_loading(ensemble: str | Path, settings: Settings) -> tuple[Separator, float]:
    """A separator, and the seconds it took to load."""
    began = time.perf_counter()
    separator = Separator(ensemble, **asdict(settings))
    devices.synchronize(separator.device)
    return separator, time.perf_counter() - began


def check_networks(plan: Plan, wanted: Collection[str]) -> list[str]:
    """The networks to measure, in the order in which they run; by default all of the plan's.

    Raises :class:`PlanError` if the plan has no such network.
    """
    known = plan.networks_used(plan.stems)
    for name in wanted:
        if name not in known:
            hint = suggest(name, known)
            raise PlanError(f"unknown network {name!r} of {plan.name}{hint}; available: {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def check_seconds(seconds: float) -> None:
    """Raise :class:`KmdxError` if this length of a synthetic song is not allowed."""
    if not SHORTEST <= seconds <= LONGEST:
        raise KmdxError(f"song length {seconds:g} s: expected {SHORTEST:g} to {LONGEST:g} s")


def check_place(report: Path | None, is_folder: bool = False) -> None:
    """Raise :class:`KmdxError` if there is no folder for a report, before anything is measured."""
    if report is None:
        return
    if is_folder and not report.is_dir():
        raise KmdxError(f"{report} is not a folder; make it first")
    if not report.is_dir() and not report.parent.is_dir():
        raise KmdxError(f"{report} cannot be written: folder {report.parent} does not exist")


def time_song(separator: Separator, seconds: float) -> SongSpeed:
    """Time a synthetic song of ``seconds``; on a GPU, an untimed run loads the kernels first."""
    rate, device = separator.plan.sample_rate, separator.device
    song = synthetic.song(seconds, rate)
    if device.type == "cuda":
        separator.separate(song, rate)
    host.reset_peak_memory()
    devices.reset_peak_memory(device)
    took, _ = timed(lambda: separator.separate(song, rate), device)
    seconds = len(song) / rate
    return SongSpeed(seconds, took, took / seconds, host.peak_memory(), devices.peak_memory(device))


class TimedNetwork:
    """A network of a separator that runs full windows of a synthetic song, in batches as for a real song."""

    def __init__(self, separator: Separator, name: str) -> None:
        plan = separator.plan
        length, rate = plan.networks[name].chunking.length, plan.sample_rate
        self.device = separator.device
        wanted = plan.signals_of(separator.stems)
        runs, used = plan.runs(wanted), plan.sources_used(wanted)
        self.sources = next(used[node] for node, network in runs.items() if network == name)  # that are used
        self._runner = separator.cache.runner(name, self.sources, length)
        self.window = _windows(1, length, rate).to(self.device)  # (1, 2, T)
        # (1, sources, 2, T) on the CPU; the first run determines the batch size
        self.estimate = self._run(self.window).cpu()
        self.at_once = self._runner.size(length)  # windows in one batch
        self._windows = _windows(self.at_once, length, rate).to(self.device)
        if self.at_once > 1:
            self._run(self._windows)

    def seconds(self) -> float:
        """Run once; returns the seconds per window."""
        return timed(lambda: self._run(self._windows), self.device)[0] / self.at_once

    @torch.inference_mode()
    def _run(self, windows: Tensor) -> Tensor:
        with exact():
            return self._runner(windows)


def repeated(run: Callable[[], Any]) -> list[Any]:
    """Results of :data:`MIN_RUNS` runs, and of up to :data:`MAX_RUNS` within :data:`BUDGET` seconds."""
    results: list[Any] = []
    began = time.perf_counter()
    while len(results) < MIN_RUNS or (len(results) < MAX_RUNS and time.perf_counter() - began < BUDGET):
        results.append(run())
    return results


def warm(device: torch.device) -> Any:
    """On the CPU, the heap settings that are used during a song."""
    return host.warm_heap() if device.type == "cpu" else nullcontext()


def speed_of(separator: Separator, name: str, at_once: int, seconds: float) -> NetworkSpeed:
    """A network's speed, from its seconds per window."""
    use = separator.plan.networks[name]
    window = use.chunking.length / separator.plan.sample_rate
    arithmetic = use.weight.architecture.get("gflops")
    gflops = None if arithmetic is None else arithmetic * window / seconds
    return NetworkSpeed(separator.precisions[name], window, at_once, seconds, window / seconds, gflops)


def _time_network(separator: Separator, name: str, on_step: Callable[[str], None]) -> NetworkSpeed:
    on_step(f"measuring network {name}")
    with warm(separator.device):
        network = TimedNetwork(separator, name)
        times = repeated(network.seconds)
    return speed_of(separator, name, network.at_once, statistics.median(times))


def predict(plan: Plan, networks: Mapping[str, NetworkSpeed], seconds: float = LONG_SONG) -> SongSpeed:
    """Predict the time of a long song from the time of a window.

    A short song has a different factor: its last segments extend beyond its end, and a network that accepts
    any length processes it in one short window.
    """
    windows = windows_of(plan, plan.stems, seconds)
    total = sum(networks[name].seconds * count for name, count in windows.items())
    return SongSpeed(seconds, total, total / seconds)


def windows_of(plan: Plan, stems: Collection[str], seconds: float = LONG_SONG) -> dict[str, int]:
    """The number of windows that each network processes in all its runs on a song, for some stems."""
    samples = int(seconds * plan.sample_rate)
    runs = Counter(plan.runs(plan.signals_of(stems)).values())
    return {name: count * plan.networks[name].windows(samples) for name, count in runs.items()}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Call ``work``; return the seconds it took, and its result."""
    devices.synchronize(device)
    began = time.perf_counter()
    result = work()
    devices.synchronize(device)
    return time.perf_counter() - began, result


def tables(report: Report) -> Iterator[RenderableType]:
    """The report as lines and tables to print."""
    here = report.machine
    gigabytes = "" if here.memory is None else f", {here.memory / 1e9:.0f} GB"
    yield escape(f"{here.name}{gigabytes}; torch {here.torch}, {here.threads} threads")
    weights = "stand-in weights" if report.stand_in else "weights"
    yield escape(
        f"{report.ensemble} on {report.device}, precision {report.precision}, speed {report.speed}, "
        f"engine {report.engine}; {weights} loaded in {report.load_seconds:.1f} s"
    )
    yield ""
    table = Table("network", "in", box=None, pad_edge=False, header_style="bold")
    for column in ("window", "at once", "takes", "signal/s", "GFLOP/s"):
        table.add_column(column, justify="right")
    for name, speed in report.networks.items():
        table.add_row(
            escape(name),
            speed.precision,
            f"{speed.window_seconds:.1f} s",
            str(speed.windows_at_once),
            duration(speed.seconds),
            f"{speed.throughput:.2f} s",
            "" if speed.gflops is None else f"{speed.gflops:.0f}",
        )
    yield table
    yield ""
    if whole := report.plan:
        seconds = f"{whole.song_seconds:.1f} s of song"
        yield f"{seconds} in {duration(whole.seconds)}, {whole.factor:.2f} × its duration"
        peaks = {"host": whole.peak_memory, "device": whole.peak_device_memory}
        shown = [
            f"{size / 1e9:.2f} GB of {where} memory" for where, size in peaks.items() if size is not None
        ]
        if shown:
            yield f"at most {' and '.join(shown)}"
    if long := report.prediction:
        yield (
            f"a song of {long.song_seconds / 60:.0f} minutes: about {duration(long.seconds)}, "
            f"{long.factor:.2f} × its duration"
        )


def duration(seconds: float) -> str:
    """A duration as text, in seconds or milliseconds."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _windows(count: int, length: int, rate: int) -> Tensor:
    """Windows ``(count, 2, length)``: one of a synthetic song, shifted differently in each."""
    song = synthetic.song((length + 1) / rate, rate)[:length]
    window = torch.from_numpy(song.T.copy())
    return torch.stack([window.roll(number * length // count, -1) for number in range(count)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
