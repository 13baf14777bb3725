"""What counts as a finished stem, whatever happened while it was written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
from stems import finish, wanted, write

from kmdx import audio, manifest
from kmdx.errors import AudioError, KmdxWarning

SONG = Path("song.wav")
FOLDER = Path("out/song")


@pytest.fixture(autouse=True)
def song(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    SONG.write_text("a song")


def is_sound(name: str) -> bool:
    return name.endswith((".wav", ".flac", ".mp3"))


def status(*stems: str, **settings: Any) -> manifest.FolderStatus:
    return manifest.status(wanted(FOLDER, SONG, *stems, **settings), is_sound)


def level(stem: str = "vocals") -> float:
    """What is in a stem's file."""
    return float(soundfile.read(FOLDER / f"{stem}.wav")[0][0])


def hidden(folder: Path = FOLDER) -> list[str]:
    """What is in a folder besides stems, records and the lock."""
    names = (path.name for path in folder.rglob("*"))
    return [name for name in names if name.endswith((".partial", ".new"))]


def test_a_stem_is_finished_when_it_was_written_with_these_settings() -> None:
    assert status().missing == ["vocals"]
    finish(FOLDER, SONG)
    assert status() == manifest.FolderStatus([], [], [], [])
    assert status(overwrite=True).missing == ["vocals"]


def test_a_record_has_the_size_and_the_checksum_of_its_file() -> None:
    finish(FOLDER, SONG, "bass", "vocals")
    (record,) = (json.loads(path.read_text("utf-8")) for path in FOLDER.glob(".kmdx/.bass.wav.json"))
    assert record["bytes"] == (FOLDER / "bass.wav").stat().st_size
    assert record["sha256"] == manifest.files.sha256(FOLDER / "bass.wav")
    assert record["song"]["sha256"] == manifest.files.sha256(SONG)
    assert record["settings"]["weights"] == {"w": "1" * 64}


def test_more_stems_may_be_added() -> None:
    finish(FOLDER, SONG, "bass")
    found = status("bass", "vocals")
    assert (found.missing, found.conflicts) == (["vocals"], [])


def test_another_format_may_be_added_and_all_of_them_count() -> None:
    for format in ("wav16", "flac", "wav16"):
        assert not status(format=format).conflicts
        finish(FOLDER, SONG, format=format)
    assert not status().missing
    assert not status(format="flac").missing
    assert not status().stale


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": "2" * 64, "ensemble": "f"}, "ensemble e, not f"),
        ({"plan": "2" * 64}, "another version of e"),
        ({"weights": {"w": "3" * 64}}, "other weights of w"),
        ({"weights": {"v": "1" * 64}}, "other weights of v, other weights of w"),
        ({"precision": "bf16"}, "precision fp32, not bf16"),
        ({"engine": "plain"}, "engine tuned, not plain"),
        ({"speed": "fast"}, "speed leaderboard, not fast"),
        ({"start": 0.5}, "start 0.0, not 0.5"),
        ({"duration": 2.0}, "duration None, not 2.0"),
        ({"downmix": True}, "downmix False, not True"),
        ({"format": "wav24"}, "format wav16, not wav24"),
    ],
)
def test_every_setting_distinguishes_stems(change: dict[str, Any], message: str) -> None:
    finish(FOLDER, SONG)
    found = status(**change)
    assert found.conflicts == [f"vocals.wav: {message}"]
    assert found.missing == ["vocals"]
    assert status(overwrite=True, **change).conflicts == []


def test_missing_weights_do_not_count_as_a_difference() -> None:
    finish(FOLDER, SONG)
    assert not status(weights={"w": None}).conflicts


def test_a_stem_made_with_other_settings_blocks_the_whole_song() -> None:
    finish(FOLDER, SONG, "bass", speed="fast")
    assert status("vocals").conflicts == ["bass.wav: speed fast, not leaderboard"]


def test_stems_of_another_song_block_the_song() -> None:
    finish(FOLDER, SONG)
    SONG.write_text("another version")
    assert status().conflicts == ["vocals.wav: another song, or an older version of this one"]


def test_a_song_with_only_a_new_modification_time_is_the_same() -> None:
    finish(FOLDER, SONG)
    os.utime(SONG, ns=(1, 1))
    assert not status().missing


def test_another_song_with_the_same_size_and_time_is_another_song() -> None:
    times = SONG.stat().st_atime_ns, SONG.stat().st_mtime_ns
    finish(FOLDER, SONG)
    SONG.write_bytes(SONG.read_bytes()[::-1])
    os.utime(SONG, ns=times)
    assert status().conflicts == ["vocals.wav: another song, or an older version of this one"]


def test_files_of_other_settings_in_other_formats_are_stale() -> None:
    finish(FOLDER, SONG, speed="fast", format="flac")
    finish(FOLDER, SONG, overwrite=True)
    assert not status().missing
    assert status().stale == ["vocals.flac: speed fast, not leaderboard"]


