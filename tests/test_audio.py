"""kmdx.audio: what it reads, what it writes, and how it says no."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
import soxr
from conftest import is_scratch

from kmdx import audio, decoding, encoding, signals
from kmdx.errors import AudioError

RATE = 44100


def tone(seconds: float = 0.5, channels: int = 2, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    """Sines of half scale, an octave apart, float32 (samples, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack(
        [0.5 * np.sin(2 * np.pi * frequency * 2**c * time) for c in range(channels)], axis=1
    ).astype(np.float32)


def encode(path: Path, codec: str, samples: np.ndarray, rate: int = RATE) -> Path:
    """Write with FFmpeg what soundfile does not write."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[samples.shape[1]]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate, bit_rate=256_000, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def silent_film(path: Path) -> Path:
    """A video without sound."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", 25, width=64, height=64, pix_fmt="yuv420p")
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        output.mux(stream.encode(frame.reformat(format="yuv420p")))
        output.mux(stream.encode(None))
    return path


def refusal(action, *arguments, **options) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(AudioError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Reading


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_reading_as_float32_equals_reading_float64_and_casting(tmp_path, subtype):
    path = tmp_path / "noise.wav"
    sf.write(path, np.random.default_rng(0).uniform(-1, 1, (5000, 2)), RATE, subtype=subtype)
    expected = sf.read(path)[0].astype(np.float32)
    sound = audio.read(path)
    assert sound.rate == RATE
    assert sound.samples.dtype == np.float32
    np.testing.assert_array_equal(sound.samples, expected)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.aiff", "a.caf", "a.w64", "a.au", "a.opus"])
@pytest.mark.parametrize("channels", [1, 2])
def test_formats_of_libsndfile(tmp_path, name, channels):
    samples = tone(channels=channels, rate=48000)
    kind = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    sf.write(tmp_path / name, samples, 48000, **kind)
    sound = audio.read(tmp_path / name)
    assert sound.rate == 48000
    assert sound.samples.shape == samples.shape
    np.testing.assert_allclose(sound.samples[2000:-2000], samples[2000:-2000], atol=0.02)


def test_mp3_has_neither_encoder_delay_nor_padding(tmp_path):
    samples = tone(1.2345)
    sound = audio.read(encode(tmp_path / "a.mp3", "libmp3lame", samples))
    assert sound.samples.shape == samples.shape
    np.testing.assert_allclose(sound.samples[2000:-2000], samples[2000:-2000], atol=0.005)


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.mkv", "a.mov"])
def test_aac_is_in_time(tmp_path, name):
    samples = tone(channels=1)
    sound = audio.read(encode(tmp_path / name, "aac", samples))
    if name != "a.mkv":  # Matroska has no place for the encoder's delay in a file made this way
        assert 0 <= len(sound.samples) - len(samples) < 1024
        np.testing.assert_allclose(sound.samples[2000:20000], samples[2000:20000], atol=0.01)
    assert sound.samples.shape[1] == 1


@pytest.mark.parametrize("name", ["song.mp3", "song.raw", "song", "a:b.wav", "Grüße, 歌..wav", ".hidden"])
def test_the_content_decides_and_not_the_name(tmp_path, name):
    sf.write(tmp_path / name, tone(), RATE, format="WAV", subtype="PCM_16")
    assert audio.read(tmp_path / name).samples.shape == (22050, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 are a Linux matter")
@pytest.mark.parametrize("extension", [".wav", ".mp3"])
def test_a_name_that_is_not_utf_8(tmp_path, extension):
    path = tmp_path / os.fsdecode(b"caf\xe9" + extension.encode())
    audio.write(path, tone(), RATE, "wav16" if extension == ".wav" else "mp3")
    assert audio.read(path).samples.shape == (22050, 2)


def test_tags_that_are_not_utf_8(tmp_path):
    path = encode(tmp_path / "a.mp3", "libmp3lame", tone())
    content = path.read_bytes()
    assert content.startswith(b"ID3")  # without it FFmpeg reads the old kind of tag, at the end
    path.write_bytes(content[10 + content[9] :] + b"TAG" + b"\xe9\xff" * 60 + bytes(5))
    assert len(audio.read(path).samples) == 22050


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize(("start", "duration"), [(0.0, 0.1), (0.1, 0.25), (0.3, None), (0.4, 9.0)])
def test_a_part_is_that_part_of_the_whole(tmp_path, name, start, duration):
    path = tmp_path / name
    encode(path, "libmp3lame", tone()) if name == "a.mp3" else sf.write(path, tone(), RATE)
    first = round(start * RATE)
    last = None if duration is None else first + round(duration * RATE)
    np.testing.assert_array_equal(
        audio.read(path, start, duration).samples, audio.read(path).samples[first:last]
    )


@pytest.mark.parametrize("extension", ["wav", "mp3"])
@pytest.mark.parametrize(
    ("start", "duration", "words"),
    [
        (-1.0, None, "start -1 s: expected 0 or more"),
        (float("nan"), None, "start nan s"),
        (0.0, 0.0, "duration 0 s: expected more than 0"),
        (0.0, -2.0, "duration -2 s"),
        (0.5, None, "start 0.5 s is past the end at 0.500 s"),
        (0.0, 1e-6, "contains no samples"),
        (0.0, 1 / RATE, "1 sample, expected at least 2"),
    ],
)
def test_parts_that_are_not_there(tmp_path, extension, start, duration, words):
    path = tmp_path / f"a.{extension}"
    audio.write(path, tone(), RATE, "wav16" if extension == "wav" else "mp3")
    assert words in refusal(audio.read, path, start, duration)


def test_files_that_cannot_be_opened(tmp_path):
    assert "no such file" in refusal(audio.read, tmp_path / "absent.wav")
    assert "not a directory" in refusal(audio.read, Path(__file__) / "a.wav")
    assert "found a folder" in refusal(audio.read, tmp_path)
    (tmp_path / "empty.wav").touch()
    assert "empty.wav: expected a sound file, found an empty file" in refusal(
        audio.read, tmp_path / "empty.wav"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert "found a pipe or a device" in refusal(audio.read, tmp_path / "pipe.wav")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    path = tmp_path / "a.wav"
    audio.write(path, tone(), RATE)
    path.chmod(0)
    assert "permission denied" in refusal(audio.read, path)


def test_permission_denied_as_the_system_says_it(tmp_path, monkeypatch):
    audio.write(tmp_path / "a.wav", tone(), RATE)
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(denied))
    assert refusal(audio.read, tmp_path / "a.wav").endswith("a.wav: cannot be read: permission denied")


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.raw", "a.txt", "a"])
@pytest.mark.parametrize("lines", [1, 200])
def test_text_is_not_sound(tmp_path, name, lines, capfd):
    path = tmp_path / name
    path.write_text("Verse, chorus, verse.\n" * lines)
    message = refusal(audio.read, path)
    assert name in message
    assert "not a sound file" in message or "no audio stream" in message  # FFmpeg draws some texts
    assert capfd.readouterr().err == ""


def test_a_playlist_opens_no_other_file(tmp_path):
    encode(tmp_path / "a.mp3", "libmp3lame", tone())
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\n{tmp_path}/a.mp3\n#EXT-X-ENDLIST\n")
    assert "not a sound file" in refusal(audio.read, playlist)


def test_a_silent_film_has_no_audio_stream(tmp_path):
    message = refusal(audio.read, silent_film(tmp_path / "a.mp4"))
    assert "contains no audio stream (streams found: video)" in message


def test_a_file_of_several_streams(tmp_path):
    path = tmp_path / "stems.mp4"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("aac", RATE, layout="mono") for _ in range(3)]
        for level, stream in enumerate(streams):
            samples = np.full((1, 20_000), 0.25 * level, np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, 0
            output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    for number in range(3):
        assert audio.read(path, stream=number).samples[10_000, 0] == pytest.approx(0.25 * number, abs=0.02)
    for number in (3, -1):
        message = refusal(audio.read, path, stream=number)
        assert f"no audio stream {number}, expected one of 0 to 2" in message


def test_nan_is_located(tmp_path):
    samples = tone()
    samples[[11025, 12000], 1] = np.nan, -np.inf
    sf.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    message = refusal(audio.read, tmp_path / "a.wav")
    assert "a.wav: NaN or infinity in 2 of 22050 samples, first at 0.250 s" in message
    assert "first at 0.250 s" in refusal(audio.read, tmp_path / "a.wav", start=0.1)
    assert len(audio.read(tmp_path / "a.wav", duration=0.25).samples) == 11025


@pytest.mark.parametrize(
    ("length", "words"), [(0, "contains no samples"), (1, "1 sample, expected at least 2")]
)
def test_files_without_sound(tmp_path, length, words):
    sf.write(tmp_path / "a.wav", np.zeros((length, 2)), RATE)
    assert words in refusal(audio.read, tmp_path / "a.wav")


# One channel at a time is 0.5; its gains to left and right as in ITU-R BS.775.
FOLD = np.array([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5], [0, 0], [0.5**0.5, 0], [0, 0.5**0.5]])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.caf"])
def test_surround_is_folded_only_when_asked(tmp_path, name):
    surround = np.repeat(0.5 * np.eye(6), 100, axis=0)
    sf.write(tmp_path / name, surround, RATE)
    message = refusal(audio.read, tmp_path / name)
    assert "6 channels, expected 1 or 2" in message
    assert "--downmix" in message
    folded = audio.read(tmp_path / name, downmix=True).samples
    np.testing.assert_allclose(folded, surround @ FOLD, atol=1e-4)


def test_surround_of_a_compressed_file(tmp_path):
    path = encode(tmp_path / "a.m4a", "aac", tone(channels=6))
    assert "6 channels" in refusal(audio.read, path)
    assert audio.read(path, downmix=True).samples.shape[1] == 2
    np.testing.assert_array_equal(
        audio.read(path, start=0.1, duration=0.1, downmix=True).samples,
        audio.read(path, downmix=True).samples[4410:8820],
    )


def test_downmix_leaves_mono_and_stereo_alone(tmp_path):
    for channels in (1, 2):
        sf.write(tmp_path / "a.wav", tone(channels=channels), RATE)
        assert audio.read(tmp_path / "a.wav", downmix=True).samples.shape[1] == channels


# Arrays


def test_check_returns_a_good_array_itself():
    samples = tone()
    assert audio.check(samples, "song") is samples


@pytest.mark.parametrize(
    ("given", "shape"),
    [(np.zeros(5), (5, 1)), ([0.0, 0.5], (2, 1)), (np.zeros((5, 2)), (5, 2)), (np.zeros((2, 9)).T, (9, 2))],
)
def test_check_shapes(given, shape):
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
def test_check_refuses(given, words):
    message = refusal(audio.check, given, "vocals")
    assert message.startswith("vocals: ")
    assert words in message


# Resampling


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
def test_resampling_to_a_length(channels, length):
    output = audio.resample(tone(channels=channels), RATE, 48000, length)
    assert output.shape == (length, channels)
    assert not output[25000:].any()


def test_resampling_two_samples():
    assert audio.resample(np.zeros((2, 1), np.float32), 192000, 8000, length=1).shape == (1, 1)


@pytest.mark.parametrize("rate", [0, -44100, 44100.5, float("nan"), float("inf")])
def test_silly_rates(tmp_path, rate):
    assert "expected a whole number above 0" in refusal(audio.resample, tone(), rate, RATE)
    assert "expected a whole number above 0" in refusal(audio.resample, tone(), RATE, rate)
    assert "expected a whole number above 0" in refusal(audio.write, tmp_path / "a.wav", tone(), rate)


# Writing


def beyond_full_scale() -> np.ndarray:
    samples = np.random.default_rng(0).uniform(-1.5, 1.5, (100_000, 2)).astype(np.float32)
    samples[:4] = [[1, -1], [1.0001, -1.0001], [1e9, -1e9], [0, 0.5]]
    return samples


def test_wav16_is_what_soundfile_writes_to_the_last_bit(tmp_path):
    samples = beyond_full_scale()
    audio.write(tmp_path / "ours.wav", samples, RATE)
    sf.write(tmp_path / "theirs.wav", samples, RATE)
    assert (tmp_path / "ours.wav").read_bytes() == (tmp_path / "theirs.wav").read_bytes()


@pytest.mark.parametrize("format", ["wav16", "wav24", "flac"])
def test_integers_clip_and_never_wrap(tmp_path, format):
    samples = beyond_full_scale()
    peaks = audio.write_all({tmp_path / "a": samples}, RATE, format)
    assert peaks == {tmp_path / "a": 1e9}
    np.testing.assert_allclose(audio.read(tmp_path / "a").samples, samples.clip(-1, 1), atol=2**-14)


def test_mp3_clips_too(tmp_path):
    """LAME would abort the process."""
    audio.write(tmp_path / "loud.mp3", beyond_full_scale(), RATE, "mp3")
    audio.write(tmp_path / "clipped.mp3", beyond_full_scale().clip(-1, 1), RATE, "mp3")
    assert (tmp_path / "loud.mp3").read_bytes() == (tmp_path / "clipped.mp3").read_bytes()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("format", audio.FORMATS)
def test_what_is_written_is_read_again(tmp_path, format, channels):
    path = tmp_path / f"Ça ira, ça ira..{audio.FORMATS[format].extension}"
    samples = tone(2.0, channels)
    audio.write(path, samples, RATE, format)
    sound = audio.read(path)
    assert sound.rate == RATE
    assert sound.samples.shape == samples.shape
    tolerance = {"wav16": 2**-15, "wav24": 2**-23, "float32": 0, "flac": 2**-23, "mp3": 0.005}[format]
    inner = slice(2000, -2000) if format == "mp3" else slice(None)
    np.testing.assert_allclose(sound.samples[inner], samples[inner], rtol=0, atol=tolerance)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("rate", audio.FORMATS["mp3"].rates)
def test_rates_of_mp3(tmp_path, rate):
    audio.write(tmp_path / "a.mp3", tone(rate=rate), rate, "mp3")
    sound = audio.read(tmp_path / "a.mp3")
    assert (sound.rate, len(sound.samples)) == (rate, rate // 2)


@pytest.mark.parametrize(("format", "rate"), [("mp3", 96000), ("mp3", 192000), ("flac", 655351)])
def test_rates_that_a_format_does_not_have(tmp_path, format, rate):
    message = refusal(audio.write, tmp_path / "a", tone(), rate, format)
    assert f"{format} does not support {rate} Hz: choose another format" in message


def test_the_highest_rate_of_flac(tmp_path):
    audio.write(tmp_path / "a.flac", tone(), 655350, "flac")
    assert audio.read(tmp_path / "a.flac").rate == 655350


@pytest.mark.parametrize("format", ["wav16", "wav24", "float32"])
def test_a_long_wav_is_rf64(tmp_path, monkeypatch, format):
    monkeypatch.setattr(encoding, "WAV_LIMIT", 1000)
    audio.write(tmp_path / "a.wav", tone(), RATE, format)
    assert (tmp_path / "a.wav").read_bytes()[:4] == b"RF64"
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav").samples, tone(), atol=1e-4)


def test_an_unknown_format(tmp_path):
    assert "unknown format 'ogg'; expected one of wav16, wav24" in refusal(
        audio.write, tmp_path / "a", tone(), RATE, "ogg"
    )


def test_writing_replaces_and_makes_folders_and_returns_peaks(tmp_path):
    vocals, drums = tmp_path / "new" / "er" / "vocals.wav", tmp_path / "new" / "drums.wav"
    for gain in (1.0, 0.5):
        peaks = audio.write_all({vocals: gain * tone(), drums: np.zeros((9, 1))}, RATE)
        assert peaks == {vocals: pytest.approx(gain * 0.5, abs=1e-4), drums: 0.0}
        assert np.abs(audio.read(vocals).samples).max() == pytest.approx(gain * 0.5, abs=1e-3)
    assert sorted((tmp_path / "new").rglob("*")) == [drums, vocals.parent, vocals]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    audio.write(tmp_path / "a.wav", tone(), RATE)
    assert (tmp_path / "a.wav").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("é" * 120 + ".wav")
    audio.write(path, tone(), RATE)
    assert audio.read(path).samples.shape == (22050, 2)


# Failures of writing: all or nothing


class FullDisk(io.FileIO):
    """A file that takes no more than `room` bytes."""

    room = 0
    error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data) -> int:
        if self.tell() + len(data) > self.room:
            raise self.error
        return super().write(data)


def song(folder: Path) -> dict[Path, np.ndarray]:
    """Two stems, in folders that are not there."""
    return {folder / "song" / "vocals": tone(3.0), folder / "song" / "more" / "drums": tone(3.0)}


@pytest.mark.parametrize("format", audio.FORMATS)
@pytest.mark.parametrize("room", [0, 40_000])
def test_a_full_disk(tmp_path, monkeypatch, capfd, format, room):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, "x+"))
    message = refusal(audio.write_all, song(tmp_path), RATE, format)
    assert message.startswith("no space left on device writing ")
    assert message.endswith("vocals; nothing was written")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("format", audio.FORMATS)
