"""Which songs a command line selects, and that each gets a separate folder on every system."""

from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from stems import finish

from kmdx import inputs
from kmdx.errors import KmdxError

OUT = Path("out")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def songs(*paths: str) -> None:
    """Make files, each with other content."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(path, "utf-8")


def places(*arguments: str, output: Path = OUT) -> dict[str, str]:
    """Where the stems of each song go."""
    batch = inputs.collect(arguments, output)
    assert not batch.problems
    return {str(song.path): song.place for song in batch.songs}


def test_a_folder_is_mirrored() -> None:
    songs("m/Album1/CD1/01.wav", "m/Album2/CD1/01.wav", "m/top.mp3", "m/live/song/mixture.wav")
    assert places("m") == {
        "m/top.mp3": "top",
        "m/Album1/CD1/01.wav": "Album1/CD1/01",
        "m/Album2/CD1/01.wav": "Album2/CD1/01",
        "m/live/song/mixture.wav": "live/song",
    }


@pytest.mark.parametrize("argument", ["m/Album1/CD1/01.wav", "m/Album1/CD1/*", "*/*/*/01.wav"])
def test_a_file_goes_to_its_name(argument: str) -> None:
    songs("m/Album1/CD1/01.wav")
    assert list(places(argument).values()) == ["01"]


@pytest.mark.parametrize(
    ("folder", "argument"), [(".", "My Song"), ("My Song", "mixture.wav"), ("My Song/sub", "../mixture.wav")]
)
def test_a_mixture_is_named_after_its_folder(
    folder: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs("My Song/mixture.wav", "My Song/vocals.wav", "My Song/sub/cover.jpg")
    monkeypatch.chdir(folder)
    assert list(places(argument).values()) == ["My Song"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a/s.wav", "b/s.wav"], ["a/s", "b/s"]),
        (["a/x/s.wav", "b/x/s.wav", "a/y/s.wav"], ["a/x/s", "b/x/s", "y/s"]),
        (["a/s.wav", "a/s.flac", "b/t.wav"], ["s (wav)", "s (flac)", "t"]),
        (["a/s.wav", "a/s.flac", "b/s.wav"], ["a/s (wav)", "a/s (flac)", "b/s"]),
        (["a/s", "a/s.wav"], ["s (no extension)", "s (wav)"]),
        (["x/Song.wav", "y/song.wav"], ["x/Song", "y/song"]),
        (["x/Song.wav", "x/song.wav"], ["Song (1)", "song (2)"]),
        (["X/s.wav", "x/s.wav"], ["s (1)", "s (2)"]),
        (["x/STRASSE.wav", "y/straße.wav"], ["x/STRASSE", "y/straße"]),
        (["x/a?.wav", "x/a*.wav"], ["a_ (1)", "a_ (2)"]),
        (["a/s.wav", "b/s.wav", "a - s.wav"], ["a/s", "b/s", "a - s"]),
        (["a.wav", "a/mixture.wav"], ["a (1)", "a (2)"]),
    ],
)  # fmt: skip
def test_songs_with_the_same_name_get_separate_folders(paths: list[str], expected: list[str]) -> None:
    songs(*paths)
    found = list(places(*paths).values())
    root = "/".join(Path.cwd().parts[1:])
    assert [place.replace(f"{root}/", "") for place in found] == expected


def test_names_that_differ_only_in_unicode_normalization_do_not_share_a_folder() -> None:
    composed, decomposed = (unicodedata.normalize(form, "café.wav") for form in ("NFC", "NFD"))
    songs(f"x/{composed}", f"y/{decomposed}")
    found = places(f"x/{composed}", f"y/{decomposed}").values()
    assert [place.split("/")[0] for place in found] == ["x", "y"]


def test_a_longer_name_that_belongs_to_another_song_is_not_used() -> None:
    songs("l/a/s.wav", "l/b/s.wav", "q/a/s.wav")
    assert list(places("l/a/s.wav", "l/b/s.wav", "q").values()) == ["l/a/s", "b/s", "q/a/s"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("CON.wav", "CON_"),
        ("con.live.wav", "con_.live"),
        ("Aux .wav", "Aux_"),
        ("nul .x.wav", "nul_ .x"),
        ("COM¹.wav", "COM¹_"),
        ("CONIN$.wav", "CONIN$_"),
        ("Contra.wav", "Contra"),
        ("end...wav", "end"),
        ("space .wav", "space"),
        ("a:b.wav", "a_b"),
        ('<>"|?*\\.wav', "_______"),
        ("a\nb\x7f.wav", "a_b_"),
        ("..wav", "_"),
        (".kmdx.wav", "_.kmdx"),
        ("é" * 120 + ".wav", "é" * 120),
    ],
)
def test_folder_names_are_valid_on_windows(name: str, place: str) -> None:
    songs(f"album/{name}")
    assert list(places(f"album/{name}").values()) == [place]


def test_parent_folder_names_are_valid_on_windows_too() -> None:
    songs("m/AC:DC/LPT1/a.wav", "m/etc./b.wav")
    assert list(places("m").values()) == ["AC_DC/LPT1_/a", "etc/b"]


def test_a_name_that_is_not_utf_8_becomes_text() -> None:
    try:
        Path("album").mkdir()
        Path(os.fsdecode(b"album/caf\xe9.wav")).write_text("x")
    except OSError:
        pytest.skip("this file system takes no such name")
    assert list(places("album").values()) == ["caf\ufffd\ufffd\ufffd"]


def test_a_long_name_stays_within_255_bytes_with_its_tag() -> None:
    name = "é" * 125
    songs(f"x/{name}.wav", f"x/{name}.mp3")
    assert all(len(place.encode()) <= 255 for place in places("x").values())
    assert len({*places("x").values()}) == 2


def test_a_song_with_stems_keeps_its_folder_when_a_namesake_is_added() -> None:
    songs("x/song.wav", "y/song.wav")
    finish(OUT / "song", Path("x/song.wav"))
    for arguments in (["x/song.wav", "y/song.wav"], ["y/song.wav", "x/song.wav"]):
        assert places(*arguments) == {"x/song.wav": "song", "y/song.wav": "y/song"}
    assert places("y/song.wav") == {"y/song.wav": "y/song"}


@pytest.mark.parametrize("place", ["y/song", "song (wav)", "song (1)"])
def test_a_song_is_found_again_under_its_longer_name(place: str) -> None:
    songs("x/song.wav", "y/song.wav")
    finish(OUT / place, Path("y/song.wav"))
    assert places("y/song.wav") == {"y/song.wav": place}


def test_a_number_is_found_again_when_a_lower_one_is_gone() -> None:
    songs("x/Song.wav", "x/song.wav")
    finish(OUT / "song (2)", Path("x/song.wav"))
    assert places("x/song.wav") == {"x/song.wav": "song (2)"}


def test_a_song_keeps_its_folder_when_its_parent_folder_is_separated_later() -> None:
    songs("h/A/01.wav", "h/B/01.wav")
    finish(OUT / "01", Path("h/A/01.wav"))
    assert places("h") == {"h/A/01.wav": "01", "h/B/01.wav": "B/01"}


def test_a_song_that_was_moved_is_found_by_its_content() -> None:
    songs("x/song.wav")
    finish(OUT / "song", Path("x/song.wav"))
    Path("x").rename("z")
    os.utime("z/song.wav", ns=(1, 1))
    assert places("z/song.wav") == {"z/song.wav": "song"}


def test_two_songs_of_equal_size_and_time_are_not_confused() -> None:
    songs("x/song.wav", "y/song.wav")
    Path("y/song.wav").write_text(Path("x/song.wav").read_text()[::-1])
    for path in ("x/song.wav", "y/song.wav"):
        os.utime(path, ns=(1, 1))
    finish(OUT / "song", Path("x/song.wav"))
    assert places("y/song.wav") == {"y/song.wav": "y/song"}


def test_a_changed_song_keeps_its_folder() -> None:
    songs("x/song.wav")
    finish(OUT / "song", Path("x/song.wav"))
    Path("x/song.wav").write_text("another version")
    assert places("x/song.wav") == {"x/song.wav": "song"}


def test_a_copy_of_a_song_does_not_share_its_folder() -> None:
    songs("x/song.wav")
    finish(OUT / "song", Path("x/song.wav"))
    Path("y").mkdir()
    Path("y/song.wav").write_bytes(Path("x/song.wav").read_bytes())
    assert places("y/song.wav", "x/song.wav") == {"y/song.wav": "y/song", "x/song.wav": "song"}


def test_a_folder_of_another_song_is_not_used_whatever_its_case() -> None:
    songs("x/SONG.wav", "x/song.wav")
    finish(OUT / "SONG", Path("x/SONG.wav"))
    assert places("x/song.wav") == {"x/song.wav": "song (1)"}


def test_finished_stems_are_not_songs() -> None:
    songs("album/one.wav")
    finish(Path("album/one"), Path("album/one.wav"))
    for output in (Path("album"), Path("elsewhere")):
        assert places("album", output=output) == {"album/one.wav": "one"}
    songs("album/one/bonus.wav")
    assert set(places("album", output=Path("elsewhere"))) == {"album/one.wav", "album/one/bonus.wav"}


@pytest.mark.parametrize("arguments", [["."], ["*.wav"], ["**/*.wav"], ["*"], ["one.wav", "out"]])
def test_files_in_the_output_folder_are_not_songs(arguments: list[str]) -> None:
    songs("one.wav")
    finish(OUT / "one", Path("one.wav"))
    assert places(*arguments) == {"one.wav": "one"}


def test_a_pattern_does_not_match_finished_stems() -> None:
    songs("album/one.wav")
    finish(Path("album/one"), Path("album/one.wav"))
    assert places("album/**/*.wav", output=Path("elsewhere")) == {"album/one.wav": "one"}


def test_a_song_given_twice_or_through_a_link_is_separated_once() -> None:
    songs("m/a.wav")
    Path("link.wav").symlink_to("m/a.wav")
    assert places("m/a.wav", "m", "./m/../m/a.wav", "link.wav") == {"m/a.wav": "a"}


def test_a_song_that_cannot_be_compared_is_a_problem_of_its_own() -> None:
    songs("m/a.wav", "m/b.wav")
    OUT.mkdir()
    (OUT / "a").symlink_to("a")  # a link to itself
    batch = inputs.collect(["m"], OUT)
    assert [song.place for song in batch.songs] == ["b"]
    assert "m/a.wav: " in batch.problems[0]


def test_two_songs_in_one_folder_through_a_link_are_refused() -> None:
    songs("m/a.wav", "m/b.wav")
    (OUT / "a").mkdir(parents=True)
    (OUT / "b").symlink_to("a")
    with pytest.raises(KmdxError, match=r"m/b\.wav and m/a\.wav would both be written to out/b"):
        inputs.refuse_shared_folders(inputs.collect(["m"], OUT).songs, OUT, ["vocals.wav"])


def test_a_folder_with_the_name_of_a_stem_is_refused() -> None:
    songs("m/x.mp3", "m/x/vocals.wav.mp3")
    found = inputs.collect(["m"], OUT).songs
    inputs.refuse_shared_folders(found, OUT, ["bass.wav"])
    with pytest.raises(KmdxError, match=r"its folder out/x/vocals\.wav would also be a stem of m/x\.mp3"):
        inputs.refuse_shared_folders(found, OUT, ["vocals.wav"])


@pytest.mark.parametrize(
    ("argument", "problem"),
    [("", "a song's name is empty"), ("none.wav", "no such file"), ("*.ogg", "no file matches"),
     ("e", "no songs"), ("/dev/null", "found a pipe or a device")],
)  # fmt: skip
def test_an_argument_that_matches_no_song_is_a_problem(argument: str, problem: str) -> None:
    Path("e").mkdir()
    batch = inputs.collect([argument], OUT)
    assert not batch.songs
    assert problem in batch.problems[0]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
@pytest.mark.parametrize(
    "names", [{"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONUTF8": "1"}]
)
def test_places_have_the_bytes_of_names_whatever_the_systems_encoding(
    tmp_path: Path, names: dict[str, str]
) -> None:
    long = "é" * 120
    for name in (b"\xff\xe9.wav", "é.wav".encode(), f"{long}.wav".encode()):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    code = (
        "import os, sys; from pathlib import Path; from kmdx import inputs\n"
        "found = inputs.collect(sys.argv[1:2], Path('out'))\n"
        "inputs.refuse_shared_folders(found.songs, Path('out'), ['vocals.wav'])\n"
        "sys.stdout.buffer.write(b'\\n'.join(sorted(os.fsencode(s.folder(Path('out'))) for s in found.songs)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **names},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().splitlines() == ["out/é", f"out/{long}", "out/" + 6 * "\ufffd"]


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with two songs, a cover and a playlist."""
    monkeypatch.chdir(tmp_path)
    Path("album").mkdir()
    for name in ("1.wav", "2.odd", "cover.jpg", "list.m3u"):
        Path("album", name).write_bytes(b"x")


