"""Warnings about songs: each text is recognized, and frames that museval excludes are reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import noise

from evaluator import song_warnings
from evaluator.scoring import score_song
from evaluator.song_warnings import summary_of

VALUES = {"stem": "a: b\nc", "share": 0.5, "count": 3, "total": 10, "metric": "museval SDR"}


@pytest.mark.parametrize("kind", song_warnings.ALL)
def test_every_kind_of_warning_is_recognized_by_its_text(kind: song_warnings.Kind) -> None:
    text = kind.of(**VALUES)
    assert [each for each in song_warnings.ALL if each.pattern.fullmatch(text)] == [kind]
    assert summary_of(text) == (kind.summary or text)


def test_an_unknown_warning_is_its_own_summary() -> None:
    assert summary_of("something new") == "something new"


def test_frames_excluded_by_a_silent_estimate_are_reported(tmp_path: Path) -> None:
    """If an estimate is exactly silent in a frame, museval's median excludes that frame."""
    rate = 8000
    truth = noise(6 * rate)
    guess = truth + 0.1 * noise(6 * rate, seed=1)
    guess[2 * rate : 4 * rate] = 0
    files = {}
    for name, samples in (("truth", truth), ("guess", guess)):
        files[name] = tmp_path / f"{name}.wav"
        soundfile.write(files[name], samples, rate, "FLOAT")
    score = score_song({"vocals": files["truth"]}, {"vocals": files["guess"]})
    assert np.isnan(score.frames["museval_sdr"]["vocals"]).sum() == 2
    assert score.warnings == [
        "vocals: the estimate is silent in 2 of 6 frames and the reference is not; "
        "museval's median leaves these frames out"
    ]
    assert score_song({"vocals": files["truth"]}, {"vocals": files["truth"]}).warnings == []
