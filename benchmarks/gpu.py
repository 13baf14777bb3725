"""Measure an ensemble on a GPU within ten minutes, and print a line to send in.

    python -m benchmarks.gpu leaderboard_c [--networks ft_vocals mmi] [--engine graphs] [--minutes 10]
        [--json FILE]

Weights are random ones of the same sizes, so nothing is downloaded. Printed are the card, its measured peaks,
a synthetic song through the whole ensemble, each network's milliseconds per window by batch size, the memory,
the operations that take longest, the ensemble's rows of the table in docs/speed.md, and one line of JSON with
all of it. What matters most comes first; what no longer fits into the time is left out with a reason.

``--json`` writes the line as a file like those of ``python -m benchmarks.baseline``, which
``benchmarks/results/README.md`` describes; the key ``gpu`` is added, and there is no baseline. ``--device
cpu`` runs the same code without a GPU, except for the parts that need one.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import baseline, table
from benchmarks.roofline import sizes_of
from kmdx import benchmark, devices, engines, files, plan_file, stand_in, terminal
from kmdx.benchmark import NetworkSpeed, Settings, SongSpeed, TimedNetwork
from kmdx.challenge import TIME_FACTOR
from kmdx.errors import KmdxError
from kmdx.networks import types
from kmdx.plan import Plan
from kmdx.precisions import exact, fast_halves
from kmdx.separator import DEFAULT_ENSEMBLE, Separator

MINUTES = 10.0
SONG = 30.0  # seconds of the synthetic song
RUNS = 3  # timed runs, of which the median counts
BATCHES = (1, 4, 16)  # windows at once, in addition to the number that the engine chooses
PROFILED = 4  # most windows at once when operations are listed
COPIED = 2**30  # bytes of a timed copy
SHOWN = 8  # operations listed per network
SHARE = 0.05  # of the time that is left, which one batch size of one network may take
PROFILING = 20.0  # seconds that listing the operations of a network may take


class Budget:
    """The time that is left. A part that may not fit is left out; the reason is printed and kept."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, part: str, seconds: float = 0.0, share: float = 1.0) -> bool:
        """Whether a part that may take ``seconds`` fits into a share of the time that is left."""
        left = share * (self.end - time.perf_counter())
        if left <= seconds:
            self.leave_out(part, f"it may take {seconds:.3g} s, and {max(0.0, left):.3g} s are left for it")
        return left > seconds

    def leave_out(self, part: str, reason: str) -> None:
        """Leave out a part."""
        self.left_out.append(f"{part}: {reason}")
        terminal.say(f"left out {part}: {reason}")


@dataclass(frozen=True)
class Task:
    """What is measured."""

    plan: Plan  # with random weights
    device: torch.device
    names: Sequence[str]  # of the networks
    whole: bool  # whether a song passes through the whole ensemble, too
    budget: Budget
    engine: str = engines.DEFAULT


@dataclass
class Measured:
    """The figures of one precision option."""

    precisions: Mapping[str, str]
    """The precision of each network."""
    load_seconds: float
    song: SongSpeed | None = None
    memory: int | None = None
    """The most GPU memory that tensors took during the song, in bytes; torch reserves more."""
    networks: dict[str, NetworkSpeed] = field(default_factory=dict)
    """Speeds at the engine's batch size."""
    batches: dict[str, dict[int, dict[str, float | None]]] = field(default_factory=dict)
    """By network and windows at once: milliseconds per window, and bytes of GPU memory."""


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds of :data:`RUNS` runs after a warm-up; on a GPU by its own clock."""
    work()
    times = []
    for _ in range(RUNS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            times.append(1e3 * benchmark.timed(work, device)[0])
    return statistics.median(times)


def most_memory(device: torch.device) -> int | None:
    """The most GPU memory that tensors took since the last reset, in bytes."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def versions() -> dict[str, str | int | None]:
    """The driver, CUDA and cuDNN; None where there is none."""
    command = shutil.which("nvidia-smi")
    lines: list[str] = []
    if command is not None:
        query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False)
        lines = done.stdout.split() if done.returncode == 0 else []
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {"driver": lines[0] if lines else None, "cuda": torch.version.cuda, "cudnn": cudnn}


