"""Leaderboard C number for number, with stand-in weights in the author's layout; minutes on two cores."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import decibels, shared

from kmdx.errors import KmdxWarning
from my_submission.music_separation_model import MusicSeparationModel

STEMS = ("bass", "drums", "other", "vocals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MusicSeparationModel:
    script = shared("golden", "stand_in_weights.py")
    folder = tmp_path_factory.mktemp("stand-in")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    torch.set_num_threads(2)
    with pytest.warns(KmdxWarning, match="unknown content"):
        return MusicSeparationModel("leaderboard_c", device="cpu", folder=folder)


def test_every_stage_is_the_published_one(model: MusicSeparationModel) -> None:
    with np.load(shared("golden", "stages.npz")) as golden:
        mixture, rate = soundfile.read(shared("golden", "mixture.wav"))
        signals = model.separator.signals(mixture, rate, golden.files)
        measured = {name: decibels(golden[name], signals[name]) for name in golden.files}
    assert len(measured) == 12
    assert min(measured.values()) > 80, measured


def test_a_longer_song_is_the_published_one(model: MusicSeparationModel) -> None:
    mixture, rate = soundfile.read(shared("golden", "long.wav"))
    stems, _ = model.separate_music_file(mixture, rate)
    with np.load(shared("golden", "long.npz")) as golden:
        measured = {name: decibels(golden[name], stems[name]) for name in STEMS}
    assert min(measured.values()) > 80, measured
