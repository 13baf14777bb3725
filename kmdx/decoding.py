"""Decode sound files to float32, one block at a time, with silence in place of damaged or missing sound.

libsndfile decodes formats whose length it knows exactly: PCM, float, µ-law, A-law, FLAC, undamaged Ogg
Vorbis, and its rarer codecs. FFmpeg (:mod:`kmdx.ffmpeg`) decodes the others, and all files of more than two
channels, because it knows their speaker layouts. :mod:`kmdx.containers` reads the length that a file
declares, and :mod:`kmdx.holes` handles missing sound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile as sf

from . import containers, ffmpeg, signals
from .errors import AudioError, reason
from .holes import DecodedSong, Request, changed
from .parts import Part

SHORT_WAV = 0.1  # seconds: if a wav is shorter than declared by up to this, nothing is considered missing
DECODED = 2**20  # samples that libsndfile decodes at a time
SMALL_STEP, LARGE_STEP = 2**10, 2**12  # samples: up to a damaged place in a flac file, and across it

# libsndfile's length of these is not exact: it counts whole blocks, or only the first link, or uses a mean
# bit rate.
INEXACT = {"MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III", "GSM610", "OPUS"}
SNDFILE = {"wav", "chunks", "flac", "vorbis"}


def read(file: BinaryIO, size: int, request: Request) -> tuple[np.ndarray, int]:
    """Decode the requested part of a file.

    Parameters
    ----------
    file : BinaryIO
        The file, opened for reading.
    size : int
        Its bytes.

    Returns
    -------
    samples : ndarray
        Float32 ``(samples, channels)``.
    rate : int
        Hz.

    Raises
    ------
    AudioError
        See :func:`kmdx.audio.read`.
    OSError
        If the file cannot be read.
    """
    song = DecodedSong(request)
    try:
        parts = containers.inspect(file, size)
    except AudioError as error:
        raise AudioError(f"{request.name}: {error}") from error
    sound = _open_sndfile(parts[0], request) if len(parts) == 1 else None
    if sound is not None:
        with sound:
            wanted = min(sound.frames, song.end(sound.samplerate))
            blocks = _decode_sndfile(song, parts[0], sound)
            samples = signals.join(blocks, expected=4 * sound.channels * wanted)
    else:
        samples = signals.join(_decode_parts(song, parts))
    for part in parts:
        part.view.raise_failure()
    song.finish()
    return samples, song.rate


def check_whole(path: Path) -> None:
    """Check that a file contains all the sound that its header declares, without decoding it.

    Raises :class:`AudioError` if it is cut short or its header does not declare its length, and
    :class:`OSError` if it cannot be read.
    """
    with path.open("rb") as file:
        try:
            parts = containers.inspect(file, path.stat().st_size)
        except AudioError as error:
            raise AudioError(f"{path}: {error}") from error
    for part in parts:
        if part.share < 1 or part.missing or part.cut or part.mute or part.marks or part.stops:
            raise AudioError(f"{path}: cut short or damaged: copy or export it again")
        if part.notes:
            raise AudioError(f"{path}: {part.notes[0]}: copy or export it again")


def _open_sndfile(part: Part, request: Request) -> sf.SoundFile | None:
    """Open the file in libsndfile; None if libsndfile does not read it exactly."""
    if part.family not in SNDFILE or request.stream:
        return None
    part.view.seek(0)
    part.view.limit(math.inf)
    try:
        sound = sf.SoundFile(part.view)
    except sf.LibsndfileError:
        return None
    length_known = 0 < sound.frames < 2**62  # unknown in a flac file that was written to a pipe
    inexact = sound.subtype in INEXACT and (sound.format, sound.subtype) != ("AIFF", "GSM610")
    if sound.channels > 2 or inexact or not length_known:
        sound.close()
        return None
    return sound


def _decode_sndfile(song: DecodedSong, part: Part, sound: sf.SoundFile) -> Iterator[np.ndarray]:
    song.rate = sound.samplerate
    song.notes += part.notes
    held = sound.frames
    song.declared = held if part.share == 1 else max(held + 1, round(held / part.share))
    if song.first >= song.declared:
        song.position = song.declared
        return
    song.position = min(song.first, held) if sound.seekable() else 0
    last = int(min(song.end(), held))
    yield from _flac(song, part, sound, last) if part.family == "flac" else _pcm(song, sound, last)
    if song.complete or song.position >= song.declared:
        return
    missing = song.declared - song.position
    if part.family == "wav" and missing <= SHORT_WAV * song.rate:
        song.note(f"{missing / song.rate:.3g} s shorter than its header declares ({missing} samples)")
        song.declared = song.position
    else:
        yield from song.silence(missing, sound.channels)


def _pcm(song: DecodedSong, sound: sf.SoundFile, last: int) -> Iterator[np.ndarray]:
    """The samples up to ``last``, or fewer if the file ends early."""
    try:
        if song.position:
            sound.seek(song.position)
        while song.position < last:
            block = sound.read(min(last - song.position, DECODED), dtype="float32", always_2d=True)
            yield from song.add(block)
            if not len(block):
                return
    except sf.LibsndfileError as error:
        raise AudioError(f"{song.name}: damaged, decoding failed: {reason(error)}") from error


def _flac(
    song: DecodedSong, part: Part, sound: sf.SoundFile, last: int, begin: int = 0
) -> Iterator[np.ndarray]:
    """The samples up to ``last`` of a flac file that starts at ``begin`` in the song.

    libsndfile stops at a damaged frame, so the file is opened again after it.
    """
    channels, step = sound.channels, DECODED
    across = LARGE_STEP * max(1, round(song.rate / 48_000))
    reader = _seek(part, song.position - begin, sound)
    while song.position < last:
        block = None if reader is None else _block(reader, min(last - song.position, step))
        if block is not None:
            yield from song.add(block)
            continue
        if reader is not None and step == DECODED:  # try again in small steps up to the damaged frame
            step = SMALL_STEP
        else:
            yield from song.silence(min(across, last - song.position), channels)
            step = DECODED
        reader = _seek(part, song.position - begin)


def _block(sound: sf.SoundFile, count: int) -> np.ndarray | None:
    """The next samples; None if they are damaged or missing."""
    try:
        block = sound.read(count, dtype="float32", always_2d=True)
    except sf.LibsndfileError:
        return None
    return block if len(block) else None


def _seek(part: Part, position: int, sound: sf.SoundFile | None = None) -> sf.SoundFile | None:
    """Open the file in libsndfile at a position; None if the samples there are damaged."""
    try:
        if sound is None:
            part.view.seek(0)
            sound = sf.SoundFile(part.view)
        sound.seek(position)
    except sf.LibsndfileError:
        return None
    return sound


def _decode_parts(song: DecodedSong, parts: list[Part]) -> Iterator[np.ndarray]:
    """The requested samples of a file with several parts, or of a file that FFmpeg decodes."""
    channels = 0
    for part in parts:
        sound = _open_sndfile(part, song.request)
        if sound is not None:
            with sound:
                if not channels:
                    song.rate, channels = sound.samplerate, sound.channels
                if (song.rate, channels) != (sound.samplerate, sound.channels):
                    raise changed(song)
                if part.family == "flac":
                    begin = song.position
                    yield from _flac(song, part, sound, begin + sound.frames, begin)
                else:
                    yield from _next_sndfile(song, sound)
        else:
            channels = yield from ffmpeg.decode(song, part, channels)
        if song.complete:
            return


def _next_sndfile(song: DecodedSong, sound: sf.SoundFile) -> Iterator[np.ndarray]:
    """The samples of the next of several parts."""
    try:
        while len(block := sound.read(DECODED, dtype="float32", always_2d=True)):
            yield from song.add(block)
    except sf.LibsndfileError as error:
        raise AudioError(f"{song.name}: damaged, decoding failed: {reason(error)}") from error