def copies(device: torch.device, budget: Budget) -> dict[str, float]:
    """GB/s that a copy in the device's memory reads and writes, and that one from the host or to it does."""
    source, target = (torch.zeros(COPIED // 4, device=device) for _ in range(2))
    found = {"memory": 2 * COPIED / milliseconds(lambda: target.copy_(source), device) / 1e6}
    if device.type != "cuda":
        budget.leave_out("copies from and to the host", f"the device is {device}")
        return found
    pageable = torch.zeros(COPIED // 4)
    for name, host in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        took = milliseconds(lambda: target.copy_(host, non_blocking=True), device)  # noqa: B023
        back = milliseconds(lambda: host.copy_(target, non_blocking=True), device)  # noqa: B023
        found |= {name: COPIED / took / 1e6, f"{name} to the host": COPIED / back / 1e6}
    return found


def peaks(device: torch.device, budget: Budget) -> dict[str, dict[str, float]]:
    """Measure and print what the device can do."""
    with exact():
        products = baseline.peak_gflops(device)
    copied = copies(device, budget)
    shown = ", ".join(f"{name} {peak / 1e3:.3g}" for name, peak in products.items())
    terminal.say(f"matrix products, TFLOP/s (no TF32): {shown}")
    terminal.say(f"copies, GB/s: {', '.join(f'{name} {speed:.3g}' for name, speed in copied.items())}")
    return {"peak_gflops": products, "copies": copied}


def measure(task: Task, precision: str) -> tuple[Measured, dict[str, Any]]:
    """Measure a precision option: each network, then a song.

    With ``auto``, the operations of a network of each type are listed, too. Networks of the same sizes are
    measured once.
    """
    gc.collect()
    devices.empty_cache(task.device)  # of the precision before
    began = time.perf_counter()
    separator = Separator(task.plan, device=str(task.device), precision=precision, engine=task.engine)
    devices.synchronize(task.device)
    measured = Measured(separator.precisions, time.perf_counter() - began)
    first: dict[str, str] = {}
    for name in task.names:
        other = first.setdefault(sizes_of(task.plan.networks[name], sources_of(task.plan, name)), name)
        if other == name and task.budget.allows(f"{name} in {precision}"):
            time_network(separator, measured, name, task.budget)
        if other in measured.networks:
            measured.networks.setdefault(name, measured.networks[other])
    if task.whole and len(measured.networks) == len(task.names):
        seconds = 2 * benchmark.predict(task.plan, measured.networks, SONG).seconds  # once as a warm-up
        if task.budget.allows(f"the song in {precision}", seconds):
            time_song(separator, measured, precision)
    return measured, operations(separator, task) if precision == "auto" else {}


def time_song(separator: Separator, measured: Measured, precision: str) -> None:
    """Time a song through the whole ensemble."""
    measured.song = song = benchmark.time_song(separator, SONG)
    measured.memory = most_memory(separator.device)
    memory = "" if measured.memory is None else f", {measured.memory / 1e9:.2f} GB of GPU memory"
    terminal.say(
        f"a song of {song.song_seconds:.0f} s in {precision}: {benchmark.duration(song.seconds)}, "
        f"{song.factor:.3g} s per second of song (limit {TIME_FACTOR:g}){memory}"
    )


def sources_of(plan: Plan, name: str) -> tuple[str, ...]:
    """The sources of a network that the plan uses."""
    used = plan.sources_used(plan.stems)
    return next(used[node] for node, network in plan.runs(plan.stems).items() if network == name)


@torch.inference_mode()
def time_network(separator: Separator, measured: Measured, name: str, budget: Budget) -> None:
    """Time a network by the number of windows at once, and print a line."""
    device, length = separator.device, separator.plan.networks[name].chunking.length
    with benchmark.warm(device), exact():
        timed = TimedNetwork(separator, name)
        seconds, own = timed.seconds(), timed.at_once
        runner = separator.cache.runner(name, timed.sources, length)
        rows: dict[int, dict[str, float | None]] = {}
        for batch in sorted({own, *(each for each in BATCHES if each < own)}):
            if budget.allows(f"{name}, {batch} at once", (RUNS + 1) * batch * seconds, SHARE):
                windows = repeat(timed.window, batch)
                devices.reset_peak_memory(device)
                took = milliseconds(lambda: runner(windows), device) / batch  # noqa: B023
                rows[batch] = {"ms": took, "memory": most_memory(device)}
    if own in rows:
        seconds = took / 1e3
    measured.batches[name] = rows
    measured.networks[name] = benchmark.speed_of(separator, name, own, seconds)
    memory = max((row["memory"] or 0 for row in rows.values()), default=0)
    cells = ", ".join(f"{batch} at once {row['ms']:.4g}" for batch, row in rows.items())
    used = f"; at most {memory / 1e9:.2f} GB" if memory else ""
    terminal.say(f"{name} in {measured.precisions[name]}, ms per window: {cells}{used}")


def repeat(window: Tensor, count: int) -> Tensor:
    """A batch of equal windows."""
    return window.expand(count, -1, -1).contiguous()


def operations(separator: Separator, task: Task) -> dict[str, Any]:
    """The operations of the first network of each type, by the type's title."""
    found: dict[str, Any] = {}
    for name in task.names:
        title = types.type_of(task.plan.networks[name].weight.architecture).title
        if title not in found and task.budget.allows(f"operations of {title}", PROFILING):
            found[title] = {"network": name, **profiled(separator, name)}
            say_operations(title, found[title])
    return found


@torch.inference_mode()
def profiled(separator: Separator, name: str) -> dict[str, Any]:
    """Milliseconds of a network's operations on its device, and how often the host deals with a GPU."""
    device = separator.device
    with benchmark.warm(device), exact():
        timed = TimedNetwork(separator, name)
        runner = separator.cache.runner(name, timed.sources, timed.window.shape[-1])
        windows = repeat(timed.window, min(PROFILED, timed.at_once))
        runner(windows)
        devices.synchronize(device)
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
            runner(windows)
            devices.synchronize(device)
    every = profiler.key_averages()
    # A GPU's kernels are events, too, but their time is also that of the operations that started them.
    clock = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    times = {each.key: getattr(each, clock) / 1e3 for each in every if each.device_type == DeviceType.CPU}
    signs = {"launches": "LaunchKernel", "waits": "Synchronize", "from_host": "HtoD", "to_host": "DtoH"}
    counts = {kind: sum(each.count for each in every if sign in each.key) for kind, sign in signs.items()}
    return {
        "windows": len(windows),
        "ms": sum(times.values()),
        **(counts if on_gpu else {}),
        "longest": dict(sorted(times.items(), key=lambda item: -item[1])[:SHOWN]),
    }


def say_operations(title: str, found: Mapping[str, Any]) -> None:
    """Print the operations of a network."""
    host = ""
    if "waits" in found:
        host = (
            f", {found['launches']} launches, {found['waits']} waits including the measurement's, "
            f"{found['from_host']} copies from the host and {found['to_host']} to it"
        )
    terminal.say(f"{title} ({found['network']}), {found['windows']} at once: {found['ms']:.3g} ms{host}")
    for operation, took in found["longest"].items():
        terminal.say(f"  {took:9.3f} ms  {took / (found['ms'] or 1):4.0%}  {operation}")


def report(
    task: Task, precision: str, measured: Measured, products: Mapping[str, float], digest: str
) -> dict[str, Any]:
    """The fields of ``benchmarks/results/README.md``; those of a baseline are None.

    ``plan`` and ``prediction`` are None unless the song was measured.
    """
    settings = Settings(str(task.device), precision, "leaderboard", task.engine)
    prediction = benchmark.predict(task.plan, measured.networks) if measured.song else None
    content: dict[str, Any] = asdict(
        benchmark.Report(
            kmdx=version("kmdx-net"),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            ensemble=task.plan.name,
            digest=digest[:16],
            stand_in=True,
            **asdict(settings),
            machine=benchmark.describe(task.device),
            load_seconds=measured.load_seconds,
            networks=measured.networks,
            plan=measured.song,
            prediction=prediction,
        )
    )
    nothing = {"baseline_seconds": None, "ratio": None}
    for speed in content["networks"].values():
        peak = products.get(speed["precision"])
        share = None if peak is None or speed["gflops"] is None else speed["gflops"] / peak
        speed |= {"peak_share": share, **nothing, "difference": None}
    if prediction is not None:
        content["plan"] |= {**nothing, "difference": None}
        passes = prediction.factor < TIME_FACTOR
        content["prediction"] |= {"limit": TIME_FACTOR, "passes": passes, **nothing}
    return {**content, "peak_gflops": products}


def measure_all(task: Task, digest: str) -> list[dict[str, Any]]:
    """Measure everything; returns a report per precision option, and all other figures in the first one."""
    here = benchmark.describe(task.device)
    below = versions()
    memory = "" if here.gpu_memory is None else f", {here.gpu_memory / 1e9:.1f} GB"
    shown = ", ".join(f"{name} {each}" for name, each in below.items() if each is not None)
    terminal.say(f"{here.name}{memory}; torch {here.torch}{', ' if shown else ''}{shown}")
    found = peaks(task.device, task.budget)
    auto, listed = measure(task, "auto")
    measured = {"auto": auto}
    if set(auto.precisions.values()) != {"fp32"}:
        measured["fp32"], _ = measure(task, "fp32")
    if task.device.type == "cuda" and torch.bfloat16 in fast_halves(task.device):
        measured["bf16"], _ = measure(replace(task, whole=False), "bf16")
    reports = [report(task, name, each, found["peak_gflops"], digest) for name, each in measured.items()]
    by_precision = {
        name: {"song": each.song and asdict(each.song), "memory": each.memory, "batches": each.batches}
        for name, each in measured.items()
    }
    gpu = {"versions": below, "copies": found["copies"], "measured": by_precision, "operations": listed}
    reports[0]["gpu"] = {**gpu, "left_out": task.budget.left_out}
    return reports


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("ensemble", nargs="?", default=DEFAULT_ENSEMBLE)
    parser.add_argument("--networks", nargs="+", default=(), help="only these networks of the plan, no song")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time to keep to")
    parser.add_argument("--engine", choices=engines.ENGINES, default=engines.DEFAULT)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the command")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    benchmark.check_place(options.json)
    if options.json and options.json.is_dir():
        raise KmdxError(f"{options.json} is a folder; name a file in it")
    budget = Budget(options.minutes)
    device = devices.choose(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # on which events and peaks are recorded
    published = plan_file.load(options.ensemble)
    names = benchmark.check_networks(published, options.networks)
    with tempfile.TemporaryDirectory(prefix="kmdx-", ignore_cleanup_errors=True) as folder:
        plan = plan_file.load(stand_in.write(options.ensemble, Path(folder)))
        task = Task(plan, device, names, not options.networks, budget, options.engine)
        reports = measure_all(task, published.digest)
    if rows := [each for each in reports if each["plan"]]:
        terminal.say("rows of the table in docs/speed.md:")
        for line in table.plans(rows):
            terminal.say(line)
    text = benchmark.as_json(reports[0])
    if options.json:
        files.write_text(options.json, text)
    terminal.say("to share these figures, paste this line into a new issue on the project's GitHub page:")
    terminal.say(json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":")))


if __name__ == "__main__":
    terminal.run(main)
