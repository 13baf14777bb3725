"""What files declare about their length: cut, of unknown size, joined, hostile."""

import contextlib
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from damaged_sound_cases import (
    EXACT,
    FFMPEG,
    OTHERS,
    SNDFILE,
    make,
    other,
    overwrite,
    read,
    read_refusal,
    riff,
    song,
)
from sound_cases import RATE

from kmdx import audio, ffmpeg, frames, ogg
from kmdx.errors import AudioError, KmdxWarning


@pytest.mark.parametrize("name", [*SNDFILE, *FFMPEG])
def test_an_undamaged_file_gives_no_warning_and_a_truncated_one_is_refused(tmp_path, name):
    path, rate = make(tmp_path, name)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    assert 0 <= len(samples) - 4 * rate <= (0 if name in EXACT else 3500)
    for share in (0.6, 0.9):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        assert name in read_refusal(path)
        path.write_bytes(content)


@pytest.mark.parametrize("bits", [16, 24])
@pytest.mark.parametrize("size", [0, 0x7FFFE000, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFF9B, 0xFFFFFFFF])
def test_a_wav_of_unknown_size_is_read_to_its_end(tmp_path, size, bits):
    data = np.random.default_rng(0).bytes(1000 * bits // 4)
    (tmp_path / "a.wav").write_bytes(riff(data, size, bits))
    samples, warned = read(tmp_path / "a.wav")
    assert samples.shape == (1000, 2)
    assert warned == []


@pytest.mark.parametrize("ds64", [0, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
def test_an_rf64_of_unknown_size_is_read_to_its_end(tmp_path, magic, ds64):
    (tmp_path / "a.wav").write_bytes(riff(bytes(4000), 0xFFFFFFFF, 16, magic, ds64))
    assert len(read(tmp_path / "a.wav")[0]) == 1000


def test_an_empty_wav_with_a_chunk_after_its_data_has_no_sound(tmp_path):
    (tmp_path / "a.wav").write_bytes(riff(b"LIST" + struct.pack("<I", 4) + b"INFO", 0))
    assert "no samples" in read_refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("lost", [1, 4, 4000, 4 * RATE // 10])
def test_a_wav_a_little_shorter_than_declared_is_read_with_a_warning(tmp_path, lost):
    data = bytes(4 * 2 * RATE)
    (tmp_path / "a.wav").write_bytes(riff(data[:-lost], len(data)))
    samples, warned = read(tmp_path / "a.wav")
    assert len(samples) == 2 * RATE - -(-lost // 4)
    assert "shorter than its header declares" in warned[0]
    with pytest.raises(AudioError, match="cut short"):
        audio.info(tmp_path / "a.wav")


def test_a_wav_whose_size_wrapped_at_4_gib_is_read(tmp_path):
    path = tmp_path / "a.wav"
    with path.open("wb") as file:
        file.write(riff(b"", 4 * RATE))
        file.truncate(44 + 2**32 + 4 * RATE)
    samples, warned = read(path, 20_000, 3)
    assert len(samples) == 3 * RATE
    assert "wrapped at 4 GiB" in warned[0]


@pytest.mark.parametrize("extension", ["aiff", "caf", "wav", "mp3", "m4a"])
def test_zeros_after_a_header_are_refused_quickly(tmp_path, extension):
    head = {
        "aiff": b"FORM\0\0\0\0AIFF",
        "caf": b"caff\0\1\0\0",
        "wav": b"RIFF\0\0\0\0WAVE",
        "mp3": b"ID3\4\0\0\0\0\0\0",
        "m4a": b"\0\0\0\x14ftypM4A " + bytes(8),
    }
    path = tmp_path / f"a.{extension}"
    with path.open("wb") as file:
        file.write(head[extension])
        file.truncate(20_000_000)
    read_refusal(path)


def test_sizes_that_c_cannot_hold_print_nothing(tmp_path):
    sf.write(tmp_path / "a.caf", song(0.1), RATE, format="CAF")
    overwrite(
        tmp_path / "a.caf", (tmp_path / "a.caf").read_bytes().index(b"data") + 4, struct.pack(">q", 2**62)
    )
    code = "import sys; from kmdx import audio; audio.read(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.caf")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
    )
    assert done.stderr.count("Traceback") == 1  # Python's own, of the AudioError
    assert "callback" not in done.stderr
    assert "cut short or damaged" in done.stderr


def test_concatenated_flac_files_are_read_one_after_another(tmp_path):
    path, _ = make(tmp_path, "a.flac", 2.0)
    one, content = read(path)[0], path.read_bytes()
    path.write_bytes(3 * content)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    np.testing.assert_array_equal(samples, np.concatenate([one] * 3))
    np.testing.assert_array_equal(read(path, 1.5, 1.0)[0], samples[66150 : 66150 + RATE])
    path.write_bytes(content + content[: len(content) // 2])
    assert "first at 2." in read_refusal(path)
    sf.write(tmp_path / "b.flac", song(1.0, 48000), 48000)
    path.write_bytes(content + (tmp_path / "b.flac").read_bytes())
    assert "its sample rate or channels change at 2.000 s" in read_refusal(path)


@pytest.mark.parametrize("name", OTHERS)
def test_other_containers_are_read_without_warnings_and_truncation_is_detected(tmp_path, name):
    for seconds, rate in ((3.0, 48000), (2.0, 44100), (1.001, 44100), (24576 / 48000, 48000)):
        rate = 48000 if name.startswith("opus") else rate
        path, declares = other(tmp_path, name, seconds, rate)
        samples, warned = read(path, accept_holes=False)
        assert warned == []
        assert -2500 <= len(samples) - seconds * rate < 3500
    path, declares = other(tmp_path, name, 3.0)
    content = path.read_bytes()
    for share in (0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share) // 2 * 2 + 1])
        if declares and (share < 0.9 or path.suffix != ".avi"):
            assert path.name in read_refusal(path)
        elif declares:  # only its index is cut
            assert read(path)[1]
        else:
            assert "incomplete" in " ".join(read(path)[1])


HOSTILE = {
    "names.ogg": b"OggS" * 250_000,
    "names-behind-a-page.ogg": b"OggS" + bytes(23) + b"OggS" * 250_000,
    "pages.ogg": (b"OggS" + bytes(23)) * 2000,
    "tags.mp3": (b"ID3\4" + bytes(6)) * 200_000,
    "tags-behind-frames.mp3": (b"\xff\xfb\x90\0" + bytes(413)) * 5 + b"TAG" * 1_000_000,
    "lyrics.mp3": (b"\xff\xfb\x90\0" + bytes(413)) * 5 + b"LYRICSBEGIN" * 100_000,
    "frames.aac": b"\xff\xf1\x50\x80\x01\x1f\xfc\0" * 50_000,
    "not-decodable.mp3": b"\xff\xfb\x90" * 2_000_000,
    "zeros.mp3": b"\xff\xfb\x90\0" + bytes(20_000_000),
    "zeros.flv": b"FLV\1\5\0\0\0\x09" + bytes(20_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_with_only_headers_is_refused_after_a_bounded_search(tmp_path, name, monkeypatch):
    monkeypatch.setattr(ogg, "MAX_PAGES", 1000)
    monkeypatch.setattr(frames, "MAX_FRAMES", 20_000)
    monkeypatch.setattr(frames, "MAX_OTHERS", 500)
    monkeypatch.setattr(ffmpeg, "MAX_DAMAGED", 500)
    (tmp_path / name).write_bytes(HOSTILE[name])
    assert name in read_refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["a.w64", "a.caf", "rf64.wav", "a.m4a", "a.wma"])
@pytest.mark.parametrize("number", [2**64 - 1, 2**62])
def test_an_impossible_position_raises_only_one_line_errors(tmp_path, name, number):
    path = other(tmp_path, name, 0.3)[0] if name in OTHERS else make(tmp_path, name, 0.3)[0]
    content = path.read_bytes()
    order = ">" if name in ("a.caf", "a.m4a") else "<"
    for at in range(4, 140, 4):
        path.write_bytes(content[:at] + struct.pack(order + "Q", number) + content[at + 8 :])
        with warnings.catch_warnings(), contextlib.suppress(AudioError):
            warnings.simplefilter("ignore", KmdxWarning)
            audio.read(path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_live_recorded_asf_file_declares_no_length(tmp_path, share):
    path, _ = other(tmp_path, "a.wma", 4.0)
    content = bytearray(path.read_bytes())
    properties = content.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
    path.write_bytes(content[: int(len(content) * share)])
    assert "missing, first at " in read_refusal(path)
    content[properties + 88] |= 1
    path.write_bytes(content)
    assert read(path, accept_holes=False)[1] == []
    path.write_bytes(content[: int(len(content) * share)])
    assert abs(len(read(path)[0]) / 48000 - 4.0 * share) < 0.2


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
@pytest.mark.parametrize("count", [0, 1000])
@pytest.mark.parametrize("name", [b"LIST", b"id3 ", b"bext"])
def test_a_chunk_after_sound_of_unknown_size_is_not_read_as_sound(tmp_path, name, count, size):
    chunks = name + struct.pack("<I", 5) + b"INFO1\0" + name + struct.pack("<I", 4) + b"more"
    (tmp_path / "a.wav").write_bytes(riff(bytes(4 * count) + chunks, size))
    if count:
        samples, warned = read(tmp_path / "a.wav", accept_holes=False)
        assert len(samples) == count
        assert warned == []
    else:
        assert "no samples" in read_refusal(tmp_path / "a.wav")


@pytest.mark.parametrize("name", ["mp3.avi", "mp2.avi", "aac.avi"])
@pytest.mark.parametrize("at", [-100, 0, 8, 1000])
def test_a_damaged_index_of_an_avi_file_is_reported(tmp_path, name, at):
    path, _ = other(tmp_path, name, 9.0)
    whole, _ = read(path)
    overwrite(path, path.read_bytes().rindex(b"idx1") + at, np.random.default_rng(1).bytes(200))
    try:
        samples, warned = read(path)
    except AudioError:
        return
    assert len(warned) > 0
    assert abs(len(samples) - len(whole)) < 3000


def test_an_avi_file_with_less_sound_than_its_stream_declares_is_refused(tmp_path):
    path, _ = other(tmp_path, "mp2.avi", 4.0)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"idx1")] = 0
    at = content.index(b"auds") + 28
    content[at + 4 : at + 8] = struct.pack("<I", 2 * struct.unpack_from("<I", content, at + 4)[0])
    path.write_bytes(content)
    assert "missing, first at 4." in read_refusal(path)
