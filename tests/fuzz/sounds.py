"""Small sound files of many formats, and mutations of them."""

from __future__ import annotations

import io
import struct

import av
import numpy as np
import soundfile as sf
from hypothesis import strategies as st

RATE = 8000
SNDFILE = {
    "wav16": ("WAV", "PCM_16", "FILE"),
    "wav24": ("WAVEX", "PCM_24", "FILE"),
    "float": ("WAV", "FLOAT", "FILE"),
    "ulaw": ("WAV", "ULAW", "FILE"),
    "ima": ("WAV", "IMA_ADPCM", "FILE"),
    "gsm": ("WAV", "GSM610", "FILE"),
    "rifx": ("WAV", "PCM_16", "BIG"),
    "rf64": ("RF64", "PCM_16", "FILE"),
    "w64": ("W64", "PCM_16", "FILE"),
    "aiff": ("AIFF", "PCM_16", "FILE"),
    "au": ("AU", "PCM_16", "FILE"),
    "caf": ("CAF", "PCM_16", "FILE"),
    "voc": ("VOC", "PCM_16", "FILE"),
    "flac": ("FLAC", "PCM_16", "FILE"),
    "vorbis": ("OGG", "VORBIS", "FILE"),
}
FFMPEG = {
    "mp3": ("mp3", "libmp3lame"),
    "mp3 in wav": ("wav", "libmp3lame"),
    "adts": ("adts", "aac"),
    "adts 7.1": ("adts", "aac"),
    "m4a": ("ipod", "aac"),
    "mov": ("mov", "pcm_s16le"),
    "alac": ("ipod", "alac"),
    "mka": ("matroska", "flac"),
    "webm": ("webm", "libopus"),
    "opus": ("ogg", "libopus"),
    "ogg flac": ("ogg", "flac"),
    "tta": ("tta", "tta"),
    "wavpack": ("wv", "wavpack"),
    "avi": ("avi", "libmp3lame"),
    "ac3": ("ac3", "ac3"),
    "ts": ("mpegts", "aac"),
    "wma": ("asf", "wmav2"),
}
NUMBERS = [
    struct.pack(order + kind, value)
    for order in "<>"
    for kind, values in (
        ("H", (0, 1, 3, 255, 0xFFFF)),
        ("I", (0, 1, 2**16, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)),
        ("Q", (0, 2**32, 2**62, 2**63 - 1, 2**64 - 1)),
    )
    for value in values
]


def song() -> np.ndarray:
    """Float32 (samples, channels), a third of a second."""
    noise = np.random.default_rng(0).standard_normal((RATE // 3, 1))
    return (0.3 * np.sin(np.arange(RATE // 3) / 7)[:, None] + 0.05 * noise).astype(np.float32)


def sound(name: str) -> bytes:
    """An undamaged file."""
    target = io.BytesIO()
    if name in SNDFILE:
        container, subtype, endian = SNDFILE[name]
        with sf.SoundFile(target, "w", RATE, 1, subtype, endian, container) as file:
            file.write(song())
        return target.getvalue()
    container, codec = FFMPEG[name]
    rate = {"libopus": 48000, "ac3": 48000}.get(codec, RATE)
    layout = "7.1" if name.endswith("7.1") else "mono"
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout, bit_rate=64_000)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(song().T), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        size = stream.codec_context.frame_size or None
        resampler = av.AudioResampler(stream.codec_context.format.name, layout, rate, size)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return target.getvalue()


@st.composite
def mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """The file with up to four changes, most of them in its header."""
    content = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        end = len(content) if draw(st.booleans()) else min(len(content), 200)
        at = draw(st.integers(0, max(0, end - 1)))
        change = draw(st.sampled_from(("number", "bytes", "zeros", "cut", "remove", "repeat", "append")))
        count = draw(st.integers(1, 600))
        if change == "number":
            number = draw(st.sampled_from(NUMBERS))
            content[at : at + len(number)] = number
        elif change == "bytes":
            new = draw(st.binary(min_size=1, max_size=8))
            content[at : at + len(new)] = new
        elif change == "zeros":
            content[at : at + count] = bytes(count)
        elif change == "cut":
            del content[max(at, 1) :]
        elif change == "remove":
            del content[at : at + count]
        elif change == "repeat":
            content[at:at] = content[at : at + count]
        else:
            content += draw(st.sampled_from((bytes(count), data, data[: len(data) // 2])))
    return bytes(content) or b"\0"
