"""kmdx.tags: which of a song's tags its stems get, and that tag errors lose no stem."""

import base64
import errno
import io
import os
import zlib
from pathlib import Path

import av
import mutagen
import numpy as np
import pytest
import soundfile as sf
from conftest import noise
from mutagen.flac import FLAC, Picture
from mutagen.id3 import APIC, ID3, Frames
from mutagen.mp4 import MP4Cover

from kmdx import audio, bounded, tags
from kmdx.errors import AudioError, KmdxWarning
from kmdx.tags import Tags

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
SONG = Tags(
    title="Où ça?",
    artist=("Ann", "Bob"),
    album="歌",
    album_artist="Various",
    track="3/12",
    disc="1/2",
    date="2003-04-05",
    genre=("Rock", "Jazz"),
    cover=PNG,
    cover_type="image/png",
)
ID3_NAMES = {
    "title": "TIT2", "artist": "TPE1", "album": "TALB", "album_artist": "TPE2", "track": "TRCK", "disc": "TPOS",
    "date": "TDRC", "genre": "TCON",
}  # fmt: skip


def picture(data: bytes = PNG, kind: int = 3) -> Picture:
    made = Picture()
    made.data, made.mime, made.type = data, "image/png", kind
    return made


def tagged(path: Path) -> Path:
    """A song with the tags of `SONG`, written by mutagen."""
    samples = noise(20_000, level=0.05)
    if path.suffix == ".m4a":
        with av.open(str(path), "w") as output:
            stream = output.add_stream("aac", 44100, layout="stereo")
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(samples.T), format="fltp", layout="stereo"
            )
            frame.sample_rate = 44100
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    elif path.suffix == ".opus":
        sf.write(path, samples, 48000, format="OGG", subtype="OPUS")
    else:
        sf.write(path, samples, 44100)
    song = mutagen.File(path)
    if song.tags is None:
        song.add_tags()
    if isinstance(song.tags, ID3):
        for field, name in ID3_NAMES.items():
            song.tags.add(Frames[name](encoding=3, text=list(getattr(SONG, field))))
        song.tags.add(APIC(encoding=3, mime="image/png", type=4, desc="back", data=PNG + b"back"))
        song.tags.add(APIC(encoding=3, mime="image/png", type=3, desc="front", data=PNG))
    elif path.suffix == ".m4a":
        song.tags.update(
            {"\xa9nam": "Où ça?", "\xa9ART": ["Ann", "Bob"], "\xa9alb": "歌", "aART": "Various", "trkn": [(3, 12)],
             "disk": [(1, 2)], "\xa9day": "2003-04-05", "\xa9gen": ["Rock", "Jazz"],
             "covr": [MP4Cover(PNG, MP4Cover.FORMAT_PNG)]}
        )  # fmt: skip
    else:
        song.tags.update(
            {"title": "Où ça?", "artist": ["Ann", "Bob"], "album": "歌", "album artist": "Various", "tracknumber": "3",
             "tracktotal": "12", "discnumber": "1/2", "date": "2003-04-05", "genre": ["Rock", "Jazz"]}
        )  # fmt: skip
        if path.suffix == ".flac":
            song.add_picture(picture(PNG + b"back", 4))
            song.add_picture(picture())
        else:
            song["metadata_block_picture"] = [base64.b64encode(picture().write()).decode()]
    song.save()
    return path


def complaint(path: Path) -> tuple[Tags, str]:
    """The tags of a song, and the one warning about them."""
    with pytest.warns(KmdxWarning) as caught:
        found = tags.read(path)
    (warning,) = caught
    assert str(warning.message).startswith(f"{path}: ")
    assert "\n" not in str(warning.message)
    return found, str(warning.message)


# Reading


@pytest.mark.parametrize("name", ["a.mp3", "a.wav", "a.aiff", "a.flac", "a.ogg", "a.opus", "a.m4a"])
def test_all_fields_and_the_front_cover_are_read(tmp_path, name):
    assert tags.read(tagged(tmp_path / name)) == SONG


@pytest.mark.parametrize(
    ("numbers", "expected"), [((3, 12), ("3/12",)), ((3, 0), ("3",)), ((0, 12), ("0/12",)), ((0, 0), ())]
)
def test_track_numbers_of_m4a_are_read(tmp_path, numbers, expected):
    path = tagged(tmp_path / "a.m4a")
    song = mutagen.File(path)
    song["trkn"] = [numbers]
    song.save()
    assert tags.read(path).track == expected