@pytest.mark.parametrize(
    ("arguments", "songs"),
    [
        (["album"], ["1"]),
        (["album/*"], ["1", "2"]),
        (["album/1.wav", "album/2.odd", "album/cover.jpg", "album/list.m3u"], ["1", "2"]),
    ],
)
@pytest.mark.usefixtures("album")
def test_covers_and_playlists_next_to_songs_are_skipped_and_counted(
    arguments: list[str], songs: list[str]
) -> None:
    found = inputs.collect(arguments, OUT)
    assert [song.place for song in found.songs] == songs
    assert found.problems == []
    assert sorted(path.name for path in found.skipped) == ["cover.jpg", "list.m3u"]


@pytest.mark.usefixtures("album")
def test_a_single_file_is_taken_for_a_song_whatever_its_extension() -> None:
    assert [song.place for song in inputs.collect(["album/cover.jpg"], OUT).songs] == ["cover"]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["album/*.jpg"], ["album/*.jpg: no songs match this pattern"]),
        (
            ["album/cover.jpg", "album/list.m3u"],
            ["album/cover.jpg: not a song, by its extension", "album/list.m3u: not a song, by its extension"],
        ),
    ],
)
@pytest.mark.usefixtures("album")
def test_covers_and_playlists_without_songs_are_problems(arguments: list[str], problems: list[str]) -> None:
    found = inputs.collect(arguments, OUT)
    assert (found.songs, found.problems) == ([], problems)
