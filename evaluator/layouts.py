"""Recognizes layouts of data sets: which files are songs, and which of a song's files are stems?

Layouts
-------
A data set is a folder of songs, or a folder of splits (``train``, ``test``, ``valid``) that are folders of
songs. It may be inside another folder, as in many archives. A song is one of these:

files named by stem (MUSDB18-HQ)
    A folder with ``mixture.wav`` and a file for each stem, in any format that :mod:`kmdx.audio` reads. Names
    are compared without case. :data:`NAMES` lists the stems and their alternative names.
streams (MUSDB18)
    One file ``<song>.stem.mp4`` with five streams, in the order of :data:`STREAMS`.
MoisesDB
    A folder with ``data.json`` and a folder of tracks for each stem; a stem is the sum of its tracks. The
    song is named after its artist and title.
described
    A folder whose files match the patterns in a ``dataset.yaml``; see :mod:`evaluator.described`.

References
----------
Rafii et al. 2017, "The MUSDB18 corpus for music separation", and its uncompressed version, MUSDB18-HQ.
Pereira et al. 2023, "MoisesDB: a dataset for source separation beyond 4-stems", arXiv 2307.15913.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evaluator.records import AVERAGE, SONG
from evaluator.sources import SOUNDS, AudioSource, is_sound
from kmdx.challenge import ACCOMPANIMENT, MIXTURE, STEMS, STREAMS
from kmdx.documents import read_json
from kmdx.errors import DocumentError, KmdxError, quoted, shown
from kmdx.file_names import key, portable

STEM_FILE = ".stem.mp4"

NAMES: Mapping[str, tuple[str, ...]] = {
    MIXTURE: ("mix",),
    "bass": (),
    "drums": ("drum",),
    "other": ("others",),
    "vocals": ("vocal", "vox", "voice"),
    ACCOMPANIMENT: ("instrumental", "instrumentals", "instrum", "no_vocals", "novocals", "backing_track"),
    "guitar": ("guitars",),
    "piano": (),
    "bowed_strings": (),
    "brass": (),
    "keys": ("keyboards", "keyboard"),
    "other_keys": (),
    "other_plucked": (),
    "percussion": (),
    "strings": (),
    "synth": ("synths",),
    "wind": ("winds",),
    "dialogue": ("dialog",),
    "effects": ("sfx",),
    "music": (),
    "speech": (),
}
"""Names of stems and their alternative names in file names, with ``_`` for spaces and hyphens."""
_CANONICAL = {alias: name for name, aliases in NAMES.items() for alias in (name, *aliases)}

SPLITS = ("train", "test", "valid", "validation", "val", "dev", "eval")
"""Folders with these names are splits even if the data set has only one folder."""

MOISESDB_UNEVEN = 1.0  # seconds by which the tracks of a MoisesDB song may differ in length
MAX_NAME = 200  # bytes of a song's name, which is used as a folder's name


@dataclass(frozen=True)
class SongFiles:
    """A song's files by name; their contents have not been read."""

    name: str
    place: Path  # its folder, or its single file
    sources: Mapping[str, tuple[AudioSource, ...]]
    """Sources of each stem, and of the mixture if it has one; several are summed."""
    extra: tuple[Path, ...] = ()  # other sound files
    problems: tuple[tuple[bool, str], ...] = ()  # for each problem whether it is fatal, and a message
    aliases: tuple[str, ...] = ()  # other names that folders of its estimates may have
    multitrack: bool = False  # whether mono and stereo files may be mixed
    uneven: float = 0.0
    """Seconds by which its files may differ in length; shorter ones are padded with silence."""
    declared: tuple[str, ...] = ()  # stems that the data set's description names


@dataclass(frozen=True)
class Scan:
    """The songs of a data set."""

    splits: Mapping[str | None, list[SongFiles]]
    """Songs of each split; ``None`` is the key of songs in no split."""
    strays: tuple[Path, ...] = ()  # sound files that belong to no song


Recognize = Callable[[Path], SongFiles | None]


def stem_named(name: str) -> str | None:
    """The stem (or mixture) in a file or folder of this name; ``None`` if the name is unknown."""
    return _CANONICAL.get(re.sub(r"[\s_-]+", "_", key(name)).strip("_"))


