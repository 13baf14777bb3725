"""What the tests of the blend search share: constructed inner products, small plans, songs and collections."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import in_process
import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import noise
from in_process import Result

from evaluator.blend_search import command
from evaluator.blend_search.collection import Collection, StemProducts
from evaluator.blend_search.inner_products import InnerProducts
from evaluator.blend_search.solving import Constraints
from kmdx import ensemble, plan_file
from kmdx.signals import Signal

STEMS = ("bass", "drums", "other", "vocals")
FREE, SUM, POSITIVE, SIMPLEX = (Constraints(*flags) for flags in ((0, 0), (1, 0), (0, 1), (1, 1)))
EVERY = [FREE, SUM, POSITIVE, SIMPLEX]


def stacked(songs: list[tuple[np.ndarray, np.ndarray]]) -> InnerProducts:
    """Of songs ``(truth (samples,), signals (signals, samples))``."""
    return InnerProducts(
        energy=np.array([truth @ truth for truth, _ in songs]),
        constant=np.array([truth @ truth for truth, _ in songs]),
        cross=np.array([signals @ truth for truth, signals in songs]),
        gram=np.array([signals @ signals.T for _, signals in songs]),
    )


def simulated(songs: int, signals: int, seed: int = 0, bias: float = 0.0) -> InnerProducts:
    """Signals that are the truth with errors of their own and errors in common, each song of its own level."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((signals, 3))
    quality = rng.uniform(0.2, 0.6, (signals, 1))
    made = []
    for _ in range(songs):
        truth = rng.lognormal(0, 1) * rng.standard_normal(300)
        errors = common @ rng.standard_normal((3, 300)) + 2 * rng.standard_normal((signals, 300))
        level = rng.lognormal(-0.5, 0.5) * np.abs(truth).mean()
        made.append((truth, (1 + bias) * truth + level * quality * errors))
    return stacked(made)


def known_best(weights: np.ndarray, songs: int = 7) -> InnerProducts:
    """Songs whose truth is the blend itself, and noise that no signal has anything of."""
    rng = np.random.default_rng(3)
    made = []
    for song in range(songs):
        basis = np.linalg.qr(rng.standard_normal((200, len(weights) + 1)))[0].T
        signals = rng.standard_normal((len(weights), len(weights))) @ basis[1:]
        made.append(((1 + song) * (weights @ signals + 0.3 * basis[0]), (1 + song) * signals))
    return stacked(made)


def two_maxima(songs: int = 6) -> InnerProducts:
    """All songs have a maximum at the first signal and a higher one at the second."""
    rng = np.random.default_rng(5)
    first, second = np.eye(8)[:2]
    made = []
    for song in range(songs):
        error = rng.standard_normal(8) * (3e-2 if song % 2 else 1e-3)
        made.append(((first if song % 2 else second) + error, np.stack([first, second])))
    return stacked(made)


