"""Compare the engine with an ensemble's published form: times, their ratio, and the difference of results.

``python -m benchmarks.baseline [song.wav] --ensemble leaderboard_c --seconds 12 [--json benchmarks/results]``
uses a synthetic song by default. ``--json`` writes the report of :func:`kmdx.benchmark.measure` with the
comparison added; ``benchmarks/results/README.md`` documents the file. A ratio is the published form's time
divided by the engine's, measured alternately. A difference is the published signal's energy relative to the
difference's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.plain_ensemble import Published, free
from kmdx import audio, benchmark, devices, files, host, plan_file, stand_in, synthetic, terminal
from kmdx.benchmark import TimedNetwork, timed
from kmdx.challenge import TIME_FACTOR
from kmdx.networks import product
from kmdx.precisions import DTYPES, fast_halves
from kmdx.separator import DEFAULT_ENSEMBLE, Separator, Stems

SECONDS = 12.0
EQUAL = 200.0  # dB, if there is no difference
CPU_SIZE, CUDA_SIZE = 2048, 8192  # rows and columns of the matrices whose product is timed
PRODUCTS = 4  # number of timed products; the first one is a warm-up


def compare_song(separator: Separator, published: Published, song: NDArray[np.float32]) -> dict[str, Any]:
    """Run a song ``(n, 2)`` through the engine, the published form, and the engine again.

    Returns the entry ``plan`` of the JSON file, whose ``seconds`` are the mean of the engine's two runs.
    """
    device, rate = separator.device, separator.plan.sample_rate

    def run() -> Stems:
        return separator.separate(song, rate)

    if device.type == "cuda":
        run()  # loads the kernels
    host.reset_peak_memory()
    devices.reset_peak_memory(device)
    first, stems = timed(run, device)
    peaks = {"peak_memory": host.peak_memory(), "peak_device_memory": devices.peak_memory(device)}
    theirs, signals = published.song(song.T.copy())
    free(device)
    again, _ = timed(run, device)
    seconds, took = len(song) / rate, (first + again) / 2
    return {
        "song_seconds": seconds,
        "seconds": took,
        "factor": took / seconds,
        **peaks,
        "baseline_seconds": theirs,
        "ratio": theirs / took,
        "difference": {stem: decibels(signals[stem].T, stems[stem]) for stem in stems},
    }


def compare_network(
    separator: Separator, published: Published, name: str, peaks: dict[str, float]
) -> dict[str, Any]:
    """An entry of ``networks`` in the JSON file: windows in the published network and ours, alternately."""
    with benchmark.warm(separator.device):
        network = TimedNetwork(separator, name)
        window = network.window.cpu().numpy()
        difference = decibels(published.window(name, network.sources, window)[1], network.estimate.numpy())
        pairs = benchmark.repeated(
            lambda: (published.window(name, network.sources, window)[0], network.seconds())
        )
    theirs, ours = zip(*pairs, strict=True)
    speed = benchmark.speed_of(separator, name, network.at_once, statistics.median(ours))
    peak = peaks.get(speed.precision)
    return {
        **asdict(speed),
        "peak_share": None if speed.gflops is None or peak is None else speed.gflops / peak,
        "baseline_seconds": statistics.median(theirs),
        "ratio": statistics.median(other / own for other, own in pairs),
        "difference": difference,
    }


def peak_gflops(device: torch.device) -> dict[str, float]:
    """Speed of matrix products in GFLOP/s, for each precision that the device is fast at; takes a second."""
    size = CUDA_SIZE if device.type == "cuda" else CPU_SIZE
    names = ["fp32", *(name for name, dtype in DTYPES.items() if dtype in fast_halves(device))]
    return {name: _product_gflops(device, DTYPES[name], size) for name in names}


def _product_gflops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """The best speed of some products of square matrices, with the faster of torch's libraries."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    with torch.inference_mode():
        for _ in range(PRODUCTS):
            devices.synchronize(device)
            began = time.perf_counter()
            product.linear(left, right)
            devices.synchronize(device)
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e9


