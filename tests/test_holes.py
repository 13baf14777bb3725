"""Damaged or missing sound becomes silence of the same length, or the file is refused."""

import av
import numpy as np
import pytest
import soundfile as sf
from damaged_sound_cases import OTHERS, make, other, overwrite, read, read_refusal, song
from sound_cases import RATE, encode

from kmdx import audio


@pytest.mark.parametrize("name", ["a.flac", "a.mka", "a.mp3", "mp3.wav", "a.m4a"])
def test_a_hole_is_silent_and_the_rest_stays_aligned(tmp_path, name):
    path, rate = make(tmp_path, name, 12.0)
    whole, _ = read(path)
    overwrite(path, 0.5, bytes(700))
    samples, warned = read(path)
    assert len(samples) == len(whole)
    assert len(warned) == 1
    assert "replaced with silence: at 5." in warned[0] or "replaced with silence: at 6." in warned[0]
    for part in (slice(2000, 5 * rate), slice(7 * rate, 11 * rate)):
        np.testing.assert_allclose(samples[part], whole[part], atol=1e-3)
    assert not samples[5 * rate : 7 * rate].all(axis=1).all()
    assert "expected a complete file" in read_refusal(path, accept_holes=False)


def test_zeros_inside_a_packet_that_decodes_without_an_error_are_a_hole(tmp_path):
    path, _ = make(tmp_path, "opus.webm")
    with av.open(str(path)) as file:
        packet = next(packet for packet in file.demux() if packet.pts > 2000)
        at = packet.pos + packet.size // 4
        assert packet.size > 200
    overwrite(path, at, bytes(130))
    samples, warned = read(path)
    assert len(samples) == 4 * 48000
    assert "0.02 s replaced with silence: at 2.0" in warned[0]


def test_zeros_inside_a_packet_of_many_channels_are_a_hole(tmp_path):
    path = tmp_path / "7.1.aac"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", RATE, layout="7.1")
        noise = 0.1 * np.random.default_rng(0).standard_normal((8, 43 * 1024)).astype(np.float32)
        for begin in range(0, noise.shape[1], 1024):
            frame = av.AudioFrame("fltp", "7.1", 1024)
            for channel in range(8):
                frame.planes[channel].update(noise[channel, begin : begin + 1024])
            frame.sample_rate, frame.pts = RATE, begin
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    whole = audio.read(path, downmix=True).samples
    overwrite(path, 0.5, bytes(300))
    assert "first at 0.5" in read_refusal(path, downmix=True)
    assert len(audio.read(path, 0.7, 0.2, downmix=True).samples) == round(0.2 * RATE) < len(whole)


def test_everything_after_five_seconds_of_holes_is_refused_at_once(tmp_path):
    path, _ = make(tmp_path, "a.flac")
    content = bytearray(path.read_bytes())
    content[21:26] = bytes([content[21] | 0x0F, 255, 255, 255, 255])  # STREAMINFO's count of samples
    path.write_bytes(content)
    assert "first at 3.99" in read_refusal(path)


def test_zeros_from_an_encoder_are_not_damage(tmp_path):
    samples = np.full((48000, 2), 0.3, np.float32)
    path = encode(tmp_path / "a.webm", "libopus", samples, 48000, b="256000")
    assert read(path, accept_holes=False)[1] == []


def test_damage_in_alac_is_a_hole_in_caf_too(tmp_path):
    path = tmp_path / "a.caf"
    for blocks in (8, 100.5):  # a last block that is full, or not
        sf.write(path, song(10.0)[: round(4096 * blocks)], RATE, format="CAF", subtype="ALAC_16")
        whole, warned = read(path, accept_holes=False)
        assert warned == []
        assert len(whole) == round(4096 * blocks)
    overwrite(path, 0.5, bytes(200))
    samples, warned = read(path)
    assert len(samples) == len(whole)
    assert "replaced with silence: at 4." in warned[0]


