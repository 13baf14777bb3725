"""A synthetic song, for measuring speed without a sound file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PHRASE = 10.0  # seconds


def song(seconds: float, rate: int, seed: int = 0) -> NDArray[np.float32]:
    """A synthetic song: colored stereo noise with beats, ``(n, 2)``, about as loud as music."""
    return np.concatenate(list(phrases(seconds, rate, seed)))


def phrases(seconds: float, rate: int, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """The same song in parts of :data:`PHRASE` seconds, for songs that do not fit in memory."""
    left = max(1, int(seconds * rate))
    length = int(PHRASE * rate)
    rng = np.random.default_rng(seed)
    while left > 0:
        yield _phrase(rng, length, rate)[: min(left, length)]
        left -= length


def _phrase(rng: np.random.Generator, length: int, rate: int) -> NDArray[np.float32]:
    spectrum = np.fft.rfft(rng.standard_normal((3, length)))
    spectrum /= np.sqrt(np.maximum(np.arange(spectrum.shape[1]), 20 * length / rate))  # pink from 20 Hz on
    left, right, middle = np.fft.irfft(spectrum, length)
    noise = np.stack([left + middle, right + middle], axis=1)
    noise *= 0.08 / noise.std()
    beat = np.arange(length) % (rate // 2) / rate  # seconds since the last beat, at two beats per second
    swell = 0.7 + 0.3 * np.sin(2 * np.pi * np.arange(length) / (4 * rate))
    hits = 0.3 * np.exp(-40 * beat) * rng.standard_normal(length)
    drum = 0.3 * np.exp(-15 * beat) * np.sin(2 * np.pi * 60 * beat)
    phrase = noise * swell[:, None] + (0.3 * hits + drum)[:, None]
    return (phrase - phrase.mean(0)).astype(np.float32)
