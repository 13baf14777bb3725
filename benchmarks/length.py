"""Measure time and memory by song length: ``python -m benchmarks.length`` draws ``docs/cost_by_length.svg``.

``kmdx separate`` separates songs from 30 seconds to half an hour, from file to file, each in a new process.
The plan has two small networks with random weights, which are much faster than real time: a TFC-TDF U-Net on
chunks and an HTDemucs on overlapping segments. The time includes loading, reading, separating and writing,
but not the start of the process; memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf

from kmdx import files, synthetic, terminal
from kmdx.challenge import RATE
from kmdx.errors import KmdxError

ROOT = Path(__file__).parents[1]
LENGTHS = (30, 60, 120, 300, 600, 1200, 1800)  # seconds
PLAN = """
title: Two small networks
networks:
  unet:
    weights:
      file: none
      architecture: {type: tfc_tdf, sources: [vocals], n_fft: 2048, hop: 512, bins: 256, frames: 128,
                     layers: 5, convolutions: 2, growth: 8, norm_groups: 2}
    trim_and_join: {chunk: 65024, trim: 2048}
  demucs:
    weights:
      file: none as well
      architecture: {type: htdemucs, sources: [drums, bass, other, vocals], channels: 8, bottom_channels: 32,
                     t_layers: 2, t_heads: 2, dconv_mode: 3, segment: 4}
    overlap_add: {overlap: 0.25}
signals:
  U: {network: unet, hears: mixture}
  rest: {sum: {mixture: 1, U.vocals: -1}}
  x: {normalize: rest}
  D: {network: demucs, hears: x}
stems:
  vocals: {sum: {U.vocals: 1}}
  drums: {sum: {D.drums: 1}, denormalize: x}
"""


class Cost(NamedTuple):
    """The length and time of one song in seconds, and the process's peak memory in bytes."""

    length: float
    seconds: float
    memory: int


