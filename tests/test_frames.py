"""Files of mp3 or AAC frames alone: joined, cut, damaged."""

import numpy as np
import pytest
from damaged_sound_cases import make, read, read_refusal, song
from sound_cases import RATE, encode

from kmdx import frames


def test_concatenated_mp3_files_with_tags_between_them_are_read(tmp_path):
    path, rate = make(tmp_path, "a.mp3", 1.0)
    one, content = read(path)[0], path.read_bytes()
    path.write_bytes(content + b"TAG" + bytes(125) + content + b"LYRICSBEGIN" + b"la " * 500)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    assert (
        0 <= len(samples) - 2 * rate < 4 * 1152
    )  # what the second file's header declares as padding is sound here
    np.testing.assert_allclose(samples[: rate - 2000], one[: rate - 2000], atol=1e-3)


BARE = {"a.mp3": "libmp3lame", "a.aac": "aac", "a.ac3": "ac3", "a.eac3": "eac3"}


def bare(folder, name, seconds=6.0, rate=RATE):
    """A file of frames that declares nothing."""
    options = {"__write_xing": "0", "__id3v2_version": "0"} if name == "a.mp3" else {}
    path = encode(folder / name, BARE[name], song(seconds, rate), rate, **options)
    return path, read(path, accept_holes=False)[0], path.read_bytes()


@pytest.mark.parametrize("name", BARE)
def test_concatenated_files_in_different_formats_are_refused(tmp_path, name):
    _, whole, content = bare(tmp_path, name, 2.0)
    path, _, other = bare(tmp_path, name, 2.0, 48000)
    for between in (b"", b"TAG" + bytes(125)):
        path.write_bytes(content + between + other)
        assert "its sample rate or channels change at " in read_refusal(path)
        assert len(read(path, 0.0, 1.0)[0]) == RATE
    path.write_bytes(content[:-100] + other)
    assert "its sample rate or channels change at " in read_refusal(path)
    path.write_bytes(content + content)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    assert len(samples) == 2 * len(whole)


@pytest.mark.parametrize("name", BARE)
def test_damage_in_a_file_of_frames_is_reported_wherever_it_is(tmp_path, name):
    path, whole, content = bare(tmp_path, name)
    middle = len(content) // 2
    for removed in (100, 300, 1500):
        path.write_bytes(content[:middle] + content[middle + removed :])
        assert ": at 2.9" in (warned := read(path)[1])[0] or ": at 3.0" in warned[0]
    path.write_bytes(content[:-4000] + bytes(4000))
    assert "first at 5." in read_refusal(path)
    path.write_bytes(bytes(4) + content[4:])
    samples, warned = read(path)
    assert ": at 0.000 s" in warned[0]
    assert len(samples) == len(whole)
    path.write_bytes(content[:-50])
    assert "its last frame is incomplete" in " ".join(read(path)[1])
    path.write_bytes(content + bytes(3000))
    assert read(path, accept_holes=False)[1] == []


def test_bytes_before_the_first_frame_do_not_hide_what_an_mp3_declares(tmp_path):
    path, _ = make(tmp_path, "a.mp3")
    whole, _ = read(path)
    content = b"some other bytes" * 20 + path.read_bytes()
    path.write_bytes(content)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    np.testing.assert_array_equal(samples, whole)
    path.write_bytes(content[: len(content) * 3 // 5])
    assert "first at 2." in read_refusal(path)


def test_the_frames_that_an_mp3_declares_fill_its_gap(tmp_path):
    path, _ = make(tmp_path, "a.mp3", 12.0)
    whole, _ = read(path)
    content = path.read_bytes()
    path.write_bytes(content[:90_000] + content[91_500:])
    samples, warned = read(path)
    assert len(samples) == len(whole)
    assert "replaced with silence: at 5." in warned[0]
    np.testing.assert_allclose(samples[7 * RATE :], whole[7 * RATE :], atol=1e-3)
    path.write_bytes(content[:90_000] + bytes(50) + content[90_000:])
    assert "but no sound is missing" in read(path)[1][0]


def frame_edges(content):
    """Where each frame of an mp3 begins, and the end of the last one."""
    position, edges = (content.index(b"\xff\xfb"), [])
    while (header := frames._mpeg(content[position : position + 10])) is not None:
        edges.append(position)
        position += header.length
    return [*edges, position]


@pytest.mark.parametrize("damaged", [0, 1, 2])
@pytest.mark.parametrize("lost", [2, 60])
def test_joined_mp3_files_of_which_one_is_cut_between_frames_lose_nothing_silently(tmp_path, damaged, lost):
    """Each file's header declares its frames, of which the last ones are missing."""
    path, rate = make(tmp_path, "a.mp3", 4.0)
    content = path.read_bytes()
    cut = content[: frame_edges(content)[-1 - lost]]
    path.write_bytes(b"".join(cut if number == damaged else content for number in range(3)))
    if lost == 60:
        assert "missing, first at " in read_refusal(path)
        return
    samples, warned = read(path)
    (line,) = warned
    assert f"{lost * 1152 / rate:.3g}" in line
    path.write_bytes(3 * content)
    whole, warned = read(path, accept_holes=False)
    assert warned == []
    assert len(samples) == len(whole)
    quiet = np.abs(samples).max(axis=1) < 1e-6
    assert np.count_nonzero(quiet & (np.abs(whole).max(axis=1) > 1e-3)) > 1000, "silence in its place"


def test_a_tag_with_a_footer_between_joined_mp3_files_is_not_damage(tmp_path):
    path, _ = make(tmp_path, "a.mp3", 4.0)
    content = path.read_bytes()
    tag = b"ID3\x04\x00\x10" + bytes([0, 0, 0, 20]) + bytes(20) + b"3DI\x04\x00\x10" + bytes([0, 0, 0, 20])
    path.write_bytes(content + tag + content)
    samples, warned = read(path, accept_holes=False)
    assert warned == []
    path.write_bytes(2 * content)
    np.testing.assert_array_equal(samples, read(path)[0])