def test_older_id3_is_read(tmp_path):
    sf.write(tmp_path / "a.mp3", noise(9000), 44100)
    old = ID3()
    old.add(Frames["TIT2"](encoding=0, text=["Café"]))
    old.add(Frames["TPE1"](encoding=1, text=["歌手"]))
    old.add(Frames["TYER"](encoding=0, text=["1999"]))
    old.add(Frames["TCON"](encoding=0, text=["(17)"]))
    old.save(tmp_path / "a.mp3", v2_version=3)
    assert tags.read(tmp_path / "a.mp3") == Tags(title="Café", artist="歌手", date="1999", genre="Rock")


def test_id3v1_in_latin_1_is_read(tmp_path):
    sf.write(tmp_path / "a.mp3", noise(9000), 44100)
    fields = [b"Caf\xe9", b"J\xfcrgen", b"Album", b"1999", bytes(28) + b"\0\7", b"\x11"]
    sizes = [30, 30, 30, 4, 30, 1]
    with (tmp_path / "a.mp3").open("ab") as file:
        file.write(b"TAG" + b"".join(map(bytes.ljust, fields, sizes, [b"\0"] * 6)))
    assert tags.read(tmp_path / "a.mp3") == Tags("Café", (), "Jürgen", "Album", (), "7", (), "1999", "Rock")


@pytest.mark.parametrize("content", [b"", b"Verse, chorus, verse.\n" * 99])
def test_a_file_without_tags_has_none(tmp_path, content, recwarn):
    (tmp_path / "a.txt").write_bytes(content)
    assert not tags.read(tmp_path / "a.txt")
    audio.write(tmp_path / "a.wav", noise(99), 44100)
    assert not tags.read(tmp_path / "a.wav").of_stem("vocals")
    assert not recwarn.list


def test_a_cover_beyond_the_limit_is_left_out_and_the_rest_is_kept(tmp_path):
    path = tagged(tmp_path / "a.mp3")
    song = mutagen.File(path)
    song.tags.delall("APIC")
    song.tags.add(APIC(encoding=3, mime="image/png", type=3, desc="", data=PNG.ljust(12_000_000)))
    song.save()
    found, words = complaint(path)
    assert (found.title, found.genre, found.cover) == (SONG.title, SONG.genre, b"")
    assert "omitted from the stems' tags: the cover (12.0 MB, at most 10 MB)" in words


def test_a_title_of_a_million_characters_is_left_out(tmp_path):
    path = tagged(tmp_path / "a.flac")
    song = FLAC(path)
    song["title"] = "la" * 500_000
    song["artist"] = "a\0b\r\nc"
    song.save()
    found, words = complaint(path)
    assert (found.title, found.artist, found.album) == ((), ("a b c",), SONG.album)
    assert "the title (more than 1000 characters or 20 values)" in words


def test_a_malformed_picture_loses_only_the_cover(tmp_path):
    path = tagged(tmp_path / "a.ogg")
    song = mutagen.File(path)
    song["metadata_block_picture"] = ["not base64!"]
    song.save()
    found, words = complaint(path)
    assert (found.title, found.cover) == (SONG.title, b"")
    assert "the cover (" in words


def id3_tag(name: bytes, body: bytes, flags: int) -> bytes:
    """An ID3v2.4 tag of one frame."""

    def size(content: bytes) -> bytes:
        return bytes(len(content) >> shift & 127 for shift in (21, 14, 7, 0))

    frame = name + size(body) + flags.to_bytes(2, "big") + body
    return b"ID3\4\0\0" + size(frame) + frame


