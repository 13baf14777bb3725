"""Spectrogram pictures of a stem: the reference above the estimate, as one PNG file.

Conventions
-----------
A picture is :data:`COLUMNS` pixels wide at most and ``2 · ROWS + GAP`` high. Its columns divide the
song's duration evenly; in each half a row is a band of frequencies, from :data:`HIGHEST` at the top to
:data:`LOWEST` at the bottom in equal steps of pitch. A pixel is the power of its band, averaged over
the channels and over its column's time, in dB below the loudest pixel of the *reference*, so that
equal colours mean equal levels; estimates louder than that are drawn as that. The axes are the
page's: it knows its width and whether it is dark.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from kmdx import audio, files
from kmdx.errors import AudioError

COLUMNS = 960  # pixels
ROWS = 144  # pixels: of each half
GAP = 6  # pixels between the halves
LOWEST, HIGHEST = 40.0, 16_000.0  # Hz
RANGE = 80.0  # dB from the darkest colour to the lightest

WINDOW = 4096  # samples: 93 ms and 10.8 Hz at 44.1 kHz
SHORTEST_HOP, LONGEST_HOP = 256, 4096  # samples
BLOCK = 64  # frames transformed at a time
FLOOR = 1e-12  # power of what is drawn for silence: far below one step of a 16-bit file


def height(frequency: float) -> float:
    """The distance of a frequency in Hz from the top of its half, as a fraction of the half's height."""
    return float(np.log(HIGHEST / frequency) / np.log(HIGHEST / LOWEST))


def write(reference: Path, estimate: Path, picture: Path) -> None:
    """Draw two sound files of one stem as a PNG file, which appears whole or not at all.

    Raises
    ------
    AudioError
        If one of them cannot be read.
    """
    data = draw(spectrogram(reference), spectrogram(estimate))
    picture.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(picture) as partial:
        partial.write_bytes(data)


def spectrogram(path: Path) -> np.ndarray:
    """Mean power of a sound file by band and time, read block by block: ``(ROWS, columns)``.

    The hop grows with the song, up to the window's length; from there on frames are averaged into a
    column. Columns are fewer than :data:`COLUMNS` where the song is shorter than their hops.

    Raises
    ------
    AudioError
        If the file cannot be read or holds no sound.
    """
    try:
        return _spectrogram(audio.read(path, accept_holes=False))
    except AudioError as error:
        raise AudioError(f"{path}: its spectrogram cannot be drawn: {error}") from error


def _spectrogram(sound: audio.Audio) -> np.ndarray:
    samples, channels = sound.samples.shape
    hop = int(np.clip(samples // COLUMNS, SHORTEST_HOP, LONGEST_HOP))
    frames = -(-samples // hop)
    columns = min(frames, COLUMNS)
    column_of = np.arange(frames) * columns // frames  # (frames,)

    # Hann, scaled so that the powers of all bins add up to the mean square.
    window = np.hanning(WINDOW + 1)[:-1].astype(np.float32)
    window *= np.sqrt(2 / (WINDOW * np.square(window).sum()))

    power = np.zeros((columns, WINDOW // 2 + 1))  # (columns, bins)
    # A frame's middle is the middle of its hop; the song stands in zeros.
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


def _bands(rate: int) -> np.ndarray:
    """Weights of the bins in each row, triangles in pitch and never narrower than a bin: ``(ROWS, bins)``."""
    bins = np.arange(WINDOW // 2 + 1) * rate / WINDOW  # Hz
    centres = HIGHEST * (LOWEST / HIGHEST) ** ((np.arange(ROWS) + 0.5) / ROWS)  # Hz
    widths = np.maximum(centres * np.log(HIGHEST / LOWEST) / ROWS, rate / WINDOW)  # Hz
    weights = np.maximum(0, 1 - np.abs(bins - centres[:, np.newaxis]) / widths[:, np.newaxis])
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)


def draw(reference: np.ndarray, estimate: np.ndarray) -> bytes:
    """A PNG file of two spectrograms of power, ``(ROWS, columns)`` each, one above the other."""
    import matplotlib
    from matplotlib.image import imsave

    columns = max(reference.shape[1], estimate.shape[1])
    loudest = max(reference.max(), FLOOR)
    levels = np.full((2 * ROWS + GAP, columns), np.nan)  # dB; NaN is transparent
    for top, spectrum in ((0, reference), (ROWS + GAP, estimate)):
        level = 10 * np.log10(np.maximum(spectrum, FLOOR) / loudest)
        levels[top : top + ROWS, : spectrum.shape[1]] = level if spectrum.max() > FLOOR else -RANGE
    colors = matplotlib.colormaps["magma"].with_extremes(bad=(0, 0, 0, 0))
    png = io.BytesIO()
    imsave(png, levels, vmin=-RANGE, vmax=0, cmap=colors, format="png", metadata={"Software": "kmdx-net"})
    return png.getvalue()
