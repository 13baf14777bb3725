"""Compressed stems are decoded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import training_cases as cases

from training import decoded_songs, sampling
from training.config import TrainingError

data = cases.data


def test_compressed_stems_are_decoded_once_and_identically(data: Path, tmp_path: Path) -> None:
    config = cases.small()
    before = cases.found(data, config)
    progress: list[tuple[int, int]] = []
    after = decoded_songs.decode(before, tmp_path / "decoded", lambda *count: progress.append(count))
    assert progress[-1] == (7, 7)
    assert after.validation[0].stems["bass"].path == data / "song 0" / "bass.wav", "wav is read in place"
    for song, other in zip(before.training, after.training, strict=True):
        for name, stem in song.stems.items():
            assert other.stems[name].path.suffix == ".wav"
            assert np.array_equal(sampling.read(stem, 0, 88_200), sampling.read(other.stems[name], 0, 88_200))
    progress.clear()
    assert decoded_songs.decode(before, tmp_path / "decoded", lambda *count: progress.append(count)) == after
    assert not progress


def test_decoding_checks_the_disk_space_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(TrainingError, match="7 decoded stems need .* GB, but only 0.00 GB are free"):
        decoded_songs.decode(cases.found(data, cases.small()), tmp_path / "decoded")
    assert not list((tmp_path / "decoded").iterdir())
