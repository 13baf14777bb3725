"""Ogg files: lost pages, chains, missing ends."""

import numpy as np
import pytest
import soundfile as sf
from damaged_sound_cases import make, overwrite, read, read_refusal, song
from sound_cases import RATE


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "flac.oga"])
def test_a_lost_page_of_a_short_song_is_refused_with_its_time(tmp_path, name):
    path, rate = make(tmp_path, name, 6.0)
    overwrite(path, 0.5, b"\xff" * 200)
    message = read_refusal(path)
    assert "first at 2." in message or "first at 3." in message
    assert len(read(path, 0.0, 1.0)[0]) == rate  # the hole is elsewhere
    assert len(read(path, 5.0, 0.5)[0]) == rate // 2


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "flac.oga"])
def test_all_links_of_a_chain_are_read(tmp_path, name):
    path, rate = make(tmp_path, name, 1.0)
    one = read(path)[0]
    path.write_bytes(3 * path.read_bytes())
    samples, warned = read(path)
    assert warned == []
    np.testing.assert_allclose(samples, np.concatenate([one] * 3), atol=1e-6)
    assert len(read(path, 1.5, 1.0)[0]) == rate


@pytest.mark.parametrize("form", [(22050, 2), (RATE, 1)])
def test_a_chain_whose_rate_or_channels_change_is_refused(tmp_path, form):
    rate, channels = form
    path, _ = make(tmp_path, "a.ogg", 1.0)
    sf.write(tmp_path / "b.ogg", song(1.0, rate, channels), rate)
    path.write_bytes(path.read_bytes() + (tmp_path / "b.ogg").read_bytes())
    assert "its sample rate or channels change at 1.000 s" in read_refusal(path)


def test_an_ogg_file_without_a_last_page_is_read_with_a_warning(tmp_path):
    path, _ = make(tmp_path, "a.opus", 4.0)
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"OggS")])
    assert "no page is marked as its last" in read(path)[1][0]