def bomb() -> bytes:
    """1 MB that a zlib decoder makes 1 GB of."""
    packer = zlib.compressobj()
    first = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(bytes(2**24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + 64 * again


@pytest.mark.skipif(os.name == "nt", reason="Windows limits neither memory nor the time of a processor")
def test_a_compressed_tag_of_gigabytes_is_given_up_on(tmp_path):
    path = tmp_path / "a.mp3"
    audio.write(path, noise(9000), 44100, "mp3")
    path.write_bytes(id3_tag(b"TIT2", b"\x7f\x7f\x7f\x7f" + bomb(), 0b1001) + path.read_bytes())
    found, words = complaint(path)
    assert not found
    assert "its tags cannot be read, so the stems have none: " in words


def test_a_truncated_tag_is_not_an_error(tmp_path):
    path = tagged(tmp_path / "a.flac")
    path.write_bytes(path.read_bytes()[:300])
    assert not complaint(path)[0]


@pytest.mark.parametrize(
    "error", [OSError(errno.EAGAIN, "no more processes"), ValueError("embedded null byte")]
)
def test_a_process_that_cannot_be_started_is_not_an_error(tmp_path, monkeypatch, error):
    monkeypatch.setattr(bounded.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(error))
    assert not complaint(tmp_path / "a.flac")[0]


# Writing


@pytest.mark.parametrize("format", ["flac", "mp3"])
def test_stems_get_the_songs_tags_and_their_own_subtitle(tmp_path, format):
    audio.write(tmp_path / "a", noise(5000), 44100, format, SONG.of_stem("vocals"))
    assert tags.read(tmp_path / "a") == SONG
    song = mutagen.File(tmp_path / "a")
    if format == "mp3":
        assert song["TIT3"].text == ["vocals"]
        assert song["APIC:"].data == PNG
        assert song.tags.version == (2, 4, 0)
    else:
        assert (song["subtitle"], song["tracknumber"], song["tracktotal"]) == (["vocals"], ["3"], ["12"])
        assert [(picture.type, picture.mime, picture.data) for picture in song.pictures] == [
            (3, "image/png", PNG)
        ]


@pytest.mark.parametrize("format", ["flac", "mp3"])
@pytest.mark.parametrize("length", [2, 1153, 40_000])
def test_tags_do_not_change_samples(tmp_path, format, length):
    audio.write(tmp_path / "bare", noise(length), 44100, format)
    audio.write(tmp_path / "tagged", noise(length), 44100, format, SONG)
    bare, with_tags = audio.read(tmp_path / "bare").samples, audio.read(tmp_path / "tagged").samples
    assert len(with_tags) == length
    np.testing.assert_array_equal(with_tags, bare)


def test_wav_stems_have_no_tags(tmp_path):
    for format in ("wav16", "float32"):
        audio.write(tmp_path / "bare", noise(99), 44100, format)
        audio.write(tmp_path / "tagged", noise(99), 44100, format, SONG)
        assert (tmp_path / "tagged").read_bytes() == (tmp_path / "bare").read_bytes()


@pytest.mark.parametrize(
    ("date", "year"), [("circa 1975", ["1975"]), ("2003-04", ["2003-04"]), ("long ago", None)]
)
def test_only_the_year_of_a_nonstandard_date_is_kept_in_mp3(tmp_path, date, year):
    audio.write(tmp_path / "a", noise(99), 44100, "mp3", Tags(title="Song", date=date))
    found = mutagen.File(tmp_path / "a").tags
    assert found["TIT2"].text == ["Song"]
    assert [str(text) for text in found["TDRC"].text] == year if year else "TDRC" not in found


@pytest.mark.parametrize(("format", "saves"), [("flac", FLAC), ("mp3", ID3)])
def test_an_error_in_the_tag_library_loses_no_stem(tmp_path, monkeypatch, format, saves):
    stems = {tmp_path / name: noise(5000, seed=seed) for seed, name in enumerate(["vocals", "drums"])}

    def fail_in_the_middle(self, file, **options):
        file.seek(0)
        file.write(b"half a tag")
        raise KeyError("a mistake")

    monkeypatch.setattr(saves, "save", fail_in_the_middle)
    with pytest.warns(
        KmdxWarning, match="vocals: its tags cannot be written: KeyError: 'a mistake'"
    ) as caught:
        audio.write_all(stems, 44100, format, dict.fromkeys(stems, SONG))
    assert len(caught) == 1
    monkeypatch.undo()
    for path, samples in stems.items():
        audio.write(tmp_path / "bare", samples, 44100, format)
        np.testing.assert_array_equal(audio.read(path).samples, audio.read(tmp_path / "bare").samples)


@pytest.mark.filterwarnings("error::kmdx.errors.KmdxWarning")
@pytest.mark.parametrize("format", ["flac", "mp3"])
def test_a_disk_that_is_full_before_the_tags_are_written_is_an_error(tmp_path, monkeypatch, format):
    audio.write(tmp_path / "bare", noise(5000), 44100, format)
    room = (tmp_path / "bare").stat().st_size + 1000
    (tmp_path / "bare").unlink()

    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    monkeypatch.setattr(Path, "open", lambda path, *_, **__: FullDisk(path, "x+"))
    large = Tags(title="Song", cover=PNG.ljust(50_000), cover_type="image/png")
    with pytest.raises(AudioError, match="no space left on device"):
        audio.write(tmp_path / "a", noise(5000), 44100, format, large)
    assert list(tmp_path.iterdir()) == []
