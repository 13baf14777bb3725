"""Draw training windows across songs and stems.

Each window has its own random generator, keyed by the run's seed and the window's number. The windows of a
step therefore do not depend on workers, processes or interruptions.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kmdx.challenge import STEMS
from kmdx.errors import KmdxWarning
from training.config import Config, TrainingError
from training.songs import TrainingSong, TrainingStem

Generator = np.random.Generator


class Example(NamedTuple):
    """The network's input, and the source in it: float32 ``(2, T)`` each."""

    input: Tensor
    target: Tensor


class _WeightedSongs:
    """Songs to draw from with different probabilities."""

    def __init__(self, songs: Sequence[TrainingSong], weights: Mapping[str, float]) -> None:
        self.songs = songs
        self.ends = list(accumulate(_weight(song.name, weights) for song in songs))

    def draw(self, generator: Generator) -> TrainingSong:
        return self.songs[bisect_right(self.ends, generator.random() * self.ends[-1])]


def _weight(name: str, weights: Mapping[str, float]) -> float:
    return next((weight for pattern, weight in weights.items() if fnmatchcase(name, pattern)), 1.0)


class Windows(Dataset[Example]):
    """An endless data set of windows, by number.

    Parameters
    ----------
    songs : sequence of TrainingSong
        Decoded songs to train with.
    """

    def __init__(self, config: Config, songs: Sequence[TrainingSong]) -> None:
        self.config = config
        self.songs = songs
        for pattern in config.data.weights:
            if not any(fnmatchcase(song.name, pattern) for song in songs):
                warnings.warn(f"data.weights: no song matches {pattern!r}", KmdxWarning, stacklevel=2)
        self.with_stem = {
            name: _WeightedSongs([song for song in songs if name in song.stems], config.data.weights)
            for name in STEMS
        }
        self.all = _WeightedSongs(songs, config.data.weights)

    def __getitem__(self, number: int) -> Example:
        """Draw the window with this number."""
        generator = np.random.Generator(np.random.Philox(key=[self.config.seed, number]))
        stems = self._stems(generator)
        data = self.config.data
        if generator.random() < data.silence:
            stems[self.config.source] = np.zeros_like(stems[self.config.source])
        for name, samples in stems.items():
            stems[name] = _augment(samples, generator, data.gain, data.swap, data.invert)
        mixture = np.sum([*stems.values()], axis=0)
        if self.config.hears == "rest" and self.config.rest.vocals is None:
            error = generator.uniform(*self.config.rest.error)
            mixture = mixture - estimated(stems["vocals"], mixture, error)
        return Example(torch.from_numpy(mixture), torch.from_numpy(stems[self.config.source]))

    def _stems(self, generator: Generator) -> dict[str, NDArray[np.float32]]:
        length = self.config.network.chunk
        if generator.random() >= self.config.data.mixing:
            song = self.all.draw(generator)
            version = song.versions[generator.integers(len(song.versions))]
            start = _start(generator, max(stem.samples for stem in version.values()), length)
            return {name: read(version.get(name), start, length) for name in STEMS}
        stems = {}
        for name in STEMS:
            candidates = self.with_stem[name]
            stem, start = None, 0
            if candidates.songs:
                song = candidates.draw(generator)
                versions = [version for version in song.versions if name in version]
                stem = versions[generator.integers(len(versions))][name]
                start = _start(generator, stem.samples, length)
            stems[name] = read(stem, start, length)
        return stems


def read(stem: TrainingStem | None, start: int, length: int) -> NDArray[np.float32]:
    """Samples ``(2, length)`` of a stem from ``start``; zeros after its end, and for a silent stem.

    Raises :class:`TrainingError` if its file was removed or changed.
    """
    window = np.zeros((2, length), np.float32)
    if stem is None or start >= stem.samples:
        return window
    expected = min(length, stem.samples - start)
    try:
        with sf.SoundFile(stem.path) as sound:
            sound.seek(start)
            samples = sound.read(expected, dtype="float32", always_2d=True)
    except (OSError, sf.SoundFileError) as error:
        raise TrainingError(f"{stem.path}: can no longer be read: {error}") from error
    if len(samples) < expected:
        raise TrainingError(f"{stem.path}: ends after {start + len(samples)} of {stem.samples} samples")
    window[:, :expected] = samples.T
    return window


def loader(
    config: Config, windows: Windows, done: int, at_once: int, workers: int, rank: int, ranks: int
) -> DataLoader:
    """The windows of one of ``ranks`` processes, in batches of ``at_once``.

    They begin with the step after ``done`` and end with its epoch.
    """
    numbers = list(_numbers(config, done, at_once, rank, ranks))
    return DataLoader(
        windows,
        batch_sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )


def _numbers(config: Config, done: int, at_once: int, rank: int, ranks: int) -> Iterator[list[int]]:
    """The numbers of the windows in each batch; a step has the same windows, however they are divided."""
    epoch = done // config.epoch
    for step in range(done, min((epoch + 1) * config.epoch, config.steps)):
        own = range(step * config.batch + rank, (step + 1) * config.batch, ranks)
        for begin in range(0, len(own), at_once):
            yield [*own[begin : begin + at_once]]


def _start(generator: Generator, samples: int, length: int) -> int:
    return int(generator.integers(max(1, samples - length + 1)))


def _augment(
    samples: NDArray[np.float32], generator: Generator, gain: tuple[float, float], swap: float, invert: float
) -> NDArray[np.float32]:
    """Change the level, and randomly swap the channels and invert the polarity."""
    factor = 10 ** (generator.uniform(*gain) / 20)
    if generator.random() < invert:
        factor = -factor
    if generator.random() < swap:
        samples = samples[::-1]
    return np.ascontiguousarray(samples * np.float32(factor))


def estimated(vocals: NDArray[np.float32], mixture: NDArray[np.float32], error: float) -> NDArray[np.float32]:
    """The true vocals with an error in dB: half is missing vocals, and half leakage of other stems."""
    level = 10 ** (error / 20)
    rest = mixture - vocals
    norm, other = (math.sqrt(float(np.square(signal).sum())) for signal in (vocals, rest))
    leak = min(level * math.sqrt(0.5) * norm / other, 0.5) if other else 0.0
    return np.float32(1 - level * math.sqrt(0.5)) * vocals + np.float32(leak) * rest


def whole(song: TrainingSong) -> Mapping[str, NDArray[np.float32]]:
    """The stems ``(2, samples)`` of a whole song."""
    return {name: read(song.stems.get(name), 0, song.samples) for name in STEMS}
