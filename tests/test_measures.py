"""SI-SDR, log-WMSE and the spectral measures: known answers, and the numbers of the reference packages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import noise

from evaluator.measures import blocks, spectral, waveform

RATE = 44100
SPECTRAL = {
    "l1_freq": spectral.l1_freq,
    "aura_stft": spectral.aura_stft,
    "aura_mrstft": lambda truth, guess: spectral.aura_mrstft(truth, guess, RATE),
    "bleedless": lambda truth, guess: spectral.bleedless_and_fullness(truth, guess, RATE)["bleedless"],
    "fullness": lambda truth, guess: spectral.bleedless_and_fullness(truth, guess, RATE)["fullness"],
}


def sweep(low: float, high: float, samples: int = RATE, level: float = 0.1) -> np.ndarray:
    """A stereo sweep over harmonics, the same on every machine."""
    t = np.arange(samples) / RATE
    phase = 2 * np.pi * (low * t + (high - low) * t**2 / 2)
    sides = [sum(np.sin(k * phase + side) / k for k in range(1, 12)) for side in (0, 1)]
    return (level * np.stack(sides, axis=1)).astype(np.float32)


def example() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A stem, an estimate with another stem in it and a part missing, and the mixture."""
    truth, rest = sweep(100, 900), sweep(1500, 300)
    guess = (0.8 * truth + 0.2 * rest).astype(np.float32)
    guess[20_000:25_000] *= 0.1
    return truth, guess, truth + rest


def test_the_metrics_match_msst_and_its_packages() -> None:
    """Its formulas with auraloss 0.4.0, librosa 0.11.0, torchaudio 2.11.0 and torch-log-wmse 0.3.1."""
    truth, guess, mixture = example()
    expected = {
        "l1_freq": 21.12941,
        "aura_stft": 5.68813,
        "aura_mrstft": 4.61374,
        "bleedless": 4.39204,
        "fullness": 26.53699,
        "si_sdr": 7.70446,
        "log_wmse": 9.84583,
    }
    measured = {name: measure(truth, guess) for name, measure in SPECTRAL.items()}
    measured["si_sdr"] = waveform.si_sdr(truth, guess)
    measured["log_wmse"] = waveform.log_wmse(truth, guess, mixture, RATE)
    assert measured == pytest.approx(expected, abs=2e-4)


def test_si_sdr_is_the_level_of_what_is_orthogonal() -> None:
    t = np.arange(RATE) / RATE
    truth, error = (np.stack([np.sin(2 * np.pi * f * t)] * 2, axis=1).astype(np.float32) for f in (100, 300))
    for scale in (0.1, 1.0, -3.0):
        assert waveform.si_sdr(truth, scale * (truth + 0.1 * error)) == pytest.approx(20, abs=1e-4)


def test_si_sdr_penalizes_a_balance_error() -> None:
    truth = np.repeat(noise(5_000, 1), 2, axis=1)
    assert waveform.si_sdr(truth, truth * np.float32([1, 0])) == pytest.approx(0, abs=1e-4)


def test_si_sdr_of_silence_is_minus_80_and_undefined_against_silence() -> None:
    truth = noise(5_000)
    assert waveform.si_sdr(truth, 0 * truth) == -80
    assert math.isnan(waveform.si_sdr(0 * truth, truth))
    assert math.isfinite(waveform.si_sdr(truth, truth))


def test_log_wmse_of_a_tone_is_its_weighted_level_at_every_rate() -> None:
    for rate in (44100, 48000, 22050):
        t = np.arange(2 * rate) / rate
        mixture, error = (np.sin(2 * np.pi * f * t)[:, None].astype(np.float32) for f in (1000, 5000))
        gain = ear_gain(5000) / ear_gain(1000)
        expected = -4 * math.log((0.1 * gain) ** 2)
        measured = waveform.log_wmse(mixture, mixture + 0.1 * error, mixture, rate)
        assert measured == pytest.approx(expected, abs=0.02)


def ear_gain(frequency: float) -> float:
    taps = waveform.ear_filter(RATE)
    return abs(np.exp(-2j * np.pi * frequency / RATE * np.arange(len(taps))) @ taps)


def test_the_weighting_filter_has_the_published_shape() -> None:
    """A shelf of +5 dB, a high-pass, a peak at 500 Hz, -6 dB at 10 kHz."""
    levels = {f: 20 * math.log10(ear_gain(f)) for f in (30, 120, 500, 1000, 4000, 10_000, 20_000)}
    expected = {30: -24.2, 120: -2.8, 500: 2.6, 1000: 1.3, 4000: 4.0, 10_000: -1.0, 20_000: -31.0}
    assert levels == pytest.approx(expected, abs=0.3)


def test_log_wmse_filters_a_long_song_as_a_short_one() -> None:
    truth, guess, mixture = (noise(150_000, 2, seed) for seed in range(3))
    taps = waveform.ear_filter(RATE)
    loudness, error = (
        np.stack([np.convolve(x[:, side], taps, "same") for side in (0, 1)])
        for x in (mixture.astype(np.float64), guess.astype(np.float64) - truth)
    )
    scaled = error / np.sqrt(np.mean(loudness**2, axis=1, keepdims=True))
    expected = np.mean(-4 * np.log(np.mean(scaled**2, axis=1) + 1e-8))
    assert waveform.log_wmse(truth, guess, mixture, RATE) == pytest.approx(expected, abs=1e-5)


def test_log_wmse_is_at_its_highest_where_the_error_is_inaudible() -> None:
    mixture = noise(10_000)
    highest = pytest.approx(-4 * math.log(1e-8))
    assert waveform.log_wmse(0 * mixture, 0 * mixture, mixture, RATE) == highest
    assert waveform.log_wmse(mixture, mixture * np.float32(1 + 1e-5), mixture, RATE) == highest
    assert waveform.log_wmse(0 * mixture, 0 * mixture, 0 * mixture, RATE) == highest


