"""Spectrogram pictures: the power of sound by time and pitch, as PNG files.

Conventions
-----------
A spectrogram is an array of mean power, ``(ROWS, columns)``, with at most :data:`COLUMNS` columns. The
columns divide the song's duration evenly. A row is a band of frequencies, from :data:`HIGHEST` at the top to
:data:`LOWEST` at the bottom in equal steps of pitch. Power is averaged over the channels and over its
column's time. In a picture, a color is a level in dB below some reference power; louder points are drawn as 0
dB. The page adds the axes.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import av
import numpy as np
from numpy.typing import NDArray

from kmdx import audio

COLUMNS = 960  # pixels
ROWS = 144  # pixels
LOWEST, HIGHEST = 40.0, 16_000.0  # Hz
RANGE = 80.0  # dB from the darkest color to the lightest

WINDOW = 4096  # samples: 93 ms and 10.8 Hz at 44.1 kHz
SHORTEST_HOP, LONGEST_HOP = 256, 4096  # samples
BLOCK = 64  # frames transformed at a time
FLOOR = 1e-12  # power that is drawn for silence: far below one step of a 16-bit file

MAGMA = (
    (0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122), (229, 80, 100), (251, 135, 97),
    (254, 194, 135), (252, 253, 191),
)  # fmt: skip
"""Colors from -RANGE to 0 dB in even steps: nine of matplotlib's map ``magma``."""


def height(frequency: float) -> float:
    """The distance of a frequency in Hz from the top of a picture, as a fraction of its height."""
    return float(np.log(HIGHEST / frequency) / np.log(HIGHEST / LOWEST))


def spectrogram(sound: audio.Audio) -> NDArray[np.float64]:
    """Mean power by band and time, computed one block at a time: ``(ROWS, columns)``.

    The hop grows with the song, up to the window's length; in longer songs, frames are averaged into a
    column. A short song has fewer columns than :data:`COLUMNS`.
    """
    samples, channels = sound.samples.shape
    hop = int(np.clip(samples // COLUMNS, SHORTEST_HOP, LONGEST_HOP))
    frames = -(-samples // hop)
    columns = min(frames, COLUMNS)
    column_of = np.arange(frames) * columns // frames  # (frames,)

    # Hann, scaled so that the powers of all bins add up to the mean square.
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    window *= np.sqrt(2 / (WINDOW * np.square(window).sum()))

    power = np.zeros((columns, WINDOW // 2 + 1))  # (columns, bins)
    # A frame's middle is the middle of its hop; the song is surrounded by zeros.
    before = (WINDOW - hop) // 2
    position = 0
    held = np.zeros((before, channels), np.float32)
    for first in range(0, frames, BLOCK):
        number = min(BLOCK, frames - first)
        needed = (number - 1) * hop + WINDOW
        read = sound.samples[position : position + needed - len(held)]
        position += len(read)
        signal = np.concatenate([held, read])
        signal = np.pad(signal, ((0, needed - len(signal)), (0, 0)))  # (needed, channels)
        views = np.lib.stride_tricks.sliding_window_view(signal, WINDOW, axis=0)[::hop]
        spectrum = np.fft.rfft(views * window)  # (number, channels, bins)
        energy = np.square(spectrum.real) + np.square(spectrum.imag)
        those, starts = np.unique(column_of[first : first + number], return_index=True)
        power[those] += np.add.reduceat(energy.mean(axis=1), starts, axis=0)
        held = signal[number * hop :]
    power /= np.bincount(column_of)[:, np.newaxis]
    return _bands(sound.rate) @ power.T


def _bands(rate: int) -> NDArray[np.float64]:
    """Weights of the bins in each row, triangles in pitch and never narrower than a bin: ``(ROWS, bins)``."""
    bins = np.arange(WINDOW // 2 + 1) * rate / WINDOW  # Hz
    centers = HIGHEST * (LOWEST / HIGHEST) ** ((np.arange(ROWS) + 0.5) / ROWS)  # Hz
    widths = np.maximum(centers * np.log(HIGHEST / LOWEST) / ROWS, rate / WINDOW)  # Hz
    weights = np.maximum(0, 1 - np.abs(bins - centers[:, np.newaxis]) / widths[:, np.newaxis])
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)


def levels(power: NDArray[np.float64], loudest: float) -> NDArray[np.float64]:
    """Levels in dB below the power ``loudest``; all of silence is at -:data:`RANGE`."""
    if power.max() <= FLOOR:
        return np.full_like(power, -RANGE)
    return 10 * np.log10(np.maximum(power, FLOOR) / max(loudest, FLOOR))


def png(level: NDArray[np.float64]) -> bytes:
    """A PNG file of levels in dB, ``(rows, columns)``; NaN is transparent."""
    steps = np.rint(254 * np.clip(1 + level / RANGE, 0, 1)) + 1
    pixels = np.where(np.isnan(level), 0, steps).astype(np.uint8)
    picture = av.VideoFrame.from_ndarray((pixels, _palette()), format="pal8")  # type: ignore[arg-type]
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width = level.shape
    encoder.pix_fmt, encoder.time_base = "pal8", picture.time_base or Fraction(1, 25)
    return b"".join(bytes(packet) for packet in (*encoder.encode(picture), *encoder.encode(None)))


@cache
def _palette() -> NDArray[np.uint8]:
    """Opacity, red, green and blue of each step: ``(256, 4)``; step 0 is transparent."""
    places = np.linspace(0, 254, len(MAGMA))
    colors = [np.interp(np.arange(255), places, channel) for channel in zip(*MAGMA, strict=True)]
    opaque = np.stack([np.full(255, 255.0), *colors], axis=1)
    return np.concatenate([np.zeros((1, 4)), np.rint(opaque)]).astype(np.uint8)