# Timestamps of these follow from what is declared or indexed, so that one packet may be lost.
IN_TIME = [name for name in OTHERS if not name.endswith(("mka", "wv", "caf", ".asf"))]


@pytest.mark.parametrize("name", IN_TIME)
def test_the_rest_stays_aligned_after_a_hole_in_other_containers(tmp_path, name):
    path, _ = other(tmp_path, name, 9.0)
    whole, _ = read(path)
    overwrite(path, 0.5, bytes(200))
    samples, warned = read(path)
    assert len(warned) == 1
    assert ": at 4." in warned[0]
    assert abs(len(samples) - len(whole)) <= 1
    after = slice(6 * 48000, 8 * 48000)
    correlation = [
        np.dot(samples[after.start + late : after.stop + late, 0], whole[after, 0]) for late in (-24, 0, 24)
    ]
    assert np.argmax(correlation) == 1
    np.testing.assert_allclose(samples[after], whole[after], atol=0.05)


def test_holes_in_alac_in_caf_with_whole_blocks_are_detected(tmp_path):
    path = tmp_path / "a.caf"
    for count in (4096 * 100, 4096 * 100 - 1, 64000, 4096):
        sf.write(path, song(10.0)[:count], RATE, format="CAF", subtype="ALAC_16")
        assert len(read(path, accept_holes=False)[0]) == count
    sf.write(path, song(10.0)[: 4096 * 100], RATE, format="CAF", subtype="ALAC_16")
    content = path.read_bytes()
    overwrite(path, 0.5, bytes(200))
    samples, warned = read(path)
    assert len(samples) == 4096 * 100
    assert "replaced with silence: at 4." in warned[0]
    path.write_bytes(content[: len(content) // 2] + content[len(content) // 2 + 700 :])
    assert "cut short or damaged" in read_refusal(path)


def test_only_the_damaged_packets_of_the_wanted_part_count(tmp_path):
    path, _ = make(tmp_path, "a.mka", 20.0)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size, packet.pts) for packet in file.demux() if packet.size]
    for at, size, time in packets:
        if 6000 < time < 13_000:
            content[at + 12 : at + size] = bytes(size - 12)
    path.write_bytes(content)
    assert "first at 6.0" in read_refusal(path)
    assert len(read(path, 15.0, 1.0)[0]) == RATE


@pytest.mark.parametrize("name", ["a.wma", "mp2.avi", "mp2.mpg"])
def test_quiet_sound_is_not_damage(tmp_path, name):
    codec, container, options, _ = OTHERS[name]
    seconds = np.arange(2 * 48000)[:, None] / 48000
    for samples in (0 * seconds, 2**-15 * np.sin(9999 * seconds), song(2.0, 48000) * (seconds % 1 > 0.5)):
        stereo = np.repeat(samples[:, :1], 2, axis=1).astype(np.float32)
        encode(tmp_path / name, codec, stereo, 48000, container, **options)
        assert read(tmp_path / name, accept_holes=False)[1] == []


def test_zeros_in_mp2_that_decode_without_an_error_are_a_hole(tmp_path):
    path, _ = other(tmp_path, "mp2.avi", 9.0)
    with av.open(str(path)) as file:
        packet = next(packet for packet in file.demux() if packet.pts and packet.pts > 100)
    overwrite(path, packet.pos + 8 + packet.size // 2, bytes(180))
    assert "replaced with silence: at 2." in read(path)[1][0]


def test_a_damaged_timestamp_gives_no_absurd_duration(tmp_path):
    path = encode(tmp_path / "a.rm", "ac3", song(10.0, 48000), 48000, "rm")
    whole, content = read(path, accept_holes=False)[0], path.read_bytes()
    for share in (0.15, 0.5, 0.8):
        path.write_bytes(content)
        overwrite(path, share, b"\xff" * 200)
        samples, warned = read(path)
        assert len(warned) == 1
        assert abs(len(samples) - len(whole)) <= 1536
