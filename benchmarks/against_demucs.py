"""Compare the htdemucs plan with the ``demucs`` command: ``python -m benchmarks.against_demucs [SONG]``.

Both use the same weights, an overlap of 0.25, no shifts, float32 and the CPU, and run the same three stages:
vocals from the mixture, drums from the residual, and bass from the next residual. ``demucs`` gets the inputs
of all stages, computed with ``kmdx``, as three songs in one call, so it starts and loads only once, as
``kmdx`` does. They are timed alternately: as whole processes from file to file, and as computation in this
process. The stems differ slightly, because ``demucs`` normalizes the input of each stage, and the plan only
the mixture. The difference is larger for a stem with little energy, as in the default synthetic song.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs

from benchmarks.baseline import SECONDS, decibels, song_of
from kmdx import terminal, weights
from kmdx.errors import KmdxError
from kmdx.separator import Separator

ENSEMBLE, SIGNATURE, OVERLAP, RATE = "htdemucs", "955717e8", 0.25, 44100
STAGES = {"song": "vocals", "without_vocals": "drums", "nor_drums": "bass"}
"""The input of each stage, and the stem that it estimates."""


def write_repository(folder: Path, models: Path | None) -> HTDemucs:
    """Write the weights as a model that ``demucs --repo`` finds by its signature; return the model."""
    weight = weights.get(ENSEMBLE)
    checkpoint = weights.load(weights.find(weight, models).path)
    own = {key: value for key, value in weight.architecture.items() if key not in ("type", "gflops")}
    package = {"klass": HTDemucs, "args": (), "kwargs": checkpoint.kwargs or own, "state": checkpoint.state}
    torch.save(package, folder / f"{SIGNATURE}.th")
    model = HTDemucs(**package["kwargs"])
    model.load_state_dict(package["state"])
    return model.eval()


def stages_of(song: np.ndarray, stems: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The input of each stage: the song without the stems of earlier stages."""
    inputs = {}
    for name, stem in STAGES.items():
        inputs[name] = song
        song = song - stems[stem]
    return inputs


def as_processes(
    song: np.ndarray, folder: Path, models: Path | None, repeat: int
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Run both commands alternately; return the seconds of each, and the difference of their stems in dB."""
    sf.write(folder / "song.wav", song, RATE, subtype="FLOAT")
    ours, theirs = folder / "kmdx", folder / "demucs"
    kmdx = [sys.executable, "-m", "kmdx.cli", "separate", str(folder / "song.wav"), "-e", ENSEMBLE]
    kmdx += ["-o", str(ours), "--device", "cpu", "--precision", "fp32", "--format", "float32", "--overwrite"]
    demucs = [sys.executable, "-m", "demucs", "-n", SIGNATURE, "--repo", str(folder), "-d", "cpu"]
    demucs += ["--shifts", "0", "--overlap", str(OVERLAP), "--float32", "--clip-mode", "none"]
    demucs += ["-o", str(theirs), *(str(folder / f"{name}.wav") for name in STAGES)]
    environment = dict(os.environ) if models is None else {**os.environ, "KMDX_MODELS": str(models)}
    times = []
    for _ in range(repeat):
        own = _run(kmdx, environment)
        stems = {stem: _read(ours / "song" / f"{stem}.wav") for stem in STAGES.values()}
        for name, signal in stages_of(song, stems).items():
            sf.write(folder / f"{name}.wav", signal, RATE, subtype="FLOAT")
        times.append((own, _run(demucs, environment)))
    differences = {}
    for name, stem in STAGES.items():
        other = _read(theirs / SIGNATURE / name / f"{stem}.wav")
        # The plan restores the mixture's mean in every stem, demucs that of the stage's input.
        differences[stem] = decibels(other - other.mean(), stems[stem] - stems[stem].mean())
    return times, differences


def _read(path: Path) -> np.ndarray:
    return sf.read(path, dtype="float32")[0]


def _run(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Run a command; return its seconds."""
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise KmdxError(f"{' '.join(command[1:4])} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return time.perf_counter() - began


def as_computation(
    song: np.ndarray, model: HTDemucs, models: Path | None, repeat: int
) -> list[tuple[float, float]]:
    """Seconds of both in this process, alternately, without loading and files."""
    separator = Separator(ENSEMBLE, device="cpu", folder=models, precision="fp32")
    inputs = stages_of(song, separator.separate(song, RATE))  # also a warm-up

    def demucs() -> None:
        for stage in inputs.values():
            wave = torch.from_numpy(stage.T.copy())
            mono = wave.mean(0)
            wave = (wave - mono.mean()) / (mono.std() + 1e-8)  # as demucs.api does
            apply_model(model, wave[None], shifts=0, overlap=OVERLAP)

    return [(_timed(lambda: separator.separate(song, RATE)), _timed(demucs)) for _ in range(repeat)]


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _line(what: str, times: Sequence[tuple[float, float]]) -> str:
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(demucs / kmdx for kmdx, demucs in times)
    return f"{what}: kmdx {own:.2f} s, demucs {other:.2f} s, {ratio:.2f} ×"


def main(arguments: list[str] | None = None) -> None:
    """Print both ratios, and the difference of the stems in dB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("song", nargs="?", type=Path)
    parser.add_argument("--folder", type=Path, help="folder of the weight files")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="longest part of the song to use")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the median is printed")
    options = parser.parse_args(arguments)
    song = song_of(options.song, options.seconds, RATE)
    print(
        f"demucs {version('demucs')}, {len(song) / RATE:.1f} s of song, {torch.get_num_threads()} threads",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as temporary:
        model = write_repository(Path(temporary), options.folder)
        times, differences = as_processes(song, Path(temporary), options.folder, max(1, options.repeat))
        print(_line("whole processes", times), flush=True)
        print(_line("computation", as_computation(song, model, options.folder, max(1, options.repeat))))
    print("difference: " + ", ".join(f"{stem} {value:.0f} dB" for stem, value in differences.items()))


if __name__ == "__main__":
    terminal.run(main)
