"""The command as a person uses it: files in, files out, one line for each mistake, exit codes."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import soundfile
import tiny
import torch
import yaml
from conftest import decibels, noise

from kmdx import audio, cli, engine, manifest, plan_file, precision, speed, tags
from kmdx.errors import AudioError
from kmdx.networks.demucs import DemucsNetwork

FOUR = ["bass", "drums", "other", "vocals"]
ODD_NAME = "Ünï cödé 歌 with spaces."


class Result(NamedTuple):
    """What a run of the command came to."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``kmdx`` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def kmdx(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["kmdx", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return kmdx


@pytest.fixture
def separate(run: Run, small: Path) -> Run:
    """Run ``kmdx separate`` with the small ensemble into ``out``."""
    return lambda *arguments: run("separate", *arguments, "--ensemble", small, "-o", "out", "--device", "cpu")


def write(path: Path, samples: np.ndarray, rate: int = 44100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


def encode(path: Path, samples: np.ndarray, codec: str, rate: int = 44100) -> Path:
    """Write a compressed file with FFmpeg."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout="stereo")
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        fifo.write(frame)
        for part in fifo.read_many(1024, partial=True):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def files_in(folder: Path) -> list[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if manifest.FOLDER not in path.parts)


def test_choices_are_those_of_the_library() -> None:
    assert [choice.value for choice in cli.Precision] == list(precision.PRECISIONS)
    assert [choice.value for choice in cli.SpeedName] == list(speed.levels())
    assert cli.SpeedName.leaderboard.value == speed.DEFAULT
    assert [choice.value for choice in cli.Engine] == [*engine.ENGINES]
    assert cli.Engine.tuned.value == engine.DEFAULT


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


def test_stems_and_accompaniment(separate: Run, tmp_path: Path) -> None:
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
def test_formats(separate: Run, tmp_path: Path, name: str, extension: str, subtype: str) -> None:
    write(tmp_path / "song.wav", noise(30_000))
    assert separate("song.wav", "--stems", "bass", "--format", name).code == 0
    assert files_in(tmp_path / "out") == [f"song/bass.{extension}"]
    assert soundfile.info(tmp_path / "out" / "song" / f"bass.{extension}").subtype == subtype


@pytest.mark.parametrize("rate", [8_000, 48_000, 192_000])
def test_odd_rates(separate: Run, tmp_path: Path, rate: int) -> None:
    write(tmp_path / "song.wav", noise(rate // 3), rate)
    assert separate("song.wav", "--stems", "vocals").code == 0
    info = soundfile.info(tmp_path / "out" / "song" / "vocals.wav")
    assert (info.samplerate, info.frames, info.channels) == (rate, rate // 3, 2)


def test_mono_and_silence_and_a_very_short_song(separate: Run, tmp_path: Path) -> None:
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
def test_compressed_songs(separate: Run, tmp_path: Path, extension: str, codec: str) -> None:
    rate = 48_000 if codec == "libopus" else 44_100
    encode(tmp_path / f"song.{extension}", noise(rate), codec, rate)
    assert separate(f"song.{extension}", "--stems", "vocals").code == 0
    info = soundfile.info(tmp_path / "out" / "song" / "vocals.wav")
    assert info.samplerate == rate
    assert abs(info.frames - rate) <= 2048


def test_a_name_with_spaces_foreign_letters_and_a_trailing_dot(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / f"{ODD_NAME}.wav", noise(20_000))
    assert separate(f"{ODD_NAME}.wav", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == [f"{ODD_NAME.rstrip('.')}/vocals.wav"]


def test_start_and_duration(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(44_100))
    assert separate("song.wav", "--start", "0.5", "--duration", "0.25", "--stems", "vocals").code == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").frames == 11_025


def test_more_than_two_channels_can_be_folded(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000, 6))
    assert separate("song.wav", "--downmix", "--stems", "vocals").code == 0
    assert soundfile.info(tmp_path / "out" / "song" / "vocals.wav").channels == 2


def test_clipping_is_warned_about_with_the_peak(separate: Run, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "loud.wav", noise(30_000, level=1), 44100, subtype="FLOAT")
    result = separate("loud.wav", "--accompaniment", "--stems", "vocals")
    assert result.code == 0
    assert "accompaniment.wav is clipped: it peaks at" in result.err
    assert "--format float32 avoids clipping" in result.err
    assert "peaks at" not in separate("loud.wav", "--overwrite", "--format", "float32").err


def test_a_song_of_16_bit_values_stored_as_floats_is_one_warning(separate: Run, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "song.wav", 32768 * noise(20_000), 44100, subtype="FLOAT")
    result = separate("song.wav", "--format", "float32")
    assert result.code == 0
    assert result.err.count("warning: ") == 1
    assert "warning: song.wav: peaks at " in result.err
    assert "16-bit values stored as floats, divide it by 32768" in result.err


def test_stems_carry_the_songs_tags(separate: Run, tmp_path: Path) -> None:
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


def test_songs_already_done_are_skipped_unless_told_otherwise(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    stem = tmp_path / "out" / "song" / "vocals.wav"
    separate("song.wav", "--stems", "vocals")
    made = stem.stat().st_mtime_ns
    skipped = separate("song.wav", "--stems", "vocals")
    assert skipped.code == 0
    assert "already in out/song; use --overwrite to separate it again" in skipped.err
    assert stem.stat().st_mtime_ns == made
    assert separate("song.wav", "--stems", "vocals", "--overwrite").code == 0
    assert stem.stat().st_mtime_ns > made


def test_only_the_stems_that_are_missing_are_made(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    separate("song.wav", "--stems", "bass")
    bass = (tmp_path / "out" / "song" / "bass.wav").stat().st_mtime_ns
    result = separate("song.wav", "--stems", "bass,vocals")
    assert (result.code, result.out) == (0, "song.wav → out/song (vocals)\n")
    assert (tmp_path / "out" / "song" / "bass.wav").stat().st_mtime_ns == bass


def test_a_folder_is_mirrored(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "album" / "one.wav", noise(5_000))
    write(tmp_path / "album" / "live" / "two.flac", noise(5_000))
    write(tmp_path / "album" / "three" / "mixture.wav", noise(5_000))
    write(tmp_path / "album" / "three" / "vocals.wav", noise(5_000))
    (tmp_path / "album" / "cover.jpg").write_bytes(b"not sound")
    assert separate("album", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["live/two/vocals.wav", "one/vocals.wav", "three/vocals.wav"]


def test_stems_in_a_folder_are_no_songs_of_it(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "one.wav", noise(5_000))
    assert separate(".", "--stems", "vocals").code == 0
    assert separate(".", "--stems", "vocals", "--overwrite").code == 0
    assert files_in(tmp_path / "out") == ["one/vocals.wav"]


def test_songs_of_one_name_do_not_overwrite_each_other(separate: Run, tmp_path: Path) -> None:
    for number, folder in enumerate(("x", "y")):
        write(tmp_path / folder / "cd" / "01.wav", noise(5_000 + number))
    assert separate("x/cd", "y/cd/01.wav", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["x/cd/01/vocals.wav", "y/cd/01/vocals.wav"]
    frames = [soundfile.info(tmp_path / "out" / name / "cd" / "01" / "vocals.wav").frames for name in "xy"]
    assert frames == [5_000, 5_001]


def test_two_songs_with_one_folder_are_refused_before_any_work(separate: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "m" / f"{name}.wav", noise(5_000))
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "b").symlink_to("a")
    result = separate("m", "--stems", "vocals")
    assert result.code == 2
    assert "would both be written to out/b" in result.errors[0]
    assert files_in(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        (["--duration", "0.05"], [], "duration 0.05, not None"),
        ([], ["--start", "0.05"], "start 0.0, not 0.05"),
        (["--format", "wav24"], [], "format wav24, not wav16"),
        (["--speed", "fast"], [], "speed fast, not leaderboard"),
        ([], ["--engine", "plain"], "engine tuned, not plain"),
    ],
)
def test_stems_of_other_settings_are_not_taken_for_these(
    separate: Run, tmp_path: Path, first: list[str], then: list[str], message: str
) -> None:
    write(tmp_path / "song.wav", noise(9_000))
    separate("song.wav", "--stems", "vocals", *first)
    before = (tmp_path / "out" / "song" / "vocals.wav").read_bytes()
    result = separate("song.wav", "--stems", "vocals", *then)
    assert result.code == 2
    assert "out/song has stems made with different settings (vocals.wav: " in result.errors[0]
    assert message in result.errors[0]
    assert (tmp_path / "out" / "song" / "vocals.wav").read_bytes() == before
    assert separate("song.wav", "--stems", "vocals", *then, "--overwrite").code == 0
    assert separate("song.wav", "--stems", "vocals", *then).code == 0


def test_stems_of_another_plan_or_other_weights_prevent_the_work_on_any_stem(
    run: Run, small: Path, tmp_path: Path
) -> None:
    """The text of the plan is the same when only its weight file changes."""
    write(tmp_path / "song.wav", noise(5_000))
    plan = tiny.write_htdemucs(tmp_path)
    same = ("--device", "cpu", "-o", "out", "--ensemble", plan)
    assert run("separate", "song.wav", "--stems", "bass", *same).code == 0
    before = files_in(tmp_path / "out")
    text = plan.read_text("utf-8")
    plan.write_text(text + "# a comment\n", "utf-8")
    assert "already in" in run("separate", "song.wav", "--stems", "bass", *same).err

    spoilt = yaml.safe_load(text)
    spoilt["stems"]["vocals"]["sum"] = {name: 0.5 for name in spoilt["stems"]["vocals"]["sum"]}
    plan.write_text(yaml.safe_dump(spoilt, sort_keys=False), "utf-8")
    assert run("separate", "song.wav", "--stems", "bass", *same).code == 0  # bass is made as before

    weights = torch.load(tmp_path / "small.ckpt")
    next(iter(weights["state"].values())).mul_(0.5)
    torch.save(weights, tmp_path / "small.ckpt")
    result = run("separate", "song.wav", "--stems", "vocals", "--accompaniment", *same)
    assert result.code == 2
    assert "bass.wav: other weights of" in result.errors[0]
    assert files_in(tmp_path / "out") == before


def test_files_of_other_settings_that_stay_are_reported(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    separate("song.wav", "--stems", "vocals", "--format", "flac", "--speed", "fast")
    result = separate("song.wav", "--stems", "vocals", "--overwrite")
    assert result.code == 0
    assert "warning: out/song also has files made with different settings: vocals.flac: " in result.err
    assert "speed fast, not leaderboard" in result.err
    assert "vocals.flac" in separate("song.wav", "--stems", "vocals").err


def test_a_file_of_somebody_else_is_kept(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    mine = tmp_path / "out" / "song" / "vocals.wav"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    result = separate("song.wav", "--stems", "vocals")
    assert result.code == 0
    assert "out/song/vocals.wav was not written by kmdx, or was changed since" in result.err
    assert mine.with_name("vocals.wav.bak").read_text() == "mine"
    assert soundfile.info(mine).frames == 5_000


def test_what_an_interrupted_run_left_is_removed(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    separate("song.wav", "--stems", "vocals")
    left = tmp_path / "out" / "song" / ".bass.wav.01234567.partial"
    left.write_bytes(b"half")
    assert "already in" in separate("song.wav", "--stems", "vocals").err
    assert not left.exists()


def test_a_song_that_cannot_be_read_does_not_stop_the_rest(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identify = manifest.identify

    def refused(path: Path) -> manifest.SourceFile:
        if path.name == "b.wav":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return identify(path)

    monkeypatch.setattr(manifest, "identify", refused)
    for name in "abc":
        write(tmp_path / "m" / f"{name}.wav", noise(5_000))
    result = separate("m", "--stems", "vocals")
    assert (result.code, result.errors) == (1, ["error: m/b.wav: cannot be read: permission denied"])
    assert files_in(tmp_path / "out") == ["a/vocals.wav", "c/vocals.wav"]


def test_a_folder_of_records_that_cannot_be_written_is_found_before_the_work(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.Separator.separate", lambda *_, **__: pytest.fail("it was separated"))
    write(tmp_path / "song.wav", noise(5_000))
    (tmp_path / "out" / "song").mkdir(parents=True)
    (tmp_path / "out" / "song" / ".kmdx").write_text("a file")
    result = separate("song.wav")
    assert result.code == 2
    assert "not a directory writing out/song/.kmdx/lock" in result.errors[0]


def test_a_models_folder_with_brackets_in_its_name_is_printed_as_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "[red]a[" / "x]"))
    assert f"folder: {tmp_path}/[red]a[/x]" in run("models", "list").out


def test_a_song_that_changes_while_it_is_read_is_not_separated(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import audio

    read = audio.read
    path = write(tmp_path / "song.wav", noise(5_000))

    def changing(*arguments: Any, **options: Any) -> audio.Audio:
        sound = read(*arguments, **options)
        write(path, noise(6_000))
        return sound

    monkeypatch.setattr(audio, "read", changing)
    result = separate("song.wav")
    assert (result.code, files_in(tmp_path / "out")) == (2, [])
    assert result.errors == ["error: song.wav: changed while it was being read; run the command again"]


def test_one_bad_song_does_not_stop_the_rest(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "good.wav", noise(5_000))
    write(tmp_path / "good too.wav", noise(5_000))
    (tmp_path / "bad.wav").write_text("la la la")
    result = separate("good.wav", "bad.wav", "missing.wav", "good too.wav", "--stems", "vocals")
    assert result.code == 1
    assert files_in(tmp_path / "out") == ["good too/vocals.wav", "good/vocals.wav"]
    assert [("bad.wav" in line, "missing.wav" in line) for line in result.errors] == [
        (False, True),
        (True, False),
    ]


def test_what_becomes_of_each_song_is_said_in_order(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in reading, in separating and in writing, and a song after each."""
    from kmdx import Separator, audio
    from kmdx.errors import DeviceError

    separate_one, write_all = Separator.separate, audio.write_all

    def separated(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        if len(samples) == 5_003:
            raise DeviceError("too long for this device")
        return separate_one(self, samples, rate, **options)

    def written(files: dict[Path, np.ndarray], *arguments: Any) -> Any:
        if "5 unwritable" in str(next(iter(files))):
            raise AudioError("no space left on device")
        return write_all(files, *arguments)

    monkeypatch.setattr(Separator, "separate", separated)
    monkeypatch.setattr(audio, "write_all", written)
    for number, name in enumerate(["0", "1 unreadable", "2", "3 inseparable", "4", "5 unwritable", "6"]):
        write(tmp_path / "album" / f"{name}.wav", noise(5_000 + number))
    (tmp_path / "album" / "1 unreadable.wav").write_text("la la la")
    monkeypatch.setattr(cli.err, "print", print)  # both kinds of lines in one place
    result = separate("album", "--stems", "vocals")
    lines = [line for line in result.out.splitlines() if "error" in line or "→" in line]
    assert [line for line in lines if "→" in line] == [
        f"album/{number}.wav → out/{number} (vocals)" for number in (0, 2, 4, 6)
    ]
    assert [next(i for i, line in enumerate(lines) if text in line) for text in (
        "0.wav →", "unreadable.wav", "2.wav →", "too long", "4.wav →", "no space", "6.wav →")] == list(range(7))  # fmt: skip
    assert result.code == 1
    assert files_in(tmp_path / "out") == [f"{number}/vocals.wav" for number in (0, 2, 4, 6)]


def test_files_are_read_and_written_during_the_separation(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import Separator, audio

    read, write_all, separate_one = audio.read, audio.write_all, Separator.separate
    second_read, second_begun, first_written = (threading.Event() for _ in range(3))
    threads = []

    def reading(path: Path, *arguments: Any, **options: Any) -> audio.Audio:
        if path.name == "b.wav":
            second_read.set()
        return read(path, *arguments, **options)

    def separated(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        threads.append(threading.current_thread())
        if len(samples) == 5_000:
            assert second_read.wait(120)
        else:
            second_begun.set()
            assert first_written.wait(120)
        return separate_one(self, samples, rate, **options)

    def writing(*arguments: Any) -> Any:
        assert second_begun.wait(120) or first_written.is_set()
        peaks = write_all(*arguments)
        first_written.set()
        return peaks

    monkeypatch.setattr(audio, "read", reading)
    monkeypatch.setattr(audio, "write_all", writing)
    monkeypatch.setattr(Separator, "separate", separated)
    write(tmp_path / "a.wav", noise(5_000))
    write(tmp_path / "b.wav", noise(6_000))
    assert separate("a.wav", "b.wav", "--stems", "vocals").code == 0
    assert threads == [threading.main_thread()] * 2


def test_speed_precision_and_engine_are_the_separators(
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
def test_what_networks_compute_in_is_told(
    separate: Run, tmp_path: Path, options: list[str], line: str
) -> None:
    write(tmp_path / "song.wav", noise(3000))
    assert line in separate("song.wav", "--stems", "vocals", *options).err.splitlines()


def spoilt(folder: Path, what: str) -> Path:
    """Make a file that cannot be separated."""
    path = folder / "song.wav"
    if what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("la la la")
    elif what == "truncated":
        write(path, noise(30_000))
        path.write_bytes(path.read_bytes()[:60_000])
    elif what == "nan":
        samples = noise(30_000)
        samples[17] = np.nan
        soundfile.write(path, samples, 44100, subtype="FLOAT")
    elif what == "no samples":
        write(path, noise(0))
    elif what == "one sample":
        write(path, noise(1))
    elif what == "three channels":
        write(path, noise(30_000, 3))
    elif what == "a folder of nothing":
        path = folder / "nothing"
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "no such file"),
        ("empty", "found an empty file"),
        ("text", "not a sound file"),
        ("truncated", "cut short"),
        ("nan", "NaN or infinity in 1 of 30000 samples"),
        ("no samples", "no samples"),
        ("one sample", "1 sample, expected at least 2"),
        ("three channels", "3 channels"),
        ("a folder of nothing", "no songs in this folder"),
        ("an empty name", "a song's name is empty"),
    ],
)
def test_bad_songs_are_one_line_and_exit_2(separate: Run, tmp_path: Path, what: str, message: str) -> None:
    result = separate("" if what == "an empty name" else spoilt(tmp_path, what))
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stems", "guitar"], "unknown stem 'guitar'"),
        (["--stems", "Vocals"], "did you mean 'vocals'?"),
        (["--stems", ","], "no stem selected"),
        (["--ensemble", "nope"], "unknown ensemble 'nope'"),
        (["--ensemble", "nope.yaml"], "cannot read the ensemble"),
        (["--device", "toaster"], "unknown device 'toaster'"),
        (["--start", "-1"], "start -1 s"),
        (["--start", "99"], "past the end"),
        (["--duration", "0"], "duration 0 s"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    run: Run, small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    defaults = ["--ensemble", small, "--device", "cpu", "-o", "out"]
    result = run("separate", "song.wav", *defaults, *arguments)
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["truncated", "empty", "another network's", "text", "an attack"])
def test_bad_weights_are_one_line_and_exit_2(run: Run, tmp_path: Path, how: str) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    path = tiny.write_htdemucs(tmp_path)
    message = tiny.spoil(tmp_path / "small.ckpt", how)
    result = run("separate", "song.wav", "--ensemble", path, "-o", "out")
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_written_is_found_out_before_the_work(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.Separator.separate", lambda *_, **__: pytest.fail("it was separated"))
    write(tmp_path / "song.wav", noise(5_000), 96_000)
    result = separate("song.wav", "--format", "mp3")
    assert result.code == 2
    assert "mp3 does not support 96000 Hz" in result.errors[0]
    (tmp_path / "out").write_text("a file where the folder should be")
    assert "nothing was written" in separate("song.wav").errors[0]


def test_a_song_in_which_a_network_gives_nan_does_not_stop_the_rest(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network and its weights are named, and not the user's file."""
    forward, calls = DemucsNetwork.forward, []

    def damaged(network: DemucsNetwork, batch: torch.Tensor) -> torch.Tensor:
        calls.append(len(batch))  # three in each song
        return forward(network, batch) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(DemucsNetwork, "forward", damaged)
    for number in range(3):
        write(tmp_path / f"{number}.wav", noise(9000))
    result = separate("0.wav", "1.wav", "2.wav", "--format", "float32")
    assert result.code == 1
    assert len(result.errors) == 1
    assert "network htdemucs returned NaN or infinity in fp32; its weights, " in result.errors[0]
    assert "small.ckpt" in result.errors[0]
    assert "1.wav" not in result.errors[0].partition("network")[2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "2"]


def test_roles_told_by_file_names_are_warned_about_once(run: Run, tmp_path: Path, monkeypatch) -> None:
    from kmdx.weights import finding

    finding._warn_of_names.cache_clear()
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    for name in ("vocals", "drums", "bass", "other"):
        (tmp_path / "models" / f"demucs_{name}.ckpt").write_bytes(b"not weights")
    write(tmp_path / "song.wav", noise(5_000))
    result = run("separate", "song.wav", "--ensemble", "htdemucs_ft", "--device", "cpu")
    assert result.code == 2
    warned = [line for line in result.err.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1
    assert "bass from demucs_other.ckpt, other from demucs_bass.ckpt" in warned[0]


def test_ctrl_c_says_what_it_stopped(separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kmdx.Separator.separate", interrupt)
    write(tmp_path / "song.wav", noise(5_000))
    result = separate("song.wav")
    assert result.code == 130
    assert result.errors == ["error: stopped in song; finished songs are kept"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_songs_that_are_finished(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import Separator, audio

    separate_one, write_all = Separator.separate, audio.write_all
    interrupted = threading.Event()

    def interrupt(self: Separator, samples: np.ndarray, rate: int, **options: Any) -> Any:
        if len(samples) == 6_000:
            interrupted.set()
            raise KeyboardInterrupt
        return separate_one(self, samples, rate, **options)

    def slow(*arguments: Any) -> Any:
        assert interrupted.wait(120)
        return write_all(*arguments)

    monkeypatch.setattr(Separator, "separate", interrupt)
    monkeypatch.setattr(audio, "write_all", slow)
    for name, samples in (("a", 5_000), ("b", 6_000), ("c", 7_000)):
        write(tmp_path / f"{name}.wav", noise(samples))
    result = separate("a.wav", "b.wav", "c.wav", "--stems", "vocals")
    assert result.code == 130
    assert result.out == "a.wav → out/a (vocals)\n"
    assert result.errors == ["error: stopped in b; finished songs are kept"]
    assert files_in(tmp_path / "out") == ["a/vocals.wav"]


def test_links_in_circles_and_names_too_long(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "album" / "one.wav", noise(5_000))
    for name in ("up", "again"):
        (tmp_path / "album" / name).symlink_to(tmp_path / "album", target_is_directory=True)
    assert separate("album", "--stems", "vocals").code == 0
    assert files_in(tmp_path / "out") == ["one/vocals.wav"]
    too_long = separate("x" * 300)
    assert too_long.code == 2
    assert len(too_long.errors) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda plan: plan["signals"]["V"].update(hears="x2"), "a cycle: V → x2 → D → x1 → V"),
        (lambda plan: plan["signals"]["V"].update(network="nope"), "unknown network 'nope'"),
        (lambda plan: plan["signals"]["x1"]["sum"].update(x="one"), "expected a number, not 'one'"),
        (lambda plan: plan["networks"]["htdemucs"]["weights"].update(file="nope.ckpt"), "nope.ckpt"),
    ],
)
def test_bad_plans_are_one_line_and_exit_2(run: Run, tmp_path: Path, spoil, message: str) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    path = tiny.write_htdemucs(tmp_path)
    plan = yaml.safe_load(path.read_text("utf-8"))
    spoil(plan)
    path.write_text(yaml.safe_dump(plan, sort_keys=False), "utf-8")
    result = run("separate", "song.wav", "--ensemble", path, "-o", "out")
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "out").exists()


def test_missing_weights_say_what_to_pull_and_how_big_it_is(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "none"))
    write(tmp_path / "song.wav", noise(5_000))
    result = run("separate", "song.wav")
    assert result.code == 2
    assert len(result.errors) == 1
    assert "kmdx models pull leaderboard_c" in result.errors[0]
    assert "MB" in result.errors[0]
    assert not (tmp_path / "separated").exists()


def test_an_output_that_cannot_be_written(separate: Run, run: Run, small: Path, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    (tmp_path / "out").write_text("a file where the folder should be")
    result = separate("song.wav")
    assert result.code == 2
    assert len(result.errors) == 1
    assert "nothing was written" in result.errors[0]
    read_only = run("separate", "song.wav", "--ensemble", small, "-o", "/proc/out")
    assert read_only.code == 2
    assert len(read_only.errors) == 1


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from kmdx import cli
sys.argv = ["kmdx", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are a POSIX feature")
def test_a_full_disk_leaves_nothing_half_written(small: Path, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(60_000))
    arguments = ["separate", "song.wav", "--ensemble", str(small), "-o", "out", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "nothing was written" in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_command_starts_without_loading_torch_or_pydantic() -> None:
    check = "import sys; from kmdx import cli, plan, weights; sys.exit(bool({'torch', 'demucs', 'pydantic'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_help_and_version(run: Run) -> None:
    assert "separate" in run("--help").out
    assert run("--version").out.startswith("kmdx-net ")
    assert run("separate", "--nope").code == 2


def test_ensembles_are_listed_and_shown(run: Run, leaderboard: Path, tmp_path: Path) -> None:
    listed = run("ensembles").out
    for name in ("leaderboard_c", "htdemucs", "htdemucs_ft"):
        assert name in listed
    shown = run("ensembles", "show", "leaderboard_c", "--svg", "graph.svg").out
    for text in (
        "10 networks",
        "research only",
        "none published",
        "segments of 7.7 s, overlap 0.85",
        "x − 0.8·V.vocals − 0.2·M.vocals",
    ):
        assert text in shown
    assert (tmp_path / "graph.svg").read_text("utf-8").startswith("<svg")
    assert "4 networks" in run("ensembles", "show", "leaderboard_c", "--stems", "vocals").out
    assert "6 networks" in run("ensembles", "show", "leaderboard_c", "--stems", "bass").out
    assert "not stated" in run("ensembles", "show", leaderboard).out
    assert run("ensembles", "show", "nope").code == 2
    assert (
        "cannot be written" in run("ensembles", "show", "htdemucs", "--svg", "no/such/folder.svg").errors[0]
    )


def test_the_drawn_graph_of_the_documentation_is_current() -> None:
    from kmdx import drawing, plan_file

    loaded = plan_file.load("leaderboard_c")
    drawn = Path(__file__).parents[1] / "docs" / "leaderboard_c.svg"
    assert drawn.read_text("utf-8") == drawing.svg(loaded, loaded.stems)


def test_models_are_listed_verified_and_located(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    assert run("models", "where").out.strip() == str(tmp_path / "models")
    listed = run("models", "list").out
    assert "htdemucs_ft_vocals" in listed
    assert "research only" in listed
    missing = run("models", "verify", "htdemucs", "mini")
    assert missing.code == 2
    assert "htdemucs             missing: looked for 955717e8-8726e21a.th, " in missing.out
    assert missing.errors == [
        "error: of 5 weights, 1 missing (htdemucs); `kmdx models pull htdemucs` downloads the missing ones (about 84 MB)"
    ]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "955717e8.safetensors").write_bytes(b"broken")
    broken = run("models", "verify", "htdemucs", "kim_vocal_1")
    assert broken.code == 2
    assert "1 missing (kim_vocal_1) and 1 damaged or for another network (htdemucs)" in broken.errors[0]
    whole = run("models", "verify", "mini")
    assert (whole.code, whole.err) == (0, "all 4 weights are present and intact\n")
    assert run("models", "verify", "nope").errors == [
        "error: " + run("models", "pull", "nope").errors[0].removeprefix("error: ")
    ]


def test_a_mistyped_ensemble_is_suggested(run: Run) -> None:
    result = run("models", "pull", "leaderbord_c")
    assert result.code == 2
    assert len(result.errors) == 1
    assert result.errors[0].endswith("; did you mean 'leaderboard_c'?")


def test_verify_without_names_is_of_every_weight(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx import weights

    monkeypatch.setenv("KMDX_MODELS", str(tmp_path / "models"))
    result = run("models", "verify")
    count = len(weights.registry())
    assert result.code == 2
    assert len(result.errors) == 1
    assert f"of {count + 4} weights, {count} missing (" in result.errors[0]
    assert f"`kmdx models pull {' '.join(weights.registry())}` downloads the missing ones" in result.errors[0]
    assert len(result.out.splitlines()) == count + 4


def test_pulled_weights_are_shown_with_their_license_and_one_that_failed_with_its_reasons(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kmdx.errors import DownloadError
    from kmdx.weights import pulling

    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))

    def pull(weight: Any, folder: Path, *more: Any) -> Path:
        if weight.name == "htdemucs_ft_bass":
            raise DownloadError("htdemucs_ft_bass could not be pulled: here and there: no")
        return folder / weight.name

    monkeypatch.setattr(pulling, "_pull", pull)
    result = run("models", "pull", "htdemucs_ft", "955717e8", "kim_vocal_1")
    assert result.code == 2
    assert result.errors == ["error: htdemucs_ft_bass could not be pulled: here and there: no"]
    there = ["htdemucs_ft_vocals", "htdemucs_ft_drums", "htdemucs_ft_other", "htdemucs"]
    assert result.out.splitlines() == [
        *(f"{name}: {tmp_path / name} (license: research only)" for name in there),
        f"kim_vocal_1: {tmp_path / 'kim_vocal_1'} (license: none known)",
    ]
    assert result.err.count("Meta publishes the code under MIT") == 1
    assert f"license of {', '.join(there)}: research only. Meta publishes" in result.err
    assert "license of kim_vocal_1: none known. The release" in result.err


def test_an_ensemble_that_is_pulled_without_a_connection_ends_with_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KMDX_MODELS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody is there
    result = run("models", "pull", "leaderboard_c")
    assert result.code == 2
    (line,) = result.errors
    assert line.startswith("error: 10 of 10 weight files could not be pulled: no connection to ")
    assert "huggingface.co through the proxy" in line
    assert result.err.splitlines()[-1] == line
    assert len(result.err.splitlines()) < 25
    assert max(map(len, result.err.splitlines())) < 400


def test_separation_of_a_stereo_song_is_the_librarys(separate: Run, small: Path, tmp_path: Path) -> None:
    from kmdx import Separator

    song = noise(30_000)
    soundfile.write(tmp_path / "song.wav", song, 44100, subtype="FLOAT")
    separate("song.wav", "--format", "float32")
    expected = Separator(small, device="cpu").separate(song, 44100)
    for stem, samples in expected.items():
        written = soundfile.read(tmp_path / "out" / "song" / f"{stem}.wav", dtype="float32")[0]
        assert decibels(samples, written) > 120
