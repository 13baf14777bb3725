"""Arrays, resampling, and sounds too long for memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
from conftest import is_scratch
from sound_cases import RATE, beyond_full_scale, encode, refusal, tone

from kmdx import audio, decoding, signals


def test_check_returns_a_valid_array_unchanged():
    samples = tone()
    assert audio.check(samples, "song") is samples


@pytest.mark.parametrize(
    ("given", "shape"),
    [(np.zeros(5), (5, 1)), ([0.0, 0.5], (2, 1)), (np.zeros((5, 2)), (5, 2)), (np.zeros((2, 9)).T, (9, 2))],
)
def test_check_returns_float32_of_shape_samples_and_channels(given, shape):
    checked = audio.check(given, "song")
    assert checked.shape == shape
    assert checked.dtype == np.float32
    assert checked.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_check_scales_integers_as_soundfile_does(tmp_path, dtype):
    sf.write(tmp_path / "a.wav", tone(), RATE, subtype={"int16": "PCM_16", "int32": "PCM_32"}[dtype])
    integers = sf.read(tmp_path / "a.wav", dtype=dtype)[0]
    np.testing.assert_array_equal(
        audio.check(integers, "song"), sf.read(tmp_path / "a.wav", dtype="float32")[0]
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((2, 441000)), "shape (2, 441000), expected (samples, channels): transpose it"),
        (np.zeros((1, 441000)), "transpose it"),
        (np.zeros((100, 6)), "6 channels, expected 1 or 2"),
        (np.zeros((2, 3, 4)), "shape (2, 3, 4), expected (samples, channels)"),
        (np.float32(1), "shape ()"),
        (np.zeros((0, 2)), "contains no samples"),
        (np.zeros((5, 0)), "contains no samples"),
        (np.zeros((1, 2)), "1 sample, expected at least 2"),
        (np.zeros(5, np.uint8), "samples are uint8, expected floats in [-1, 1], int16 or int32"),
        (np.zeros(5, np.int64), "samples are int64"),
        (np.zeros(5, complex), "samples are complex128"),
        (["a", "b"], "samples are <U1"),
        ([[0.0, 0.1], [0.2]], "not an array of numbers"),
        (None, "samples are object"),
        ([0.0, float("nan")], "NaN or infinity in 1 of 2 samples, first at sample 1"),
        ([0.0, 1e300], "NaN or infinity in 1 of 2"),
    ],
)
def test_check_refuses_arrays_that_are_not_songs(given, words):
    message = refusal(audio.check, given, "vocals")
    assert message.startswith("vocals: ")
    assert words in message


@pytest.mark.parametrize("rate", [8000, 22050, 48000, 96000, 192000])
def test_resampling_there_and_back_keeps_amplitude_and_alignment(rate):
    samples = tone(1.0, frequency=500)
    there = audio.resample(samples, RATE, rate)
    assert there.dtype == np.float32
    assert len(there) == rate
    inner = slice(rate // 10, -rate // 10)
    expected = tone(1.0, rate=rate, frequency=500)
    np.testing.assert_allclose(there[inner], expected[inner], atol=1e-4)
    back = audio.resample(there, rate, RATE, length=len(samples))
    assert back.shape == samples.shape
    np.testing.assert_allclose(back[4410:-4410], samples[4410:-4410], atol=1e-4)


def test_resampling_to_the_same_rate_returns_the_input():
    samples = tone()
    assert audio.resample(samples, RATE, RATE) is samples
    assert audio.resample(samples, RATE, RATE, length=len(samples)) is samples


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("length", [3, 48000])
def test_resampling_can_produce_a_given_length(channels, length):
    output = audio.resample(tone(channels=channels), RATE, 48000, length)
    assert output.shape == (length, channels)
    assert not output[25000:].any()


def test_two_samples_can_be_resampled():
    assert audio.resample(np.zeros((2, 1), np.float32), 192000, 8000, length=1).shape == (1, 1)


@pytest.mark.parametrize("rate", [0, -44100, 44100.5, float("nan"), float("inf")])
def test_rates_that_are_not_positive_whole_numbers_are_refused(tmp_path, rate):
    assert "expected a whole number above 0" in refusal(audio.resample, tone(), rate, RATE)
    assert "expected a whole number above 0" in refusal(audio.resample, tone(), RATE, rate)
    assert "expected a whole number above 0" in refusal(audio.write, tmp_path / "a.wav", tone(), rate)


@pytest.fixture
def long(monkeypatch) -> None:
    """Every song longer than 0.05 s counts as long."""
    monkeypatch.setattr(signals, "LIMIT", 8 * RATE // 20)
    monkeypatch.setattr(decoding, "DECODED", 1000)


@pytest.mark.parametrize(
    "name", ["a.wav", "a.flac", "a.ogg", "a.aiff", "a.caf", "a.w64", "a.au", "a.opus", "a.mp3", "a.m4a"]
)
@pytest.mark.parametrize(("start", "duration"), [(0.0, None), (0.1, 0.25), (0.4, 9.0)])
def test_a_long_file_is_read_into_a_scratch_file(tmp_path, request, name, start, duration):
    path = tmp_path / name
    if name in ("a.mp3", "a.m4a"):
        encode(path, {"a.mp3": "libmp3lame", "a.m4a": "aac"}[name], tone())
    else:
        kind = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
        sf.write(path, tone(), 48000 if kind else RATE, **kind)
    expected = audio.read(path, start, duration)
    assert not is_scratch(expected.samples)
    request.getfixturevalue("long")
    sound = audio.read(path, start, duration)
    assert is_scratch(sound.samples)
    assert sound.rate == expected.rate
    np.testing.assert_array_equal(sound.samples, expected.samples)


def test_surround_in_a_long_file_is_downmixed(tmp_path, request):
    sf.write(tmp_path / "a.wav", tone(channels=6), RATE)
    expected = audio.read(tmp_path / "a.wav", downmix=True).samples
    request.getfixturevalue("long")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav", downmix=True).samples, expected)


@pytest.mark.parametrize("place", [0, 11025, 22049])
def test_nan_is_located_in_a_long_song(tmp_path, long, place):
    samples = tone()
    samples[place, 1] = np.nan
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    expected = f"NaN or infinity in 1 of 22050 samples, first at {place / RATE:.3f} s"
    assert expected in refusal(audio.read, tmp_path / "a.wav")
    many = np.zeros((3 * signals.BLOCK, 1), np.float32)
    many[[-7, -5]] = np.inf
    assert f"in 2 of {len(many)} samples, first at sample {len(many) - 7}" in refusal(
        audio.check, many, "a song"
    )


def test_a_long_file_without_scratch_space_is_refused(tmp_path, monkeypatch, long):
    audio.write(tmp_path / "a.wav", tone(), RATE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    message = refusal(audio.read, tmp_path / "a.wav")
    assert f"in {tmp_path / 'nothing'}; at least" in message
    assert "of scratch space are needed" in message


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("given", "scale"), [("int16", 2**15), ("int32", 2**31), ("float64", 1), (">f4", 1), ("every other", 1)]
)
def test_a_long_array_of_any_kind_becomes_float32(long, given, scale, channels):
    samples = np.tile(tone(channels=channels), (7, 1))  # more than two blocks
    if given == "every other":
        array, expected = samples[::2], samples[::2].copy()
    else:
        array = (samples * scale).astype(given)
        expected = array.astype(np.float32) / np.float32(scale)
    checked = audio.check(array, "song")
    assert is_scratch(checked)
    assert checked.flags.c_contiguous
    np.testing.assert_array_equal(checked, expected)


@pytest.mark.parametrize(
    ("rate_in", "rate_out"),
    [(48000, 44100), (44100, 48000), (96000, 44100), (44100, 192000), (8000, 44100), (44100, 44101)],
)
@pytest.mark.parametrize("length", [2, 3 * signals.BLOCK, 3 * signals.BLOCK + 17])
def test_resampling_in_blocks_equals_resampling_at_once(rate_in, rate_out, length):
    samples = np.random.default_rng(0).uniform(-1, 1, (length, 2)).astype(np.float32)
    expected = soxr.resample(samples, rate_in, rate_out, quality="VHQ")
    output = audio.resample(samples, rate_in, rate_out)
    assert output.shape == expected.shape
    assert np.abs(output - expected).max(initial=0) < 1e-7  # -140 dB; it is 0 on the machines known
    turned = audio.resample(np.ascontiguousarray(samples.T).T, rate_in, rate_out)
    np.testing.assert_array_equal(turned, output)


def test_resampling_a_long_array_fills_a_scratch_file(request):
    expected = audio.resample(tone(), RATE, 48000)
    request.getfixturevalue("long")
    for length in (None, 23_999, 24_000, 24_500):
        output = audio.resample(tone(), RATE, 48000, length)
        assert is_scratch(output)
        assert len(output) == (length or 24_000)
        np.testing.assert_array_equal(output[:24_000], expected[:length])
        assert not output[24_000:].any()
    padded = audio.resample(tone(), RATE, RATE, length=30_000)
    assert is_scratch(padded)
    np.testing.assert_array_equal(padded[:22_050], tone())
    assert not padded[22_050:].any()


@pytest.mark.parametrize("format", audio.FORMATS)
def test_a_scratch_array_is_written_like_any_other(tmp_path, format):
    samples = beyond_full_scale()
    held = signals.empty(samples.shape, limit=0)
    held[:] = samples
    peaks = audio.write_all({tmp_path / "ours": held, tmp_path / "theirs": samples}, RATE, format)
    assert peaks == {tmp_path / "ours": 1e9, tmp_path / "theirs": 1e9}
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
from kmdx import audio, decoding, encoding, signals

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000

signals.LIMIT = 1_000_000
source, folder, format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
audio.resample(audio.read(source, duration=0.1).samples, 48000, 44100)  # their libraries are loaded
audio.write(folder / "short", np.zeros((99, 2)), 44100, format)
before = memory("VmRSS")
sound = audio.read(source)
song = audio.resample(sound.samples, sound.rate, 44100)
audio.write_all({folder / "a": song, folder / "b": song[::-1]}, 44100, format)
print(song.nbytes / 1e6, memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system has no /proc")
@pytest.mark.parametrize(("extension", "format"), [(".wav", "wav16"), (".mp3", "flac"), (".flac", "mp3")])
def test_a_long_song_takes_little_memory(tmp_path, extension, format):
    path = tmp_path / f"song{extension}"
    samples = np.tile(tone(1.0, rate=48000), (60, 1))
    audio.write(path, samples, 48000, {".wav": "wav16", ".flac": "flac", ".mp3": "mp3"}[extension])
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, path, tmp_path, format], capture_output=True, text=True, check=True
    )
    signal, used = map(float, done.stdout.split())
    assert signal > 21
    assert used < 25  # of three signals


def test_audio_does_not_import_torch():
    code = "import sys, kmdx.audio; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
