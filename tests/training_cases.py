"""A small training config, three songs to train on, and what tests of training read from a run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import noise
from rich.console import Console

from training import config as configs
from training import songs, trainer
from training.config import Config
from training.hardware import Hardware
from training.run import Run

ROOT = Path(__file__).parents[1]
STEMS = ("bass", "drums", "other", "vocals")
NETWORK = {
    "n_fft": 512, "hop": 256, "bins": 64, "frames": 32, "layers": 3, "convolutions": 1, "growth": 4,
    "norm_groups": 2, "trim": 256,
}  # fmt: skip
CHUNK = 256 * 31
HERE = Hardware("cpu", workers=0)
CONFIG = {
    "title": "A small network", "source": "vocals", "network": NETWORK, "steps": 6, "epoch": 2, "batch": 2,
    "validation": ["song 0"], "optimizer": {"rate": 0.01, "warm_up": 2}, "loss": {"l1": 1, "spectral": 0.5, "windows": [256]},
}  # fmt: skip


def small(**changes: object) -> Config:
    return configs.parse({**CONFIG, **changes}, "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of two seconds, in wav, flac and Ogg; one without bass."""
    folder = tmp_path_factory.mktemp("songs")
    for number, ending in enumerate(("wav", "flac", "ogg")):
        song = folder / f"song {number}"
        song.mkdir()
        for place, stem in enumerate(STEMS):
            if (number, stem) != (2, "bass"):
                soundfile.write(
                    song / f"{stem}.{ending}", 0.3 * noise(88_200, seed=10 * number + place), 44100
                )
    return folder


def found(data: Path, config: Config) -> songs.Songs:
    return songs.find([data], config.source, config.network.chunk, config.validation)


@pytest.fixture
def fit(data: Path, tmp_path: Path) -> Callable[..., Run]:
    """Train in this process, in a folder of that name."""

    def run(name: str = "run", folder: Path = data, **changes: object) -> Run:
        config = small(**changes)
        console = Console(stderr=True)
        output = tmp_path / name
        return trainer.fit(
            config, [folder], output, console=console, decoded=tmp_path / "decoded", hardware=HERE
        )

    return run


def state(run: Run) -> dict[str, torch.Tensor]:
    """What training goes on with, and the averaged weights."""
    checkpoint = torch.load(run.last, weights_only=True)
    averaged = {f"average.{name}": value for name, value in checkpoint["state_dict"].items()}
    return {**checkpoint["current_model_state"], **averaged}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)
        ]
