"""User errors of ``kmdx separate``: one line, exit code 2, and nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import cli_cases
import numpy as np
import pytest
import soundfile
import tiny
import yaml
from cli_cases import Run, files_in, write
from conftest import noise

from kmdx import audio
from kmdx.weights import local

run, separate = cli_cases.run, cli_cases.separate


def test_an_unwritable_folder_of_records_is_detected_before_separation(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.Separator.separate", lambda *_, **__: pytest.fail("it was separated"))
    write(tmp_path / "song.wav", noise(5_000))
    (tmp_path / "out" / "song").mkdir(parents=True)
    (tmp_path / "out" / "song" / ".kmdx").write_text("a file")
    result = separate("song.wav")
    assert result.code == 2
    assert "not a directory writing out/song/.kmdx/lock" in result.errors[0]


def test_a_song_that_changes_while_it_is_read_is_not_separated(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def damaged_song(folder: Path, what: str) -> Path:
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
def test_bad_songs_give_one_line_and_exit_code_2(
    separate: Run, tmp_path: Path, what: str, message: str
) -> None:
    result = separate("" if what == "an empty name" else damaged_song(tmp_path, what))
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
def test_bad_options_give_one_line_and_exit_code_2(
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
def test_bad_weights_give_one_line_and_exit_code_2(run: Run, tmp_path: Path, how: str) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    path = tiny.write_htdemucs(tmp_path)
    message = tiny.spoil(tmp_path / "small.ckpt", how)
    result = run("separate", "song.wav", "--ensemble", path, "-o", "out")
    assert result.code == 2
    assert len(result.errors) == 1
    assert message in result.errors[0]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_detected_before_separation(
    separate: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kmdx.Separator.separate", lambda *_, **__: pytest.fail("it was separated"))
    write(tmp_path / "song.wav", noise(5_000), 96_000)
    result = separate("song.wav", "--format", "mp3")
    assert result.code == 2
    assert "mp3 does not support 96000 Hz" in result.errors[0]
    (tmp_path / "out").write_text("a file where the folder should be")
    assert "nothing was written" in separate("song.wav").errors[0]


def test_weights_identified_by_file_name_give_one_warning(run: Run, tmp_path: Path, monkeypatch) -> None:
    local._warn_of_names.cache_clear()
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


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda plan: plan["signals"]["V"].update(hears="x2"), "a cycle: V → x2 → D → x1 → V"),
        (lambda plan: plan["signals"]["V"].update(network="nope"), "unknown network 'nope'"),
        (lambda plan: plan["signals"]["x1"]["sum"].update(x="one"), "expected a number, not 'one'"),
        (lambda plan: plan["networks"]["htdemucs"]["weights"].update(file="nope.ckpt"), "nope.ckpt"),
    ],
)
def test_bad_plans_give_one_line_and_exit_code_2(run: Run, tmp_path: Path, spoil, message: str) -> None:
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


def test_missing_weights_report_what_to_pull_and_its_size(
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


def test_unwritable_output_gives_one_line_and_exit_code_2(
    separate: Run, run: Run, small: Path, tmp_path: Path
) -> None:
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