def test_a_gain_counts_only_as_bleed_or_only_as_missing_signal() -> None:
    truth = noise(30_000)
    for gain in (2.0, 0.5):
        values = spectral.bleedless_and_fullness(truth, (gain * truth).astype(np.float32), RATE)
        lost = 100 / (1 + 20 * math.log10(2))
        bleedless, fullness = (lost, 100) if gain > 1 else (100, lost)
        assert values == pytest.approx({"bleedless": bleedless, "fullness": fullness}, abs=1e-3)


def test_l1_frequency_of_silence_is_the_mean_magnitude_of_the_stem() -> None:
    truth = noise(30_000)
    mean = np.mean([np.abs(plain_spectrum(truth[:, side])).mean() for side in (0, 1)])
    assert spectral.l1_freq(truth, 0 * truth) == pytest.approx(100 / (1 + 10 * mean), abs=1e-4)


def plain_spectrum(signal: np.ndarray, size: int = 2048, hop: int = 1024) -> np.ndarray:
    padded = np.pad(signal, size // 2, mode="reflect")
    return np.array([np.fft.rfft(padded[at : at + size]) for at in range(0, len(padded) - size + 1, hop)])


def test_aura_stft_of_half_the_level_is_the_formula() -> None:
    """Spectral convergence 1 (the norm of the difference is the estimate's) plus ln 2."""
    truth = noise(30_000, level=0.5)
    expected = 100 / (1 + 10 * (1 + math.log(2)))
    assert spectral.aura_stft(truth, truth / 2) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_perfect_estimate_has_100_percent(name: str) -> None:
    truth = noise(20_000)
    assert SPECTRAL[name](truth, truth) == 100


@pytest.mark.parametrize("name", SPECTRAL)
def test_silence_has_a_value(name: str) -> None:
    truth = noise(20_000)
    for reference, estimate in ((truth, 0 * truth), (0 * truth, truth), (0 * truth, 0 * truth)):
        assert 0 <= SPECTRAL[name](reference, estimate) <= 100


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("samples", [1, 2, 700])
def test_a_song_shorter_than_a_frame_has_a_value(name: str, samples: int) -> None:
    truth = noise(samples, 1)
    assert 0 < SPECTRAL[name](truth, truth / 2) <= 100


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_metrics_do_not_depend_on_the_block_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, guess, _ = example()
    whole = SPECTRAL[name](truth, guess)
    monkeypatch.setattr(blocks, "VALUES", 5 * 1025)
    assert SPECTRAL[name](truth, guess) == pytest.approx(whole, abs=1e-5)


def test_waveform_metrics_do_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, guess, mixture = example()
    whole = waveform.si_sdr(truth, guess), waveform.log_wmse(truth, guess, mixture, RATE)
    monkeypatch.setattr(waveform, "BLOCK", 1000)
    monkeypatch.setattr(waveform, "EAR_FFT", 8192)
    parts = waveform.si_sdr(truth, guess), waveform.log_wmse(truth, guess, mixture, RATE)
    assert parts == pytest.approx(whole, abs=1e-9)


def test_every_mel_filter_has_an_area_of_one() -> None:
    bank = blocks.mel_bank(RATE, 4096, 40)
    assert bank.shape == (40, 2049)
    np.testing.assert_allclose(bank.sum(dim=1) * RATE / 4096, 1, atol=0.02)


def test_mel_filters_are_even_in_hertz_below_1_khz_and_in_octaves_above() -> None:
    bins = torch.arange(2049) * RATE / 4096
    bank = blocks.mel_bank(RATE, 4096, 40)
    centers = ((bank * bins).sum(dim=1) / bank.sum(dim=1)).numpy()
    np.testing.assert_allclose(np.diff(centers[:9]), 97.5, atol=4)
    ratios = centers[16:] / centers[15:-1]
    np.testing.assert_allclose(ratios, ratios[0], rtol=0.005)


def test_mel_filters_without_a_bin_are_left_out() -> None:
    assert len(blocks.mel_bank(192_000, 1024, 128)) < 128
    truth = noise(20_000)
    assert 0 < spectral.aura_mrstft(truth, truth / 2, 192_000) < 100


@pytest.mark.parametrize("rate", [44100, 48000])
def test_the_a_weighting_filter_is_the_least_squares_fit_of_scipy(rate: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    poles = -2 * np.pi * np.array([20.598997] * 2 + [12194.217] * 2 + [107.65265, 737.86223])
    gain = (2 * np.pi * 12194.217) ** 2 * 10 ** (1.9997 / 20)
    b, a = signal.zpk2tf(*signal.bilinear_zpk([0] * 4, poles, gain, rate))
    frequencies, response = signal.freqz(b, a, 512, fs=rate)
    expected = signal.firls(101, frequencies, abs(response), fs=rate)
    np.testing.assert_allclose(spectral.a_weighting(rate), expected, atol=1e-6)


def test_arrays_of_other_shapes_are_refused() -> None:
    truth, guess = noise(900), noise(901)
    for measure in [*SPECTRAL.values(), waveform.si_sdr]:
        with pytest.raises(ValueError, match="differ in shape"):
            measure(truth, guess)
    with pytest.raises(ValueError, match="differ in shape"):
        waveform.log_wmse(truth, truth, guess, RATE)
    with pytest.raises(ValueError, match=r"expected \(samples, channels\)"):
        waveform.si_sdr(truth[:, 0], truth[:, 0])
