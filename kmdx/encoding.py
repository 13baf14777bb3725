"""Encode arrays as sound files: the output formats and their encoders, which are deterministic.

A file's bytes depend only on the samples, the rate, the format, the tags and the installed encoders, not on
the time, the file's name or the sizes of blocks. libsndfile encodes all formats except float32, for which it
would write a time stamp.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf

from . import signals
from .errors import AudioError, quoted, suggest
from .tags import TagError, Tags, id3, write_flac

WAV_LIMIT = 2**32 - 2**20  # bytes of samples; a wav's sizes have 32 bits, so longer files are RF64
FLOAT = 3  # WAVE_FORMAT_IEEE_FLOAT

MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)  # Hz
MP3_LEAD = 47
"""Zeros before an mp3's first sample; decoders skip them with LAME's delay of 1105 samples.

Together they are 1152 samples, so the song begins at the start of a frame. Otherwise, if the delay and the
song end in the same frame, FFmpeg counts wrong: songs of up to 46 samples are decoded too long.
"""
MP3_SHORT = 8 * 1152
"""Samples; shorter songs are padded with two frames of 1152 zeros on both sides.

FFmpeg recognizes an mp3 with certainty only from seven frames on; it may take a shorter file for a video.
"""

LAME_GAIN = 0.95  # LAME's gain at the highest bit rate if the sample rate is below 32 kHz


@dataclass(frozen=True)
class Format:
    """An output format of :func:`encode`."""

    extension: str  # with the dot
    container: str  # libsndfile's name of the file format
    subtype: str  # libsndfile's name of the sample format
    integer: bool  # samples beyond full scale are clipped; also in mp3, because players clip them
    rates: Container[int] = range(1, 2**31)  # Hz
    tagged: bool = False  # whether its files have tags


FORMATS: dict[str, Format] = {
    "wav16": Format(".wav", "WAV", "PCM_16", integer=True),
    "wav24": Format(".wav", "WAV", "PCM_24", integer=True),
    "float32": Format(".wav", "WAV", "FLOAT", integer=False),
    "flac": Format(".flac", "FLAC", "PCM_24", integer=True, rates=range(1, 655_351), tagged=True),
    "mp3": Format(
        ".mp3",
        "MP3",
        "MPEG_LAYER_III",
        integer=True,
        rates=MP3_RATES,
        tagged=True,
    ),
}


def check_format(name: str, rate: int) -> Format:
    """The format with this name.

    Raises :class:`AudioError` if it is unknown, does not support the rate (Hz), or the installed libsndfile
    does not write it.
    """
    if name not in FORMATS:
        hint = suggest(str(name), FORMATS)
        raise AudioError(f"unknown format {quoted(name)}{hint}; available: {', '.join(FORMATS)}")
    format = FORMATS[name]
    if rate not in format.rates:
        raise AudioError(f"{name} does not support {rate} Hz: choose another format, such as wav24")
    if not sf.check_format(format.container, format.subtype):
        raise AudioError(
            f"libsndfile {sf.__libsndfile_version__} does not write {name}: choose another format, or"
            " install libsndfile 1.1 or newer, which soundfile's wheels contain"
        )
    return format


def encode(path: Path, samples: np.ndarray, rate: int, format: Format, tags: Tags | None = None) -> str:
    """Write a new file and flush it to disk.

    Raises :class:`OSError` or :class:`soundfile.SoundFileError`, for example if the disk is full.

    Parameters
    ----------
    path : Path
        A file that does not exist.
    samples : ndarray
        Float32 ``(samples, channels)``, finite.
    rate : int
        A rate that the format supports, in Hz.
    tags : Tags, optional
        For flac and mp3; wav files have none.

    Returns
    -------
    str
        Why the tags could not be written; empty if they were. The samples are complete in both cases.
    """
    with path.open("x+b", buffering=0) as file:  # unbuffered, so that seeking and closing cannot fail
        left_out = encode_into(file, samples, rate, format, tags)
        os.fsync(file.fileno())
    return left_out


def encode_into(
    file: io.FileIO, samples: np.ndarray, rate: int, format: Format, tags: Tags | None = None
) -> str:
    """Write into an empty, unbuffered file; like :func:`encode`, without flushing."""
    sink = _Sink(file)
    try:
        return _ENCODERS[format.container](sink, samples, rate, format, tags)
    finally:
        sink.raise_failure()


def _encode_wav(sink: _Sink, samples: np.ndarray, rate: int, format: Format, tags: Tags | None) -> str:
    sample_bytes = {"PCM_16": 2, "PCM_24": 3, "FLOAT": 4}[format.subtype]
    long = samples.size * sample_bytes > WAV_LIMIT
    if format.subtype != "FLOAT":
        format = dataclasses.replace(format, container="RF64" if long else "WAV")
        _encode_sndfile(sink, samples, rate, format)
        return ""
    sink.write(_float_header(len(samples), samples.shape[1], rate, long))
    for block in signals.blocks(samples):
        sink.write(block.astype("<f4").tobytes())
        sink.raise_failure()
    return ""


def _float_header(length: int, channels: int, rate: int, long: bool) -> bytes:
    """The header of a wav file of 32-bit floats, or if `long`, of an RF64 file (EBU Tech 3306)."""
    size = 4 * length * channels  # bytes
    unknown = 0xFFFFFFFF  # see the ds64 chunk
    kind = struct.pack("<HHIIHHH", FLOAT, channels, rate, 4 * channels * rate, 4 * channels, 32, 0)
    chunks = struct.pack("<4sI", b"fmt ", len(kind)) + kind
    chunks += struct.pack("<4sII", b"fact", 4, unknown if long else length)
    chunks += struct.pack("<4sI", b"data", unknown if long else size)
    if not long:
        return struct.pack("<4sI4s", b"RIFF", 4 + len(chunks) + size, b"WAVE") + chunks
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, 4 + 36 + len(chunks) + size, size, length, 0)
    return struct.pack("<4sI4s", b"RF64", unknown, b"WAVE") + sizes + chunks


def _encode_flac(sink: _Sink, samples: np.ndarray, rate: int, format: Format, tags: Tags | None) -> str:
    _encode_sndfile(sink, samples, rate, format)
    if not tags:
        return ""
    try:
        write_flac(sink, tags)
    except TagError as error:
        sink.raise_failure()
        sink.seek(0)
        sink.truncate()  # the tags may be partly written
        _encode_sndfile(sink, samples, rate, format)
        return str(error)
    return ""


def _encode_mp3(sink: _Sink, samples: np.ndarray, rate: int, format: Format, tags: Tags | None) -> str:
    left_out = ""
    try:
        header = id3(tags or Tags())
    except TagError as error:
        header, left_out = b"", str(error)
    sink.write(header)
    sink.origin = len(header)
    extra = 2 * 1152 if len(samples) < MP3_SHORT else 0
    before, after = MP3_LEAD + extra, extra
    gain = np.float32(1 if rate >= 32_000 else 1 / LAME_GAIN)
    # Compression level 0 means the highest bit rate: 320 kbit/s, or 160 below 32 kHz, or 64 below 16 kHz.
    options = {"compression_level": 0, "bitrate_mode": "CONSTANT"}
    with _sndfile(sink, samples, rate, format, **options) as sound:
        sound.write(np.zeros((before, samples.shape[1])))
        for block in signals.blocks(samples):
            sound.write(gain * block.clip(-1, 1))  # LAME would abort the whole process on samples of 1e9
        sound.write(np.zeros((after, samples.shape[1])))
    _note_padding(sink, before, after)
    return left_out


def mp3(samples: np.ndarray, rate: int, compression: float) -> bytes:
    """An mp3 with a variable bit rate in memory, for playing; decoders restore its exact length.

    Parameters
    ----------
    samples : ndarray
        Float32 ``(samples, channels)``, finite.
    rate : int
        One of the format's rates, in Hz.
    compression : float
        0 to 1: LAME's quality V0 to V9.
    """
    memory = io.BytesIO()
    options = {"compression_level": compression, "bitrate_mode": "VARIABLE"}
    with sf.SoundFile(
        memory, "w", rate, samples.shape[1], "MPEG_LAYER_III", format="MP3", **options
    ) as sound:
        sound.write(samples.clip(-1, 1))  # LAME would abort the whole process on samples of 1e9
    return memory.getvalue()


def _note_padding(sink: _Sink, before: int, after: int) -> None:
    """Make decoders skip more samples of an mp3, by changing its first frame, which has no sound.

    LAME's extension of the Xing header begins 120 bytes after the word "Info" (gabriel.mp3-tech.org). At
    offset 21, it has 12 bits of delay and 12 of padding; at offset 34, the CRC-16 of everything before.
    """
    sink.seek(0)
    frame = sink.read(256)
    info = frame.find(b"Info")
    if info < 0:
        raise AudioError(f"libsndfile {sf.__libsndfile_version__} wrote an mp3 without its length")
    place, end = info + 120 + 21, info + 120 + 34
    skipped = int.from_bytes(frame[place : place + 3], "big") + (before << 12) + after
    changed = frame[:place] + skipped.to_bytes(3, "big") + frame[place + 3 : end]
    sink.seek(0)
    sink.write(changed + struct.pack(">H", _crc16(changed)))


def _crc16(data: bytes) -> int:
    """CRC-16/ARC."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