def test_files_without_a_record_next_to_the_stems_are_stale() -> None:
    finish(FOLDER, SONG)
    for name in ("vocals.mp3", "notes.txt", "solo.wav"):
        (FOLDER / name).write_text("x")
    assert status().stale == ["vocals.mp3: no record of how it was made"]


@pytest.mark.parametrize("cut", [1, 400])
def test_a_stem_whose_size_differs_from_its_record_is_made_again(cut: int) -> None:
    finish(FOLDER, SONG)
    path = FOLDER / "vocals.wav"
    path.write_bytes(path.read_bytes()[:-cut])
    assert status() == manifest.FolderStatus(["vocals"], [], [], ["vocals.wav"])
    finish(FOLDER, SONG)
    assert level() == pytest.approx(0.5, abs=1e-4)
    assert not list(FOLDER.glob("*.bak"))


def test_a_damaged_stem_of_other_settings_is_not_replaced() -> None:
    finish(FOLDER, SONG, speed="fast")
    (FOLDER / "vocals.wav").write_text("edited by its owner")
    assert status().conflicts == ["vocals.wav: speed fast, not leaderboard"]


def test_a_stem_that_was_removed_is_made_again() -> None:
    finish(FOLDER, SONG, speed="fast")
    (FOLDER / "vocals.wav").unlink()
    assert status() == manifest.FolderStatus(["vocals"], [], [], [])


def test_a_file_without_a_record_is_kept_under_another_name() -> None:
    FOLDER.mkdir(parents=True)
    for number in range(2):
        (FOLDER / "vocals.wav").write_text(f"mine {number}")
        assert status() == manifest.FolderStatus(["vocals"], [], [], ["vocals.wav"])
        finish(FOLDER, SONG)
        shutil.rmtree(FOLDER / manifest.FOLDER)
        assert level() == pytest.approx(0.5, abs=1e-4)
    assert (FOLDER / "vocals.wav.bak").read_text() == "mine 0"
    assert (FOLDER / "vocals.wav.bak2").read_text() == "mine 1"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stem_that_was_replaced_by_another_file_is_kept(overwrite: bool) -> None:
    finish(FOLDER, SONG)
    (FOLDER / "vocals.wav").write_text("edited by its owner")
    assert status(overwrite=overwrite).unknown == ["vocals.wav"]
    finish(FOLDER, SONG, overwrite=overwrite)
    assert (FOLDER / "vocals.wav.bak").read_text() == "edited by its owner"


def test_a_folder_in_the_place_of_a_stem_is_an_error() -> None:
    (FOLDER / "vocals.wav").mkdir(parents=True)
    assert status() == manifest.FolderStatus(["vocals"], [], [], [])
    with pytest.raises(AudioError, match="is a folder"):
        finish(FOLDER, SONG)


