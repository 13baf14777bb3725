"""Sound files to be compared: their form, and their samples block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from kmdx import decoding
from kmdx.errors import AudioError

FRAME = 1.0
"""Seconds of a frame and between two frames, as in museval."""


@dataclass(frozen=True)
class Form:
    """What files must have in common to be compared."""

    samples: int
    rate: int  # Hz
    channels: int

    def __str__(self) -> str:
        return f"{self.samples} samples of {self.channels} channels at {self.rate} Hz"

    @property
    def frame(self) -> int:
        """Samples of a frame: a song shorter than one is its only frame, as in museval."""
        return min(int(FRAME * self.rate), self.samples)

    @property
    def frames(self) -> int:
        """Whole frames; museval leaves out what follows the last."""
        return self.samples // self.frame


def form_of(path: Path) -> Form:
    """Read the form of a sound file from its header.

    Raises
    ------
    AudioError
        If it cannot be read or holds no samples.
    """
    with _open(path) as sound:
        if sound.frames < 1:
            raise AudioError(f"{path}: no samples in it")
        return Form(sound.frames, sound.samplerate, sound.channels)


def same_form(paths: Sequence[Path]) -> Form:
    """Read the form that files have in common.

    Raises
    ------
    AudioError
        If one cannot be read, or differs from the first.
    """
    first = form_of(paths[0])
    for path in paths[1:]:
        if (form := form_of(path)) != first:
            raise AudioError(f"{path}: {form}, but {paths[0]}: {first}")
    return first


def read_together(paths: Sequence[Path], block: int) -> Iterator[list[NDArray[np.float32]]]:
    """Read files of one form side by side, ``block`` samples at a time.

    Each array ``(samples, channels)`` is overwritten by the next block.

    Raises
    ------
    AudioError
        If a file cannot be read, or ends before its header says.
    """
    with ExitStack() as stack:
        sounds = [stack.enter_context(_open(path)) for path in paths]
        buffers = [np.empty((min(block, sound.frames), sound.channels), np.float32) for sound in sounds]
        for begin in range(0, sounds[0].frames, block):
            expected = min(block, sounds[0].frames - begin)
            parts = []
            for path, sound, buffer in zip(paths, sounds, buffers, strict=True):
                try:
                    parts.append(sound.read(out=buffer[:expected]))
                except sf.SoundFileError as error:
                    raise AudioError(f"{path}: damaged after sample {begin}: {error}") from error
                if len(parts[-1]) < expected:
                    raise AudioError(f"{path}: ends after {begin + len(parts[-1])} of {sound.frames} samples")
            yield parts


def read_whole(path: Path) -> NDArray[np.float32]:
    """Read a file into one array ``(samples, channels)``.

    Raises
    ------
    AudioError
        If it cannot be read, or ends before its header says.
    """
    ((samples,),) = read_together([path], form_of(path).samples)
    return samples


def _open(path: Path) -> sf.SoundFile:
    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        decoding.check_whole(path)
        return sf.SoundFile(path)
    except (OSError, sf.SoundFileError) as error:
        raise AudioError(f"{path}: cannot be read: {error}") from error
    except UnicodeEncodeError as error:
        raise AudioError(f"{path}: expected a name in UTF-8: rename it") from error
