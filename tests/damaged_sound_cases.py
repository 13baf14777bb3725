"""Sound files to damage, and what reading them returns, warns of and refuses."""

import struct
import warnings

import av
import numpy as np
import pytest
import soundfile as sf
from sound_cases import RATE, encode, refusal

from kmdx import audio
from kmdx.errors import KmdxWarning


def song(seconds=4.0, rate=RATE, channels=2):
    """A rising tone and some noise, ``(samples, channels)``."""
    time = np.arange(round(seconds * rate)) / rate
    sweep = 0.3 * np.sin(2 * np.pi * (300 * time + 60 * time**2))
    noise = np.random.default_rng(0).standard_normal((len(time), channels))
    return (sweep[:, None] + 0.03 * noise).astype(np.float32)


SNDFILE = {
    "a.wav": ("WAV", "PCM_16", "FILE"),
    "float.wav": ("WAVEX", "FLOAT", "FILE"),
    "rifx.wav": ("WAV", "PCM_24", "BIG"),
    "rf64.wav": ("RF64", "PCM_16", "FILE"),
    "ulaw.wav": ("WAV", "ULAW", "FILE"),
    "a.w64": ("W64", "PCM_16", "FILE"),
    "a.aiff": ("AIFF", "PCM_16", "FILE"),
    "a.au": ("AU", "PCM_24", "FILE"),
    "a.caf": ("CAF", "PCM_16", "FILE"),
    "a.flac": ("FLAC", "PCM_16", "FILE"),
    "a.ogg": ("OGG", "VORBIS", "FILE"),
}


FFMPEG = {
    "a.mp3": ("libmp3lame", {}),
    "mp3.wav": ("libmp3lame", {}),
    "a.m4a": ("aac", {"__movflags": "faststart"}),
    "a.mka": ("flac", {}),
    "opus.webm": ("libopus", {}),
    "a.opus": ("libopus", {}),
    "flac.oga": ("flac", {"container": "ogg"}),
    "a.tta": ("tta", {}),
}


EXACT = {*SNDFILE, "a.mp3", "a.mka", "opus.webm", "a.opus", "flac.oga", "a.tta"}


def make(folder, name, seconds=4.0):
    """An undamaged file, and its rate."""
    path = folder / name
    if name in SNDFILE:
        container, subtype, endian = SNDFILE[name]
        sf.write(path, song(seconds), RATE, subtype, endian, container)
        return path, RATE
    codec, options = FFMPEG[name]
    rate = 48000 if codec == "libopus" else RATE
    return encode(path, codec, song(seconds, rate), rate, **options), rate


def read(path, *arguments, **options):
    """Samples, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        samples = audio.read(path, *arguments, **options).samples
    return samples, [str(warning.message) for warning in caught if warning.category is KmdxWarning]


def read_refusal(*arguments, **options):
    """The one line with which reading a file is refused."""
    return refusal(audio.read, *arguments, **options)


def overwrite(path, at, data):
    """Replace bytes of a file from a position on, given in bytes or as a share of the file."""
    content = bytearray(path.read_bytes())
    at = at if isinstance(at, int) else int(len(content) * at)
    content[at : at + len(data)] = data
    path.write_bytes(content)


def riff(data, size, bits=16, magic=b"RIFF", ds64=None):
    """A wav file that declares ``size`` bytes of sound."""
    form = struct.pack("<HHIIHH", 1, 2, RATE, RATE * 2 * bits // 8, 2 * bits // 8, bits)
    long = b"" if ds64 is None else b"ds64" + struct.pack("<IQQQI", 28, ds64, ds64, ds64, 0)
    head = magic + struct.pack("<I", size) + b"WAVE" + long + b"fmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", size) + data


# Files by name: codec, FFmpeg's container and options, and whether the file declares how long its sound is.
OTHERS = {
    "aac.flv": ("aac", "flv", {}, True),
    "mp3.flv": ("libmp3lame", "flv", {}, True),
    "a.wma": ("wmav2", "asf", {}, True),
    "mp3.asf": ("libmp3lame", "asf", {}, True),
    "pcm.asf": ("pcm_s16le", "asf", {}, True),
    "mp3.avi": ("libmp3lame", "avi", {}, True),
    "mp2.avi": ("mp2", "avi", {}, True),
    "aac.avi": ("aac", "avi", {}, True),
    "alac.caf": ("alac", "caf", {}, True),
    "alac.m4a": ("alac", "ipod", {}, True),
    "opus.mp4": ("libopus", "mp4", {}, True),
    "aac.mov": ("aac", "mov", {}, True),
    "a.wv": ("wavpack", "wv", {}, True),
    "aac.mka": ("aac", "matroska", {}, True),
    "mp3.mka": ("libmp3lame", "matroska", {}, True),
    "live.mka": ("aac", "matroska", {"__live": "1"}, False),
    "aac.ts": ("aac", "mpegts", {}, False),
    "mp3.ts": ("libmp3lame", "mpegts", {}, False),
    "ac3.m2ts": ("ac3", "mpegts", {"__mpegts_m2ts_mode": "1"}, False),
    "mp2.mpg": ("mp2", "mpeg", {}, False),
    "ac3.vob": ("ac3", "vob", {}, False),
    "delayed.mp4": (
        "aac",
        "mp4",
        {"__movflags": "frag_keyframe+delay_moov", "__frag_duration": "500000"},
        True,
    ),
}


def other(folder, name, seconds, rate=48000):
    codec, container, options, declares = OTHERS[name]
    if codec not in av.codecs_available:
        pytest.skip(f"FFmpeg was built without {codec}")
    return encode(folder / name, codec, song(seconds, rate), rate, container, **options), declares
