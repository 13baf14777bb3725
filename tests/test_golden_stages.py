"""Leaderboard C number for number, every stage of it, with stand-in weights in the author's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import decibels, shared

from kmdx.errors import KmdxWarning
from my_submission.music_separation_model import MusicSeparationModel


def test_every_stage_is_the_published_one(stand_in_weights: Path) -> None:
    with pytest.warns(KmdxWarning, match="unknown content"):
        model = MusicSeparationModel("leaderboard_c", device="cpu", folder=stand_in_weights)
    with np.load(shared("golden", "stages.npz")) as golden:
        mixture, rate = soundfile.read(shared("golden", "mixture.wav"))
        signals = model.separator.signals(mixture, rate, golden.files)
        measured = {name: decibels(golden[name], signals[name]) for name in golden.files}
    assert len(measured) == 12
    assert min(measured.values()) > 80, measured
