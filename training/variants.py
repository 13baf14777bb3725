"""Variants of songs for training: the same songs at another speed, which changes pitch and tempo."""

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
    """Write variants of songs as 16-bit ``OUTPUT/<song>/<stem>.wav``; yield each song's name when it exists.

    A song that already exists, complete and at this speed, is not written again. Raises
    :class:`TrainingError` if the speed is out of range, a data set has no training songs, or two songs have
    the same name, and :class:`AudioError` if a stem cannot be read or a variant cannot be written.

    Parameters
    ----------
    output : Path
        Output folder; pass it to a run as ``--variants``.
    folders : sequence of Path
        Data sets; of those with splits, the split ``train`` is used.
    speed : float
        0.5 makes songs twice as long and an octave lower.
    every : int
        Use every nth song of each data set, beginning with the first.
    """
    if not SLOWEST <= speed <= FASTEST or speed == 1:
        raise TrainingError(f"speed {speed:g}: expected {SLOWEST:g} to {FASTEST:g}, except 1")
    if every < 1:
        raise TrainingError(f"every {every}: expected 1 or more")
    chosen = [song for folder in folders for song in to_train_with(folder)[::every]]
    names = [song.name for song in chosen]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TrainingError(f"two songs have the name {twice[0]!r}; rename one of them")
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
    """Whether all stems have a variant whose length matches this speed."""
    return all(
        files[name].is_file() and abs(audio.info(files[name]).samples - stem.samples / speed) < 2
        for name, stem in stems.items()
    )
