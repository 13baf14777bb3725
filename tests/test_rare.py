"""Formats that only libsndfile reads."""

import numpy as np
import pytest
import soundfile as sf
from damaged_sound_cases import read, read_refusal, song
from sound_cases import RATE


@pytest.mark.parametrize(("container", "channels"), [("VOC", 2), ("SVX", 1)])
def test_truncated_files_in_old_formats_are_refused(tmp_path, container, channels):
    path = tmp_path / f"a.{container.lower()}"
    sf.write(path, song(4.0, RATE, channels), RATE, "PCM_16", format=container)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    assert len(samples) == 4 * RATE
    for share in (0.6, 0.97):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert "cut short or damaged" in read_refusal(path)
        path.write_bytes(content)


# Formats that libsndfile writes and FFmpeg does not read: container, codec, channels and rate.
RARE = [
    ("MAT4", "PCM_16", 2, RATE),
    ("MAT4", "DOUBLE", 1, RATE),
    ("MAT5", "PCM_16", 2, RATE),
    ("MAT5", "FLOAT", 1, RATE),
    ("MPC2K", "PCM_16", 2, RATE),
    ("HTK", "PCM_16", 1, 16000),
    ("WVE", "ALAW", 1, 8000),
    ("SDS", "PCM_16", 1, RATE),
    ("SDS", "PCM_24", 1, RATE),
    ("XI", "DPCM_16", 1, RATE),
    ("AVR", "PCM_16", 2, RATE),
    ("WAV", "G721_32", 1, 8000),
    ("WAV", "NMS_ADPCM_16", 1, 8000),
    ("AU", "G723_24", 1, 8000),
    ("AIFF", "GSM610", 1, 8000),
]


@pytest.mark.parametrize(("container", "codec", "channels", "rate"), RARE)
def test_rare_formats_are_read_as_by_libsndfile_and_truncation_is_detected(
    tmp_path, container, codec, channels, rate
):
    path = tmp_path / "a.bin"
    sf.write(path, song(2.013, rate, channels), rate, codec, format=container)
    expected, true_rate = sf.read(path, dtype="float32", always_2d=True)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    np.testing.assert_array_equal(samples, expected)
    part, _ = read(path, 1.0, 0.5)
    np.testing.assert_array_equal(part, expected[true_rate : true_rate + round(0.5 * true_rate)])
    content = path.read_bytes()
    for share in (0.6, 0.95) if container != "XI" else ():  # whose header declares nothing
        path.write_bytes(content[: int(len(content) * share)])
        assert "a.bin" in read_refusal(path)
