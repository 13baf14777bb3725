"""Measure the time and memory of scoring songs from disk: ``python -m benchmarks.scoring``.

This makes songs of four stems in a temporary folder, as 16-bit wav files like predictions, and scores them
block by block. For comparison, the 4-minute song is also scored with whole files in memory, for global SDR
only.
"""

from __future__ import annotations

import tempfile
import timeit
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile as sf

from evaluator.metrics import global_sdr
from evaluator.scoring import score_song
from kmdx import terminal
from kmdx.challenge import RATE, STEMS

MINUTES = (1, 4, 16)


def make_song(folder: Path, minutes: int) -> None:
    """Write references and estimates: ten seconds of noise, repeated."""
    rng = np.random.default_rng(0)
    for kind in ("references", "estimates"):
        (folder / kind).mkdir(parents=True)
        for stem in STEMS:
            part = rng.uniform(-0.5, 0.5, (10 * RATE, 2)).astype(np.float32)
            with sf.SoundFile(folder / kind / f"{stem}.wav", "w", RATE, 2, "PCM_16") as sound:
                for _ in range(6 * minutes):
                    sound.write(part)


def files(folder: Path, kind: str) -> dict[str, Path]:
    """The files of the stems."""
    return {stem: folder / kind / f"{stem}.wav" for stem in STEMS}


def streamed(folder: Path) -> None:
    """Compute all metrics block by block."""
    score_song(files(folder, "references"), files(folder, "estimates"))


def whole(folder: Path) -> None:
    """Compute only the global SDR, with whole files in memory."""
    for stem in STEMS:
        truth, guess = (
            sf.read(files(folder, kind)[stem], dtype="float32")[0] for kind in ("references", "estimates")
        )
        global_sdr(truth, guess)


def main() -> None:
    """Print one line per method and length."""
    with tempfile.TemporaryDirectory() as temporary:
        for minutes in MINUTES:
            folder = Path(temporary, str(minutes))
            make_song(folder, minutes)
            ways = {"all metrics, streamed": streamed}
            if minutes == 4:
                ways["only global SDR, whole files"] = whole
            for name, score in ways.items():
                seconds, peak = measure(score, folder)
                share = seconds / (60 * minutes)
                print(
                    f"{minutes:3} min  {name:30} {seconds:6.2f} s, {share:.2%} of its length {peak:6.1f} MiB"
                )


def measure(score: Callable[[Path], None], folder: Path) -> tuple[float, float]:
    """The shortest of three times in seconds, and the peak memory of arrays in MiB from a separate run."""
    tracemalloc.start()
    score(folder)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    return min(timeit.repeat(lambda: score(folder), number=1, repeat=3)), peak


if __name__ == "__main__":
    terminal.run(main)
