"""A small YAML file maps the names of any data set's files to stems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator.command import choose_stems
from evaluator.data_check import check_data
from evaluator.dataset import EVERY_SPLIT, check, find_tracks, read
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError

RATE = 44100
TRACKS = ("01_Kick", "02_Snare", "03_Bass DI", "04_Gtr", "05_LeadVox")
FULL = """
stems:
  drums: ["*kick*", "*Snare*"]
  bass: "*Bass*"
  vocals: ["*vox", "Voices/*"]
  strings: "*Violin*"
  Others: "*Gtr*"
mixture: "*master*"
ignore: "*click*"
splits:
  test: [One]
  train: ["T*"]
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two songs of five tracks, the third of one channel."""
    for song in ("One", "Two"):
        (tmp_path / "set" / song).mkdir(parents=True)
        for number, name in enumerate(TRACKS):
            channels = 1 if name == "03_Bass DI" else 2
            sf.write(tmp_path / "set" / song / f"{name}.wav", noise(2000, channels, seed=number), RATE)
    return tmp_path / "set"


def describe(data: Path, text: str) -> Path:
    (data / "dataset.yaml").write_text(text, "utf-8")
    return data


def tracks_of(song: Path, *names: str) -> np.ndarray:
    parts = [sf.read(song / f"{name}.wav", always_2d=True)[0] for name in names]
    return np.sum([part * np.ones(2) for part in parts], axis=0).astype(np.float32)


def test_files_are_summed_to_the_stems_that_their_names_match(data: Path) -> None:
    (track,) = find_tracks(describe(data, FULL))
    assert (track.name, track.split) == ("One", "test")
    assert track.stems == ("drums", "bass", "vocals", "other")
    assert np.array_equal(read(track, "drums").samples, tracks_of(data / "One", "01_Kick", "02_Snare"))
    assert np.array_equal(read(track, "bass").samples, tracks_of(data / "One", "03_Bass DI"))
    assert np.array_equal(read(track, MIXTURE).samples, tracks_of(data / "One", *TRACKS))
    assert [track.name for track in find_tracks(data, EVERY_SPLIT)] == ["One", "Two"]


def test_other_files_are_reported_unless_the_description_ignores_them(data: Path) -> None:
    for name in ("06_Click", "07_Talk"):
        sf.write(data / "One" / f"{name}.wav", noise(2000), RATE)
    problems = [str(problem) for problem in check(find_tracks(describe(data, FULL)))]
    assert "One: not used, because they are not stems or are duplicates: 07_Talk.wav" in problems
    assert "no file of any song matches strings" in problems


def test_a_mixture_and_folders_can_be_matched(data: Path) -> None:
    (data / "One" / "voices").mkdir()
    sf.write(data / "One" / "voices" / "a.wav", noise(2000, seed=8), RATE)
    sf.write(data / "One" / "Master.wav", noise(2000, seed=9), RATE)
    (track,) = find_tracks(describe(data, FULL))
    assert np.array_equal(read(track, MIXTURE).samples, tracks_of(data / "One", "Master"))
    expected = tracks_of(data / "One", "05_LeadVox", "voices/a")
    assert np.array_equal(read(track, "vocals").samples, expected)


def test_the_description_can_be_the_data_set_and_be_stored_elsewhere(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("root: set\nstems: {vocals: '*vox', accompaniment: '0[1-4]*'}", "utf-8")
    assert [track.stems for track in find_tracks(path)] == [("vocals", "accompaniment")] * 2


def test_lengths_differ_only_as_far_as_the_description_allows(data: Path) -> None:
    sf.write(data / "One" / "04_Gtr.wav", noise(1990), RATE)
    (problem,) = [each for each in check(find_tracks(describe(data, FULL))) if each.fatal]
    assert "other 1990" in problem.message
    assert "bass 2000" in problem.message
    problems = check(find_tracks(describe(data, f"uneven: 0.1{FULL}")))
    assert not any(each.fatal for each in problems)
    assert any(
        each.text == "short files are padded with silence: other by 10 of 2000 samples" for each in problems
    )


def test_a_saved_check_is_not_used_after_the_description_changed(data: Path, tmp_path: Path) -> None:
    short = data / "Two" / "02_Snare.wav"
    sf.write(short, noise(1900), RATE)
    describe(data, FULL)
    assert "lengths differ" in check_data(find_tracks(data, "train"), tmp_path).unusable["Two"]
    describe(data, f"{FULL}uneven: 0.5\n")
    assert not check_data(find_tracks(data, "train"), tmp_path).unusable


@pytest.mark.parametrize("name", ["LeadVox", "leadvox", "LEADVOX"])
def test_a_stem_is_chosen_by_its_name_in_any_case(data: Path, name: str) -> None:
    describe(data, "stems: {LeadVox: '*vox', bass: '*bass*'}")
    assert choose_stems(find_tracks(data), name) == ("LeadVox",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("5", "line 1: expected a mapping of names to values"),
        ("mixture: a", "line 1: the key 'stems' is missing"),
        ("stems: {}", "line 1: stems: expected at least one stem"),
        ("stems: {bass: a}\nsplit: {}", "line 2: unknown key 'split'.*did you mean 'splits'"),
        ("stems:\n  bass: 5", "line 2: stems.bass: expected text, found 5"),
        ("stems:\n  bass: []", "line 2: stems.bass: expected a pattern or a list"),
        ("stems:\n  a/b: c", "line 2: stems.a/b: 'a/b' cannot be the name of a stem"),
        ("stems: {mix: a}", "'mix' cannot be the name of a stem"),
        ("stems: {Song: a}", "'Song' cannot be the name of a stem"),
        ("stems: {vox: a, vocals: b}", "stems.vocals: means vocals, which is listed already"),
        ("stems: {bass: *Bass*}", "put quotes around a pattern that begins"),
        (
            "stems: {bass: a}\nuneven: -1",
            "line 2: uneven: expected a number of seconds from 0 to 60, found -1",
        ),
        (
            "stems: {bass: '*Bass*', other: '0*'}",
            "03_Bass DI.wav matches both bass and other; make the patterns",
        ),
        ("stems: {bass: '*Bass*'}\nsplits: {test: Three}", "splits.test: no song is named 'Three'"),
        ("stems: {bass: '*Bass*'}\nsplits: {a: One, b: O*}", "splits: One is in both a and b"),
        ("stems: {bass: a}\nroot: nowhere", "nowhere is not a folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(data: Path, text: str, message: str) -> None:
    with pytest.raises(KmdxError, match=message) as caught:
        find_tracks(describe(data, text))
    assert str(data / "dataset.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_description_the_error_suggests_one(data: Path) -> None:
    with pytest.raises(KmdxError, match=r"found One/01_Kick.wav, .* and 7 more; describe .*dataset.yaml"):
        find_tracks(data)


@pytest.mark.parametrize("more", ["", "splits: {test: '*'}", "ignore: '*'"])
def test_a_description_that_matches_nothing_is_named_in_the_error(data: Path, more: str) -> None:
    describe(data, f"stems: {{drums: '*Timpani*'}}\n{more}")
    for place in (data, data / "dataset.yaml"):
        with pytest.raises(
            KmdxError,
            match=r"dataset\.yaml: no songs found: no file matches the pattern of a stem; check the patterns$",
        ):
            find_tracks(place)


def test_a_song_that_is_a_link_has_the_links_name(data: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "Mine").symlink_to(data / "One")
    (tmp_path / "links" / "dataset.yaml").write_text("stems: {drums: '*kick*'}")
    assert [track.name for track in find_tracks(tmp_path / "links")] == ["Mine"]
