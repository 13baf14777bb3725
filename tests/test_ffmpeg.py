"""Damage that FFmpeg's timestamps reveal, in Matroska and fragmented MP4 files."""

import struct

import av
import numpy as np
import pytest
from damaged_sound_cases import OTHERS, make, other, overwrite, read, read_refusal, song
from sound_cases import RATE, encode


def boxes(content):
    """Where each box of an mp4 file begins, and its name."""
    position, found = 0, []
    while position < len(content):
        found.append((position, content[position + 4 : position + 8]))
        position += int.from_bytes(content[position : position + 4], "big")
    return found


def test_a_damaged_first_cluster_of_a_matroska_file_is_a_hole_at_its_start(tmp_path):
    options = {"__cluster_time_limit": "50"}
    path = encode(tmp_path / "a.webm", "libopus", song(6.0, 48000), 48000, **options)
    assert read(path, accept_holes=False)[1] == []
    whole, content = read(path)[0], path.read_bytes()
    overwrite(path, content.index(b"\x1f\x43\xb6\x75"), bytes(8))
    samples, warned = read(path)
    late = len(samples) - len(whole)  # timestamps are rounded to 1 ms
    assert 0 <= late <= 48
    assert "replaced with silence: at 0.000 s" in warned[0]
    np.testing.assert_allclose(samples[48000 + late :], whole[48000:], atol=1e-3)


@pytest.mark.parametrize("flags", ["", "+dash+global_sidx"])
def test_a_fragmented_mp4_with_a_damaged_structure_never_becomes_a_shorter_song(tmp_path, flags):
    options = {"__movflags": "frag_keyframe+empty_moov" + flags, "__frag_duration": "200000"}
    path = encode(tmp_path / "a.mp4", "aac", song(11.0), **options)
    whole, warned = read(path, accept_holes=False)
    assert warned == []
    content = path.read_bytes()
    fragments = [at for at, name in boxes(content) if name == b"moof"]
    for data in (bytes(8), bytes(200), b"\0\0\0\5"):
        overwrite(path, fragments[10], data)
        if flags:  # its index leads to the fragments behind the damage
            assert len(read(path)[0]) == len(whole)
            assert "expected a complete file" in read_refusal(path, accept_holes=False)
        else:
            assert "damaged: found no more sound after 2." in read_refusal(path)
        path.write_bytes(content)
    overwrite(path, fragments[10] + 4, bytes(4))
    samples, warned = read(path)
    assert len(samples) == len(whole)
    assert "for 0.209 s" in warned[0]
    np.testing.assert_allclose(samples[4 * RATE :], whole[4 * RATE :], atol=0.1)
    overwrite(path, fragments[-1], bytes(200))
    assert "expected a complete file" in read_refusal(path, accept_holes=False)
    for behind in (bytes(1000), b"TAG" + bytes(125)):
        path.write_bytes(content + behind)
        assert read(path, accept_holes=False)[1] == []
    if flags:  # the index lists more than there is
        path.write_bytes(content[: fragments[10]])
        assert "found no more sound" in read_refusal(path)


@pytest.mark.parametrize("name", ["opus.webm", "mp3.mka", "aac.mka"])
def test_a_damaged_end_of_a_matroska_file_is_a_hole(tmp_path, name):
    if name in OTHERS:
        path, _ = other(tmp_path, name, 4.0)
    else:
        path, _ = make(tmp_path, name)
    whole, content = read(path)[0], path.read_bytes()
    with av.open(str(path)) as file:
        last = [packet.pos for packet in file.demux() if packet.size][-1]
    overwrite(path, last, bytes(200))
    samples, warned = read(path)
    assert abs(len(samples) - len(whole)) < 1100  # the padding that the lost packet declared
    assert "replaced with silence: at 3.9" in warned[0] or "replaced with silence: at 4.0" in warned[0]
    path.write_bytes(content[: last + 10])
    assert "replaced with silence" in read(path)[1][0]


def test_a_fragmented_mp4_shorter_than_its_declared_duration_is_refused(tmp_path):
    options = {"__movflags": "frag_keyframe+empty_moov", "__frag_duration": "200000"}
    path = encode(tmp_path / "a.mp4", "aac", song(4.0), **options)
    whole, content = read(path)[0], path.read_bytes()
    fragments = [at for at, name in boxes(content) if name == b"moof"]
    declared = content.index(b"mvhd") + 20
    content = content[:declared] + struct.pack(">I", 4000) + content[declared + 4 :]
    path.write_bytes(content)
    np.testing.assert_array_equal(read(path, accept_holes=False)[0], whole)
    for number in (len(fragments) // 2, -2):
        path.write_bytes(content[: fragments[number]])
        assert "missing, first at " in read_refusal(path)
