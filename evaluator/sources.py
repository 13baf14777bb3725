"""Reads the sound of a stem from a file, from one stream of a file, or from several files.

Several files are added in float64. A mono file in a stereo song is copied to both channels, and a file that
is shorter than its song is padded with silence. :mod:`evaluator.dataset` decides whether this is acceptable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from kmdx import audio, ffmpeg, signals
from kmdx.audio import Form
from kmdx.challenge import RATE, STREAMS
from kmdx.errors import AudioError
from kmdx.inputs import COMPRESSED, EXTENSIONS

SOUNDS = (".wav", ".flac", *sorted(EXTENSIONS - {".wav", ".flac"}))
"""File name endings of sound files, preferred ones first."""

OFTEN_LOSSY = COMPRESSED | {".ogg", ".oga", ".opus"}
LOSSLESS = ("alac", "flac", "pcm_", "wavpack", "tta", "ape")  # beginnings of the names of FFmpeg's codecs
BLOCK = 4 * RATE  # samples read at a time


@dataclass(frozen=True)
class AudioSource:
    """A file, or one audio stream of a file that has several."""

    path: Path
    stream: int | None = None
    """The stream's index among the audio streams; ``None`` for a file with a single stream."""


def is_sound(path: Path) -> bool:
    """Whether a file's name has the ending of a sound file."""
    return path.suffix.lower() in EXTENSIONS


def is_lossy(path: Path) -> bool:
    """Whether a file is lossy; decided by its codec if its ending allows both."""
    if path.suffix.lower() not in OFTEN_LOSSY:
        return False
    try:
        with av.open(str(path), **ffmpeg.ANY_TAGS) as container:
            return not container.streams.audio[0].codec_context.name.startswith(LOSSLESS)
    except (av.FFmpegError, OSError, IndexError):
        return True


def form(source: AudioSource) -> Form:
    """Length, rate and channels of a source: from its header, or by decoding it if the header lacks them.

    Raises
    ------
    AudioError
        If it cannot be read, is damaged or contains no samples.
    """
    if source.stream is not None:
        return _stream_form(source.path, source.stream)
    return audio.info(source.path)


def blocks(sources: Sequence[AudioSource], target: Form, size: int = BLOCK) -> Iterator[NDArray[np.float32]]:
    """Read the sum of sources, ``size`` samples at a time.

    Parameters
    ----------
    sources : sequence of AudioSource
        One or more sources at the target's rate, none longer than the target.
    target : Form
        Form of the sum: mono is copied to both channels, and shorter sources are padded with silence.
    size : int
        Samples of a block.

    Yields
    ------
    ndarray
        float32 ``(samples, channels)``, overwritten by the next block.

    Raises
    ------
    AudioError
        If a file cannot be read, or is shorter than its header claims.
    """
    if len(sources) == 1:
        yield from _fitted(sources[0], target, size)
        return
    for first, *others in zip(*(_fitted(source, target, size) for source in sources), strict=True):
        total = first.astype(np.float64)
        for other in others:
            total += other
        yield total.astype(np.float32)


def read(sources: Sequence[AudioSource], target: Form, what: str) -> NDArray[np.float32]:
    """Read the whole sum of sources, float32 ``(samples, channels)``; parameters as in :func:`blocks`.

    Raises
    ------
    AudioError
        If a file cannot be read, or the sum contains NaN or infinity; the message begins with ``what``.
    """
    if len(sources) == 1:
        samples = audio.read(sources[0].path, stream=sources[0].stream or 0, accept_holes=False).samples
        if not target.samples or samples.shape == (target.samples, target.channels):
            return samples
    total = signals.empty((target.samples, target.channels))
    position = 0
    for block in blocks(sources, target):
        total[position : position + len(block)] = block
        position += len(block)
    return audio.check(total, what, target.rate)


def _fitted(source: AudioSource, target: Form, size: int) -> Iterator[NDArray[np.float32]]:
    """Blocks of one source, with the target's channels and length."""
    position = 0
    for block in _own_blocks(source, size):
        expected = min(size, target.samples - position)
        if block.shape[1] != target.channels:
            block = np.repeat(block, target.channels, axis=1)
        if len(block) < expected:
            block = np.pad(block, ((0, expected - len(block)), (0, 0)))
        position += len(block)
        yield block
    while position < target.samples:
        length = min(size, target.samples - position)
        position += length
        yield np.zeros((length, target.channels), np.float32)


def _own_blocks(source: AudioSource, size: int) -> Iterator[NDArray[np.float32]]:
    if source.stream is None and audio.is_exact(source.path):
        for (block,) in audio.read_together([source.path], size):
            yield block
        return
    samples = audio.read(source.path, stream=source.stream or 0, accept_holes=False).samples
    for begin in range(0, len(samples), size):
        yield samples[begin : begin + size]


def _stream_form(path: Path, number: int) -> Form:
    try:
        with av.open(str(path), **ffmpeg.ANY_TAGS) as container:
            streams = container.streams.audio
            if len(streams) < len(STREAMS):
                raise AudioError(
                    f"{path}: {len(streams)} audio streams, expected {len(STREAMS)}: {', '.join(STREAMS)}"
                )
            stream = streams[number]
            seconds = (stream.duration or 0) * (stream.time_base or 0)
            return Form(round(seconds * stream.rate), stream.rate, stream.channels)
    except (av.FFmpegError, OSError) as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from error