def reference_of(stem: str, stems: Iterable[str] = ()) -> str:
    """The name in data sets of one of an ensemble's stems.

    ``accompaniment`` for ``instrumental``, and for ``other`` if vocals and other are the only stems.
    """
    if stem == "other" and set(stems) == {"vocals", "other"}:
        return ACCOMPANIMENT
    return stem_named(stem) or stem


def parts_of_accompaniment(stems: Collection[str]) -> tuple[str, ...]:
    """The stems that sum to the accompaniment, if they are all there.

    They are all except the vocals if these include bass, drums and other, or if vocals and other are the only
    stems.
    """
    found = {*stems} - {MIXTURE, ACCOMPANIMENT}
    complete = set(STEMS) <= found | {"vocals"} or found == {"vocals", "other"}
    return tuple(stem for stem in stems if stem in found - {"vocals"}) if complete else ()


def folder_name(folder: Path) -> str:
    """A folder's name, even for ``.``; a link to a folder keeps its own name."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def entries(folder: Path) -> list[Path]:
    """The entries of a folder, sorted by name, without hidden files such as those of macOS."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def sounds_below(folder: Path, depth: int = 3) -> list[Path]:
    """Sound files in a folder and its subfolders."""
    found = []
    for path in entries(folder):
        if path.is_dir():
            found += sounds_below(path, depth - 1) if depth else []
        elif is_sound(path):
            found.append(path)
    return found


def song(path: Path) -> SongFiles | None:
    """The song in a folder or file, according to its layout; ``None`` if it is not a song.

    Raises
    ------
    OSError
        If a folder cannot be read.
    """
    if not path.is_dir():
        if not path.name.lower().endswith(STEM_FILE) or not path.is_file():
            return None
        name = path.name[: -len(STEM_FILE)]
        streams = {stem: (AudioSource(path, number),) for number, stem in enumerate(STREAMS)}
        return SongFiles(name, path, streams, aliases=(f"{name}.stem",))
    if (path / "data.json").is_file():
        found = _moisesdb(path)
        if found is not None:
            return found
    return _named(path)


def scan(data: Path, recognize: Recognize = song, depth: int = 2) -> Scan:
    """Find the songs of a data set.

    Parameters
    ----------
    data : Path
        The data set, one of its splits, or one song.
    recognize : callable
        Returns the song in a folder or file, or None.
    depth : int
        How many levels of folders may be around the data set.

    Raises
    ------
    OSError
        If a folder cannot be read.
    """
    whole = recognize(data)
    if whole is not None:
        return Scan({None: [whole]})
    splits: dict[str | None, list[SongFiles]] = {}
    strays: list[Path] = []
    folders = []
    for path in entries(data):
        found = recognize(path)
        if found is not None:
            splits.setdefault(None, []).append(found)
        elif path.is_dir():
            folders.append(path)
        elif is_sound(path):
            strays.append(path)
    for folder in folders:
        songs = []
        left: list[Path] = []
        for path in entries(folder):
            found = recognize(path)
            if found is not None:
                songs.append(found)
            elif path.is_dir():
                left += sounds_below(path)
            elif is_sound(path):
                left.append(path)
        if songs:
            splits[folder.name] = songs
        strays += left
    if not splits and depth:
        inner = [scan(folder, recognize, depth - 1) for folder in folders]
        with_songs = [each for each in inner if each.splits]
        if len(with_songs) == 1:
            return with_songs[0]
    return Scan({split: _distinct(songs) for split, songs in splits.items()}, tuple(strays))


def _distinct(songs: list[SongFiles]) -> list[SongFiles]:
    """Songs named by their metadata; if two have the same name, their folders' names are added."""
    names = [each.name for each in songs]
    return [
        replace(each, name=safe_name(f"{each.name} ({each.place.name[:8]})"))
        if each.aliases and each.place.is_dir() and names.count(each.name) > 1
        else each
        for each in songs
    ]


def safe_name(name: str) -> str:
    """A name from metadata, changed to be a valid folder name on every system."""
    return portable(unicodedata.normalize("NFC", name).strip(" ."), MAX_NAME) or "_"


