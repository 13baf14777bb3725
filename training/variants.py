"""Variants of songs to train with: the same songs played slower or faster, pitch and tempo together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import soxr

from kmdx import audio
from kmdx.challenge import RATE
from training.config import TrainingError
from training.songs import TrainingStem, to_train_with, whole

SLOWEST, FASTEST = 0.25, 4.0


def write(output: Path, folders: Sequence[Path], speed: float, every: int = 1) -> Iterator[str]:
    """Write variants of songs as ``OUTPUT/<song>/<stem>.wav``, 16 bit; yields the name of each that exists.

    A song that exists there, complete and at this speed, is not written again.

    Parameters
    ----------
    output : Path
        What ``--variants`` names then.
    folders : sequence of Path
        Data sets, of each the split ``train`` where it has splits.
    speed : float
        0.5 is twice as long and an octave lower.
    every : int
        Of each data set only one song in so many, the first among them.

    Raises
    ------
    TrainingError
        If the speed is out of bounds, a data set has no songs to train with, or two songs have one name.
    AudioError
        If a stem cannot be read, or a variant cannot be written.
    """
    if not SLOWEST <= speed <= FASTEST or speed == 1:
        raise TrainingError(f"speed {speed:g}: expected {SLOWEST:g} to {FASTEST:g}, and not 1")
    if every < 1:
        raise TrainingError(f"every {every}: expected 1 or more")
    chosen = [song for folder in folders for song in to_train_with(folder)[::every]]
    names = [song.name for song in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TrainingError(f"two songs are called {twice[0]!r}")
    for song in chosen:
        files = {name: output / song.name / f"{name}.wav" for name in song.stems}
        if not _written(song.stems, files, speed):
            slowed = {
                files[name]: soxr.resample(whole(stem), RATE * speed, RATE)
                for name, stem in song.stems.items()
            }
            audio.write_all(slowed, RATE)
        yield song.name


def _written(stems: Mapping[str, TrainingStem], files: Mapping[str, Path], speed: float) -> bool:
    """Whether all stems have a variant of the length that they have at this speed."""
    return all(
        files[name].is_file() and abs(audio.info(files[name]).samples - stem.samples / speed) < 2
        for name, stem in stems.items()
    )
