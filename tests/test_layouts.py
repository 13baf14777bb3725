"""Songs are recognized in any layout, with any stems, and a missing stem is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from evaluator import data_check
from evaluator.dataset import EVERY_SPLIT, Track, as_wav, check, find_tracks, fingerprint, read
from evaluator.layouts import parts_of_accompaniment, reference_of
from kmdx.challenge import MIXTURE, STEMS
from kmdx.errors import KmdxError

RATE = 44100
LENGTH = 20_000
FINGERPRINT = "6bffa6376c77c959fd90febe7ae0eb4254e607608bb266df7b3dad223be2d70e"
Stems = dict[str, np.ndarray]


def stems_of(
    names: tuple[str, ...] = STEMS, samples: int = LENGTH, channels: int = 2, seed: int = 0
) -> Stems:
    """Stems on the grid of 16 bits, whose sum is within full scale."""
    return {
        name: np.round(32768 * noise(samples, channels, seed=100 * seed + number, level=0.05)) / 32768
        for number, name in enumerate(names)
    }


def whole(stems: Mapping[str, np.ndarray]) -> Stems:
    return {**stems, "mixture": np.sum([*stems.values()], axis=0)}


def put(folder: Path, files: Mapping[str, np.ndarray], ending: str = "wav", rate: int = RATE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, samples in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        sf.write(folder / f"{name}.{ending}", samples, rate)
    return folder


def one(data: Path, split: str | None = None) -> Track:
    (track,) = find_tracks(data, split)
    return track


def said(data: Path, fatal: bool | None = None, **options: bool) -> list[str]:
    """All problems except the number of songs."""
    problems = [problem for problem in check(find_tracks(data), **options) if "MUSDB" not in problem.message]
    return [str(problem) for problem in problems if fatal in (None, problem.fatal)]


def test_names_are_compared_without_case(tmp_path: Path) -> None:
    stems = stems_of()
    put(tmp_path / "Test" / "song", {name.capitalize(): samples for name, samples in whole(stems).items()})
    track = one(tmp_path, "test")
    assert (track.stems, track.split) == (STEMS, "Test")
    assert said(tmp_path) == []
    assert np.array_equal(read(track, "drums").samples, stems["drums"].astype(np.float32))


def test_only_lossy_formats_are_called_lossy(tmp_path: Path) -> None:
    stems = whole(stems_of())
    put(tmp_path / "song", {stem: stems[stem] for stem in ("bass", "drums", MIXTURE)}, "flac")
    put(tmp_path / "song", {stem: stems[stem] for stem in ("other", "vocals")}, "ogg")
    assert said(tmp_path) == [
        "1 of 1 song is lossy (ogg): scores differ from scores against uncompressed stems"
    ]


def test_a_song_that_is_a_link_has_the_links_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "store" / "0123", whole(stems_of()))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "Song").symlink_to(tmp_path / "store" / "0123")
    assert one(tmp_path / "set").name == "Song"
    monkeypatch.chdir(tmp_path / "store" / "0123")
    assert one(Path()).name == "0123"


@pytest.mark.parametrize(
    ("ending", "lossy"), [("flac", False), ("ogg", True), ("mp3", True), ("aiff", False)]
)
def test_any_sound_format_is_read_and_lossy_ones_are_reported(
    tmp_path: Path, ending: str, lossy: bool
) -> None:
    put(tmp_path / "song", whole(stems_of()), ending)
    track = one(tmp_path)
    assert (track.samples, track.lossy) == (LENGTH, lossy)
    expected = f"1 of 1 song is lossy ({ending}): scores differ from scores against uncompressed stems"
    assert said(tmp_path) == [expected] * lossy
    assert sf.info(as_wav(track, "bass", tmp_path / "out")).frames == LENGTH


@pytest.mark.parametrize(
    ("files", "stems"),
    [
        (("Vocals", "Instrumental"), ("vocals", "accompaniment")),
        (("vocals", "no_vocals"), ("vocals", "accompaniment")),
        ((*STEMS, "guitar", "piano"), (*STEMS, "guitar", "piano")),
        (("speech", "music", "sfx"), ("effects", "music", "speech")),
        (("vocals",), ("vocals",)),
    ],
)
def test_a_song_has_the_stems_that_its_files_are_named_after(
    tmp_path: Path, files: tuple[str, ...], stems: tuple[str, ...]
) -> None:
    put(tmp_path / "song", whole(stems_of(files)))
    assert one(tmp_path).stems == stems
    assert said(tmp_path) == []


def test_mono_at_48_khz_keeps_its_rate(tmp_path: Path) -> None:
    put(tmp_path / "song", whole(stems_of(channels=1)), rate=48000)
    track = one(tmp_path)
    assert (track.rate, track.channels, read(track, "bass").samples.shape) == (48000, 1, (LENGTH, 1))
    assert said(tmp_path) == []


def test_without_a_mixture_the_sum_of_the_stems_is_used_and_reported(tmp_path: Path) -> None:
    stems = stems_of()
    put(tmp_path / "song", stems)
    assert said(tmp_path) == ["1 of 1 song has no mixture: the sum of its stems is used"]
    expected = np.sum([*stems.values()], axis=0).astype(np.float32)
    assert np.array_equal(read(one(tmp_path), MIXTURE).samples, expected)
    assert np.array_equal(sf.read(as_wav(one(tmp_path), MIXTURE, tmp_path))[0], expected)


def test_the_accompaniment_of_four_stems_is_the_sum_of_three(tmp_path: Path) -> None:
    stems = stems_of()
    put(tmp_path / "song", whole(stems))
    track = one(tmp_path)
    assert track.available == (*STEMS, "accompaniment")
    expected = (stems["bass"] + stems["drums"] + stems["other"]).astype(np.float32)
    assert np.array_equal(read(track, "accompaniment").samples, expected)
    with pytest.raises(
        KmdxError, match="song: no stem 'piano'; available: bass, drums, other, vocals, accomp"
    ):
        read(track, "piano")


def test_an_accompaniment_next_to_its_parts_is_not_summed_twice(tmp_path: Path) -> None:
    stems = stems_of()
    rest = stems["bass"] + stems["drums"] + stems["other"]
    put(tmp_path / "song", {**whole(stems), "accompaniment": rest})
    assert said(tmp_path) == []


def moisesdb(root: Path, title: str = "One", folder: str = "00ea82c1-2f8b", short: int = 0) -> Stems:
    """A song of MoisesDB: two tracks of vocals, one of them mono."""
    stems = stems_of(("bass", "vocals"))
    second = np.round(32768 * noise(LENGTH - short, 1, seed=7, level=0.05)) / 32768
    place = root / "moisesdb_v0.1" / folder
    put(place / "bass", {"b": stems["bass"]})
    put(place / "vocals", {"lead": stems["vocals"], "backing": second})
    content = {
        "song": title,
        "artist": "Tones",
        "stems": [
            {"stemName": "bass", "tracks": [{"id": "b", "extension": "wav"}]},
            {"stemName": "vocals", "tracks": [{"id": "lead", "extension": "wav"}, {"id": "backing"}]},
        ],
    }
    (place / "data.json").write_text(json.dumps(content), "utf-8")
    return {**stems, "vocals": stems["vocals"] + np.pad(second, ((0, short), (0, 0)))}


def test_a_stem_of_moisesdb_is_the_sum_of_its_tracks(tmp_path: Path) -> None:
    stems = moisesdb(tmp_path)
    track = one(tmp_path)
    assert (track.name, track.stems, track.channels) == ("Tones - One", ("bass", "vocals"), 2)
    assert np.array_equal(read(track, "vocals").samples, stems["vocals"].astype(np.float32))
    assert np.array_equal(sf.read(as_wav(track, "vocals", tmp_path))[0], stems["vocals"])


def test_tracks_of_moisesdb_that_end_a_little_earlier_are_padded_and_named(tmp_path: Path) -> None:
    stems = moisesdb(tmp_path, short=50)
    assert np.array_equal(read(one(tmp_path), "vocals").samples, stems["vocals"].astype(np.float32))
    expected = f"short files are padded with silence: vocals/backing.wav by 50 of {LENGTH} samples"
    assert f"Tones - One: {expected}" in said(tmp_path)


def test_what_is_wrong_with_a_song_of_moisesdb_is_reported_with_its_key(tmp_path: Path) -> None:
    moisesdb(tmp_path)
    place = tmp_path / "moisesdb_v0.1" / "00ea82c1-2f8b"
    content = json.loads((place / "data.json").read_text())
    (place / "bass" / "b.wav").rename(place / "bass" / "c.wav")
    assert "Tones - One: bass/b.wav is in data.json, but no such file" in said(tmp_path, fatal=True)
    assert "Tones - One: not used, because they are not stems or are duplicates: bass/c.wav" in said(tmp_path)
    content["stems"][0]["tracks"] = 5
    (place / "data.json").write_text(json.dumps(content))
    assert "data.json: stems[0].tracks: expected a list, found 5" in said(tmp_path, fatal=True)[0]
    content["stems"][0]["stemName"] = "../bass"
    (place / "data.json").write_text(json.dumps(content))
    assert "stems[0].stemName: '../bass' cannot be the name of a stem" in said(tmp_path, fatal=True)[0]


def test_songs_of_moisesdb_with_one_title_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    for folder in ("11111111-a", "22222222-b"):
        moisesdb(tmp_path, "a/b", folder)
    assert [track.name for track in find_tracks(tmp_path)] == [
        "Tones - a_b (11111111)",
        "Tones - a_b (22222222)",
    ]


def test_sound_files_that_belong_to_no_song_are_reported(tmp_path: Path) -> None:
    put(tmp_path / "test" / "song", {**whole(stems_of()), "rehearsal": noise(9), "old/bass": noise(9)})
    put(tmp_path / "test" / "odd", {"take": noise(9)})
    put(tmp_path, {"loose": noise(9)})
    loose, extra = said(tmp_path)
    assert loose == f"not used, because they belong to no song: {tmp_path.name}/loose.wav, odd/take.wav"
    assert (
        extra == "song: not used, because they are not stems or are duplicates: rehearsal.wav, old/bass.wav"
    )


def test_an_unknown_split_is_an_error_that_lists_the_splits(tmp_path: Path) -> None:
    put(tmp_path / "set" / "train" / "a", whole(stems_of()))
    put(tmp_path / "set" / "valid" / "b", whole(stems_of()))
    found = (
        r"no split 'test'; found train \(1 song\), valid \(1 song\); "
        "name one of them with --split, or use --split all$"
    )
    for split in (None, "test"):
        with pytest.raises(KmdxError, match=found):
            find_tracks(tmp_path / "set", split)
    with pytest.raises(KmdxError, match="no split 'test'; found 1 song in no split; leave out --split"):
        find_tracks(tmp_path / "set" / "train", "test")
    assert one(tmp_path, "train").name == "a", "a folder around the data set"
    assert one(tmp_path / "set" / "train", "train").name == "a", "the split itself"
    assert [track.split for track in find_tracks(tmp_path, EVERY_SPLIT)] == ["train", "valid"]


def leave_out(stems: Stems, *names: str) -> Stems:
    return {name: samples for name, samples in whole(stems).items() if name not in names}


@pytest.mark.parametrize(
    ("names", "absent", "message"),
    [
        (STEMS, ("bass",), "no bass among its files"),
        (STEMS, ("bass", "drums", "other"), "no bass, drums, other among its files"),
        (("vocals", "accompaniment"), ("vocals",), "no vocals among its files"),
        ((*STEMS, "guitar", "piano"), ("piano",), "a stem is missing, perhaps piano"),
    ],
)
def test_a_missing_stem_is_refused_by_name_unless_that_is_accepted(
    tmp_path: Path, names: tuple[str, ...], absent: tuple[str, ...], message: str
) -> None:
    put(tmp_path / "song", leave_out(stems_of(names), *absent))
    (refused,) = said(tmp_path, fatal=True)
    assert message in refused
    assert refused.endswith("--accept-incomplete")
    assert said(tmp_path, fatal=True, accept_incomplete=True) == []
    assert message in said(tmp_path, accept_incomplete=True)[-1]


def test_only_the_song_that_lacks_a_stem_is_refused(tmp_path: Path) -> None:
    names = (*STEMS, "strings")
    put(tmp_path / "a", whole(stems_of(names)))
    put(tmp_path / "b", leave_out(stems_of(names, seed=1), "strings"))
    (refused,) = said(tmp_path, fatal=True)
    assert refused.startswith("b: no strings among its files")


def quieter(mixture: np.ndarray) -> np.ndarray:
    return 0.5 * mixture


def limited(mixture: np.ndarray) -> np.ndarray:
    """Brighter and louder, with loud passages turned down."""
    bright = mixture - 0.5 * np.roll(mixture, 1, axis=0)
    level = np.convolve(np.abs(bright).max(axis=1), np.ones(2000) / 2000, "same")
    return 2 * bright * np.minimum(1, 0.05 / level)[:, np.newaxis]


@pytest.mark.parametrize("mastered", [quieter, limited])
@pytest.mark.parametrize("names", [STEMS, (*STEMS, "guitar")])
def test_a_mastered_mixture_is_a_warning(
    tmp_path: Path, mastered: Callable[[np.ndarray], np.ndarray], names: tuple[str, ...]
) -> None:
    files = whole(stems_of(names, 100_000))
    put(tmp_path / "song", {**files, "mixture": mastered(files["mixture"])})
    assert said(tmp_path, fatal=True) == []
    assert "song: the stems do not sum to the mixture" in said(tmp_path)[0]


def test_the_data_check_is_repeated_when_incomplete_songs_become_acceptable(tmp_path: Path) -> None:
    put(tmp_path / "data" / "song", leave_out(stems_of(), "bass"))
    tracks = find_tracks(tmp_path / "data")
    assert data_check.check_data(tracks, tmp_path).unusable.keys() == {"song"}
    assert data_check.check_data(tracks, tmp_path, accept_incomplete=True).unusable == {}


def test_the_fingerprint_of_a_summed_stem_changes_with_any_of_its_files(tmp_path: Path) -> None:
    moisesdb(tmp_path)
    before = fingerprint(one(tmp_path))
    put(tmp_path / "moisesdb_v0.1" / "00ea82c1-2f8b" / "vocals", {"backing": noise(LENGTH, 1, seed=9)})
    assert fingerprint(one(tmp_path)) != before


def test_fingerprints_of_musdb18_hq_stay_as_they_were(tmp_path: Path) -> None:
    silence = np.zeros((10, 2))
    put(tmp_path / "song", dict.fromkeys(("mixture", *STEMS), silence))
    assert fingerprint(one(tmp_path)) == FINGERPRINT, "earlier runs know songs by it"


def test_other_next_to_only_the_vocals_is_the_accompaniment() -> None:
    both = ("vocals", "other")
    assert [reference_of(stem, both) for stem in both] == ["vocals", "accompaniment"]
    assert parts_of_accompaniment(both) == ("other",)
    assert reference_of("other", STEMS) == "other"
    assert parts_of_accompaniment(("vocals", "other", "drums")) == ()
