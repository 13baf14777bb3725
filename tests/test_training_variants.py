"""Variants of songs: slower or faster copies that a run uses unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from kmdx.challenge import RATE
from kmdx.errors import KmdxError
from training import songs, variants


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three songs to train with, of a tone of 440 Hz in each stem, and one to validate with."""
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    for name in ("train/a", "train/b", "train/c", "valid/d"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for stem in ("bass", "drums", "vocals"):
            sf.write(folder / f"{stem}.flac", np.stack([tone, -tone], 1), RATE)
    return tmp_path / "data"


def pitch(path: Path) -> float:
    samples, rate = sf.read(path)
    assert rate == RATE
    spectrum = np.abs(np.fft.rfft(samples[:, 0]))
    return float(np.argmax(spectrum)) * rate / len(samples)


@pytest.mark.parametrize(("speed", "every", "names"), [(0.5, 1, "abc"), (2.0, 2, "ac"), (0.75, 3, "a")])
def test_songs_are_slowed_down(data: Path, tmp_path: Path, speed: float, every: int, names: str) -> None:
    output = tmp_path / "other"
    assert list(variants.write(output, [data], speed, every)) == list(names)
    written = sorted(output.rglob("*.wav"))
    assert len(written) == 3 * len(names), "neither the song that is set apart nor the stem that is missing"
    for path in written:
        assert sf.info(path).frames == pytest.approx(RATE / speed, abs=1)
        assert pitch(path) == pytest.approx(440 * speed, abs=1)
        assert sf.read(path)[0].std() == pytest.approx(0.5 / np.sqrt(2), rel=0.01)
    found = songs.find([data], "bass", 1000, variants=[output])
    assert [len(song.variants) for song in found.training] == [int(name in names) for name in "abc"]


def test_existing_variants_are_not_written_again(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "other"
    list(variants.write(output, [data], 0.5))
    for path in output.rglob("*.wav"):
        os.utime(path, (1, 1))
    (output / "b" / "drums.wav").unlink()
    assert list(variants.write(output, [data], 0.5)) == ["a", "b", "c"]
    kept = [path for path in output.rglob("*.wav") if path.stat().st_mtime == 1]
    assert {path.parent.name for path in kept} == {"a", "c"}
    list(variants.write(output, [data], 0.8))
    assert sf.info(output / "a" / "bass.wav").frames == pytest.approx(RATE / 0.8, abs=1)


@pytest.mark.parametrize(
    ("folder", "speed", "every", "message"),
    [
        ("data", 1.0, 1, "speed 1: expected"),
        ("data", 0.1, 1, "speed 0.1: expected"),
        ("data", float("nan"), 1, "speed nan: expected"),
        ("data", 0.5, 0, "every 0: expected 1 or more"),
        ("none", 0.5, 1, "no such folder"),
        ("data/train", 0.5, 1, "two songs have the name 'a'"),
    ],
)
def test_mistakes_are_one_line_errors(
    data: Path, tmp_path: Path, folder: str, speed: float, every: int, message: str
) -> None:
    folders = [data, data.parent / folder] if folder == "data/train" else [data.parent / folder]
    with pytest.raises(KmdxError, match=message):
        list(variants.write(tmp_path / "other", folders, speed, every))
    assert not (tmp_path / "other").exists()
