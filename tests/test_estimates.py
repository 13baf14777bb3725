"""Existing stems are found by song and stem in any folder layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator import estimates
from evaluator.dataset import EVERY_SPLIT, Track, find_tracks
from evaluator.layouts import NAMES
from kmdx.challenge import STEMS
from kmdx.errors import KmdxError

RATE = 44100
LENGTH = 10_000
SONGS = ("Ünï One", "Two - Live")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for number, song in enumerate(SONGS):
        (folder / "test" / song).mkdir(parents=True)
        for place, stem in enumerate(STEMS):
            sound = noise(LENGTH, seed=4 * number + place)
            sf.write(folder / "test" / song / f"{stem}.wav", sound, RATE)
    return folder


@pytest.fixture(scope="module")
def tracks(data: Path) -> list[Track]:
    return sorted(find_tracks(data), key=lambda track: SONGS.index(track.name))


def put(path: Path, samples: int = LENGTH, rate: int = RATE, channels: int = 2, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, noise(samples, channels, seed=seed), rate)
    return path


@pytest.mark.parametrize(
    "place",
    [
        "{song}/{stem}.wav",
        "test/{song}/{stem}.flac",
        "model/x/{song}/{stem}.wav",
        "{upper}/{Stem}.WAV",
        "{decomposed}/{stem}.wav",
        "{song}_{stem}.wav",
        "{song} - {Stem}.wav",
        "{song} ({Stem}).wav",
        "{song}/{song}_{stem}.wav",
        "{song}.stem/{stem}.wav",
        "{stem}/{song}.wav",
        "{song}/{alias}.wav",
    ],
)
def test_stems_are_found_in_every_usual_layout(place: str, tracks: list[Track], tmp_path: Path) -> None:
    aliases = {stem: (*NAMES[stem], stem)[0] for stem in STEMS}
    expected = {}
    for track in tracks:
        decomposed = track.name.replace("Ü", "U\u0308").replace("ï", "i\u0308")
        for stem in STEMS:
            names = {"song": track.name, "upper": track.name.upper(), "decomposed": decomposed}
            names |= {"stem": stem, "Stem": stem.capitalize(), "alias": aliases[stem]}
            expected[track.name, stem] = (put(tmp_path / place.format(**names)),)
    found = estimates.find(tmp_path, tracks)
    assert {
        (song, stem): paths for song, own in found.files.items() for stem, paths in own.items()
    } == expected
    assert found.problems() == []


def test_unused_files_are_reported_except_other_stems_of_the_song(
    tracks: list[Track], tmp_path: Path
) -> None:
    for name in ("vocals", "mixture", "drums", "piano", "no_vocals"):
        put(tmp_path / SONGS[0] / f"{name}.wav")
    put(tmp_path / "Three" / "vocals.wav")
    found = estimates.find(tmp_path, tracks, ["vocals", "bass"])
    unused = f"Three/vocals.wav, {SONGS[0]}/no_vocals.wav, {SONGS[0]}/piano.wav"
    assert [str(problem) for problem in found.problems()] == [
        f"{tmp_path}: not used, because they are not scored stems of these songs: {unused}"
    ]


def test_two_files_of_one_stem_are_an_error_that_names_both(tracks: list[Track], tmp_path: Path) -> None:
    first = put(tmp_path / "a" / SONGS[0] / "vocals.wav")
    second = put(tmp_path / "b" / SONGS[0] / "vocals.flac")
    with pytest.raises(KmdxError) as caught:
        estimates.find(tmp_path, tracks)
    assert f"{first} and {second} are both vocals of {SONGS[0]}" in str(caught.value)


def test_the_folder_of_the_songs_split_decides_between_two_files(tracks: list[Track], tmp_path: Path) -> None:
    put(tmp_path / "train" / SONGS[0] / "vocals.wav")
    chosen = put(tmp_path / "test" / SONGS[0] / "vocals.wav")
    assert estimates.find(tmp_path, tracks).files[SONGS[0]]["vocals"] == (chosen,)


@pytest.mark.parametrize("name", ["accompaniment", "no_vocals", "Instrumental"])
def test_the_accompaniment_is_found_if_it_is_requested(
    name: str, tracks: list[Track], tmp_path: Path
) -> None:
    path = put(tmp_path / SONGS[0] / f"{name}.wav")
    put(tmp_path / SONGS[0] / "vocals.wav")
    assert estimates.find(tmp_path, tracks).files[SONGS[0]].keys() == {"vocals"}
    found = estimates.find(tmp_path, tracks, ["vocals", "accompaniment"])
    assert found.files[SONGS[0]]["accompaniment"] == (path,)


def test_the_accompaniment_is_the_sum_of_three_estimates(tracks: list[Track], tmp_path: Path) -> None:
    for number, stem in enumerate(STEMS):
        put(tmp_path / SONGS[0] / f"{stem}.wav", seed=number)
    found = estimates.find(tmp_path, tracks, ["accompaniment"])
    path = estimates.as_wav(found, tracks[0], "accompaniment", tmp_path / "out")
    parts = [sf.read(tmp_path / SONGS[0] / f"{stem}.wav")[0] for stem in STEMS[:3]]
    assert np.array_equal(sf.read(path)[0], np.sum(parts, axis=0).astype(np.float32))


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "ogg"])
def test_any_format_becomes_a_wav_of_the_songs_length(
    ending: str, tracks: list[Track], tmp_path: Path
) -> None:
    path = put(tmp_path / SONGS[0] / f"vocals.{ending}")
    found = estimates.find(tmp_path, tracks, ["vocals"])
    wav = estimates.as_wav(found, tracks[0], "vocals", tmp_path / "out")
    assert sf.info(wav).frames == LENGTH
    assert (wav == path) == (ending == "wav")
    assert found.lossy == (ending in ("mp3", "ogg"))


def test_only_a_lossy_file_may_be_longer_by_a_frame(tracks: list[Track], tmp_path: Path) -> None:
    put(tmp_path / SONGS[0] / "vocals.ogg", LENGTH + estimates.TAIL)
    put(tmp_path / SONGS[0] / "bass.ogg", LENGTH + estimates.TAIL + 1)
    put(tmp_path / SONGS[0] / "drums.wav", LENGTH + 1)
    found = estimates.find(tmp_path, tracks)
    assert sf.info(estimates.as_wav(found, tracks[0], "vocals", tmp_path / "out")).frames == LENGTH
    for stem in ("bass", "drums"):
        with pytest.raises(KmdxError, match=f"{stem}.*samples, expected {LENGTH}, the length"):
            estimates.as_wav(found, tracks[0], stem, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": LENGTH - 10}, f"vocals.wav: {LENGTH - 10} samples, expected {LENGTH}"),
        ({"rate": 48000}, "vocals.wav: 48000 Hz, but the song has 44100 Hz; resample the file"),
        ({"channels": 1}, "vocals.wav: channels: 1, expected 2 as in the song"),
    ],
)
def test_an_estimate_whose_format_differs_from_the_songs_is_refused(
    changes: dict[str, int], message: str, tracks: list[Track], tmp_path: Path
) -> None:
    put(tmp_path / SONGS[0] / "vocals.wav", **changes)
    found = estimates.find(tmp_path, tracks)
    with pytest.raises(KmdxError, match=message):
        estimates.as_wav(found, tracks[0], "vocals", tmp_path / "out")


def test_a_folder_without_stems_is_a_one_line_error(tracks: list[Track], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path / "other" / "x.wav")
    for folder, message in [
        ("missing", "no such folder; expected a folder of estimates"),
        ("empty", "no stems of 2 songs; expected Ünï One/vocals.wav and others; found no sound files"),
        ("other", "and others; found x.wav"),
    ]:
        with pytest.raises(KmdxError, match=message) as caught:
            estimates.find(tmp_path / folder, tracks)
        assert "\n" not in str(caught.value)


def test_songs_whose_names_begin_alike_are_not_confused(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "set")
    shutil.copytree(copy / "test" / SONGS[1], copy / "test" / f"{SONGS[1]} - Other")
    both = find_tracks(copy, EVERY_SPLIT)
    path = put(tmp_path / "estimates" / f"{SONGS[1]} - Other_vocals.wav")
    found = estimates.find(tmp_path / "estimates", both)
    assert found.files[f"{SONGS[1]} - Other"] == {"vocals": (path,)}
    assert not found.files[SONGS[1]]
