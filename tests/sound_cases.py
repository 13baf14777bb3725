"""Sounds, files of every kind that FFmpeg writes, and how they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from kmdx.errors import AudioError

RATE = 44100
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def tone(seconds: float = 0.5, channels: int = 2, rate: int = RATE, frequency: float = 440.0) -> np.ndarray:
    """Sines of half scale, an octave apart, float32 (samples, channels)."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack(
        [0.5 * np.sin(2 * np.pi * frequency * 2**c * time) for c in range(channels)], axis=1
    ).astype(np.float32)


def beyond_full_scale() -> np.ndarray:
    """Stereo noise of which a third is beyond full scale."""
    samples = np.random.default_rng(0).uniform(-1.5, 1.5, (100_000, 2)).astype(np.float32)
    samples[:4] = [[1, -1], [1.0001, -1.0001], [1e9, -1e9], [0, 0.5]]
    return samples


def encode(
    path: Path,
    codec: str,
    samples: np.ndarray,
    rate: int = RATE,
    container: str | None = None,
    bit_rate: int = 128_000,
    **options: str,
) -> Path:
    """Write ``(samples, channels)``; the names of the container's options begin with two underscores."""
    muxer = {key[2:]: value for key, value in options.items() if key.startswith("__")}
    coder = {key: value for key, value in options.items() if not key.startswith("__")}
    layout = LAYOUTS[samples.shape[1]]
    with av.open(str(path), "w", format=container, options=muxer) as file:
        stream = file.add_stream(codec, rate, layout=layout, options=coder)
        stream.bit_rate = bit_rate
        stream.codec_context.open()
        size = stream.codec_context.frame_size or None
        resampler = av.AudioResampler(stream.codec_context.format.name, layout, rate, size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return path


def refusal(action: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(AudioError) as caught:
        action(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
