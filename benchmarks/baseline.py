"""The engine against the plainest form of an ensemble, on one song in one run.

``python -m benchmarks.baseline song.wav --ensemble leaderboard_c --seconds 12``; without a song on a
synthetic one. What the baseline is stands in :mod:`kmdx.benchmark.baseline`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from kmdx import audio, plan_file, terminal
from kmdx.benchmark import measuring, synthetic
from kmdx.benchmark.plain import Plain
from kmdx.separator import DEFAULT_ENSEMBLE

SECONDS = 12.0


def song_of(path: Path | None, seconds: float, rate: int) -> np.ndarray:
    """Up to so many seconds of a song as ``(n, 2)`` at that rate, or of a synthetic one."""
    if path is None:
        measuring.check_seconds(seconds)
        return synthetic.song(seconds, rate)
    sound = audio.read(path, 0.0, seconds, downmix=True)
    samples = audio.resample(sound.samples, sound.rate, rate)
    return np.repeat(samples, 2, axis=1) if samples.shape[1] == 1 else samples


def main(arguments: list[str] | None = None) -> None:
    """Print seconds, ratio, and the difference of every stem."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("song", nargs="?", type=Path)
    parser.add_argument("--ensemble", default=DEFAULT_ENSEMBLE)
    parser.add_argument("--folder", type=Path, help="where weight files lie")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the song at most")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--speed", default="leaderboard")
    parser.add_argument("--engine", default="tuned")
    options = parser.parse_args(arguments)
    plan = plan_file.load(options.ensemble)
    song = song_of(options.song, options.seconds, plan.sample_rate)
    engine = measuring.Engine(
        options.ensemble, options.device, options.precision, options.speed, options.folder, options.engine
    )
    with Plain(options.ensemble, engine.device, options.folder) as plain:
        speed, _ = measuring.compare_plan(engine, plain, song)
    assert speed.ratio is not None
    assert speed.difference is not None
    print(
        f"{plan.name} on {engine.device}, {options.precision}, {speed.song_seconds:.1f} s of song: "
        f"engine {speed.seconds:.2f} s, baseline {speed.baseline_seconds:.2f} s, {speed.ratio:.2f} ×"
    )
    for stem, difference in speed.difference.items():
        print(f"  {stem:8} {difference:6.1f} dB")


if __name__ == "__main__":
    terminal.run(main)
