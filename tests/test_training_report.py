"""The report at the end of a run: its excerpts, and Ctrl-C while it is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import training_cases as cases
import yaml
from conftest import decibels, noise

from kmdx.networks.tfc_tdf import TfcTdf
from training import command, run_report, songs, trainer, validation
from training.run import Run

RATE = 44100
data = cases.data


@pytest.fixture
def long(tmp_path: Path) -> songs.TrainingSong:
    """A song of 24 s, whose vocals are loudest from 9 s to 19 s."""
    folder = tmp_path / "long"
    folder.mkdir()
    for number, stem in enumerate(cases.STEMS):
        sound = noise(24 * RATE, seed=number, level=0.01)
        if stem == "vocals":
            sound[9 * RATE : 19 * RATE] *= 10
        soundfile.write(folder / f"{stem}.wav", sound, RATE, subtype="FLOAT")
    (song,) = songs.to_train_with(tmp_path)
    return song


@pytest.mark.parametrize("seconds", [(0, 3), (9, 19), (21, 24)])
@pytest.mark.parametrize("hears", ["mixture", "rest", "rest of a network"])
def test_an_excerpt_equals_that_part_of_the_whole_song(
    hears: str, seconds: tuple[int, int], long: songs.TrainingSong
) -> None:
    config = cases.small(hears=hears.partition(" ")[0], source="vocals" if hears == "mixture" else "drums")
    torch.manual_seed(0)
    network = TfcTdf(config.network.unet(), config.source).eval()
    vocals = TfcTdf(config.network.unet(), "vocals").eval() if hears == "rest of a network" else None
    part = slice(*(RATE * place for place in seconds))
    whole = validation.estimate(config, network, vocals, long, torch.device("cpu"))
    found = validation.excerpt(config, network, vocals, long, part, torch.device("cpu"))
    for signal, expected in zip(found, whole, strict=True):
        assert decibels(expected[:, part], signal) > 100


def test_excerpts_are_the_loudest_seconds_and_nothing_else_is_estimated(
    long: songs.TrainingSong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cases.small()
    network = TfcTdf(config.network.unet(), "vocals").eval()
    run_network, lengths = validation._run, []

    def noted(config: object, network: object, signal: np.ndarray, device: torch.device) -> np.ndarray:
        lengths.append(signal.shape[1])
        return run_network(config, network, signal, device)  # type: ignore[arg-type]

    monkeypatch.setattr(validation, "_run", noted)
    monkeypatch.setattr(trainer, "trained", lambda run: network)
    run = Run(tmp_path)
    (made,) = run_report._excerpts(run, config, songs.Songs((), (long,)), torch.device("cpu"))
    written, _ = soundfile.read(tmp_path / made["files"]["true"])
    vocals, _ = soundfile.read(long.stems["vocals"].path)
    assert decibels(vocals[9 * RATE : 19 * RATE], written) > 60
    (length,) = lengths
    assert length <= 10 * RATE + 3 * cases.CHUNK


def test_ctrl_c_while_the_page_is_written_gives_one_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(run: Run, found: songs.Songs, device: str) -> Path:
        assert device == "cpu"
        raise KeyboardInterrupt

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(cases.CONFIG), "utf-8")
    monkeypatch.setattr(trainer, "fit", lambda *arguments, **options: Run(tmp_path))
    monkeypatch.setattr(run_report, "write", interrupted)
    arguments = ["run", str(config), "--data", str(data), "-o", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.startswith("stopped; the same command resumes")


def heights(drawn: str, style: str) -> np.ndarray:
    """Heights of the points of the curve of a style."""
    (path,) = re.findall(
        rf'<path d="([^"]+)" clip-path="[^"]+" style="fill: none; stroke: var\(--curve\); {style}', drawn
    )
    return np.array([float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)])


def test_a_noisy_curve_has_its_running_mean_drawn_over_it() -> None:
    curve = run_report.Curve([*range(100)], [1.0, 3.0] * 50)
    drawn = run_report.diagram("loss", curve, smooth=True)
    faint, mean = heights(drawn, "stroke-opacity: 0.3"), heights(drawn, "stroke-width: 1.5")
    middle = faint.mean()
    assert np.abs(faint - middle).min() > 50
    assert np.abs(mean[20:] - middle).max() < 10
    assert "stroke-opacity" not in run_report.diagram("loss", curve)


def test_a_diagram_follows_the_colors_of_the_page_and_names_its_points() -> None:
    curve = run_report.Curve([10, 20], [0.1, float("inf")])
    drawn = run_report.diagram("a < b", curve, logarithmic=True, dots=True)
    assert drawn == run_report.diagram("a < b", curve, logarithmic=True, dots=True), "the same bytes"
    assert 'aria-label="a &lt; b"' in drawn
    assert "<title>step 10: 0.100</title>" in drawn
    assert "step 20" not in drawn
    assert "#" not in re.sub(r'(url\(|href=")#', "", drawn), "no color of its own"
    assert run_report.diagram("empty", run_report.Curve([1], [float("nan")])) == ""


def test_the_axis_of_a_constant_positive_curve_has_no_negative_numbers() -> None:
    assert ">-" not in run_report.diagram("loss", run_report.Curve([1, 2], [0.01, 0.01]))
