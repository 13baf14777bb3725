"""``kmdx separate`` into folders that already contain stems or other files."""

from __future__ import annotations

import json
from pathlib import Path

import cli_cases
import pytest
import soundfile
import tiny
import torch
import yaml
from cli_cases import Run, files_in, write
from conftest import noise

from kmdx import manifest, song_log

run, separate = cli_cases.run, cli_cases.separate


def test_finished_songs_are_skipped_unless_overwrite_is_given(separate: Run, tmp_path: Path) -> None:
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


def test_many_finished_songs_are_counted_on_the_terminal_and_each_is_logged(
    separate: Run, tmp_path: Path
) -> None:
    names = [f"song{number:02d}.wav" for number in range(song_log.FEW + 2)]
    for name in names:
        write(tmp_path / name, noise(2000))
    again = (*names, "--stems", "bass", "--log-json", "log")
    assert separate(*again).code == 0
    skipped = separate(*again)
    assert (skipped.code, skipped.out) == (0, "")
    assert skipped.err.count("already in") == song_log.FEW
    assert skipped.err.count("2 more songs; use --overwrite to separate them again") == 1
    assert [*map(json.loads, (tmp_path / "log").read_text().splitlines())][-1]["status"] == "finished before"
    assert len((tmp_path / "log").read_text().splitlines()) == 2 * len(names)


def test_the_owner_of_a_folder_is_known_from_any_readable_record(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(2000))
    separate("song.wav", "--stems", "bass,vocals")
    folder = tmp_path / "out" / "song"
    (folder / manifest.FOLDER / manifest.record_name("bass.wav")).write_text("damaged")
    found = manifest.owner(folder)
    assert found is not None
    assert found.path == str(tmp_path / "song.wav")
    (folder / "vocals.wav").unlink()
    assert manifest.owner(folder) is None


def test_only_missing_stems_are_made(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(20_000))
    separate("song.wav", "--stems", "bass")
    bass = (tmp_path / "out" / "song" / "bass.wav").stat().st_mtime_ns
    result = separate("song.wav", "--stems", "bass,vocals")
    assert (result.code, result.out) == (0, "song.wav → out/song (vocals)\n")
    assert (tmp_path / "out" / "song" / "bass.wav").stat().st_mtime_ns == bass


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
def test_stems_made_with_other_settings_are_never_mistaken_for_finished_ones(
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


def test_stems_of_another_plan_or_other_weights_stop_the_command_before_any_work(
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


def test_remaining_files_with_other_settings_are_reported(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    separate("song.wav", "--stems", "vocals", "--format", "flac", "--speed", "fast")
    result = separate("song.wav", "--stems", "vocals", "--overwrite")
    assert result.code == 0
    assert "warning: out/song also has files made with different settings: vocals.flac: " in result.err
    assert "speed fast, not leaderboard" in result.err
    assert "vocals.flac" in separate("song.wav", "--stems", "vocals").err


def test_a_file_that_kmdx_did_not_write_is_kept(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    mine = tmp_path / "out" / "song" / "vocals.wav"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    result = separate("song.wav", "--stems", "vocals")
    assert result.code == 0
    assert "out/song/vocals.wav was not written by kmdx, or was changed since" in result.err
    assert mine.with_name("vocals.wav.bak").read_text() == "mine"
    assert soundfile.info(mine).frames == 5_000


def test_leftovers_of_an_interrupted_run_are_removed(separate: Run, tmp_path: Path) -> None:
    write(tmp_path / "song.wav", noise(5_000))
    separate("song.wav", "--stems", "vocals")
    left = tmp_path / "out" / "song" / ".bass.wav.01234567.partial"
    left.write_bytes(b"half")
    assert "already in" in separate("song.wav", "--stems", "vocals").err
    assert not left.exists()
