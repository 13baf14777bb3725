"""Leaderboard C number for number, every stage of it, with stand-in weights in the author's layout."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
import soundfile
from conftest import shared

from kmdx.errors import KmdxWarning
from my_submission.music_separation_model import MusicSeparationModel

pytestmark = pytest.mark.slow


def test_every_stage_matches_the_published_submission(stand_in_weights: Path) -> None:
    with pytest.warns(KmdxWarning, match="unknown content"):
        model = MusicSeparationModel("leaderboard_c", device="cpu", folder=stand_in_weights, precision="fp32")
    mixture, rate = soundfile.read(shared("golden", "mixture.wav"), dtype="float32")
    with np.load(shared("golden", "stages.npz")) as published:
        assert len(published.files) == 12
        golden.check(model.separator, mixture, rate, dict(published))
