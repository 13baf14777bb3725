"""Tags of any text, and files whose tags were damaged anywhere."""

import json
from pathlib import Path

import mutagen
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kmdx import audio, tags
from kmdx.tags import Tags

TEXT = (
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40)
    .map(str.strip)
    .filter(bool)
)
KEYS = {"texts", "cover", "cover_type", "left_out"}


@given(title=TEXT, artists=st.lists(TEXT, min_size=1, max_size=3), format=st.sampled_from(["flac", "mp3"]))
def test_any_text_comes_back(tmp_path: Path, title: str, artists: list[str], format: str) -> None:
    path = tmp_path / "song"
    audio.write(path, np.zeros((99, 1)), 44100, format, Tags(title=title, artist=tuple(artists)))
    found = mutagen.File(path)
    names = ("title", "artist") if format == "flac" else ("TIT2", "TPE1")
    assert [list(found[name]) for name in names] == [[title], artists]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A tagged song of each format."""
    path = tmp_path_factory.mktemp("tagged") / "song"
    cover = b"\x89PNG\r\n\x1a\n" + bytes(50)
    contents = []
    for format in ("flac", "mp3"):
        some = Tags(
            "Song", (), ("Ann", "Bob"), "Album", track="1/2", date="2003", cover=cover, cover_type="image/png"
        )
        audio.write(path, np.zeros((99, 1)), 44100, format, some)
        contents.append(path.read_bytes())
    return contents


@given(
    number=st.integers(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=8),
    cut=st.none() | st.integers(0, 400),
)
def test_damaged_tags_are_reported_and_never_raise(
    tmp_path: Path, songs: list[bytes], number: int, changes: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(songs[number])
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path / "damaged"
    path.write_bytes(content[:cut])
    report = json.loads(json.dumps(tags.report(str(path))))
    assert set(report) in (KEYS, {"problem"})
    if "problem" not in report:
        Tags(**report["texts"], cover_type=report["cover_type"])
