"""Reading sound files: formats, names, parts, channels, and files that are refused."""

import errno
import os
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from sound_cases import RATE, encode, refusal, tone

from kmdx import audio


def silent_film(path: Path) -> Path:
    """A video without sound."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", 25, width=64, height=64, pix_fmt="yuv420p")
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        output.mux(stream.encode(frame.reformat(format="yuv420p")))
        output.mux(stream.encode(None))
    return path


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
def test_formats_of_libsndfile_are_read(tmp_path, name, channels):
    samples = tone(channels=channels, rate=48000)
    kind = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    sf.write(tmp_path / name, samples, 48000, **kind)
    sound = audio.read(tmp_path / name)
    assert sound.rate == 48000
    assert sound.samples.shape == samples.shape
    np.testing.assert_allclose(sound.samples[2000:-2000], samples[2000:-2000], atol=0.02)


def test_mp3_has_neither_encoder_delay_nor_padding(tmp_path):
    samples = tone(1.2345)
    sound = audio.read(encode(tmp_path / "a.mp3", "libmp3lame", samples, bit_rate=256_000))
    assert sound.samples.shape == samples.shape
    np.testing.assert_allclose(sound.samples[2000:-2000], samples[2000:-2000], atol=0.005)


@pytest.mark.parametrize("name", ["a.m4a", "a.mp4", "a.mkv", "a.mov"])
def test_aac_is_aligned_in_time(tmp_path, name):
    samples = tone(channels=1)
    sound = audio.read(encode(tmp_path / name, "aac", samples, bit_rate=256_000))
    if name != "a.mkv":  # Matroska has no place for the encoder's delay in a file made this way
        assert 0 <= len(sound.samples) - len(samples) < 1024
        np.testing.assert_allclose(sound.samples[2000:20000], samples[2000:20000], atol=0.01)
    assert sound.samples.shape[1] == 1


@pytest.mark.parametrize("name", ["song.mp3", "song.raw", "song", "a:b.wav", "Grüße, 歌..wav", ".hidden"])
def test_the_format_is_detected_from_the_content_and_not_the_name(tmp_path, name):
    sf.write(tmp_path / name, tone(), RATE, format="WAV", subtype="PCM_16")
    assert audio.read(tmp_path / name).samples.shape == (22050, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8 are a Linux matter")
@pytest.mark.parametrize("extension", [".wav", ".mp3"])
def test_a_file_whose_name_is_not_utf_8_is_read(tmp_path, extension):
    path = tmp_path / os.fsdecode(b"caf\xe9" + extension.encode())
    audio.write(path, tone(), RATE, "wav16" if extension == ".wav" else "mp3")
    assert audio.read(path).samples.shape == (22050, 2)


def test_a_file_whose_tags_are_not_utf_8_is_read(tmp_path):
    path = encode(tmp_path / "a.mp3", "libmp3lame", tone())
    content = path.read_bytes()
    assert content.startswith(b"ID3")  # without it FFmpeg reads the old kind of tag, at the end
    path.write_bytes(content[10 + content[9] :] + b"TAG" + b"\xe9\xff" * 60 + bytes(5))
    assert len(audio.read(path).samples) == 22050


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
@pytest.mark.parametrize(("start", "duration"), [(0.0, 0.1), (0.1, 0.25), (0.3, None), (0.4, 9.0)])
def test_reading_a_part_equals_slicing_the_whole(tmp_path, name, start, duration):
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
def test_parts_outside_the_song_are_refused(tmp_path, extension, start, duration, words):
    path = tmp_path / f"a.{extension}"
    audio.write(path, tone(), RATE, "wav16" if extension == "wav" else "mp3")
    assert words in refusal(audio.read, path, start, duration)


def test_files_that_cannot_be_opened_are_refused_with_the_reason(tmp_path):
    assert "no such file" in refusal(audio.read, tmp_path / "absent.wav")
    assert "not a directory" in refusal(audio.read, Path(__file__) / "a.wav")
    assert "found a folder" in refusal(audio.read, tmp_path)
    (tmp_path / "empty.wav").touch()
    assert "empty.wav: expected a sound file, found an empty file" in refusal(
        audio.read, tmp_path / "empty.wav"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert "found a pipe or a device" in refusal(audio.read, tmp_path / "pipe.wav")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    audio.write(path, tone(), RATE)
    path.chmod(0)
    assert "permission denied" in refusal(audio.read, path)


def test_an_error_of_the_system_is_quoted(tmp_path, monkeypatch):
    audio.write(tmp_path / "a.wav", tone(), RATE)
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(denied))
    assert refusal(audio.read, tmp_path / "a.wav").endswith("a.wav: cannot be read: permission denied")


@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.raw", "a.txt", "a"])
@pytest.mark.parametrize("lines", [1, 200])
def test_a_text_file_is_refused(tmp_path, name, lines, capfd):
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


def test_a_video_without_an_audio_stream_is_refused(tmp_path):
    message = refusal(audio.read, silent_film(tmp_path / "a.mp4"))
    assert "contains no audio stream (streams found: video)" in message


def test_any_of_several_streams_can_be_read(tmp_path):
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
def test_files_without_sound_are_refused(tmp_path, length, words):
    sf.write(tmp_path / "a.wav", np.zeros((length, 2)), RATE)
    assert words in refusal(audio.read, tmp_path / "a.wav")


# One channel at a time is 0.5; its gains to left and right as in ITU-R BS.775.
FOLD = np.array([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5], [0, 0], [0.5**0.5, 0], [0, 0.5**0.5]])


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.caf"])
def test_surround_is_downmixed_only_on_request(tmp_path, name):
    surround = np.repeat(0.5 * np.eye(6), 100, axis=0)
    sf.write(tmp_path / name, surround, RATE)
    message = refusal(audio.read, tmp_path / name)
    assert "6 channels, expected 1 or 2" in message
    assert "--downmix" in message
    folded = audio.read(tmp_path / name, downmix=True).samples
    np.testing.assert_allclose(folded, surround @ FOLD, atol=1e-4)


def test_surround_in_a_compressed_file_is_downmixed(tmp_path):
    path = encode(tmp_path / "a.m4a", "aac", tone(channels=6))
    assert "6 channels" in refusal(audio.read, path)
    assert audio.read(path, downmix=True).samples.shape[1] == 2
    np.testing.assert_array_equal(
        audio.read(path, start=0.1, duration=0.1, downmix=True).samples,
        audio.read(path, downmix=True).samples[4410:8820],
    )


def test_downmix_does_not_change_mono_and_stereo(tmp_path):
    for channels in (1, 2):
        sf.write(tmp_path / "a.wav", tone(channels=channels), RATE)
        assert audio.read(tmp_path / "a.wav", downmix=True).samples.shape[1] == channels
