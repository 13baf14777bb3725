"""The public class: any rate and channel count, subsets of stems, files, silence, missing weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import separator_cases
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise

from kmdx import Separator, audio, signals
from kmdx.errors import (
    AudioError,
    DeviceError,
    KmdxWarning,
    PlanError,
    WeightsError,
)

separator, whole = separator_cases.separator, separator_cases.whole


def test_stems_have_the_songs_shape_and_the_song_is_unchanged(separator: Separator) -> None:
    song = noise(40_000)
    before = song.copy()
    stems = separator.separate(song, 44100)
    assert list(stems) == ["bass", "drums", "other", "vocals", "accompaniment"]
    for stem in stems.values():
        assert stem.shape == song.shape
        assert stem.dtype == np.float32
        assert stem.flags.c_contiguous
    assert np.array_equal(song, before)


def test_stems_of_the_staged_plan_and_the_accompaniment_add_up(separator: Separator) -> None:
    song = noise(40_000)
    stems = separator.separate(song, 44100)
    mean = song.mean(1).mean()
    four = sum(stems[name] - mean for name in ("bass", "drums", "other", "vocals"))
    assert decibels(song - mean, four) > 90, "what is left is what is left"
    assert np.array_equal(stems["accompaniment"], song - stems["vocals"])


def test_the_same_song_gives_the_same_stems(separator: Separator) -> None:
    song = noise(30_000)
    first, second = (separator.separate(song, 44100, stems=["vocals"])["vocals"] for _ in range(2))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("rate", [8_000, 22_050, 48_000, 192_000])
def test_other_rates_keep_rate_and_length(separator: Separator, rate: int) -> None:
    song = noise(rate // 2 + 7)
    stems = separator.separate(song, rate, stems=["vocals", "accompaniment"])
    assert stems["vocals"].shape == song.shape
    assert decibels(song, stems["vocals"] + stems["accompaniment"]) > 120


def test_resampling_both_ways_equals_resampling_by_hand(separator: Separator) -> None:
    song = noise(24_000)
    by_hand = separator.separate(audio.resample(song, 48_000, 44_100), 44_100, stems=["drums"])["drums"]
    direct = separator.separate(song, 48_000, stems=["drums"])["drums"]
    assert np.array_equal(direct, audio.resample(by_hand, 44_100, 48_000, len(song)))


@pytest.mark.parametrize("shape", [(30_000,), (30_000, 1)])
def test_mono_is_separated_as_two_equal_channels(separator: Separator, shape: tuple[int, ...]) -> None:
    mono = noise(30_000, 1)
    stems = separator.separate(mono.reshape(shape), 44100)
    stereo = separator.separate(np.repeat(mono, 2, 1), 44100)
    for name, stem in stems.items():
        assert stem.shape == (30_000, 1)
        if name != "accompaniment":
            assert np.allclose(stem, stereo[name].mean(1, keepdims=True), atol=1e-7)


def test_silence_gives_silence(separator: Separator) -> None:
    for stem in separator.separate(np.zeros((30_000, 2)), 44100).values():
        assert stem.shape == (30_000, 2)
        assert not stem.any()


@pytest.mark.parametrize("samples", [2, 3, 100, 22_049, 22_050, 22_051, 2 * 22_050])
def test_songs_about_as_long_as_a_segment_are_separated(separator: Separator, samples: int) -> None:
    stems = separator.separate(noise(samples), 44100)
    assert all(stem.shape == (samples, 2) and np.isfinite(stem).all() for stem in stems.values())


@pytest.mark.parametrize("samples", [2, tiny.CHUNK, tiny.CHUNK - 2 * 109, 2 * (tiny.CHUNK - 2 * 93)])
def test_songs_of_whole_chunks_or_two_samples_are_separated(whole: Separator, samples: int) -> None:
    stems = whole.separate(noise(samples), 44100)
    assert all(stem.shape == (samples, 2) and np.isfinite(stem).all() for stem in stems.values())


def test_a_separator_loads_only_what_its_stems_need(leaderboard: Path) -> None:
    vocals = Separator(leaderboard, device="cpu", stems=["vocals"])
    assert set(vocals.networks) == {"mdx_vocals", "ft_vocals", "mmi", "extra"}
    with pytest.raises(PlanError, match="unknown stem 'bass'"):
        vocals.separate(noise(1000), 44100, stems=["bass"])
    with pytest.raises(PlanError, match="did not load"):
        vocals.signals(noise(1000), 44100, ["demucs_bass"])


def test_any_signal_of_the_plan_is_available(whole: Separator) -> None:
    song = noise(20_000)
    signals = whole.signals(song, 44100, ["mdx_vocals", "demucs_vocals", "vocals", "M.bass"])
    assert decibels(signals["vocals"], 0.88 * signals["mdx_vocals"] + 0.12 * signals["demucs_vocals"]) > 120
    assert signals["M.bass"].shape == song.shape


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((0, 2)), "no samples"),
        (np.zeros((1, 2)), "1 sample, expected at least 2"),
        (np.full((100, 2), np.nan), "NaN"),
        (np.zeros((100, 3)), "3 channels"),
        (np.zeros((2, 44100)), "transpose"),
        ("song", "samples are"),
    ],
)
def test_arrays_that_are_not_songs_are_refused(separator: Separator, samples: object, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        separator.separate(samples, 44100)  # type: ignore[arg-type]


def test_a_part_of_a_file_is_separated(separator: Separator, tmp_path: Path) -> None:
    song = noise(44_100)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    stems, rate = separator.separate_file(tmp_path / "song.wav", start=0.25, duration=0.5, stems=["vocals"])
    assert rate == 44100
    expected = separator.separate(song[11_025 : 11_025 + 22_050], 44100, stems=["vocals"])
    assert np.array_equal(stems["vocals"], expected["vocals"])


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match="^unknown device 'toaster'; use auto, cpu, cuda or cuda:N$"):
        Separator("htdemucs", device="toaster")
    with pytest.raises(DeviceError, match="device 'meta' is not available"):
        Separator("htdemucs", device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="device 'cuda:0' is not available"):
            Separator("htdemucs", device="cuda:0")


def test_missing_weights_are_reported_with_the_command_that_gets_them_and_their_size(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        Separator("leaderboard_c", folder=tmp_path)
    message = str(caught.value)
    assert "10 of the weights that leaderboard_c needs are not in" in message
    assert "kmdx models pull leaderboard_c" in message
    assert "MB" in message
    with pytest.raises(WeightsError, match="htdemucs is missing: looked for .*kmdx models pull htdemucs"):
        Separator("htdemucs", folder=tmp_path)


def test_the_error_lists_only_missing_weights(leaderboard: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        Separator("leaderboard_c", folder=tmp_path, stems=["vocals"])
    assert "`kmdx models pull mdx_vocals htdemucs_ft_vocals hdemucs_mmi mdx_extra_a1d90b5c`" in str(
        caught.value
    )
    assert "(about 486 MB)" in str(caught.value)
    with pytest.raises(WeightsError, match=r"`kmdx models pull htdemucs` downloads it \(about 84 MB\)"):
        Separator("htdemucs", folder=tmp_path)


def test_networks_with_the_same_weights_are_loaded_once(tmp_path: Path) -> None:
    path = tiny.write_htdemucs(tmp_path)
    content = yaml.safe_load(path.read_text("utf-8"))
    twin = copy.deepcopy(content["networks"]["htdemucs"])
    twin["overlap_add"]["overlap"] = 0.5
    content["networks"]["twin"] = twin
    content["signals"]["D"]["network"] = "twin"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    networks = Separator(path, device="cpu").networks
    assert networks["htdemucs"] is networks["twin"]


def test_a_network_whose_rate_differs_from_the_plan_is_refused(tmp_path: Path) -> None:
    path = tiny.write_htdemucs(tmp_path)
    path.write_text(path.read_text("utf-8").replace("sample_rate: 44100", "sample_rate: 48000"), "utf-8")
    with pytest.raises(PlanError, match="needs 44100 Hz, but the plan's sample rate is 48000 Hz"):
        Separator(path, device="cpu")


@pytest.mark.parametrize(
    ("peak", "words"),
    [
        (8.5, "peaks at 8.5, expected about 1; its stems may be wrong; scale it to a peak of 1"),
        (32767, "peaks at 32767, expected about 1; its stems may be wrong; if it contains 16-bit values stored as floats,"),
        (33000, "divide it by 32768"),
        (-8388608, "24-bit values stored as floats, divide it by 8388608"),
        (2e9, "32-bit values stored as floats, divide it by 2147483648"),
        (1e12, "scale it to a peak of 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limit", [1, signals.LIMIT])  # in a scratch file, and in memory
def test_a_song_far_beyond_full_scale_gives_one_warning(
    separator: Separator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float, words: str, limit: int
) -> None:
    monkeypatch.setattr(signals, "LIMIT", limit)
    song = np.zeros((9000, 1), np.float32)
    song[4321] = peak
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    with pytest.warns(KmdxWarning) as of_array:
        separator.separate(song, 44100, stems=["vocals"])
    with pytest.warns(KmdxWarning) as of_file:
        separator.separate_file(tmp_path / "song.wav", stems=["vocals"])
    for caught, name in ((of_array, "the song"), (of_file, tmp_path / "song.wav")):
        (warning,) = caught
        assert str(warning.message).startswith(f"{name}: peaks at ")
        assert words in str(warning.message)


def test_eight_times_full_scale_and_integers_give_no_warning(
    separator: Separator, recwarn: pytest.WarningsRecorder
) -> None:
    separator.separate(np.full((9000, 1), -8.0), 44100, stems=["vocals"])
    separator.separate(np.full((9000, 1), -(2**15), np.int16), 44100, stems=["vocals"])
    assert not recwarn.list


@pytest.mark.parametrize("how", ["truncated", "empty", "another network's", "text", "an attack"])
def test_bad_weights_are_a_one_line_error_and_nothing_runs(tmp_path: Path, how: str) -> None:
    plan = tiny.write_htdemucs(tmp_path)
    message = tiny.spoil(tmp_path / "small.ckpt", how)
    with pytest.raises(WeightsError, match=message) as caught:
        Separator(plan, device="cpu")
    assert "\n" not in str(caught.value)
    assert "small.ckpt" in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("options", [{}, {"engine": "plain"}, {"precision": "bf16"}], ids=str)
def test_a_song_gives_the_same_bits_after_any_other_songs(small: Path, options: dict) -> None:
    song = noise(25_000)
    separator = Separator(small, device="cpu", stems=["vocals", "drums"], **options)
    alone = separator.separate(song, 44100)
    separator.separate(noise(40_000, 1, seed=1), 32_000)
    separator.separate(np.zeros((5000, 2)), 44100)
    with pytest.raises(AudioError):
        separator.separate(np.full((100, 2), np.nan), 44100)
    after = separator.separate(song, 44100)
    assert all(np.array_equal(alone[name], after[name]) for name in alone)