def decibels(reference: NDArray[np.floating], estimate: NDArray[np.floating]) -> float:
    """10·log10 of the reference's energy over the difference's, limited to ±200 dB; NaN becomes −200."""
    truth = np.asarray(reference, np.float64)
    error = float(np.square(truth - estimate).sum())
    if error == 0:
        return EQUAL
    with np.errstate(divide="ignore"):
        ratio = float(10 * np.log10(np.square(truth).sum() / error))
    return float(np.clip(ratio, -EQUAL, EQUAL)) if not np.isnan(ratio) else -EQUAL


def compare(
    separator: Separator, published: Published, report: benchmark.Report, song: NDArray[np.float32]
) -> dict[str, Any]:
    """The content of the JSON file: a report of the engine, plus the comparison."""
    peaks = peak_gflops(separator.device)
    plan = compare_song(separator, published, song)
    networks = {name: compare_network(separator, published, name, peaks) for name in report.networks}
    ours = {
        name: replace(speed, seconds=networks[name]["seconds"]) for name, speed in report.networks.items()
    }
    theirs = {
        name: replace(speed, seconds=networks[name]["baseline_seconds"]) for name, speed in ours.items()
    }
    long, other = benchmark.predict(separator.plan, ours), benchmark.predict(published.plan, theirs)
    prediction = {
        **asdict(long),
        "limit": TIME_FACTOR,
        "passes": long.factor < TIME_FACTOR,
        "baseline_seconds": other.seconds,
        "ratio": other.seconds / long.seconds,
    }
    extended = {"peak_gflops": peaks, "networks": networks, "plan": plan, "prediction": prediction}
    return {**asdict(report), **extended}


def song_of(path: Path | None, seconds: float, rate: int) -> np.ndarray:
    """The first seconds of a song, or a synthetic song, as ``(n, 2)`` at a rate."""
    if path is None:
        benchmark.check_seconds(seconds)
        return synthetic.song(seconds, rate)
    sound = audio.read(path, 0.0, seconds, downmix=True)
    samples = audio.resample(sound.samples, sound.rate, rate)
    return np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples


def main(arguments: list[str] | None = None) -> None:
    """Print the seconds, the ratio, and the difference of every stem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("song", nargs="?", type=Path)
    parser.add_argument("--ensemble", default=DEFAULT_ENSEMBLE)
    parser.add_argument("--folder", type=Path, help="folder of the weight files")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="longest part of the song to use")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--speed", default="leaderboard")
    parser.add_argument("--engine", default="tuned")
    parser.add_argument("--stand-in", action="store_true", help="use random weights")
    parser.add_argument("--json", type=Path, help="also compare all networks, and write a report here")
    options = parser.parse_args(arguments)
    benchmark.check_place(options.json, is_folder=True)
    settings = benchmark.Settings(options.device, options.precision, options.speed, options.engine)
    plan = plan_file.load(options.ensemble)
    song = song_of(options.song, options.seconds, plan.sample_rate)
    with ExitStack() as stack:
        ensemble = options.ensemble
        if options.stand_in:
            ensemble = stand_in.write(ensemble, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        separator = Separator(ensemble, folder=options.folder, **asdict(settings))
        published = stack.enter_context(Published(ensemble, separator.device, options.folder))
        if options.json is None:
            speed = compare_song(separator, published, song)
        else:
            report = benchmark.measure(ensemble, settings, seconds=len(song) / plan.sample_rate)
            report = replace(report, digest=plan.digest[:16], stand_in=options.stand_in)
            content = compare(separator, published, report, song)
            speed = content["plan"]
            files.write_text(options.json / report.file_name, benchmark.as_json(content))
    print(
        f"{plan.name} on {separator.device}, {options.precision}, {speed['song_seconds']:.1f} s of song: "
        f"engine {speed['seconds']:.2f} s, baseline {speed['baseline_seconds']:.2f} s, {speed['ratio']:.2f} ×"
    )
    for stem, difference in speed["difference"].items():
        print(f"  {stem:8} {difference:6.1f} dB")


if __name__ == "__main__":
    terminal.run(main)
