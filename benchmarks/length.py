"""Measure time and memory by song length: ``python -m benchmarks.length`` draws ``docs/cost_by_length.svg``.

``kmdx separate`` separates songs from 30 seconds to half an hour, from file to file, each in a new process.
The plan has two small networks with random weights, which are much faster than real time: a TFC-TDF U-Net on
chunks and an HTDemucs on overlapping segments. The time includes loading, reading, separating and writing,
but not the start of the process; memory is the process's peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile as sf

from evaluator import plots
from kmdx import files, synthetic, terminal
from kmdx.challenge import RATE
from kmdx.errors import KmdxError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def svg(costs: Sequence[Cost]) -> str:
    """Draw time and memory by length, in two diagrams side by side."""
    power, factor = exponent(costs)
    lengths = [cost.length for cost in costs]

    def draw(figure: Figure) -> None:
        figure.set_facecolor("white")
        figure.set_layout_engine("constrained")
        work, memory = figure.subplots(1, 2)
        work.plot(lengths, [factor * length**power for length in lengths], color=plots.ORANGE)
        _dots(work, lengths, [cost.seconds for cost in costs])
        work.set_title(f"seconds of work: length to the power of {power:.2f}")
        powers = np.log10([cost.seconds for cost in costs])
        work.set(yscale="log", ylim=(10 ** np.floor(powers.min()), 10 ** np.ceil(powers.max())))
        work.yaxis.set_major_formatter("{x:g}")
        _dots(memory, lengths, [cost.memory / 1e9 for cost in costs])
        memory.set_title("peak memory of the process, GB")
        memory.set_ylim(bottom=0)
        for axes in (work, memory):
            axes.set_xscale("log")
            axes.set_xticks(lengths, [_duration(length) for length in lengths], size=9)
            axes.minorticks_off()

    return plots.svg(draw, 1048, 400, "Seconds of work and peak memory by the song's length") + "\n"


def _dots(axes: Axes, lengths: Sequence[float], values: Sequence[float]) -> None:
    for length, value in zip(lengths, values, strict=True):
        (dot,) = axes.plot(length, value, "o", color=plots.BLUE, markersize=8, mew=0)
        plots.set_title(dot, f"{_duration(length)}: {value:.3g}")


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
    if importlib.util.find_spec("matplotlib") is None:
        raise KmdxError("matplotlib is missing; install it with: pip install '.[plots]'")
    costs = measure(sorted(set(options.lengths)))
    files.write_text(options.output, svg(costs))
    print(f"time grows with the length to the power of {exponent(costs)[0]:.3f}; written: {options.output}")


if __name__ == "__main__":
    terminal.run(main)
