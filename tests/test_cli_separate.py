"""``kmdx separate`` on one song: files in, files out."""

from __future__ import annotations

from pathlib import Path

import cli_cases
import numpy as np
import pytest
import soundfile
from cli_cases import Run, files_in, write
from conftest import decibels, noise
from sound_cases import encode

from kmdx import Separator, audio, plan_file, tags
from kmdx.errors import AudioError

run, separate = cli_cases.run, cli_cases.separate

FOUR = ["bass", "drums", "other", "vocals"]
ODD_NAME = "Ünï cödé 歌 with spaces."


def test_a_song_becomes_a_folder_of_stems(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    result = separate("song.wav")
    assert result.code == 0
    assert files_in(tmp_path / "out") == [f"song/{stem}.wav" for stem in FOUR]
    info = soundfile.info(tmp_path / "out" / "song" / "vocals.wav")
    assert (info.samplerate, info.channels, info.frames, info.subtype) == (44100, 2, 30_000, "PCM_16")


def test_a_plan_is_parsed_once_in_a_run(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = plan_file.parse
    monkeypatch.setattr(
        plan_file, "parse", lambda *given, **named: parsed.append("") or parse(*given, **named)
    )
    write(tmp_path / "a.wav", noise(30_000))
    write(tmp_path / "b.wav", noise(30_000, seed=1))
    assert separate("a.wav", "b.wav").code == 0
    assert len(parsed) == 1


def test_shifts_and_augmentation_change_the_stems_and_are_settings_of_theirs(
    separate: Run, tmp_path: Path
) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    assert separate("song.wav", "--stems", "vocals").code == 0
    once = (tmp_path / "out" / "song" / "vocals.wav").read_bytes()
    refused = separate("song.wav", "--stems", "vocals", "--shifts", "2", "--tta")
    assert refused.code == 2
    assert "made with different settings" in refused.err
    assert separate("song.wav", "--stems", "vocals", "--shifts", "2", "--tta", "--overwrite").code == 0
    assert (tmp_path / "out" / "song" / "vocals.wav").read_bytes() != once
    assert separate("song.wav", "--shifts", "0").err.strip() == "error: expected 1 to 100 shifts, found 0"


def test_the_accompaniment_is_the_song_minus_the_vocals(separate: Run, tmp_path: Path) -> None:
    song = noise(30_000)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    assert (
        separate("song.wav", "--stems", "vocals, drums", "--accompaniment", "--format", "float32").code == 0
    )
    assert files_in(tmp_path / "out" / "song") == ["accompaniment.wav", "drums.wav", "vocals.wav"]
    vocals, accompaniment = (
        soundfile.read(tmp_path / "out" / "song" / f"{stem}.wav", dtype="float32")[0]
        for stem in ("vocals", "accompaniment")
    )
    assert np.array_equal(accompaniment, song - vocals)


@pytest.mark.parametrize(
    ("name", "extension", "subtype"),
    [("wav16", "wav", "PCM_16"), ("wav24", "wav", "PCM_24"), ("float32", "wav", "FLOAT"), ("flac", "flac", "PCM_24"),
     ("mp3", "mp3", "MPEG_LAYER_III")],
)  # fmt: skip
def test_each_format_writes_its_own_file_type(
    separate: Run, tmp_path: Path, name: str, extension: str, subtype: str
) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    assert separate("song.wav", "--stems", "bass", "--format", name).code == 0
    assert files_in(tmp_path / "out") == [f"song/bass.{extension}"]
    assert soundfile.info(tmp_path / "out" / "song" / f"bass.{extension}").subtype == subtype


@pytest.mark.parametrize("rate", [8_000, 48_000, 192_000])
def test_any_sample_rate_is_kept(separate: Run, tmp_path: Path, rate: int) -> None:
    write(tmp_path / "song.wav", noise(rate // 3), rate)
    assert separate("song.wav", "--stems", "vocals").code == 0
    info = soundfile.info(tmp_path / "out" / "song" / "vocals.wav")
    assert (info.samplerate, info.frames, info.channels) == (rate, rate // 3, 2)


def test_mono_silent_and_very_short_songs_are_separated(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "mono.wav", noise(30_000, 1))
    write(tmp_path / "silence.wav", np.zeros((30_000, 2)))
    write(tmp_path / "short.wav", noise(441))
    assert separate("mono.wav", "silence.wav", "short.wav", "--stems", "vocals").code == 0
    assert soundfile.info(tmp_path / "out" / "mono" / "vocals.wav").channels == 1
    assert not soundfile.read(tmp_path / "out" / "silence" / "vocals.wav")[0].any()
    assert soundfile.info(tmp_path / "out" / "short" / "vocals.wav").frames == 441


@pytest.mark.parametrize(
    ("extension", "codec"), [("mp3", "libmp3lame"), ("m4a", "aac"), ("opus", "libopus"), ("mp4", "aac")]
)
def test_compressed_songs_are_separated(separate: Run, tmp_path: Path, extension: str, codec: str) -> None:
    rate = 48_000 if codec == "libopus" else 44_100
    encode(tmp_path / f"song.{extension}", codec, noise(rate), rate)
    assert separate(f"song.{extension}", "--stems", "vocals").code == 0
    info = soundfile.info(tmp_path / "out" / "song" / "vocals.wav")
    assert info.samplerate == rate
    assert abs(info.frames - rate) <= 2048


def test_a_name_with_spaces_foreign_letters_and_a_trailing_dot_is_handled(
    separate: Run, tmp_path: Path
) -> None:
    write(tmp_path / f"{ODD_NAME}.wav", noise(20_000))
    assert separate(f"{ODD_NAME}.wav", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == [f"{ODD_NAME.rstrip('.')}/vocals.wav"]


def test_start_and_duration_select_a_part_of_the_song(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(44_100))
    assert separate("song.wav", "--start", "0.5", "--duration", "0.25", "--stems", "vocals").code == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").frames == 11_025


def test_more_than_two_channels_can_be_downmixed(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000, 6))
    assert separate("song.wav", "--downmix", "--stems", "vocals").code == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").channels == 2


def test_clipping_gives_a_warning_with_the_peak(separate: Run, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", noise(30_000, level=1), 44100, subtype="FLOAT")
    result = separate("loud.wav", "--accompaniment", "--stems", "vocals")
    assert result.code == 0
    assert "accompaniment.wav is clipped: it peaks at" in result.err
    assert "--format float32 avoids clipping" in result.err
    assert "peaks at" not in separate("loud.wav", "--overwrite", "--format", "float32").err


def test_a_song_of_16_bit_values_stored_as_floats_gives_one_warning(separate: Run, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "song.wav", 32768 * noise(20_000), 44100, subtype="FLOAT")
    result = separate("song.wav", "--format", "float32")
    assert result.code == 0
    assert result.err.count("warning: ") == 1
    assert "warning: song.wav: peaks at " in result.err
    assert "16-bit values stored as floats, divide it by 32768" in result.err


def test_stems_get_the_tags_of_the_song(separate: Run, tmp_path: Path) -> None:
    song = tags.Tags(
        title="Song", artist=("Ann", "Bob"), track="3/12", cover=b"\xff\xd8\xff", cover_type="image/jpeg"
    )
    audio.write(tmp_path / "song.mp3", noise(20_000), 44100, "mp3", song)
    for format in ("flac", "mp3"):
        assert separate("song.mp3", "--stems", "vocals", "--format", format, "--overwrite").code == 0
        vocals = tmp_path / "out" / "song" / f"vocals.{format}"
        assert tags.read(vocals) == song
        assert soundfile.info(vocals).frames == 20_000


def test_a_song_with_broken_tags_is_separated_with_one_warning(separate: Run, tmp_path: Path) -> None:
    audio.write(tmp_path / "song.flac", noise(20_000), 44100, "flac", tags.Tags(title="Song"))
    content = (tmp_path / "song.flac").read_bytes()
    (tmp_path / "song.flac").write_bytes(content.replace(b"\x0a\0\0\0title", b"\xff\xff\xff\xfftitle"))
    result = separate("song.flac", "--format", "flac")
    assert result.code == 0
    assert result.err.count("warning: ") == 1
    assert "warning: song.flac: its tags cannot be read, so the stems have none: " in result.err
    assert len(files_in(tmp_path / "out")) == 4


def test_speed_precision_and_engine_are_passed_to_the_separator(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def made(self: object, *_: object, **options: object) -> None:
        asked.append((options["speed"], options["precision"], options["engine"]))
        raise AudioError("that was all")

    monkeypatch.setattr("kmdx.Separator.__init__", made)
    write(tmp_path / "song.wav", noise(5_000))
    assert separate("song.wav").code == 2
    assert separate("song.wav", "--speed", "balanced", "--precision", "bf16", "--engine", "plain").code == 2
    assert asked == [("leaderboard", "auto", "tuned"), ("balanced", "bf16", "plain")]
    for option in (["--speed", "light"], ["--precision", "int8"]):
        assert separate("song.wav", *option).code == 2
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--precision", "bf16"], "small on cpu in bf16"),
        (["--engine", "plain"], "small on cpu in fp32, plain engine"),
        ([], "small on cpu in fp32"),
    ],
)
def test_the_precision_and_the_engine_are_printed(
    separate: Run, tmp_path: Path, options: list[str], line: str
) -> None:
    write(tmp_path / "song.wav", noise(3000))
    assert line in separate("song.wav", "--stems", "vocals", *options).err.splitlines()


def test_the_command_writes_what_the_library_returns(separate: Run, small: Path, tmp_path: Path) -> None:
    song = noise(30_000)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    separate("song.wav", "--format", "float32")
    expected = Separator(small, device="cpu").separate(song, 44100)
    for stem, samples in expected.items():
        written = soundfile.read(tmp_path / "out" / "song" / f"{stem}.wav", dtype="float32")[0]
        assert decibels(samples, written) > 120
