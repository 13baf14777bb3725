"""Windows: sampling and augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import training_cases as cases
from conftest import decibels

from kmdx.errors import KmdxWarning
from training import sampling, songs
from training.sampling import Windows

data = cases.data


def test_a_window_depends_only_on_seed_and_number(data: Path) -> None:
    config = cases.small()
    training = cases.found(data, config).training
    first, again = Windows(config, training), Windows(config, training)
    assert torch.equal(first[7].input, again[7].input)
    assert not torch.equal(first[7].input, first[8].input)
    assert not torch.equal(first[7].input, Windows(cases.small(seed=1), training)[7].input)
    assert first[7].input.shape == first[7].target.shape == (2, cases.CHUNK)


def test_an_unmixed_window_is_part_of_one_song(data: Path) -> None:
    plain = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    config = cases.small(data=plain)
    training = cases.found(data, config).training
    window = Windows(config, training)[3]
    matches = []
    for song in training:
        stems = sampling.whole(song)
        mixture = sum(stems.values())
        place = np.flatnonzero(np.abs(stems["vocals"][0] - window.target[0, 0].numpy()) < 1e-9)
        matches += [
            np.abs(mixture[:, start : start + cases.CHUNK] - window.input.numpy()).max() < 1e-6
            for start in place
            if start + cases.CHUNK <= song.samples
        ]
    assert any(matches)


def test_stems_are_augmented_as_configured(data: Path) -> None:
    still = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    training = cases.found(data, cases.small()).training
    plain = Windows(cases.small(data=still), training)[0].target
    swapped = Windows(cases.small(data={**still, "swap": 1, "invert": 1}), training)[0].target
    assert torch.equal(swapped, -plain.flip(0))
    louder = Windows(cases.small(data={**still, "gain": [6, 6]}), training)[0].target
    assert torch.allclose(louder, 10 ** (6 / 20) * plain)
    assert not Windows(cases.small(data={**still, "silence": 1}), training)[0].target.any()


def test_mixed_windows_have_stems_of_different_songs(data: Path) -> None:
    config = cases.small(source="bass", data={"mixing": 1, "gain": [0, 0], "swap": 0, "invert": 0})
    drawn = Windows(config, cases.found(data, config).training)
    assert all(drawn[number].target.any() for number in range(20)), "the song without bass lends none"
    unmixed = Windows(cases.small(source="bass", data={"mixing": 0}), drawn.songs)
    assert {bool(unmixed[number].target.any()) for number in range(20)} == {True, False}


@pytest.mark.parametrize(("weights", "share"), [({}, 0.5), ({"song 1": 0.25}, 0.8), ({"song *": 3}, 0.5)])
@pytest.mark.parametrize("mixing", [0, 1])
def test_songs_are_sampled_in_proportion_to_their_weights(
    data: Path, monkeypatch: pytest.MonkeyPatch, weights: dict, share: float, mixing: float
) -> None:
    config = cases.small(data={"mixing": mixing, "weights": weights})
    one, two = (song for song in cases.found(data, config).training if song.name != "song 0")
    read: list[Path] = []

    def note(stem: songs.TrainingStem | None, start: int, length: int) -> np.ndarray:
        read.extend([] if stem is None else [stem.path])
        return np.zeros((2, length), np.float32)

    monkeypatch.setattr(sampling, "read", note)
    drawn = Windows(config, [one, two])
    for number in range(500):
        drawn[number]
    vocals = [path for path in read if path.stem == "vocals"]
    assert len(vocals) == 500
    assert abs(vocals.count(two.stems["vocals"].path) / 500 - share) < 0.07  # three standard deviations


def test_a_weight_that_matches_no_song_is_reported(data: Path) -> None:
    config = cases.small(data={"weights": {"sogn *": 2}})
    with pytest.warns(KmdxWarning, match="no song matches 'sogn "):
        Windows(config, cases.found(data, config).training)


def test_the_simulated_vocals_error_has_the_configured_level(data: Path) -> None:
    still = {"mixing": 0, "gain": [0, 0], "swap": 0, "invert": 0}
    training = cases.found(data, cases.small()).training
    whole = Windows(cases.small(source="drums", data=still), training)
    rest = Windows(
        cases.small(source="drums", hears="rest", rest={"error": [-12, -12]}, data=still), training
    )
    vocals = Windows(cases.small(data=still), training)
    for number in range(3):
        estimated = whole[number].input - rest[number].input
        assert decibels(vocals[number].target.numpy(), estimated.numpy()) == pytest.approx(12, abs=0.3)


def test_a_step_uses_the_same_windows_however_they_are_distributed(data: Path) -> None:
    config = cases.small(batch=4, steps=5, epoch=3)

    def numbers(epoch: int, at_once: int, ranks: int) -> list[set[int]]:
        shares = [list(sampling._numbers(config, 3 * epoch, at_once, rank, ranks)) for rank in range(ranks)]
        per_step = len(shares[0]) // (min(5, 3 * (epoch + 1)) - 3 * epoch)
        return [
            {number for share in shares for part in share[begin : begin + per_step] for number in part}
            for begin in range(0, len(shares[0]), per_step)
        ]

    whole = [set(range(0, 4)), set(range(4, 8)), set(range(8, 12))]
    assert numbers(0, 4, 1) == numbers(0, 1, 1) == numbers(0, 2, 2) == numbers(0, 1, 2) == whole
    assert numbers(1, 2, 1) == [set(range(12, 16)), set(range(16, 20))]


def test_a_variant_is_sampled_like_its_song(data: Path, tmp_path: Path) -> None:
    for stem in cases.STEMS:
        (tmp_path / "song 1").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "song 1" / f"{stem}.wav", np.full((50_000, 2), 0.25), 44100)
    both = songs.find([data], "vocals", cases.CHUNK, ["song 0", "song 2"], [tmp_path])
    (song,) = both.training
    assert len(song.versions) == 2
    drawn = Windows(cases.small(data={"mixing": 0, "gain": [0, 0], "invert": 0}), both.training)
    variants = [bool((drawn[number].target == 0.25).all()) for number in range(30)]
    assert 5 < sum(variants) < 25