def _encode_sndfile(sink: _Sink, samples: np.ndarray, rate: int, format: Format) -> None:
    with _sndfile(sink, samples, rate, format) as sound:
        for block in signals.blocks(samples):
            sound.write(block)


def _sndfile(sink: _Sink, samples: np.ndarray, rate: int, format: Format, **options: Any) -> sf.SoundFile:
    return sf.SoundFile(sink, "w", rate, samples.shape[1], format.subtype, format=format.container, **options)


_ENCODERS = {"WAV": _encode_wav, "FLAC": _encode_flac, "MP3": _encode_mp3}


class _Sink(io.RawIOBase):
    """A file for an encoder in C, which cannot pass on exceptions: the first one is kept.

    With a path instead, libsndfile reports a full disk as "System error", or not at all if flac's last block
    is lost on closing. Positions are relative to `origin`.
    """

    def __init__(self, file: io.FileIO) -> None:
        self.file = file
        self.origin = 0
        self.failure: BaseException | None = None  # KeyboardInterrupt too

    def write(self, data: Any) -> int:
        return self._keep_failure(self._write_whole, data)

    def read(self, size: int = -1) -> bytes:
        return self._keep_failure(self.file.read, size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET:
            offset += self.origin
        return self._keep_failure(self.file.seek, offset, whence) - self.origin

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        return self._keep_failure(self.file.truncate, size + self.origin) - self.origin

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _write_whole(self, data: bytes) -> int:
        written = 0
        while written < len(data):  # the last write before the disk is full may be incomplete
            written += self.file.write(data[written:])
        return written

    def _keep_failure(self, action: Callable[..., Any], *arguments: Any) -> Any:
        if self.failure is None:
            try:
                return action(*arguments)
            except BaseException as error:
                self.failure = error
        return 0
