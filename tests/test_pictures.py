"""Spectrograms: what they show, and sounds that have none."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile as sf
from conftest import noise
from report_cases import RATE

from evaluator import pictures
from kmdx import spectrograms
from kmdx.errors import AudioError
from kmdx.spectrograms import ROWS


def pixels(png: bytes) -> np.ndarray:
    """Levels of a PNG as pictures.py writes it, from 0 to 255; its colors are close to matplotlib's."""
    image = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    colors = matplotlib.colormaps["magma"](np.arange(256))[:, :3]
    distances = np.abs(image[:, :, None] - colors.astype(np.float32)).sum(-1)
    return distances.argmin(-1)


def test_a_picture_shows_the_pitch_and_the_level(tmp_path: Path) -> None:
    moment = np.arange(6 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * moment)[:, None] * (moment < 3)[:, None] * [1, 1]
    sf.write(tmp_path / "reference.wav", tone, RATE)
    sf.write(tmp_path / "estimate.wav", tone / 10, RATE)
    picture = tmp_path / "media" / "picture.png"
    pictures.write(tmp_path / "reference.wav", tmp_path / "estimate.wav", picture)
    image = pixels(picture.read_bytes()).astype(float)
    assert image.shape == (2 * ROWS + pictures.GAP, spectrograms.COLUMNS)
    reference, estimate = image[:ROWS], image[ROWS + pictures.GAP :]
    row = int(spectrograms.height(1000) * ROWS)
    assert abs(int(reference[:, 200].argmax()) - row) <= 1
    assert reference.max() == 255
    assert estimate.max() == pytest.approx(255 * (1 - 20 / spectrograms.RANGE), abs=2)  # 20 dB less
    assert reference[:, 500:].max() == 0  # silent from the middle on
    assert [path.name for path in picture.parent.iterdir()] == ["picture.png"]


def test_short_and_silent_files_get_pictures_and_broken_ones_an_error(tmp_path: Path) -> None:
    sf.write(tmp_path / "short.flac", noise(300, 1), 8000)
    sf.write(tmp_path / "silent.wav", np.zeros((3000, 2)), RATE)
    short, silent = (pictures.spectrogram(tmp_path / name) for name in ("short.flac", "silent.wav"))
    assert short.shape == (ROWS, 2)
    assert not pixels(pictures.draw(silent, silent))[:ROWS].any()
    (tmp_path / "broken.wav").write_bytes(b"RIFF of nothing")
    with pytest.raises(AudioError, match=r"broken\.wav: its spectrogram cannot be drawn"):
        pictures.spectrogram(tmp_path / "broken.wav")
