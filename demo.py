"""``make demo``: separate a real excerpt with real weights, and print the scores.

Downloads htdemucs (84 MB), separates the MUSDB18 excerpt in the PyPI package ``stempeg`` (The Easton
Ellises, "Falcon 69", 6 s, CC BY-NC-SA), and prints the global SDR of each stem. If htdemucs cannot be
downloaded, the small ensemble in the package is used.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

from rich.table import Table

from evaluator.metrics import global_sdr
from kmdx import Separator, audio, terminal, weights
from kmdx.challenge import STREAMS
from kmdx.errors import DownloadError, KmdxError
from kmdx.terminal import out

OUTPUT = Path("demo-output")


def excerpt() -> Path:
    """Find the excerpt in the installed package, without importing it, because that needs ffmpeg."""
    package = importlib.util.find_spec("stempeg")
    folders = (package.submodule_search_locations if package else None) or []
    found = [path for folder in folders for path in Path(folder).glob("data/*.stem.mp4")]
    if not found:
        raise KmdxError("the package stempeg, which contains the excerpt, is not installed: use `make demo`")
    return found[0]


def choose_ensemble() -> str:
    """Download htdemucs and return its name, or that of the small ensemble if it cannot be downloaded."""
    out.print("1. weights: htdemucs")
    try:
        out.print(f"   {weights.pull(weights.get('htdemucs'))}")
    except DownloadError as error:
        out.print(f"   {error}", markup=False)
        out.print("   so the small ensemble is used; larger ensembles separate much better")
        return "mini"
    return "htdemucs"


def main() -> None:
    """Run the demo."""
    source = excerpt()
    name = source.name.removesuffix(".stem.mp4")
    ensemble = choose_ensemble()

    out.print(f"2. song: {name}")
    song = {stream: audio.read(source, stream=number) for number, stream in enumerate(STREAMS)}
    mixture = song["mixture"]
    seconds = len(mixture.samples) / mixture.rate

    separator = Separator(ensemble)
    out.print(f"3. separating {seconds:.1f} s with {ensemble} on {separator.device}")
    began = time.perf_counter()
    stems = separator.separate(mixture.samples, mixture.rate)
    took = time.perf_counter() - began
    files = {OUTPUT / name / f"{stem}.wav": samples for stem, samples in stems.items()}
    audio.write_all({**files, OUTPUT / name / "mixture.wav": mixture.samples}, mixture.rate)

    table = Table("stem", "SDR of the estimate", "SDR of the mixture", box=None, pad_edge=False)
    for path in files:
        truth = song[path.stem].samples
        table.add_row(
            path.stem,
            f"{global_sdr(truth, audio.read(path).samples):.2f} dB",
            f"{global_sdr(truth, mixture.samples):.2f} dB",
        )
    out.print(table)
    out.print(f"   {took:.1f} s, {took / seconds:.1f} × the excerpt's duration")
    out.print(f"4. stems: {OUTPUT / name}")


if __name__ == "__main__":
    terminal.run(main)
