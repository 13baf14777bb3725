"""Spectrogram pictures of a stem: the reference above the estimate, as one PNG file.

A picture is ``2 · ROWS + GAP`` pixels high. Levels are in dB below the loudest point of the *reference*, so
that equal colors mean equal levels. See :mod:`kmdx.spectrograms`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kmdx import audio, files, spectrograms
from kmdx.errors import AudioError
from kmdx.spectrograms import ROWS

GAP = 6  # pixels between the halves


def write(reference: Path, estimate: Path, picture: Path) -> None:
    """Draw two sound files of one stem as a PNG file, which is written completely or not at all.

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
    """The spectrogram of a sound file, ``(ROWS, columns)``.

    Raises
    ------
    AudioError
        If the file cannot be read or contains no sound.
    """
    try:
        return spectrograms.spectrogram(audio.read(path, accept_holes=False))
    except AudioError as error:
        raise AudioError(f"{path}: its spectrogram cannot be drawn: {error}") from error


def draw(reference: np.ndarray, estimate: np.ndarray) -> bytes:
    """A PNG file of two spectrograms of power, ``(ROWS, columns)`` each, one above the other."""
    columns = max(reference.shape[1], estimate.shape[1])
    levels = np.full((2 * ROWS + GAP, columns), np.nan)  # dB; NaN is transparent
    for top, power in ((0, reference), (ROWS + GAP, estimate)):
        levels[top : top + ROWS, : power.shape[1]] = spectrograms.levels(power, reference.max())
    return spectrograms.png(levels)
