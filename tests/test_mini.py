"""The small ensemble in the package: its files, offline use, and scores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import demo
from evaluator.metrics import global_sdr
from kmdx import Separator, plan_file, weights
from kmdx.errors import DownloadError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "mini"
STEMS = ("bass", "drums", "other", "vocals")
RATE = 44100


def song(seconds: float = 6) -> dict[str, np.ndarray]:
    """Stems of a song that no network was trained on: decaying noise and sweeps, a low saw, chords, a vowel."""
    rng = np.random.default_rng(0)
    time = np.arange(int(seconds * RATE)) / RATE

    def tone(pitch: np.ndarray | float, partials: int, tilt: float) -> np.ndarray:
        phase = 2 * np.pi * np.cumsum(np.broadcast_to(pitch, time.shape)) / RATE
        return sum(np.sin(k * phase + rng.uniform(0, 6)) / k**tilt for k in range(1, partials + 1))

    beat = time % 0.5
    drums = 0.5 * np.exp(-beat / 0.05) * np.sin(2 * np.pi * (50 * beat - 6 * np.exp(-beat / 0.02)))
    drums += 0.15 * np.exp(-(time % 0.25) / 0.03) * rng.standard_normal(len(time))
    steps = (time // 1).astype(int) % 4
    bass = 0.2 * tone(np.array([55.0, 73.4, 65.4, 49.0])[steps], 6, 1.5)
    chord = sum(tone(pitch, 8, 1.2) for pitch in (220.0, 277.2, 329.6))
    other = 0.04 * chord * np.exp(-(time % 1) / 0.6)
    vocals = 0.1 * tone(392 * (1 + 0.01 * np.sin(2 * np.pi * 5.5 * time)), 20, 1.0)
    made = {"bass": bass, "drums": drums, "other": other, "vocals": vocals}
    return {stem: np.stack([sound, sound], 1).astype(np.float32) for stem, sound in made.items()}


def test_all_four_networks_come_with_the_package_and_are_small() -> None:
    files = [use.weight.path for use in plan_file.load("mini").networks.values()]
    assert {path.parent for path in files} == {FOLDER}
    assert sum(path.stat().st_size for path in files) < 8e6


def test_mini_separates_without_an_internet_connection(tmp_path: Path) -> None:
    stems = song(3)
    soundfile.write(tmp_path / "song.wav", sum(stems.values()), RATE, "FLOAT")
    program = (
        "import socket, sys\n"
        "def refused(*args): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refused\n"
        "from kmdx import cli\n"
        "sys.argv = ['kmdx', 'separate', 'song.wav', '--ensemble', 'mini', '--device', 'cpu']\n"
        "cli.main()\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "KMDX_MODELS": str(tmp_path / "nothing here")}
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    written = {path.stem: soundfile.read(path)[0] for path in tmp_path.rglob("*.wav") if path.stem in STEMS}
    assert set(written) == set(STEMS)
    assert all(sound.shape == stems["bass"].shape and sound.any() for sound in written.values())


def test_mini_improves_every_stem() -> None:
    stems = song()
    mixture = sum(stems.values())
    estimates = Separator("mini", device="cpu", precision="fp32").separate(mixture, RATE)
    gains = {
        stem: global_sdr(truth, estimates[stem]) - global_sdr(truth, mixture) for stem, truth in stems.items()
    }
    assert min(gains["bass"], gains["drums"], gains["vocals"]) > 3, gains


@pytest.mark.parametrize(("precision", "change"), [("fp16", 0.01), ("bf16", 0)])
def test_half_precision_changes_the_scores_very_little(precision: str, change: float) -> None:
    stems = {stem: truth[: len(truth) // 3] for stem, truth in song().items()}  # fp16 is slow in software
    mixture = sum(stems.values())
    exact = Separator("mini", device="cpu", precision="fp32").separate(mixture, RATE)
    separator = Separator("mini", device="cpu", precision=precision)
    computes = torch.float16 if precision == "fp16" else torch.float32  # U-Nets do not support bfloat16
    assert {network.dtype for network in separator.networks.values()} == {computes}
    half = separator.separate(mixture, RATE)
    for stem, truth in stems.items():
        assert global_sdr(truth, half[stem]) == pytest.approx(global_sdr(truth, exact[stem]), abs=change)
        assert np.array_equal(half[stem], exact[stem]) == (precision == "bf16")


def test_the_demo_falls_back_to_mini(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(weight: weights.Weight) -> Path:
        raise DownloadError(f"{weight.name}: no source could deliver")

    monkeypatch.setattr(weights, "pull", unreachable)
    assert demo.choose_ensemble() == "mini"
    assert "no source could deliver" in capsys.readouterr().out
    monkeypatch.setattr(weights, "pull", lambda weight: Path("somewhere"))
    assert demo.choose_ensemble() == "htdemucs"


def test_pulling_mini_downloads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import cli

    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    for words in (
        ["models", "pull", "mini"],
        ["models", "list"],
        ["models", "verify", "mini"],
        ["ensembles", "show", "mini"],
    ):
        monkeypatch.setattr(sys, "argv", ["kmdx", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr().err
    assert "mini_vocals" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]
