"""Leaderboard C number for number on a song of several chunks and segments; minutes of work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
from conftest import decibels, shared

from my_submission.music_separation_model import MusicSeparationModel


def test_a_longer_song_is_the_published_one(stand_in_weights: Path) -> None:
    model = MusicSeparationModel("leaderboard_c", device="cpu", folder=stand_in_weights)
    mixture, rate = soundfile.read(shared("golden", "long.wav"))
    stems, _ = model.separate_music_file(mixture, rate)
    with np.load(shared("golden", "long.npz")) as golden:
        measured = {name: decibels(golden[name], stems[name]) for name in golden.files}
    assert len(measured) == 4
    assert min(measured.values()) > 80, measured
