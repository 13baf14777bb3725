"""Tags and covers: read from any file that mutagen supports, and written into flac and mp3.

Songs are untrusted, and mutagen has no limits: 2 MB of small ID3 frames take 7 s, and 1 MB of compressed ones
1 GB of memory. Tags are therefore read in a separate process, with limits on time and memory
(:mod:`kmdx.bounded`).

To write tags into another format, add a function like :func:`write_flac`. For m4a, mutagen's ``MP4`` accepts
the same values under the names in column ``mp4`` of :data:`NAMES`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mutagen
from mutagen.apev2 import APEv2
from mutagen.asf import ASFTags
from mutagen.flac import FLAC, Picture
from mutagen.id3 import APIC, ID3, TSSE, Frames
from mutagen.mp4 import MP4Cover, MP4Tags

from . import bounded
from .errors import KmdxWarning, first_line

SECONDS = 2  # CPU time for the tags of one song, which normally take less than 0.1
MEMORY = 2**29  # bytes of address space
COVER_LIMIT = 10_000_000  # bytes; flac allows 16 MB
TEXT_LIMIT = 1000  # characters of a value
VALUES = 20  # values of a field

FRONT_COVER = 3  # its number in ID3, flac and ASF
IMAGES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}


class TagError(Exception):
    """Tags cannot be written; the message is mutagen's."""


@dataclass(frozen=True)
class Tags:
    """The tags of a song or a stem, and its cover.

    Each text field has any number of values; a single value may be given as a string. `track` and `disc`
    are numbers, or a number and a total as in ``"3/12"``. `cover` is the content of an image file with the
    MIME type `cover_type`.
    """

    title: tuple[str, ...] = ()
    subtitle: tuple[str, ...] = ()
    artist: tuple[str, ...] = ()
    album: tuple[str, ...] = ()
    album_artist: tuple[str, ...] = ()
    track: tuple[str, ...] = ()
    disc: tuple[str, ...] = ()
    date: tuple[str, ...] = ()
    genre: tuple[str, ...] = ()
    cover: bytes = b""
    cover_type: str = ""

    def __post_init__(self) -> None:
        for field in NAMES:
            if isinstance(value := getattr(self, field), str):
                object.__setattr__(self, field, (value,))

    def __bool__(self) -> bool:
        """Whether any tag or cover is set."""
        return bool(self.cover) or any(getattr(self, field) for field in NAMES)

    def of_stem(self, stem: str) -> Tags:
        """The tags of one of the song's stems: the song's tags, with the stem's name as the subtitle."""
        return dataclasses.replace(self, subtitle=(stem,)) if self else self


class Names(NamedTuple):
    """The name of a field in each tag format."""

    id3: str
    vorbis: str
    mp4: str
    ape: str
    asf: str


NAMES = {
    "title": Names("TIT2", "title", "\xa9nam", "Title", "Title"),
    "subtitle": Names("TIT3", "subtitle", "----:com.apple.iTunes:SUBTITLE", "Subtitle", "WM/SubTitle"),
    "artist": Names("TPE1", "artist", "\xa9ART", "Artist", "Author"),
    "album": Names("TALB", "album", "\xa9alb", "Album", "WM/AlbumTitle"),
    "album_artist": Names("TPE2", "albumartist", "aART", "Album Artist", "WM/AlbumArtist"),
    "track": Names("TRCK", "tracknumber", "trkn", "Track", "WM/TrackNumber"),
    "disc": Names("TPOS", "discnumber", "disk", "Disc", "WM/PartOfSet"),
    "date": Names("TDRC", "date", "\xa9day", "Year", "WM/Year"),
    "genre": Names("TCON", "genre", "\xa9gen", "Genre", "WM/Genre"),
}
OTHER_VORBIS_NAMES = {"album_artist": ("album artist", "album_artist"), "date": ("year",)}
VORBIS_TOTALS = {"track": ("tracktotal", "totaltracks"), "disc": ("disctotal", "totaldiscs")}


