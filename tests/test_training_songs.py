"""Problems with songs are reported before the first step."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import training_cases as cases
import yaml
from conftest import noise

from kmdx.challenge import STEMS
from kmdx.errors import KmdxWarning
from training import decoded_songs, sampling, songs, trainer
from training.config import TrainingError
from training.run import Run

data, fit = cases.data, cases.fit
RATE = 44100


def write(folder: Path, **seconds: float) -> Path:
    """A song whose stems have these lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, length in seconds.items():
        soundfile.write(folder / f"{stem}.wav", noise(round(length * RATE)), RATE)
    return folder


def test_stems_of_different_lengths_are_reported(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "song 0", tmp_path / "song 0")
    song = write(tmp_path / "uneven", bass=2, drums=2, other=1.95, vocals=1.5)
    with pytest.warns(KmdxWarning) as warned:
        songs.find([tmp_path], "vocals", cases.CHUNK, ["song 0"])
    (message,) = [str(warning.message) for warning in warned]
    assert message == (
        f"{song / 'vocals.wav'}: shorter (1.5 s) than bass.wav (2.0 s), perhaps cut short; treated as silent after its end"
    )


def test_a_variant_that_is_too_short_is_refused(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "song 1", bass=0.1, drums=0.1, other=0.1, vocals=0.1)
    with pytest.raises(
        TrainingError, match=f"song 1 in {tmp_path} is shorter than a window: 0.1 s, expected at least 0.2 s"
    ):
        songs.find([data], "vocals", cases.CHUNK, ["song 0", "song 2"], [tmp_path])


