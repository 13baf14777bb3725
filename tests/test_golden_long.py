"""Leaderboard C number for number on a song of several chunks and segments; a minute or more of work."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
import soundfile
from conftest import shared

from my_submission.music_separation_model import MusicSeparationModel


@pytest.mark.slow
def test_a_longer_song_matches_the_published_submission(stand_in_weights: Path) -> None:
    model = MusicSeparationModel("leaderboard_c", device="cpu", folder=stand_in_weights, precision="fp32")
    mixture, rate = soundfile.read(shared("golden", "long.wav"), dtype="float32")
    with np.load(shared("golden", "long.npz")) as published:
        # Networks of each kind pass over it for the vocals alone; what the other stems add is in the stages.
        golden.check(model.separator, mixture, rate, {"vocals": published["vocals"]})