def pretended(folder: Path, published: float | None = None, **products: InnerProducts) -> Collection:
    """A collection of constructed inner products; published weights are equal shares, or all the same."""
    stems = []
    for name, each in products.items():
        count = each.cross.shape[1]
        weights = np.full(count, 1 / count if published is None else published)
        values = np.full(len(each.energy), 600.0)
        stems.append(
            StemProducts(name, tuple(f"{name}_{number}" for number in range(count)), weights, each, values)
        )
    songs = tuple(f"song {number}" for number in range(len(stems[0].products.energy)))
    return Collection(folder, plan_file.load("htdemucs"), songs, tuple(stems), {}, (), {})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weight files of networks that run, in their order."""
    files: list[str] = []
    estimate = ensemble.SongSignals.estimate

    def noted(song: ensemble.SongSignals, name: str, network: str, reference: str) -> dict[str, Signal]:
        files.append(song.plan.networks[network].weight.path.stem)
        return estimate(song, name, network, reference)

    monkeypatch.setattr(ensemble.SongSignals, "estimate", noted)
    return files


@pytest.fixture(scope="module")
def plan_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small networks in stages, with blends at two levels and a residual in which vocals prevail."""
    folder = tmp_path_factory.mktemp("two")
    for name, seed in (("one", 1), ("two", 2)):
        torch.save({"state": tiny.demucs(tiny.HTDEMUCS, seed).state_dict()}, folder / f"{name}.ckpt")
    networks = {
        name: {
            "weights": {"file": f"{name}.ckpt", "architecture": tiny.HTDEMUCS},
            "overlap_add": {"overlap": 0.1},
        }
        for name in ("one", "two")
    }
    signals = {
        "x": {"normalize": "mixture"},
        "V": {"network": "one", "hears": "x"},
        "W": {"network": "two", "hears": "mixture"},
        "rest": {"sum": {"mixture": 1, "W.drums": -0.05}},
        "x1": {"sum": {"x": 1, "V.vocals": -0.3, "V.other": -0.1}},
        "D": {"network": "two", "hears": "x1"},
        "normal_drums": {"sum": {"V.drums": 0.75, "D.drums": 0.25}, "denormalize": "x"},
    }
    stems = {
        "bass": {"sum": {"V.bass": 1}, "denormalize": "x"},
        "drums": {"sum": {"normal_drums": 0.8, "W.drums": 0.2}},
        "other": {"sum": {"x1": 0.1, "D.drums": -0.02}, "denormalize": "x"},
        "vocals": {"sum": {"rest": 0.9, "W.vocals": 0.1}},
    }
    path = folder / "two.yaml"
    content = {
        "title": "Two",
        "description": "Tiny.",
        "networks": networks,
        "signals": signals,
        "stems": stems,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


SONGS = ("a", "b, quiet", "c, no bass", "d")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short songs in which vocals prevail; one is some steps of 16 bits loud, one has no bass."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(SONGS):
        song = folder / "test" / name
        song.mkdir(parents=True)
        level = 1.6e-3 if "quiet" in name else 0.1
        stems = {
            stem: noise(
                24_000 + 100 * number,
                seed=10 * number + index,
                level=level * (1 if stem == "vocals" else 0.1),
            )
            for index, stem in enumerate(STEMS)
        }
        if "no bass" in name:
            stems["bass"][:] = 0
        stems = {stem: np.round(samples * 32767) / 32768 for stem, samples in stems.items()}
        for stem, samples in {**stems, "mixture": sum(stems.values())}.items():
            soundfile.write(song / f"{stem}.wav", samples, 44100)
    return folder


COLLECT = ("--all-estimates", "--device", "cpu", "--precision", "fp32")


def call(*arguments: object) -> int:
    """Run the command in this process; returns its exit code."""
    return in_process.exit_code(command.main, "blend_search", *arguments)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command and take what it prints."""
    return lambda *arguments: in_process.run(capsys, command.main, "blend_search", *arguments)


@pytest.fixture(scope="module")
def collected(plan_of_two: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection of these songs."""
    folder = tmp_path_factory.mktemp("collected") / "two"
    assert call("collect", plan_of_two, data, "-o", folder, *COLLECT) == 0
    return folder


@pytest.fixture
def copied(collected: Path, tmp_path: Path) -> Path:
    """A collection to change."""
    return shutil.copytree(collected, tmp_path / "copied")


@pytest.fixture(scope="module")
def staged(plan_of_two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan whose last stage is a residual that could be far better: vocals are to be left out of bass."""
    folder = tmp_path_factory.mktemp("staged")
    content = yaml.safe_load(plan_of_two.read_text("utf-8"))
    for network in content["networks"].values():
        network["weights"]["file"] = str(plan_of_two.parent / network["weights"]["file"])
    content["signals"]["rest"] = {"sum": {"mixture": 1, "W.drums": -0.4, "V.drums": 0.1}}
    content["stems"]["vocals"] = {"sum": {"rest": 1}}
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path