def measure(lengths: Sequence[float]) -> list[Cost]:
    """Separate a song of each length, each in its own process."""
    from kmdx import stand_in

    costs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "small.yaml").write_text(PLAN, "utf-8")
        (folder / "weights").mkdir()
        plan = stand_in.write(folder / "small.yaml", folder / "weights")
        # The first runs twice, because a virtual machine may be slow to provide unused memory.
        for number, length in enumerate([lengths[0], *lengths]):
            song = folder / "song.wav"
            with sf.SoundFile(song, "w", RATE, 2, "PCM_16") as file:
                for phrase in synthetic.phrases(length, RATE):
                    file.write(phrase)
            command = [sys.executable, "-m", "benchmarks.length", "--child", str(song), str(plan)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
            if done.returncode:
                raise KmdxError(f"{length:g} s of song failed: {done.stderr.strip() or done.stdout.strip()}")
            if number:
                costs.append(Cost(length, *json.loads(done.stdout.splitlines()[-1])))
                print(_line(costs[-1]), flush=True)
    return costs


def separate(song: Path, output: Path, plan: str, *options: str) -> tuple[float, int]:
    """Run ``kmdx separate`` on the CPU; return the seconds, and the process's peak memory in bytes."""
    from kmdx import cli, host

    sys.argv = ["kmdx", "separate", str(song), "-e", plan, "-o", str(output), "--device", "cpu", *options]
    began = time.perf_counter()
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    return time.perf_counter() - began, host.peak_memory() or 0


def child(song: Path, plan: str) -> None:
    """Separate one song, and print ``[seconds, bytes]``."""
    output = song.with_name("stems")
    separate(song, output, plan, "--overwrite", "--duration", "1")  # imports and other one-time work
    print(json.dumps(separate(song, output, plan, "--overwrite")))


def exponent(costs: Sequence[Cost]) -> tuple[float, float]:
    """Fit ``seconds = factor · length ** exponent``; return ``(exponent, factor)``."""
    lengths, seconds = (np.log([getattr(cost, name) for cost in costs]) for name in ("length", "seconds"))
    power, offset = np.polyfit(lengths, seconds, 1)
    return float(power), float(np.exp(offset))


WIDTH, HEIGHT = 420, 300  # pixels of one diagram
LEFT, TOP, BOTTOM, GAP = 64, 48, 48, 40
LABEL = 48  # that a length takes below a diagram


def svg(costs: Sequence[Cost]) -> str:
    """Draw time and memory by length, in two diagrams side by side."""
    power, factor = exponent(costs)
    lengths = [cost.length for cost in costs]
    seconds = [cost.seconds for cost in costs]
    memory = [cost.memory / 1e9 for cost in costs]
    fit = [factor * length**power for length in lengths]
    width, height = 2 * (LEFT + WIDTH + GAP), TOP + HEIGHT + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12" fill="#334155">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_diagram(
            LEFT,
            f"seconds of work: length to the power of {power:.2f}",
            lengths,
            seconds,
            _powers(seconds),
            _log,
            fit,
        ),
        *_diagram(
            2 * LEFT + WIDTH + GAP,
            "peak memory of the process, GB",
            lengths,
            memory,
            _steps(memory),
            float,
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _diagram(
    left: float,
    title: str,
    lengths: Sequence[float],
    values: Sequence[float],
    ticks: Sequence[float],
    scale: Callable[[float], float],
    fit: Sequence[float] = (),
) -> list[str]:
    """One diagram over the songs' length, which is logarithmic; ``scale`` is that of the values."""
    low, high = scale(ticks[0]), scale(ticks[-1])
    first, last = _log(min(lengths)), _log(max(lengths))

    def x(length: float) -> float:
        return left + WIDTH * (_log(length) - first) / ((last - first) or 1)

    def y(value: float) -> float:
        return TOP + HEIGHT * (1 - (scale(value) - low) / (high - low))

    parts = [f'<text x="{left}" y="{TOP - 20}" font-size="13" font-weight="bold">{escape(title)}</text>']
    for tick in ticks:
        parts.append(f'<path d="M {left} {y(tick):.1f} h {WIDTH}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    free = math.inf  # to the left of the label before
    for length in sorted(lengths, reverse=True):
        parts.append(f'<path d="M {x(length):.1f} {TOP} v {HEIGHT}" stroke="#e2e8f0"/>')
        if x(length) < free:
            place = f'x="{x(length):.1f}" y="{TOP + HEIGHT + 20}" text-anchor="middle"'
            parts.append(f"<text {place}>{_duration(length)}</text>")
            free = x(length) - LABEL
    if fit:
        points = " ".join(
            f"{x(length):.1f},{y(value):.1f}" for length, value in zip(lengths, fit, strict=True)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="#b45309" stroke-width="1.3"/>')
    for length, value in zip(lengths, values, strict=True):
        place = f'cx="{x(length):.1f}" cy="{y(value):.1f}" r="4" fill="#0369a1"'
        parts.append(f"<circle {place}><title>{_duration(length)}: {value:.3g}</title></circle>")
    return parts


def _log(value: float) -> float:
    return math.log10(value)


def _powers(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values."""
    low, high = math.floor(_log(min(values))), math.ceil(_log(max(values)))
    return [10.0**power for power in range(low, max(high, low + 1) + 1)]


def _steps(values: Sequence[float]) -> list[float]:
    """Five even steps from zero up to a round number above the values."""
    top = max(values)
    unit = 10 ** math.floor(_log(top))
    step = next(unit * part for part in (0.25, 0.5, 1.0, 2.5) if 5 * unit * part >= top)
    return [step * number for number in range(6)]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"


def _line(cost: Cost) -> str:
    share = cost.seconds / cost.length
    return (
        f"{_duration(cost.length):>8} {cost.seconds:8.2f} s, {share:.3f} × its length, "
        f"{cost.memory / 1e9:.2f} GB at most"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", type=float, default=LENGTHS, metavar="SECONDS")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "cost_by_length.svg")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        song, plan = options.child
        child(Path(song), plan)
        return
    if len(set(options.lengths)) < 2:
        raise KmdxError("a fit needs two lengths")
    costs = measure(sorted(set(options.lengths)))
    files.write_text(options.output, svg(costs))
    print(f"time grows with the length to the power of {exponent(costs)[0]:.3f}; written: {options.output}")


if __name__ == "__main__":
    terminal.run(main)
