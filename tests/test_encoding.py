"""kmdx.encoding: exact lengths, and the same bytes whenever a file is written."""

import struct
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from conftest import noise

from kmdx import audio, encoding, signals, tags
from kmdx.errors import AudioError

MP3_RATES = audio.FORMATS["mp3"].rates


def lengths(path: Path) -> set[int]:
    """Samples of a file as three decoders find them, and as its header declares them."""
    with av.open(str(path)) as container:
        ffmpeg = sum(frame.samples for frame in container.decode(audio=0))
    return {sf.info(path).frames, len(sf.read(path)[0]), ffmpeg, len(audio.read(path).samples)}


def wav_chunks(content: bytes) -> dict[bytes, bytes]:
    """The chunks of a wav file up to its samples."""
    found, place = {}, 12
    while b"data" not in found:
        name, size = struct.unpack_from("<4sI", content, place)
        found[name] = content[place + 8 : place + 8 + size]
        place += 8 + size
    return found


# Each rate gets some of the lengths on either side of every limit: the encoder's delay, one or two frames,
# the last frame, the songs that are padded.
@pytest.mark.parametrize("rate", MP3_RATES)
def test_every_length_survives_mp3(tmp_path, rate):
    around = [
        2,
        3,
        17,
        46,
        47,
        48,
        576,
        577,
        623,
        1151,
        1152,
        1153,
        1198,
        1199,
        2305,
        9215,
        9216,
        10_960,
        11_521,
    ]
    for number, length in enumerate(around):
        samples = noise(length, 1 + (number + rate) % 2, seed=number)
        audio.write(tmp_path / "a.mp3", samples, rate, "mp3")
        assert lengths(tmp_path / "a.mp3") == {length}


@pytest.mark.parametrize(("rate", "bit_rate"), [(8000, 64), (16_000, 160), (24_000, 160), (44_100, 320)])
@pytest.mark.parametrize("length", [9_000, 20_000])  # with and without the padding of short songs
def test_mp3_keeps_time_and_level_and_has_the_highest_bit_rate(tmp_path, rate, bit_rate, length):
    samples = np.sin(np.arange(length) * 0.1)[:, None] * np.float32([0.5, -0.25])
    audio.write(tmp_path / "a.mp3", samples, rate, "mp3")
    decoded = audio.read(tmp_path / "a.mp3").samples
    np.testing.assert_allclose(decoded[99:-99], samples[99:-99], atol=0.03)
    assert (decoded * samples).sum() == pytest.approx(np.square(samples).sum(), rel=2e-3)
    with av.open(str(tmp_path / "a.mp3")) as container:
        assert container.streams.audio[0].bit_rate == bit_rate * 1000


def test_the_checksum_of_an_mp3s_first_frame_fits_its_changed_delay(tmp_path):
    audio.write(tmp_path / "a.mp3", noise(20_000), 44100, "mp3")
    content = (tmp_path / "a.mp3").read_bytes()
    frame = content[content.index(b"\xff\xfb") :]
    assert int.from_bytes(frame[177:180], "big") >> 12 == 576 + encoding.MP3_LEAD
    assert (encoding._crc16(frame[:190]), encoding._crc16(b"123456789")) == (
        int.from_bytes(frame[190:192], "big"),
        0xBB3D,  # the published check value of CRC-16/ARC
    )


def test_a_float_wav_contains_its_samples_and_no_timestamp(tmp_path):
    samples = noise(1000, level=3)
    audio.write(tmp_path / "a.wav", samples, 48000, "float32")
    content = (tmp_path / "a.wav").read_bytes()
    assert struct.unpack("<4sI4s", content[:12]) == (b"RIFF", len(content) - 8, b"WAVE")
    assert wav_chunks(content) == {
        b"fmt ": struct.pack("<HHIIHHH", 3, 2, 48000, 8 * 48000, 8, 32, 0),
        b"fact": struct.pack("<I", 1000),
        b"data": samples.astype("<f4").tobytes(),
    }
    np.testing.assert_array_equal(sf.read(tmp_path / "a.wav", dtype="float32")[0], samples)


def test_a_long_float_wav_has_64_bit_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "WAV_LIMIT", 1000)
    samples = noise(1000, level=3)
    audio.write(tmp_path / "a.wav", samples, 48000, "float32")
    content = (tmp_path / "a.wav").read_bytes()
    assert content[:12] == b"RF64\xff\xff\xff\xffWAVE"
    assert content[12:48] == struct.pack("<4sIQQQI", b"ds64", 28, len(content) - 8, 8000, 1000, 0)
    np.testing.assert_array_equal(sf.read(tmp_path / "a.wav", dtype="float32")[0], samples)
    with av.open(str(tmp_path / "a.wav")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == 1000


@pytest.mark.parametrize("format", audio.FORMATS)
def test_bytes_do_not_depend_on_names_block_sizes_or_memory_layout(tmp_path, monkeypatch, format):
    samples = noise(20_000)
    some = tags.Tags(title="Song", cover=b"\x89PNG\r\n\x1a\n", cover_type="image/png")
    audio.write(tmp_path / "a", samples, 44100, format, some)
    monkeypatch.setattr(signals, "blocks", partial(signals.blocks, length=1234))
    audio.write(tmp_path / "another name.x", samples[::-1][::-1], 44100, format, some)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "another name.x").read_bytes()


def test_a_missing_encoder_is_reported_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "check_format", lambda container, subtype: container != "MP3")
    with pytest.raises(AudioError, match="does not write mp3: choose another format"):
        audio.check_writable([tmp_path / "a.mp3"], 44100, "mp3")
    audio.check_writable([tmp_path / "a.flac"], 44100, "flac")
