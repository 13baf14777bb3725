"""Real weights on real songs, through the command and the files that it writes."""

from __future__ import annotations

import sys

import pytest
import soundfile
from conftest import shared

from evaluator.metrics import global_sdr
from kmdx import cli

# Measured with the demucs package alone, staged by hand.
PUBLISHED = {
    "Music Delta - 80s Rock": {"drums": 14.80, "bass": 13.10, "other": 9.01, "vocals": 14.64},
    "The Easton Ellises - Falcon 69": {"drums": 10.38, "bass": 3.59, "other": 0.95, "vocals": 5.08},
}


def test_the_staged_htdemucs_reaches_its_known_scores(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    songs = shared("audio", "musdb18-excerpts")
    monkeypatch.setenv("KMDX_MODELS", str(shared("weights")))
    output = tmp_path / "stems"
    monkeypatch.setattr(sys, "argv", ["kmdx", "separate", str(songs), "-o", str(output), "-e", "htdemucs"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    for name, expected in PUBLISHED.items():
        (reference,), (made,) = songs.glob(f"*/{name}"), output.glob(f"*/{name}")
        for stem, sdr in expected.items():
            truth, estimate = (soundfile.read(folder / f"{stem}.wav")[0] for folder in (reference, made))
            assert global_sdr(truth, estimate) == pytest.approx(sdr, abs=0.05), (name, stem)