def test_a_file_that_lost_its_record_is_made_again_without_a_copy() -> None:
    finish(FOLDER, SONG)
    shutil.rmtree(FOLDER / manifest.FOLDER)
    assert status().missing == ["vocals"]
    finish(FOLDER, SONG)
    assert not status().missing
    assert not list(FOLDER.glob("*.bak"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", "{}", '{"file": "vocals.wav"}', "[" * 5000, "\ud800", {"bytes": "many"},
     {"settings": {"ensemble": ["x"]}}, {"song": {"modified": "then"}}],
)  # fmt: skip
def test_a_malformed_record_leaves_the_stem_unfinished(text: str | dict[str, Any]) -> None:
    finish(FOLDER, SONG)
    place = FOLDER / ".kmdx" / ".vocals.wav.json"
    if isinstance(text, dict):
        record = json.loads(place.read_text("utf-8"))
        changes = {key: {**record[key], **new} if isinstance(new, dict) else new for key, new in text.items()}
        text = json.dumps({**record, **changes})
    place.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert status().missing == ["vocals"]


def test_a_record_of_another_file_does_not_count() -> None:
    finish(FOLDER, SONG, "bass")
    places = FOLDER / ".kmdx"
    shutil.copy(places / ".bass.wav.json", places / ".vocals.wav.json")
    shutil.copy(FOLDER / "bass.wav", FOLDER / "vocals.wav")
    assert status().missing == ["vocals"]


def killed_at(step: int, work: Callable[[], None]) -> int | None:
    """Do some work in a process that is killed at its n-th change of a file; None if it finished."""
    child = os.fork()
    if not child:
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            writes = (
                event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            )
            if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work()
        finally:
            os._exit(0)
    _, code = os.waitpid(child, 0)
    return code or None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("earlier", [None, "fast", "leaderboard"])
def test_a_kill_at_any_step_leaves_old_stems_new_stems_or_unfinished_ones(earlier: str | None) -> None:
    """Earlier stems are of another speed, or of the same."""
    stems = ("bass", "vocals")
    levels = {0.1: earlier, 0.7: "leaderboard"}
    step = 0
    while True:
        step += 1
        shutil.rmtree("out", ignore_errors=True)
        if earlier is not None:
            write(wanted(FOLDER, SONG, *stems, speed=earlier), level=0.1)
        if killed_at(step, lambda: write(wanted(FOLDER, SONG, *stems, overwrite=True), level=0.7)) is None:
            break
        for number, stem in enumerate(stems):
            is_there = (FOLDER / f"{stem}.wav").exists()
            value = round(level(stem) - 0.01 * number, 1) if is_there else None
            for speed in ("fast", "leaderboard"):
                if not status(stem, speed=speed).missing:
                    assert levels[value] == speed
        manifest.clean(FOLDER)
        assert not hidden()
        write(wanted(FOLDER, SONG, *stems, overwrite=True), level=0.7)
        assert [level(stem) for stem in stems] == pytest.approx([0.7, 0.71], abs=1e-4)
        assert not status(*stems).missing
    assert step > 10  # else nothing was killed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_between_two_stems_of_other_settings_is_noticed() -> None:
    """Size and name of both files are equal: only their checksums differ."""

    def work() -> None:
        write(wanted(FOLDER, SONG, "bass", "vocals", start=0.2, overwrite=True), level=0.7)

    mixed = 0
    for step in range(1, 30):
        shutil.rmtree("out", ignore_errors=True)
        write(wanted(FOLDER, SONG, "bass", "vocals"), level=0.1)
        killed_at(step, work)
        found = {stem: level(stem) for stem in ("bass", "vocals")}
        mixed += found["bass"] > 0.5 > found["vocals"]
        if not status("bass", "vocals").missing:
            assert found == pytest.approx({"bass": 0.1, "vocals": 0.11}, abs=1e-4)
    assert mixed


def test_leftovers_of_a_killed_run_are_removed_by_the_next_run() -> None:
    finish(FOLDER, SONG)
    (FOLDER / ".bass.wav.0a1b2c3d.partial").write_text("half")
    (FOLDER / ".kmdx" / ".vocals.wav.json.new").write_text("{")
    manifest.clean(FOLDER)
    assert not hidden()
    assert not status().missing


def test_files_that_another_process_is_writing_are_not_removed() -> None:
    finish(FOLDER, SONG)
    with manifest.writing(wanted(FOLDER, SONG, "bass"), manifest.identify(SONG)):
        partial = FOLDER / ".bass.wav.0a1b2c3d.partial"
        partial.write_text("half")
        manifest.clean(FOLDER)
        assert partial.exists()


def test_one_process_at_a_time_writes_to_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_LOCK_TIMEOUT", 0.01)
    monkeypatch.setattr(manifest, "_LOCK_QUIET", 0.0)
    with manifest.writing(wanted(FOLDER, SONG, "bass"), manifest.identify(SONG)) as prepare:
        with (
            pytest.warns(KmdxWarning, match="waiting for another process that is writing to out/song"),
            pytest.raises(AudioError, match="another process has been writing to it"),
        ):
            write(wanted(FOLDER, SONG, "drums"))
        audio.write_all({FOLDER / "bass.wav": [0.5, 0.5]}, 8000, before_rename=prepare)
    write(wanted(FOLDER, SONG, "drums"))
    assert not status("bass", "drums").missing


@pytest.mark.parametrize("overwrite", [False, True])
def test_stems_of_another_song_written_meanwhile_are_never_replaced(overwrite: bool) -> None:
    other = Path("other.wav")
    other.write_text("another song")
    late = wanted(FOLDER, SONG, overwrite=overwrite)
    write(wanted(FOLDER, other), level=0.1)
    with pytest.raises(AudioError, match=r"meanwhile, another process wrote the stems of .*other\.wav"):
        write(late)
    assert level() == pytest.approx(0.1, abs=1e-4)


def test_stems_that_another_process_wrote_with_other_settings_meanwhile_are_kept() -> None:
    late = wanted(FOLDER, SONG)
    assert not manifest.status(late, is_sound).conflicts
    write(wanted(FOLDER, SONG, speed="fast"), level=0.1)
    with pytest.raises(
        AudioError, match=r"another process wrote stems with different settings to it \(vocals"
    ):
        write(late)
    assert level() == pytest.approx(0.1, abs=1e-4)


def test_a_failure_leaves_no_folder_and_keeps_older_stems() -> None:
    with pytest.raises(AudioError, match="NaN"):
        write(wanted(FOLDER, SONG), level=float("nan"))
    assert not Path("out").exists()
    finish(FOLDER, SONG)
    with pytest.raises(AudioError, match="NaN"):
        write(wanted(FOLDER, SONG, overwrite=True), level=float("nan"))
    assert not hidden()
    assert not status().missing


def test_a_folder_that_cannot_be_created_is_a_one_line_error() -> None:
    Path("out").write_text("a file")
    with pytest.raises(AudioError, match="out/song: cannot be written"):
        finish(FOLDER, SONG)


def test_records_do_not_look_like_stems() -> None:
    finish(FOLDER, SONG)
    assert [path.name for path in Path("out").rglob("vocals.*")] == ["vocals.wav"]