def _named(folder: Path) -> SongFiles | None:
    """The song in a folder of files named by stem; wav is preferred to flac, and flac to other formats."""
    sounds = [path for path in entries(folder) if is_sound(path) and not path.is_dir()]
    if any(path.name.lower().endswith(STEM_FILE) for path in sounds):
        return None  # a folder of MUSDB18 files
    by_preference = sorted(
        sounds,
        key=lambda path: (key(path.stem) != stem_named(path.stem), SOUNDS.index(path.suffix.lower()), path),
    )
    chosen: dict[str, Path] = {}
    extra = []
    for path in by_preference:
        stem = stem_named(path.stem)
        if stem is not None and stem not in chosen:
            chosen[stem] = path
        else:
            extra.append(path)
    if not chosen:
        return None
    order = [stem for stem in NAMES if stem in chosen]
    name = folder_name(folder)
    below = [path for each in entries(folder) if each.is_dir() for path in sounds_below(each)]
    return SongFiles(
        name,
        folder,
        {stem: (AudioSource(chosen[stem]),) for stem in order},
        (*sorted(extra, key=sounds.index), *below),
    )


@dataclass
class _Moises:
    """Content of ``data.json`` and the folders next to it."""

    sources: dict[str, tuple[AudioSource, ...]] = field(default_factory=dict)
    problems: list[tuple[bool, str]] = field(default_factory=list)


def _moisesdb(folder: Path) -> SongFiles | None:
    """A song of MoisesDB; ``None`` if the folder's ``data.json`` is not one of MoisesDB."""
    found = _Moises()
    content: Any = None
    try:
        content = read_json(folder / "data.json")
        if not isinstance(content, dict) or "stems" not in content:
            return None
        for number, stem in enumerate(_list(content, "stems")):
            _moisesdb_stem(folder, stem, f"stems[{number}]", found)
    except DocumentError as error:
        if content is None and not any(path.is_dir() for path in entries(folder)):
            return None
        found.problems.append((True, f"data.json: {error}"))
    if not found.sources and not found.problems:
        found.problems.append((True, "data.json: no stem has a track; expected at least one"))
    names = [content.get(part) if isinstance(content, dict) else None for part in ("artist", "song")]
    title = " - ".join(text for text in names if isinstance(text, str) and text.strip())
    name = safe_name(title) if title else folder_name(folder)
    used = {source.path for sources in found.sources.values() for source in sources}
    mixtures = [path for path in entries(folder) if is_sound(path) and stem_named(path.stem) == MIXTURE]
    if mixtures:
        found.sources = {MIXTURE: (AudioSource(mixtures[0]),), **found.sources}
    extra = tuple(path for path in sounds_below(folder) if path not in used and path not in mixtures[:1])
    return SongFiles(
        name,
        folder,
        found.sources,
        extra,
        tuple(found.problems),
        aliases=(folder_name(folder), *(text for text in names[1:] if isinstance(text, str))),
        multitrack=True,
        uneven=MOISESDB_UNEVEN,
    )


def _moisesdb_stem(folder: Path, stem: Any, where: str, found: _Moises) -> None:
    """Add a stem of ``data.json``, and its problems."""
    name = _text(stem, "stemName", where)
    if not is_stem_name(name):
        raise DocumentError(f"{where}.stemName: {quoted(name)} cannot be the name of a stem")
    sources = []
    for number, track in enumerate(_list(stem, "tracks", f"{where}.")):
        identity = _text(track, "id", f"{where}.tracks[{number}]")
        ending = track.get("extension", "wav")
        if not isinstance(ending, str) or re.search(r"[/\\\x00]", f"{identity}{ending}"):
            raise DocumentError(f"{where}.tracks[{number}]: {quoted(identity)} cannot be the name of a file")
        path = folder / name / f"{identity}.{ending}"
        if path.is_file():
            sources.append(AudioSource(path))
        else:
            found.problems.append((True, f"{shown(f'{name}/{path.name}')} is in data.json, but no such file"))
    if sources:
        found.sources[name] = (*found.sources.get(name, ()), *sources)


def is_stem_name(name: str) -> bool:
    """Whether a name is valid for a stem and its file."""
    return (
        bool(re.fullmatch(r"\w[\w +&-]{0,63}", name))
        and stem_named(name) != MIXTURE
        and key(name) not in (SONG, AVERAGE)  # in results these are means of stems
    )


def _list(content: Any, name: str, where: str = "") -> list[Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DocumentError(f"{where}{name}: expected a list, found {quoted(found)}")
    return found


def _text(content: Any, name: str, where: str) -> str:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, str) or not found:
        raise DocumentError(f"{where}.{name}: expected text, found {quoted(found)}")
    return found


def refuse_unreadable(error: OSError) -> KmdxError:
    """An error of the operating system as a user's error."""
    return KmdxError(f"{error.filename}: cannot be read: {error.strerror}")