def test_a_file_that_has_become_shorter_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "song", vocals=1) / "vocals.wav"
    stem = replace(songs._stem(path), samples=2 * RATE)
    assert sampling.read(stem, 0, RATE).any()
    with pytest.raises(TrainingError, match=r"vocals.wav: ends after 44100 of 88200 samples"):
        sampling.read(stem, RATE // 2, RATE)


@pytest.mark.parametrize(("name", "kind"), [("song 0", "validation"), ("song 1", "training")])
def test_an_entirely_silent_source_is_reported_before_the_first_step(
    name: str, kind: str, data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    copy = tmp_path / "silent"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "song 2")
    for file in (copy / name).glob("vocals.*"):
        file.unlink()
    soundfile.write(copy / name / "vocals.wav", np.zeros((88_200, 2)), RATE)
    with pytest.raises(TrainingError, match=f"vocals is silent in all {kind} songs"):
        fit(folder=copy)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_of_a_vocals_network_is_found_from_any_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: Callable[..., Run]
) -> None:
    fit("vocals", steps=2)
    drums = {"source": "drums", "hears": "rest", "rest": {"vocals": "vocals"}, "steps": 2}
    monkeypatch.chdir(tmp_path)
    run = fit("drums", **drums)
    assert run.config().rest.vocals == str(tmp_path / "vocals")
    run.config_file.write_text(run.config_file.read_text("utf-8").replace(str(tmp_path / "vocals"), "vocals"))
    assert fit("drums", **drums).config().rest.vocals == str(tmp_path / "vocals"), "as earlier runs noted it"
    monkeypatch.chdir(data)
    assert trainer.vocals_network(run.config()) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rest": {"vocals": "mdx_vocals"}}, "rest.vocals: the input of A small network is the mixture"),
        (
            {"source": "bass", "hears": "rest", "rest": {"vocals": "runs/a"}},
            "rest.vocals: runs/a: no such run",
        ),
        ({"source": "bass", "hears": "rest", "rest": {"vocals": "./a"}}, "rest.vocals: ./a: no such run"),
    ],
)
def test_unusable_vocals_networks_are_refused(
    changes: dict, message: str, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    with pytest.raises(TrainingError, match=message):
        fit(**changes)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_songs_that_have_moved_are_recognized(data: Path, tmp_path: Path, fit: Callable[..., Run]) -> None:
    run = fit()
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    assert fit(folder=moved).data()["folders"] == [str(moved)]
    noted = yaml.safe_load(run.data_file.read_text("utf-8"))
    assert noted.pop("stems")["song 2"][0]["vocals"].startswith("88200 samples, ")
    run.data_file.write_text(yaml.safe_dump(noted), "utf-8")
    assert "stems" in fit(folder=moved).data(), "earlier runs did not note it"


def shorten(song: Path) -> None:
    soundfile.write(song / "vocals.flac", noise(80_000), RATE)


def add(song: Path) -> None:
    write(song.parent / "song 3", bass=1, drums=1, other=1, vocals=1)


def without_bass(song: Path) -> None:
    (song / "bass.flac").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shorten, r"vocals of song 1 had 88200 samples, \d+ bytes, and now has 80000 samples"),
        (without_bass, r"bass of song 1 had 88200 samples, \d+ bytes, and now has no file"),
        (shutil.rmtree, "the training song song 1 is missing now"),
        (add, "the training song song 3 is new"),
    ],
)
def test_songs_that_have_changed_are_named(
    change: Callable[[Path], None], message: str, data: Path, tmp_path: Path, fit: Callable[..., Run]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    fit(folder=copy, steps=2)
    change(copy / "song 1")
    with pytest.raises(TrainingError, match=message):
        fit(folder=copy, steps=2)


def of_folder(folder: Path, source: str = "vocals") -> tuple[songs.Songs, list[str]]:
    """Songs of a folder, the first to validate with, and what is warned of."""
    first = min(path.name for path in folder.iterdir() if path.is_dir())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = songs.find([folder], source, 1000, [first])
    return found, [str(warning.message) for warning in warned]


def test_names_in_capitals_are_stems(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, Bass=1, DRUMS=1, Other=1, Vocals=1)
    found, warned = of_folder(tmp_path)
    assert found.training[0].stems.keys() == set(STEMS)
    assert warned == []


def test_other_stems_are_added_to_other_so_that_nothing_is_left_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, bass=1, drums=1, other=1, vocals=1, guitar=1, piano=1)
    found, warned = of_folder(tmp_path)
    assert warned == [f"{tmp_path}: added to other: guitar (2 of 2 songs), piano (2 of 2 songs)"]
    decoded = decoded_songs.decode(found, tmp_path / "decoded").training[0].stems
    assert decoded["bass"].path == tmp_path / "b" / "bass.wav"
    parts = [soundfile.read(tmp_path / "b" / f"{name}.wav")[0] for name in ("other", "guitar", "piano")]
    expected = np.sum(parts, axis=0).astype(np.float32)
    assert np.array_equal(sampling.read(decoded["other"], 0, RATE).T, expected)


def test_unknown_sound_files_are_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, bass=1, drums=1, other=1, vocals=1, rehearsal=1)
    _, warned = of_folder(tmp_path)
    expected = "ignoring sound files that are not stems, or are duplicates: a/rehearsal.wav, b/rehearsal.wav"
    assert warned == [f"{tmp_path}: {expected}"]


def test_two_stems_train_a_network_of_vocals_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, vocals=1, accompaniment=1)
    found, _ = of_folder(tmp_path)
    assert found.training[0].stems["other"].path.name == "accompaniment.wav"
    with pytest.raises(TrainingError, match="a has accompaniment instead of a separate stem drums"):
        of_folder(tmp_path, "drums")


def test_a_data_set_with_a_description_can_be_trained_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "set" / name, **{"1 Kick": 1, "2 Snare": 1, "3 Bass": 1, "4 Vox": 1, "5 Keys": 1})
    stems = {"drums": ["*kick", "*snare"], "bass": "*bass", "vocals": "*vox", "other": "*keys"}
    (tmp_path / "set" / "dataset.yaml").write_text(yaml.safe_dump({"stems": stems}), "utf-8")
    found, warned = of_folder(tmp_path / "set")
    assert [part.path.name for part in found.training[0].stems["drums"].parts] == [
        "1 Kick.wav",
        "2 Snare.wav",
    ]
    assert warned == []
    again = songs.find([tmp_path / "set" / "dataset.yaml"], "vocals", 1000, ["a"])
    assert again == found


