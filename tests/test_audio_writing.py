"""Writing sound files: formats, clipping, and failures that leave nothing behind."""

import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from sound_cases import RATE, beyond_full_scale, refusal, tone

from kmdx import audio, encoding


def test_wav16_equals_what_soundfile_writes_bit_for_bit(tmp_path):
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
def test_written_files_can_be_read_back(tmp_path, format, channels):
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
def test_mp3_is_written_at_each_of_its_rates(tmp_path, rate):
    audio.write(tmp_path / "a.mp3", tone(rate=rate), rate, "mp3")
    sound = audio.read(tmp_path / "a.mp3")
    assert (sound.rate, len(sound.samples)) == (rate, rate // 2)


@pytest.mark.parametrize(("format", "rate"), [("mp3", 96000), ("mp3", 192000), ("flac", 655351)])
def test_rates_that_a_format_does_not_support_are_refused(tmp_path, format, rate):
    message = refusal(audio.write, tmp_path / "a", tone(), rate, format)
    assert f"{format} does not support {rate} Hz: choose another format" in message


def test_flac_is_written_at_its_highest_rate(tmp_path):
    audio.write(tmp_path / "a.flac", tone(), 655350, "flac")
    assert audio.read(tmp_path / "a.flac").rate == 655350


@pytest.mark.parametrize("format", ["wav16", "wav24", "float32"])
def test_a_long_wav_becomes_rf64(tmp_path, monkeypatch, format):
    monkeypatch.setattr(encoding, "WAV_LIMIT", 1000)
    audio.write(tmp_path / "a.wav", tone(), RATE, format)
    assert (tmp_path / "a.wav").read_bytes()[:4] == b"RF64"
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav").samples, tone(), atol=1e-4)


def test_an_unknown_format_is_refused(tmp_path):
    assert "unknown format 'ogg'; available: wav16, wav24" in refusal(
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


def test_a_file_with_the_longest_possible_name_is_written(tmp_path):
    path = tmp_path / ("é" * 120 + ".wav")
    audio.write(path, tone(), RATE)
    assert audio.read(path).samples.shape == (22050, 2)


class FullDisk(io.FileIO):
    """A file that takes no more than `room` bytes."""

    room = 0
    error: BaseException = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(self, data) -> int:
        if self.tell() + len(data) > self.room:
            raise self.error
        return super().write(data)


def song(folder: Path) -> dict[Path, np.ndarray]:
    """Two stems, in folders that do not exist."""
    return {folder / "song" / "vocals": tone(3.0), folder / "song" / "more" / "drums": tone(3.0)}


@pytest.mark.parametrize("format", audio.FORMATS)
@pytest.mark.parametrize("room", [0, 40_000])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, capfd, format, room):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, "x+"))
    message = refusal(audio.write_all, song(tmp_path), RATE, format)
    assert message.startswith("no space left on device writing ")
    assert message.endswith("vocals; nothing was written")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("format", audio.FORMATS)
def test_a_full_device_leaves_nothing_behind(tmp_path, monkeypatch, format):
    monkeypatch.setattr(Path, "open", lambda *_, **__: open("/dev/full", "r+b", 0))  # noqa: PTH123, SIM115
    assert "no space left on device" in refusal(audio.write_all, song(tmp_path), RATE, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("missing", [1, 5_000, 50_000])
@pytest.mark.parametrize("format", audio.FORMATS)
def test_a_size_limit_reached_in_the_second_file_keeps_the_old_file(tmp_path, format, missing):
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
def test_ctrl_c_in_the_middle_of_an_encoder_leaves_nothing_behind(tmp_path, monkeypatch, capfd, format):
    monkeypatch.setattr(FullDisk, "room", 10_000)
    monkeypatch.setattr(FullDisk, "error", KeyboardInterrupt())
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, "x+"))
    with pytest.raises(KeyboardInterrupt):
        audio.write_all(song(tmp_path), RATE, format)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


def test_nothing_is_written_if_one_array_is_refused(tmp_path):
    files = song(tmp_path) | {tmp_path / "song" / "bass": np.full((9, 2), np.nan)}
    assert "bass: NaN or infinity in 9 of 9 samples" in refusal(audio.write_all, files, RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rename_reports_what_was_written(tmp_path, monkeypatch):
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


def test_a_file_in_place_of_a_folder_is_reported(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.wav", tmp_path / "file" / "b" / "a.wav"):
        assert "not a directory writing" in refusal(audio.write, path, tone(), RATE)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_target_that_is_a_folder_or_a_device_is_refused(tmp_path):
    assert "it is a folder or a device" in refusal(audio.write, tmp_path, tone(), RATE)
    assert "it is a folder or a device" in refusal(audio.write, Path(os.devnull), tone(), RATE)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="this system has no /proc")
def test_a_folder_that_even_root_cannot_write_to_is_reported():
    assert "; nothing was written" in refusal(audio.write, "/proc/self/a.wav", tone(), RATE)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    message = refusal(audio.write_all, song(tmp_path), RATE)
    tmp_path.chmod(0o700)
    assert message.startswith("permission denied writing ")
    assert list(tmp_path.iterdir()) == []
