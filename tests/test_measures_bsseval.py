"""ISR, SIR and SAR against museval, and against least squares on written-out delays where it has no answer."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from conftest import noise

from evaluator.measures import bsseval as module
from evaluator.measures.bsseval import METRICS, bsseval

RATE, TAPS = 2000, 16
Stems = Mapping[str, np.ndarray]


def song(seconds: float = 3.2, channels: int = 2) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Three stems, and estimates with the others, a filter and noise in them."""
    samples = int(seconds * RATE)
    truths = {stem: noise(samples, channels, seed) for seed, stem in enumerate(("bass", "drums", "vocals"))}
    mixture = sum(truths.values())
    guesses = {
        stem: (0.7 * truth + 0.2 * np.roll(truth, 2, axis=0) + 0.1 * mixture).astype(np.float32)
        + noise(samples, channels, 9, 0.01)
        for stem, truth in truths.items()
    }
    return truths, guesses


def museval_frames(references: Stems, estimates: Stems) -> np.ndarray:
    """``(metrics, stems, frames)`` of museval, of which the module that computes needs no ffmpeg."""
    package = importlib.util.find_spec("museval")
    if package is None or package.origin is None:
        pytest.skip("museval is not installed")
    spec = importlib.util.spec_from_file_location("bss", Path(package.origin).with_name("metrics.py"))
    assert spec is not None
    assert spec.loader is not None
    museval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(museval)
    arrays = [np.array([stems[stem] for stem in references], np.float64) for stems in (references, estimates)]
    return np.array(museval.bss_eval(*arrays, window=RATE, hop=RATE, filters_len=TAPS)[1:4])


def values(scores: dict[str, dict[str, list[float]]]) -> np.ndarray:
    """``(metrics, stems, frames)``."""
    return np.array([[frames[metric] for frames in scores.values()] for metric in METRICS])


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 3.2])
def test_every_frame_matches_museval(seconds: float, channels: int) -> None:
    truths, guesses = song(seconds, channels)
    expected = museval_frames(truths, guesses)
    np.testing.assert_allclose(values(bsseval(truths, guesses, RATE, TAPS)), expected, rtol=0, atol=1e-7)


def test_frames_with_a_silent_file_have_no_value_as_in_museval() -> None:
    truths, guesses = song()
    truths["bass"][:RATE] = 0
    guesses["drums"][2 * RATE :, 1] = -guesses["drums"][2 * RATE :, 0]  # museval adds up the channels
    measured = values(bsseval(truths, guesses, RATE, TAPS))
    assert np.isnan(measured).all(axis=(0, 1)).tolist() == [True, False, True]
    np.testing.assert_allclose(measured, museval_frames(truths, guesses), rtol=0, atol=1e-7)


def test_a_song_with_a_silent_file_has_no_values() -> None:
    truths, guesses = song()
    guesses["bass"][:] = 0
    assert np.isnan(values(bsseval(truths, guesses, RATE, TAPS))).all()


def least_squares(references: Stems, guess: np.ndarray, stem: str) -> list[float]:
    """ISR, SIR and SAR of a song of one frame: projections by an orthogonal basis of the delays."""

    def delayed(stems: list[np.ndarray]) -> np.ndarray:
        columns = [channel for truth in stems for channel in truth.T.astype(np.float64)]
        return np.array([np.pad(c, (k, TAPS - 1 - k)) for c in columns for k in range(TAPS)]).T

    def project(stems: list[np.ndarray], target: np.ndarray) -> np.ndarray:
        left, sizes, _ = np.linalg.svd(delayed(stems), full_matrices=False)
        basis = left[:, sizes > 1e-9 * sizes[0]]
        return basis @ (basis.T @ target)

    true, target = (np.pad(x.astype(np.float64), ((0, TAPS - 1), (0, 0))) for x in (references[stem], guess))
    own, everything = project([references[stem]], target), project(list(references.values()), target)
    parts = [(true, own - true), (own, everything - own), (everything, target - everything)]
    return [10 * math.log10(np.square(a).sum() / np.square(b).sum()) for a, b in parts]


@pytest.mark.parametrize("kind", ["equal channels", "a silent channel", "two equal stems"])
def test_references_that_depend_on_each_other_have_values(kind: str) -> None:
    truths, guesses = song(1.0)
    if kind == "two equal stems":
        truths["drums"] = truths["vocals"]
    else:
        truths["vocals"][:, 1] = truths["vocals"][:, 0] if kind == "equal channels" else 0
    scores = bsseval(truths, guesses, RATE, TAPS)
    for stem in truths:
        expected = least_squares(truths, guesses[stem], stem)
        measured = [scores[stem][metric][0] for metric in METRICS]
        assert measured == pytest.approx(expected, abs=1e-5)


def test_references_that_nearly_depend_on_each_other_score_as_if_they_did() -> None:
    """The filters of museval grow so much there that artifacts of frames are as loud as the song."""
    truths, guesses = song(4.0)
    truths["vocals"][:, 1] = truths["vocals"][:, 0]
    expected = values(bsseval(truths, guesses, RATE, TAPS))
    truths["vocals"][:, 1] *= np.float32(1 + 1e-7)
    np.testing.assert_allclose(values(bsseval(truths, guesses, RATE, TAPS)), expected, rtol=0, atol=0.05)


def test_stems_without_an_estimate_count_as_interference() -> None:
    truths, guesses = song()
    full = bsseval(truths, guesses, RATE, TAPS)
    alone = bsseval(truths, {"drums": guesses["drums"]}, RATE, TAPS)
    assert list(alone) == ["drums"]
    for metric in METRICS:
        assert alone["drums"][metric] == pytest.approx(full["drums"][metric], abs=1e-9)


def test_a_song_of_one_stem_has_no_interference_to_measure() -> None:
    truths, guesses = song()
    scores = bsseval({"bass": truths["bass"]}, {"bass": guesses["bass"]}, RATE, TAPS)["bass"]
    assert np.isnan(scores["museval_sir"]).all()
    assert np.isfinite(scores["museval_isr"] + scores["museval_sar"]).all()


def test_correlations_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    truths, guesses = song()
    signals = np.concatenate([*truths.values(), *guesses.values()], axis=1).astype(np.float64)
    monkeypatch.setattr(module, "FFT", 64)
    monkeypatch.setattr(module, "BLOCKS", 3)
    lags = module._correlations(list(truths.values()), list(guesses.values()), TAPS)
    for lag in (0, 1, TAPS - 1):
        expected = signals[: len(signals) - lag, :6].T @ signals[lag:]
        np.testing.assert_allclose(lags[lag], expected, atol=1e-9)


def test_transform_sizes_are_even_and_large_enough() -> None:
    for least in (1, 2, 3, 1023, 44611, 48511, 96511):
        size = module._fast_size(least)
        assert size >= least
        assert size % 2 == 0
        assert size <= 2 * least or least == 1


def test_estimates_without_a_reference_and_other_lengths_are_refused() -> None:
    truths, guesses = song()
    with pytest.raises(ValueError, match="guitar"):
        bsseval(truths, {"guitar": guesses["bass"]}, RATE)
    with pytest.raises(ValueError, match="one shape"):
        bsseval(truths, {"bass": guesses["bass"][1:]}, RATE)
