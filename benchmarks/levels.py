"""Measure time and scores at each speed level: ``python -m benchmarks.levels DATASET [--overlap 0.85]``.

This separates songs in MUSDB18-HQ's layout at each level, by default in float32, and prints the seconds of
work per second of song and the change of each stem's global SDR. Use ``--overlap`` to give the networks the
overlap of leaderboard C, if the ensemble's own is so small that the levels do not differ.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import yaml

from evaluator.metrics import global_sdr
from kmdx import Separator, audio, plan_file, speeds, terminal
from kmdx.errors import KmdxError
from kmdx.precisions import PRECISIONS


def overlapping(ensemble: str, overlap: float, folder: Path) -> Path:
    """Write a copy of an ensemble's plan with this overlap in all networks that use overlap_add."""
    content = yaml.safe_load(
        (Path(plan_file.__file__).parent / "plans" / f"{ensemble}.yaml").read_text("utf-8")
    )
    for use in content["networks"].values():
        if "overlap_add" in use:
            use["overlap_add"]["overlap"] = overlap
    path = folder / f"{ensemble}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def measure(ensemble: str | Path, dataset: Path, models: Path | None, precision: str = "fp32") -> None:
    """Print one line per song and level."""
    mixtures = sorted(dataset.rglob("mixture.wav"))
    if not mixtures:
        raise KmdxError(f"{dataset}: no song folders with a mixture.wav")
    songs = {path.parent: audio.read(path) for path in mixtures}
    before: dict[Path, dict[str, float]] = {}
    for level in speeds.levels():
        separator = Separator(ensemble, device="cpu", folder=models, precision=precision, speed=level)
        for folder, song in songs.items():
            began = time.perf_counter()
            stems = separator.separate(song.samples, song.rate)
            factor = (time.perf_counter() - began) * song.rate / len(song.samples)
            sdr = {
                stem: global_sdr(audio.read(folder / f"{stem}.wav").samples, samples)
                for stem, samples in stems.items()
            }
            first = before.setdefault(folder, sdr)
            changes = ", ".join(
                f"{stem} {value:.2f} ({value - first[stem]:+.2f})" for stem, value in sdr.items()
            )
            print(f"{level:11s} {factor:6.2f} ×  {folder.name}: {changes}", flush=True)


def main() -> None:
    """Measure all levels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--ensemble", default="htdemucs")
    parser.add_argument("--overlap", type=float)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--folder", type=Path, help="folder of the weight files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        chosen: str | Path = options.ensemble
        if options.overlap is not None:
            chosen = overlapping(options.ensemble, options.overlap, Path(temporary))
        measure(chosen, options.dataset, options.folder, options.precision)


if __name__ == "__main__":
    terminal.run(main)