def read(path: str | os.PathLike[str], name: str | None = None) -> Tags:
    """Read the tags of a song; empty if it has none, or mutagen does not support its format.

    ``name`` is the song's name in messages, by default its path.

    Every problem causes one :class:`~kmdx.errors.KmdxWarning`, not an error: tags that cannot be read within
    the limits, a cover larger than 10 MB, or a text longer than 1000 characters. The song's subtitle is not
    read, because :meth:`Tags.of_stem` sets it to the stem's name.
    """
    try:
        song = os.path.abspath(path)  # noqa: PTH100 (does not resolve links)
        found = bounded.call(report, song, seconds=SECONDS, memory=MEMORY)
    except bounded.Failed as error:
        found = {"problem": str(error)}
    if "problem" in found:
        warnings.warn(
            f"{name or path}: its tags cannot be read, so the stems have none: {found['problem']}",
            KmdxWarning,
            stacklevel=2,
        )
        return Tags()
    if found["left_out"]:
        warnings.warn(
            f"{name or path}: omitted from the stems' tags: {', '.join(found['left_out'])}",
            KmdxWarning,
            stacklevel=2,
        )
    texts = {field: tuple(values) for field, values in found["texts"].items()}
    return Tags(**texts, cover=base64.b64decode(found["cover"]), cover_type=found["cover_type"])


def id3(tags: Tags) -> bytes:
    """An ID3v2.4 tag for the beginning of an mp3. Even an empty tag identifies the file as an mp3.

    Raises :class:`TagError` if mutagen cannot write it.
    """
    try:
        frames = ID3()
        frames.add(TSSE(encoding=3, text=["LAME"]))
        for field, values in _texts(tags):
            frame: Any = Frames[NAMES[field].id3](encoding=3, text=list(values))
            if field == "date" and not all(map(str, frame.text)):  # "circa 1975" is not an ID3 date
                frame.text = re.findall(r"\d{4}", " ".join(values))[:1]
            frames.add(frame)
        if tags.cover:
            frames.add(APIC(encoding=3, mime=tags.cover_type, type=FRONT_COVER, desc="", data=tags.cover))
        written = io.BytesIO()
        frames.save(written, v1=0, padding=lambda info: 0)
    except Exception as error:  # mutagen may raise any class, and no stem may be lost because of its tags
        raise TagError(_reason(error)) from error
    return written.getvalue()


def write_flac(file: io.RawIOBase, tags: Tags) -> None:
    """Write tags into a flac file without tags.

    Raises :class:`TagError` if mutagen cannot write them; the file is then damaged.
    """
    try:
        file.seek(0)
        flac = FLAC(file)
        for field, values in _texts(tags):
            number, slash, total = values[0].partition("/")
            if field in VORBIS_TOTALS and slash:
                flac[NAMES[field].vorbis], flac[VORBIS_TOTALS[field][0]] = number, total
            else:
                flac[NAMES[field].vorbis] = list(values)
        if tags.cover:
            picture = Picture()
            picture.type, picture.mime, picture.data = FRONT_COVER, tags.cover_type, tags.cover
            flac.add_picture(picture)
        file.seek(0)
        flac.save(file, padding=lambda info: 0)
    except Exception as error:
        raise TagError(_reason(error)) from error