def test_dev_full(tmp_path, monkeypatch, format):
    monkeypatch.setattr(Path, "open", lambda *_, **__: open("/dev/full", "r+b", 0))  # noqa: PTH123, SIM115
    assert "no space left on device" in refusal(audio.write_all, song(tmp_path), RATE, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("missing", [1, 5_000, 50_000])
@pytest.mark.parametrize("format", audio.FORMATS)
def test_a_real_limit_met_by_the_end_of_the_second_file(tmp_path, format, missing):
    """The last block of a flac, and the header of any file, are written on closing."""
    import resource

    vocals, drums = tmp_path / "vocals", tmp_path / "drums"
    audio.write(drums, beyond_full_scale(), RATE, format)
    before = drums.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) - missing, limits[1]))
    try:
        message = refusal(audio.write_all, {vocals: tone(0.1), drums: beyond_full_scale()}, RATE, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message == f"file too large writing {drums}; nothing was written"
    assert list(tmp_path.iterdir()) == [drums]
    assert drums.read_bytes() == before


@pytest.mark.parametrize("format", audio.FORMATS)
def test_control_c_in_the_middle_of_an_encoder(tmp_path, monkeypatch, capfd, format):
    monkeypatch.setattr(FullDisk, "room", 10_000)
    monkeypatch.setattr(FullDisk, "error", KeyboardInterrupt())
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, "x+"))
    with pytest.raises(KeyboardInterrupt):
        audio.write_all(song(tmp_path), RATE, format)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_an_array_that_is_refused_after_a_good_one(tmp_path):
    files = song(tmp_path) | {tmp_path / "song" / "bass": np.full((9, 2), np.nan)}
    assert "bass: NaN or infinity in 9 of 9 samples" in refusal(audio.write_all, files, RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_rename_that_fails_says_what_was_written(tmp_path, monkeypatch):
    rename = Path.replace

    def fail_for_drums(partial, target):
        if target.name == "drums":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(partial, target)

    monkeypatch.setattr(Path, "replace", fail_for_drums)
    message = refusal(audio.write_all, song(tmp_path), RATE)
    assert message.startswith("permission denied writing ")
    assert message.endswith("drums; only vocals was written")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["song", "vocals"]


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.wav", tmp_path / "file" / "b" / "a.wav"):
        assert "not a directory writing" in refusal(audio.write, path, tone(), RATE)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_target_that_is_a_folder_or_a_device(tmp_path):
    assert "it is a folder or a device" in refusal(audio.write, tmp_path, tone(), RATE)
    assert "it is a folder or a device" in refusal(audio.write, Path(os.devnull), tone(), RATE)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_folder_in_which_even_root_cannot_write():
    assert "; nothing was written" in refusal(audio.write, "/proc/self/a.wav", tone(), RATE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    message = refusal(audio.write_all, song(tmp_path), RATE)
    tmp_path.chmod(0o700)
    assert message.startswith("permission denied writing ")
    assert list(tmp_path.iterdir()) == []


# Long sounds


@pytest.fixture
def long(monkeypatch) -> None:
    """Whatever is longer than 0.05 s is long."""
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


def test_surround_in_a_long_file_is_folded(tmp_path, request):
    sf.write(tmp_path / "a.wav", tone(channels=6), RATE)
    expected = audio.read(tmp_path / "a.wav", downmix=True).samples
    request.getfixturevalue("long")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav", downmix=True).samples, expected)


@pytest.mark.parametrize("place", [0, 11025, 22049])
def test_nan_is_located_in_a_long_sound(tmp_path, long, place):
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


def test_no_room_for_a_long_file(tmp_path, monkeypatch, long):
    audio.write(tmp_path / "a.wav", tone(), RATE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    message = refusal(audio.read, tmp_path / "a.wav")
    assert f"in {tmp_path / 'nothing'}; at least" in message
    assert "of scratch space are needed" in message


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("given", "scale"), [("int16", 2**15), ("int32", 2**31), ("float64", 1), (">f4", 1), ("every other", 1)]
)
def test_a_long_array_of_another_kind(long, given, scale, channels):
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
def test_resampling_in_blocks_is_resampling_at_once(rate_in, rate_out, length):
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


# The module


def test_audio_does_not_import_torch():
    code = "import sys, kmdx.audio; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
