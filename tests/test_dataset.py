"""Songs are found, and what is wrong with them is reported before any work."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator.dataset import (
    EVERY_SPLIT,
    MUSDB_SONGS,
    Problem,
    Track,
    as_wav,
    check,
    find_tracks,
    fingerprint,
    grouped,
)
from kmdx import audio
from kmdx.challenge import STEMS
from kmdx.errors import KmdxError

RATE = 44100
FEW = f"but MUSDB18-HQ's test set has {MUSDB_SONGS}"


def make_song(folder: Path, seed: int = 0, samples: int = 3000, extension: str = "wav") -> Path:
    """Write a song whose 16-bit stems sum to its mixture."""
    folder.mkdir(parents=True)
    stems = {
        stem: np.round(8000 * noise(samples, seed=4 * seed + number)) for number, stem in enumerate(STEMS)
    }
    for name, values in {**stems, "mixture": sum(stems.values())}.items():
        sf.write(folder / f"{name}.{extension}", np.asarray(values, np.int16), RATE)
    return folder


def complaints(data: Path, split: str | None = None) -> list[tuple[bool, str]]:
    """All problems except the number of songs."""
    problems = check(find_tracks(data, split))
    return [(problem.fatal, str(problem)) for problem in problems if FEW not in problem.message]


def stem_file() -> Path:
    """A real MUSDB18 file, from a package that tests may have; importing that would need ffmpeg."""
    package = importlib.util.find_spec("stempeg")
    folders = (package.submodule_search_locations if package else None) or []
    found = [path for folder in folders for path in Path(folder).glob("data/*.stem.mp4")]
    if not found:
        pytest.skip("stempeg, which carries a MUSDB18 file, is not installed")
    return found[0]


@pytest.mark.parametrize("extension", ["wav", "flac"])
def test_songs_are_found_in_every_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str
) -> None:
    for split, names in {"test": ["Zoë - 歌 [live]", "AM Contra"], "train": ["Other Song"]}.items():
        for seed, name in enumerate(names):
            make_song(tmp_path / split / name, seed, extension=extension)
    (tmp_path / "test" / ".hidden").mkdir()
    (tmp_path / "test" / "notes").mkdir()

    def names(data: Path, *arguments: str | None) -> list[tuple[str, str | None]]:
        return [(track.name, track.split) for track in find_tracks(data, *arguments)]

    assert names(tmp_path) == [("AM Contra", "test"), ("Zoë - 歌 [live]", "test")]
    assert names(tmp_path, "train") == [("Other Song", "train")]
    assert names(tmp_path, EVERY_SPLIT) == [
        ("AM Contra", "test"),
        ("Other Song", "train"),
        ("Zoë - 歌 [live]", "test"),
    ]
    assert names(tmp_path / "test") == [("AM Contra", None), ("Zoë - 歌 [live]", None)]
    assert names(tmp_path / "test" / "AM Contra") == [("AM Contra", None)]
    monkeypatch.chdir(tmp_path / "test" / "AM Contra")
    assert names(Path()) == [("AM Contra", None)]

    assert names(tmp_path, "test", "A*") == [("AM Contra", "test")]
    assert names(tmp_path, "test", "Zoë - 歌 [live]") == [("Zoë - 歌 [live]", "test")]

    track = find_tracks(tmp_path)[1]
    assert (track.rate, track.samples, track.channels, track.lossy) == (RATE, 3000, 2, False)
    assert track.duration == 3000 / RATE
    assert track.files["bass"] == tmp_path / "test" / track.name / f"bass.{extension}"
    assert complaints(tmp_path) == []


def test_a_folder_without_songs_is_a_one_line_error(tmp_path: Path) -> None:
    make_song(tmp_path / "set" / "test" / "song")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file.txt").write_text("no song")
    for data, split, tracks, expected in [
        (tmp_path / "missing", "test", None, "No such file"),
        (empty, "test", None, r"expected <split>/<song>/mixture.wav .* found an empty folder"),
        (tmp_path / "set", "train", None, r"no split 'train'; found test \(1 song\); name one of them"),
        (tmp_path / "file.txt", "test", None, "expected a folder|Not a directory"),
        (tmp_path / "set" / "test", "train", None, "no split 'train'; found 1 song in no split"),
        (tmp_path / "set", "test", "B*", r"none of 1 song is named 'B\*'; the first is 'song'"),
    ]:
        with pytest.raises(KmdxError, match=expected) as caught:
            find_tracks(data, split, tracks)
        assert "\n" not in str(caught.value)


def test_headers_are_checked(tmp_path: Path) -> None:
    make_song(tmp_path / "missing", 0)
    (tmp_path / "missing" / "bass.wav").unlink()
    (tmp_path / "missing" / "mixture.wav").unlink()
    make_song(tmp_path / "extra", 1)
    for name in ("rehearsal.wav", "bass.flac", "._drums.wav"):
        shutil.copy(tmp_path / "extra" / "bass.wav", tmp_path / "extra" / name)
    make_song(tmp_path / "garbage", 2)
    (tmp_path / "garbage" / "drums.wav").write_bytes(b"RIFF but not quite")
    make_song(tmp_path / "rate", 3)
    sf.write(tmp_path / "rate" / "other.wav", noise(3000), 48000)
    make_song(tmp_path / "mono", 4)
    sf.write(tmp_path / "mono" / "other.wav", noise(3000, 1), RATE)
    make_song(tmp_path / "only", 7)
    for stem in STEMS:
        (tmp_path / "only" / f"{stem}.wav").unlink()
    make_song(tmp_path / "short", 5)
    sf.write(tmp_path / "short" / "vocals.wav", noise(2900), RATE)
    make_song(tmp_path / "truncated", 6)
    cut = (tmp_path / "truncated" / "vocals.wav").read_bytes()[:-400]  # as an interrupted copy leaves it
    (tmp_path / "truncated" / "vocals.wav").write_bytes(cut)

    found = complaints(tmp_path)
    assert [fatal for fatal, _ in found] == [False, False, False, True, True, True, True, True, True]
    without, some, extra, garbage, mono, only, rate, short, truncated = (text for _, text in found)
    assert without == "1 of 8 songs have no mixture: the sum of their stems is used: missing"
    assert some == "not all of 8 songs have these stems: bass (6), drums (7), other (7), vocals (7)"
    assert extra.startswith("extra: not used")
    assert extra.endswith(": bass.flac, rehearsal.wav")
    assert "drums.wav: cannot be read" in garbage
    assert mono == "mono: other has 1 channel at 44100 Hz, expected 2 at 44100 Hz like its other files"
    assert only == "only: none of its files is a stem; expected bass, drums, other, vocals or others"
    assert rate == "rate: other has 2 channels at 48000 Hz, expected 2 at 44100 Hz like its other files"
    assert (
        short == "short: lengths differ: mixture 3000, bass 3000, drums 3000, other 3000, vocals 2900 samples"
    )
    assert "vocals.wav: cut short or damaged" in truncated
    (tmp_path / "garbage" / "mixture.wav").write_bytes(b"RIFF but not quite")
    track = find_tracks(tmp_path, tracks="garbage")[0]
    assert (track.rate, track.samples, track.duration) == (0, 0, 0.0)


def test_stems_must_sum_to_the_mixture(tmp_path: Path) -> None:
    for seed, name in enumerate(["fine", "PR - Oh No", "wrong", "loud", "nan"]):
        make_song(tmp_path / name, seed, samples=3000 + seed)
    for name in ("PR - Oh No", "wrong"):
        mixture, _ = sf.read(tmp_path / name / "mixture.wav")
        sf.write(tmp_path / name / "mixture.wav", 0.99 * mixture, RATE)  # 40 dB below
    # Rounding and clipping of 16-bit files are no fault.
    stems = {stem: 0.05 * noise(3003, seed=9 + number, level=1.0) for number, stem in enumerate(STEMS)}
    stems["bass"][100:130] = stems["drums"][100:130] = 0.8
    for stem, samples in stems.items():
        sf.write(tmp_path / "loud" / f"{stem}.wav", samples, RATE)
    sf.write(tmp_path / "loud" / "mixture.wav", sum(stems.values()), RATE)
    sf.write(tmp_path / "nan" / "vocals.wav", np.full((3004, 2), np.nan), RATE, subtype="FLOAT")

    assert complaints(tmp_path) == [
        (
            False,
            "PR - Oh No: the stems do not sum to the mixture: the difference is 39.9 dB below it (a known error of MUSDB18-HQ)",
        ),
        (True, "nan: NaN or infinity in its samples"),
        (False, "wrong: the stems do not sum to the mixture: the difference is 39.9 dB below it"),
    ]
    assert all(FEW in problem.message for problem in check(find_tracks(tmp_path), content=False))


@pytest.mark.parametrize(
    ("number", "details", "line"),
    [
        (1, ["click.wav"], "S0: not used: click.wav"),
        (2, ["click.wav"], "2 songs: not used: S0 (click.wav), S1 (click.wav)"),
        (3, ["a", "b"], "3 songs: not used: S0 (a), S1 (b), S2 (a)"),
        (9, [""], "9 songs: not used: S0, S1, S2 and 6 more"),
    ],
)
def test_songs_with_the_same_problem_share_a_line(number: int, details: list[str], line: str) -> None:
    found = [
        Problem(f"S{place}", False, "not used", details[place % len(details)]) for place in range(number)
    ]
    whole = [Problem(None, False, "not used"), Problem(None, False, "not used by any")]
    assert grouped([*found, *whole, Problem("S0", False, "other")]) == [
        line, "not used", "not used by any", "S0: other",
    ]  # fmt: skip


def test_each_kind_of_problem_of_many_songs_is_one_line(tmp_path: Path) -> None:
    for seed, name in enumerate(["one", "two", "three"]):
        make_song(tmp_path / name, seed, samples=3000 + seed)
        sf.write(tmp_path / name / f"click {seed}.wav", noise(3000, seed=seed), RATE)
        mixture, _ = sf.read(tmp_path / name / "mixture.wav")
        sf.write(tmp_path / name / "mixture.wav", (0.99 - 0.1 * seed) * mixture, RATE)
    _, extra, sums = grouped(check(find_tracks(tmp_path)))
    assert extra == (
        "3 songs: not used, because they are not stems or are duplicates: "
        "one (click 0.wav), three (click 2.wav), two (click 1.wav)"
    )
    assert sums.startswith(
        "3 songs: the stems do not sum to the mixture: one (the difference is 39.9 dB below"
    )
    for name in ("one", "two", "three"):
        (tmp_path / name / "drums.wav").unlink()
    incomplete = grouped(check(find_tracks(tmp_path), accept_incomplete=True))[-1]
    assert incomplete.startswith("3 songs: no drums among its files: one (the mixture contains sound that")


def test_damaged_samples_are_found(tmp_path: Path) -> None:
    make_song(tmp_path / "song", samples=50_000, extension="flac")
    path = tmp_path / "song" / "bass.flac"
    path.write_bytes(path.read_bytes()[:60_000])
    (problem,) = complaints(tmp_path)
    assert problem[0]
    assert "bass.flac" in problem[1]


def test_duplicate_songs_are_reported(tmp_path: Path) -> None:
    make_song(tmp_path / "test" / "A", 0)
    make_song(tmp_path / "test" / "B", 1)
    make_song(tmp_path / "test" / "C", 0, extension="flac")
    assert complaints(tmp_path) == [(False, "C has the same mixture as A")]
    for name in "DEFGHIJKLMNO":
        make_song(tmp_path / "test" / name, 0)
    ((_, line),) = complaints(tmp_path)
    assert line.startswith("C, D, E")
    assert line.endswith(" and 3 more have the same mixture as A")
    for name in "DEFGHIJKLMNO":
        shutil.rmtree(tmp_path / "test" / name)

    make_song(tmp_path / "train" / "A", 2)
    (first, fatal), *_ = [(text, fatal) for fatal, text in complaints(tmp_path, EVERY_SPLIT)]
    assert fatal
    assert first.startswith("A: two songs have this name: ")
    assert str(Path("test", "A")) in first
    assert str(Path("train", "A")) in first


def test_an_unusual_number_of_songs_is_reported(tmp_path: Path) -> None:
    track = find_tracks(make_song(tmp_path / "song"))[0]
    assert [str(problem) for problem in check([track])] == [f"the data set has 1 song, {FEW}"]
    many = [
        Track(str(number), track.sources, None, (), False, RATE, 3000, 2) for number in range(MUSDB_SONGS)
    ]
    assert check(many, content=False) == []


def test_fingerprints_depend_on_the_content(tmp_path: Path) -> None:
    track = find_tracks(make_song(tmp_path / "song"))[0]
    before = fingerprint(track)
    moved = find_tracks(shutil.copytree(tmp_path / "song", tmp_path / "moved"))[0]
    assert fingerprint(moved) == before
    samples, _ = sf.read(moved.files["vocals"], dtype="int16")
    samples[-1, 1] ^= 1
    sf.write(moved.files["vocals"], samples, RATE)
    assert fingerprint(moved) != before

    swapped = find_tracks(shutil.copytree(tmp_path / "song", tmp_path / "swapped"))[0]
    (tmp_path / "swapped" / "bass.wav").rename(tmp_path / "x")
    (tmp_path / "swapped" / "drums.wav").rename(tmp_path / "swapped" / "bass.wav")
    (tmp_path / "x").rename(tmp_path / "swapped" / "drums.wav")
    assert fingerprint(swapped) != before
    moved.files["bass"].unlink()
    with pytest.raises(KmdxError, match=r"bass\.wav: cannot be read"):
        fingerprint(moved)


def test_songs_are_provided_as_wav(tmp_path: Path) -> None:
    wav = find_tracks(make_song(tmp_path / "wav"))[0]
    flac = find_tracks(make_song(tmp_path / "flac", extension="flac"))[0]
    for name in ("mixture", *STEMS):
        assert as_wav(wav, name, tmp_path / "out") == wav.files[name]
        path = as_wav(flac, name, tmp_path / "out")
        assert path == tmp_path / "out" / f"{name}.wav"
        np.testing.assert_array_equal(sf.read(path)[0], sf.read(wav.files[name])[0])


def test_musdb18_stem_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    shutil.copy(stem_file(), tmp_path / "test" / "Ünï cödé.stem.mp4")
    (track,) = find_tracks(tmp_path)
    assert (track.name, track.lossy, track.split, track.rate, track.channels) == (
        "Ünï cödé",
        True,
        "test",
        RATE,
        2,
    )
    assert complaints(tmp_path) == [
        (False, "1 of 1 song is lossy (AAC): scores differ from scores on MUSDB18-HQ")
    ]

    stems = {
        name: sf.read(as_wav(track, name, tmp_path / "out"), dtype="float32")[0]
        for name in ("mixture", *STEMS)
    }
    assert {samples.shape for samples in stems.values()} == {(track.samples, 2)}
    for number, name in enumerate(["mixture", "drums", "bass", "other", "vocals"]):
        np.testing.assert_array_equal(stems[name], audio.read(stem_file(), stream=number).samples)
    assert fingerprint(track) == fingerprint(find_tracks(tmp_path / "test" / "Ünï cödé.stem.mp4")[0])


def test_stem_files_with_too_few_streams_are_refused(tmp_path: Path) -> None:
    audio.write(tmp_path / "song.wav", noise(3000), RATE)
    (tmp_path / "song.wav").rename(tmp_path / "song.stem.mp4")
    (tmp_path / "text.stem.mp4").write_text("no sound")
    found = [text for fatal, text in complaints(tmp_path) if fatal]
    assert any("1 audio streams, expected 5: mixture, drums, bass, other, vocals" in text for text in found)
    assert any("text.stem.mp4: cannot be read" in text for text in found)