def _texts(tags: Tags) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The text fields that have values."""
    for field in NAMES:
        if values := getattr(tags, field):
            yield field, values


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


# The following functions run in the separate process.


def report(path: str) -> dict[str, Any]:
    """Read the tags of a file for :func:`read`, as JSON values."""
    try:
        song = mutagen.File(path)
        if song is None or song.tags is None:
            return {"texts": {}, "cover": "", "cover_type": "", "left_out": []}
        texts = {field: _values(song.tags, field) for field in NAMES if field != "subtitle"}
    except Exception as error:  # on damaged files, mutagen raises exceptions of almost any class
        return {"problem": _reason(error)}
    left_out = []
    try:
        pictures = sorted(_pictures(song), key=lambda picture: picture.kind != FRONT_COVER)
    except Exception as error:
        pictures = []
        left_out.append(f"the cover ({_reason(error)})")
    for field, values in texts.items():
        if len(values) > VALUES or any(len(value) > TEXT_LIMIT for value in values):
            left_out.append(f"the {field} (more than {TEXT_LIMIT} characters or {VALUES} values)")
            texts[field] = []
    cover = pictures[0] if pictures else _Picture(0, "", b"")
    cover_type = cover.type
    if len(cover.data) > COVER_LIMIT:
        left_out.append(f"the cover ({len(cover.data) / 1e6:.1f} MB, at most {COVER_LIMIT / 1e6:.0f} MB)")
        cover_type = ""
    elif cover.data and not cover_type:
        left_out.append("the cover (not an image of a known type)")
    return {
        "texts": texts,
        "cover": base64.b64encode(cover.data).decode() if cover_type else "",
        "cover_type": cover_type,
        "left_out": left_out,
    }


class _Picture(NamedTuple):
    """A picture in a sound file."""

    kind: int  # what it shows, by ID3's numbers
    declared: str
    data: bytes

    @property
    def type(self) -> str:
        """Its MIME type by its content, or else as declared; empty if unknown."""
        found = next((name for magic, name in IMAGES.items() if self.data.startswith(magic)), self.declared)
        return found if self.data and re.fullmatch(r"image/[\w.+-]{1,30}", found, re.ASCII) else ""


def _values(tags: Any, field: str) -> list[str]:
    """The values of a field, without control characters."""
    names = NAMES[field]
    found: Any
    if isinstance(tags, ID3):
        frame = tags.get(names.id3)
        found = [] if frame is None else frame.genres if field == "genre" else frame.text
    elif isinstance(tags, MP4Tags):
        found = tags.get(names.mp4, [])
        if field in VORBIS_TOTALS:
            found = [f"{number}/{total}" if total else number or "" for number, total in found]
    elif isinstance(tags, APEv2):
        found = str(tags[names.ape]).split("\0") if names.ape in tags else []
    elif isinstance(tags, ASFTags):
        found = tags.get(names.asf, [])
    else:
        candidates = (names.vorbis, *OTHER_VORBIS_NAMES.get(field, ()))
        found = next((tags[name] for name in candidates if name in tags), [])
        totals = [tags[name] for name in VORBIS_TOTALS.get(field, ()) if name in tags]
        if found and totals and "/" not in found[0]:
            found = [f"{found[0]}/{totals[0][0]}"]
    cleaned = (re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]+", " ", str(value)).strip() for value in found)
    return [value for value in cleaned if value]


def _pictures(song: Any) -> Iterator[_Picture]:
    tags = song.tags
    if isinstance(tags, ID3):
        for frame in tags.getall("APIC"):
            yield _Picture(int(frame.type), frame.mime, frame.data)
    elif isinstance(tags, MP4Tags):
        for cover in tags.get("covr", []):
            declared = {MP4Cover.FORMAT_JPEG: "image/jpeg", MP4Cover.FORMAT_PNG: "image/png"}
            yield _Picture(FRONT_COVER, declared.get(cover.imageformat, ""), bytes(cover))
    elif isinstance(tags, APEv2):
        for name in tags:
            if name.lower().startswith("cover art"):
                kind = FRONT_COVER if "front" in name.lower() else 0
                yield _Picture(kind, "", tags[name].value.partition(b"\0")[2])  # after a file name
    elif isinstance(tags, ASFTags):
        for picture in tags.get("WM/Picture", []):  # kind, size of the data, two texts, the data
            content = bytes(picture.value)
            yield _Picture(content[0], "", content[-int.from_bytes(content[1:5], "little") :])
    else:
        blocks = [Picture(base64.b64decode(text)) for text in tags.get("metadata_block_picture", [])]
        for picture in [*getattr(song, "pictures", []), *blocks]:
            yield _Picture(picture.type, picture.mime, picture.data)
