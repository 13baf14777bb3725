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

import struct
import zlib
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

COLOURS = (
    (0, 0, 4),
    (28, 16, 68),
    (79, 18, 123),
    (129, 37, 129),
    (181, 54, 122),
    (229, 80, 100),
    (251, 135, 97),
    (254, 194, 135),
    (252, 253, 191),
)
"""From silent to loud, red, green and blue in 0..255: matplotlib's *magma*, by eighths."""


def height(frequency: float) -> float:
    """How far below the top of its half a frequency in Hz lies, as a part of the half's height."""
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
        raise AudioError(f"{path}: no spectrogram of it: {error}") from error


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
    columns = max(reference.shape[1], estimate.shape[1])
    loudest = max(reference.max(), FLOOR)
    image = np.full((2 * ROWS + GAP, columns), 256, np.uint16)
    for top, spectrum in ((0, reference), (ROWS + GAP, estimate)):
        level = 10 * np.log10(np.maximum(spectrum, FLOOR) / loudest)  # dB
        pixels = np.clip(255 * (1 + level / RANGE), 0, 255) if spectrum.max() > FLOOR else 0 * level
        image[top : top + ROWS, : spectrum.shape[1]] = np.round(pixels)
    return _png(image)


def _png(image: np.ndarray) -> bytes:
    """A PNG file of pixels 0..255 in :data:`COLOURS`; 256 is see-through. ``(height, width)``."""
    steps = np.linspace(0, len(COLOURS) - 1, 255)
    palette = np.stack(
        [np.interp(steps, range(len(COLOURS)), channel) for channel in zip(*COLOURS, strict=True)]
    )
    colours = np.round(palette.T).astype(np.uint8)  # (255, 3); the last entry is the see-through one
    indices = np.where(image > 255, 255, np.minimum(image, 254)).astype(np.uint8)
    rows = np.pad(indices, ((0, 0), (1, 0)))  # each row begins with its filter: 0, none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 3, 0, 0, 0)  # 8 bits, a palette
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"PLTE", colours.tobytes() + bytes(3))
        + chunk(b"tRNS", b"\xff" * 255 + b"\x00")
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
        + chunk(b"IEND", b"")
    )