def test_a_summed_stem_is_recognized_by_all_its_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, bass=1, drums=1, other=1, vocals=1, guitar=1)
    before = songs.contents(of_folder(tmp_path)[0].training)
    soundfile.write(tmp_path / "b" / "guitar.wav", noise(RATE), RATE, "FLOAT")
    assert songs.contents(of_folder(tmp_path)[0].training) != before


def test_songs_are_found_and_split(data: Path) -> None:
    with pytest.warns(KmdxWarning, match="song 2: no bass: treated as silent"):
        both = songs.find([data], "bass", 1000, ["song 0"])
    assert [song.name for song in both.training] == ["song 1", "song 2"]
    assert [song.name for song in both.validation] == ["song 0"]
    assert set(both.training[1].stems) == {"drums", "other", "vocals"}


def test_the_splits_of_a_data_set_are_used(data: Path, tmp_path: Path) -> None:
    for split, song in (("train", "song 1"), ("valid", "song 0"), ("test", "song 2")):
        shutil.copytree(data / song, tmp_path / split / song)
    both = songs.find([tmp_path], "vocals", 1000)
    assert [song.name for song in (*both.training, *both.validation)] == ["song 1", "song 0"], (
        "never the test songs"
    )


def test_musdb18s_validation_songs_are_used(data: Path, tmp_path: Path) -> None:
    for name in ("Meaxic - Take A Step", "Another"):
        shutil.copytree(data / "song 1", tmp_path / "train" / name)
    assert [song.name for song in songs.find([tmp_path], "drums", 1000).validation] == [
        "Meaxic - Take A Step"
    ]


def broken(data: Path, tmp_path: Path, how: str) -> list[Path]:
    """A copy of the songs with one thing wrong."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    first = copy / "song 1"
    match how:
        case "rate":
            soundfile.write(first / "vocals.flac", noise(48_000), 48_000)
        case "short":
            for stem in cases.STEMS:
                soundfile.write(first / f"{stem}.flac", noise(4000), 44_100)
        case "damaged":
            (first / "vocals.flac").write_bytes(b"no sound")
        case "source":
            for song in copy.iterdir():
                for file in song.glob("vocals.*"):
                    file.unlink()
        case "empty":
            shutil.rmtree(copy)
            copy.mkdir()
        case "missing":
            shutil.rmtree(copy)
        case "file":
            return [first / "vocals.flac"]
        case "twice":
            return [copy, data]
    return [copy]


@pytest.mark.filterwarnings("ignore::kmdx.errors.KmdxWarning")
@pytest.mark.parametrize(
    ("how", "validation", "message"),
    [
        ("rate", ["song 0"], "vocals.flac: 48000 Hz, expected 44100 Hz"),
        ("short", ["song 0"], "song 1 is shorter than a window: 0.1 s, expected at least 0.2 s"),
        ("damaged", ["song 0"], "vocals.flac: cannot be read"),
        ("source", ["song 0"], "none of 2 training songs has vocals"),
        ("empty", ["song 0"], "no songs: expected folders with bass, drums, other, vocals"),
        ("missing", ["song 0"], "copy: no such folder"),
        ("file", ["song 0"], "vocals.flac: expected a folder or a .yaml file"),
        ("twice", ["song 0"], "two songs have the name 'song 0'"),
        ("", [], "no validation songs in"),
        ("", ["song 9"], "no validation song matches 'song 9'; available: song 0, song 1, song 2"),
        ("", ["song *"], "no training songs"),
    ],
)
def test_invalid_data_is_a_one_line_error_before_training_starts(
    how: str, validation: list[str], message: str, data: Path, tmp_path: Path
) -> None:
    folders = broken(data, tmp_path, how)
    with pytest.raises(TrainingError) as caught:
        songs.find(folders, "vocals", cases.CHUNK, validation)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
