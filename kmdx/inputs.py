"""Find the songs that a command line names, and choose an output folder for the stems of each.

The stems of a file argument go to ``OUTPUT/<name>``. A folder argument is mirrored: the stems of
``m/a/b.wav`` go to ``OUTPUT/a/b``. A file ``mixture.*`` is named after its folder. If songs would share an
output folder, the names of their parent folders are added, then their file extensions, then a number. A song
that already has stems under one of these names keeps that folder.
"""

from __future__ import annotations

import glob
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from kmdx import file_names, manifest, urls
from kmdx.challenge import MIXTURE
from kmdx.errors import KmdxError
from kmdx.urls import Url, UrlError

SOUND = {".wav", ".w64", ".flac", ".aif", ".aiff", ".aifc", ".caf", ".ogg", ".oga", ".opus"}
COMPRESSED = {".mp3", ".m4a", ".aac", ".wma", ".mka", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
EXTENSIONS = SOUND | COMPRESSED
"""Extensions of songs in folders; a file that is named directly may have any extension."""
PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".heic", ".svg"}
LISTS = {".m3u", ".m3u8", ".pls", ".xspf", ".cue", ".log", ".sfv", ".md5", ".sha256", ".accurip", ".csv"}
TEXTS = {".txt", ".nfo", ".md", ".pdf", ".rtf", ".lrc", ".srt", ".json", ".yaml", ".yml", ".xml", ".html"}
OTHERS = {".mid", ".midi", ".zip", ".rar", ".7z", ".db", ".ini", ".url", ".asd", ".reapeaks"}
COMPANIONS = PICTURES | LISTS | TEXTS | OTHERS
"""Extensions of files that accompany songs: skipped, unless such a file is the only argument."""

_NUMBERED = re.compile(r"(.*) \((\d+)\)", re.DOTALL)

Key = tuple[str, ...]


@dataclass(frozen=True)
class InputSong:
    """A file to separate, and the folder of its stems, relative to OUTPUT and with ``/`` as separator."""

    path: Path | Url
    place: str

    def folder(self, output: Path) -> Path:
        """The folder of its stems."""
        return output / self.place


@dataclass(frozen=True)
class Batch:
    """The songs that the arguments of a command line name, and one line for each problem."""

    songs: list[InputSong]
    problems: list[str]
    skipped: list[Path]
    """Files that accompany songs, such as covers and playlists."""


def collect(
    inputs: Iterable[str], output: Path, target: Url | None = None, records: Path | None = None
) -> Batch:
    """Find the songs that files, folders, patterns and URLs name.

    A folder stands for all sound files in it and below. If a folder contains ``mixture.*``, its other sound
    files are considered its stems and skipped. Finished stems and files below ``output`` are skipped, too.

    Parameters
    ----------
    inputs : iterable of str
        Paths, URLs and glob patterns.
    output : Path
        Parent of the songs' output folders.
    target : Url, optional
        Where they are uploaded to, if that is a URL.
    records : Path, optional
        Parent of the folders with the songs' records; by default ``output``.
    """
    inputs = list(inputs)
    is_one_file = len(inputs) == 1 and Path(inputs[0]).is_file()
    found: dict[Path | Url, _Placing] = {}  # by the file's real path
    problems: list[str] = []
    skipped: list[Path] = []
    stems = manifest.recorded_below(records or output / manifest.FOLDER)
    for text in inputs:
        count, count_skipped = len(problems), len(skipped)
        try:
            url = urls.parse(text)
            if isinstance(url, Url):
                placings = list(_at_url(url, target))
            else:
                passed = None if is_one_file else skipped
                placings = list(_placings(str(url) if text.strip() else text, output, problems, passed))
        except OSError as error:  # the name is too long, or the folder is not readable
            problems.append(f"{text}: {error.strerror}")
            continue
        except UrlError as error:
            problems.append(str(error))
            continue
        is_output = len(inputs) > 1 and Path(text).resolve() == output.resolve()  # found by `*`
        is_skipped = Path(text).is_file() and len(skipped) > count_skipped
        if not placings and len(problems) == count and not is_output and not is_skipped:
            problems.append(_explain_no_songs(text) if isinstance(url, Path) else f"{url}: no songs there")
        for placing in placings:
            real = placing.path.resolve()
            if is_one_file or real not in stems:
                found.setdefault(real, placing)
    placings = _assign_places([*found.values()], records or output, problems)
    if not placings and not problems and all(Path(text).is_file() for text in inputs):
        problems = [f"{path}: not a song, by its extension" for path in skipped]
        skipped = []
    songs = [InputSong(placing.path, "/".join(placing.place)) for placing in placings]
    return Batch(songs, problems, [*dict.fromkeys(skipped)])


def refuse_shared_folders(songs: Iterable[InputSong], output: Path, names: Collection[str]) -> None:
    """Check that no two songs write to the same place: with links in OUTPUT, two names may be one folder.

    Raises :class:`KmdxError` if two songs share a folder, or the folder of one has the same path as a stem of
    another.

    Parameters
    ----------
    names : collection of str
        Names of the files to be written into each song's folder.
    """
    songs = list(songs)
    owners: dict[Key, InputSong] = {}
    for song in songs:
        folder = _key(song.folder(output).resolve().parts)
        if other := owners.get(folder):
            raise KmdxError(
                f"{song.path} and {other.path} would both be written to {song.folder(output)}; "
                "separate them in two commands with different --output"
            )
        owners[folder] = song
    stems = {(*folder, *_key((name,))): song for folder, song in owners.items() for name in names}
    for folder, song in owners.items():
        for end in range(1, len(folder) + 1):
            if other := stems.get(folder[:end]):
                raise KmdxError(
                    f"{song.path}: its folder {song.folder(output)} would also be a stem of {other.path}; "
                    "separate them in two commands with different --output"
                )


@dataclass
class _Placing:
    """A song for which a place (an output folder) is being chosen."""

    path: Path | Url
    depth: int  # how many of the song's parent folders are part of its place
    tag: str = ""  # text added to its name in parentheses
    kept: Key | None = None  # its place from an earlier run

    @cached_property
    def names(self) -> Key:
        """The names of its parent folders and its own name, made valid on every system."""
        here = self.path
        path = here.location if isinstance(here, Url) else Path(os.path.abspath(here))  # noqa: PTH100 (does not resolve links)
        names = path.parent.parts[1:]
        if path.stem != MIXTURE or not names:
            names = (*names, path.stem)
        return tuple(map(_portable, names))

    @property
    def directory(self) -> Key:
        """The folder that it is in, as a key."""
        return _key(self.names[:-1])

    @property
    def extension(self) -> str:
        """Its extension, which distinguishes it from a file of the same name in the same folder."""
        return _portable(self.path.suffix.lstrip(".") or "no extension")

    @property
    def place(self) -> Key:
        """The folder of its stems, relative to OUTPUT."""
        return self.kept or self.at(self.depth, self.tag)

    def at(self, depth: int, tag: str) -> Key:
        """The place with this many parent folders and this tag."""
        end = f" ({tag})" if tag else ""
        name = file_names.shortened(self.names[-1], file_names.LONGEST - len(end.encode())) + end
        return (*self.names[-1 - depth : -1], name)

    def earlier(self, listing: _Listing) -> Iterator[Path]:
        """The existing folders that an earlier run may have given it."""
        for depth in (*range(self.depth, len(self.names)), *reversed(range(self.depth))):
            if listing.find(self.names[-1 - depth : -1]) is None:
                continue
            for tag in ("", self.extension, *listing.numbers(self.at(depth, ""))):
                folder = listing.find(self.at(depth, tag))
                if folder is not None:
                    yield folder


class _Listing:
    """The folders in OUTPUT, found by name regardless of case and Unicode normal form."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._names: dict[Path, dict[str, str]] = {}
        self._numbers: dict[Path, dict[str, list[str]]] = {}

    def find(self, place: Key) -> Path | None:
        """The folder of a place; None if it does not exist."""
        folder = self.output
        for key in _key(place):
            name = self._names_in(folder).get(key)
            if name is None:
                return None
            folder = folder / name
        return folder

    def numbers(self, place: Key) -> list[str]:
        """The numbers in the names of existing folders, ``<name> (<number>)``."""
        parent = self.find(place[:-1])
        if parent is None:
            return []
        if parent not in self._numbers:
            found = self._numbers[parent] = defaultdict(list)
            for match in filter(None, map(_NUMBERED.fullmatch, self._names_in(parent))):
                found[match[1]].append(match[2])
        return self._numbers[parent].get(_key(place)[-1], [])

    def _names_in(self, folder: Path) -> dict[str, str]:
        if folder not in self._names:
            try:
                names = sorted(path.name for path in folder.iterdir())
            except OSError:  # it does not exist, or is a file
                names = []
            self._names[folder] = {_key((name,))[0]: name for name in names}
        return self._names[folder]


def _assign_places(placings: list[_Placing], output: Path, problems: list[str]) -> list[_Placing]:
    """Give each song its own place; return the songs, except those whose files cannot be compared."""
    listing = _Listing(output)
    taken: dict[Key, _Placing] = {}
    for is_same_song in (manifest.SourceFile.is_at, manifest.SourceFile.is_content_of):
        for placing in [placing for placing in placings if placing.kept is None]:
            try:
                _keep_place(placing, listing, taken, is_same_song)
            except OSError as error:
                problems.append(f"{placing.path}: {error.filename or placing.path}: {error.strerror}")
                placings = [other for other in placings if other is not placing]
            except UrlError as error:
                problems.append(str(error))
                placings = [other for other in placings if other is not placing]

    while clashes := _clashes([placing for placing in placings if placing.kept is None], listing, taken):
        for group, others in clashes:
            _widen(group, others)
    return placings


def _keep_place(
    placing: _Placing,
    listing: _Listing,
    taken: dict[Key, _Placing],
    is_same_song: Callable[[manifest.SourceFile, Path | Url], bool],
) -> None:
    """Keep a song in the folder that already has its stems, unless another song of this run uses it."""
    for folder in placing.earlier(listing):
        place = folder.relative_to(listing.output).parts
        owner = manifest.owner(folder)
        if _key(place) not in taken and owner is not None and is_same_song(owner, placing.path):
            placing.kept = place
            taken[_key(place)] = placing
            return


def _clashes(
    placings: list[_Placing], listing: _Listing, taken: Mapping[Key, _Placing]
) -> list[tuple[list[_Placing], list[_Placing]]]:
    """The groups of songs that share a place, each with the songs that already own it."""
    groups = defaultdict(list)
    for placing in placings:
        groups[_key(placing.place)].append(placing)
    clashes = []
    for key, group in groups.items():
        others = [taken[key]] if key in taken else []
        folder = listing.find(key)
        owner = manifest.owner(folder) if folder is not None and not others else None
        if owner is not None:
            others.append(_Placing(urls.parse(owner.path), 0))
        if len(group) + len(others) > 1:
            clashes.append((group, others))
    return clashes


def _widen(group: list[_Placing], others: list[_Placing]) -> None:
    """Give songs that share a place distinct names: add a parent folder, their extensions, or numbers."""
    everyone = [*group, *others]
    deepest = [len(placing.names) - 1 for placing in group]
    if len({placing.directory for placing in everyone}) > 1 and any(
        placing.depth < most for placing, most in zip(group, deepest, strict=True)
    ):
        for placing, most in zip(group, deepest, strict=True):
            placing.depth = min(placing.depth + 1, most)
    elif len({_key((placing.extension,)) for placing in everyone}) > 1 and not any(p.tag for p in group):
        for placing in group:
            placing.tag = placing.extension
    else:
        used = max((int(placing.tag) for placing in group if placing.tag.isdecimal()), default=0)
        for number, placing in enumerate(group, used + 1):
            placing.tag = str(number)


def _placings(text: str, output: Path, problems: list[str], skipped: list[Path] | None) -> Iterator[_Placing]:
    """The songs that one argument names. Files that accompany songs are added to ``skipped``, if given."""
    path = Path(text)
    if not text.strip():
        return
    if path.is_dir():
        passed = {output.resolve()} - {path.resolve()}
        for song in _in_folder(path, passed, problems, [] if skipped is None else skipped):
            below = song.relative_to(path).parent.parts
            yield _Placing(song, max(0, len(below) - (song.stem == MIXTURE)))
    elif path.is_file() and path.suffix.lower() in COMPANIONS and skipped is not None:
        skipped.append(path)
    elif path.is_file():
        yield _Placing(path, 0)
    elif not path.exists() and glob.has_magic(text):
        for match in map(Path, sorted(glob.glob(text, recursive=True))):  # noqa: PTH207 (may be absolute)
            is_below = output.resolve() in (match.resolve(), *match.resolve().parents)
            if not is_below and match.name not in manifest.recorded(match.parent):
                yield from _placings(str(match), output, problems, skipped)


def _at_url(url: Url, target: Url | None) -> Iterator[_Placing]:
    """The songs that a URL names."""
    for found, is_folder in urls.matches(url):
        if is_folder:
            yield from _below(found, target)
        else:
            yield _Placing(found, 0)


def _below(folder: Url, target: Url | None) -> Iterator[_Placing]:
    """The songs in and below a folder at a URL, sorted by name; without stems that have a record."""
    files = urls.below(folder)
    output = f"{target.text.rstrip('/')}/" if target else "\0"
    skips_output = not f"{folder.text.rstrip('/')}/".startswith(output)
    songs: dict[PurePosixPath, list[tuple[PurePosixPath, Url]]] = defaultdict(list)
    for name in sorted(files):
        path = PurePosixPath(name)
        record = str(path.parent / manifest.FOLDER / manifest.record_name(path.name))
        is_hidden = any(part.startswith(".") for part in path.parts)
        is_output = skips_output and files[name].text.startswith(output)
        if path.suffix.lower() in EXTENSIONS and record not in files and not is_hidden and not is_output:
            songs[path.parent].append((path, files[name]))
    for parent, entries in sorted(songs.items()):
        mixtures = [entry for entry in entries if entry[0].stem == MIXTURE]
        for path, url in mixtures or entries:
            yield _Placing(url, max(0, len(parent.parts) - (path.stem == MIXTURE)))


def _in_folder(folder: Path, passed: set[Path], problems: list[str], skipped: list[Path]) -> Iterator[Path]:
    """The songs in and below a folder, sorted by name; each folder once, even if several links lead to it."""
    if folder.resolve() in passed:
        return
    passed.add(folder.resolve())
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    sounds = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in EXTENSIONS]
    skipped += [entry for entry in entries if entry.is_file() and entry.suffix.lower() in COMPANIONS]
    stems = manifest.recorded(folder)
    yield from [entry for entry in sounds if entry.stem == MIXTURE] or [
        entry for entry in sounds if entry.name not in stems
    ]
    for entry in entries:
        if entry.is_dir():
            try:
                yield from _in_folder(entry, passed, problems, skipped)
            except OSError as error:
                problems.append(f"{entry}: {error.strerror}")


def _portable(name: str) -> str:
    """The name, changed where necessary to be a valid folder on every system, and not that of records."""
    name = file_names.portable(name)
    return f"_{name}" if name.casefold() in ("", manifest.FOLDER) else name


def _key(place: Iterable[str]) -> Key:
    """A place in a form that compares equal regardless of case and Unicode normal form."""
    return tuple(map(file_names.key, place))


def _explain_no_songs(text: str) -> str:
    """Why an argument names no song."""
    if not text.strip():
        return "a song's name is empty: expected a file, a folder or a pattern"
    if Path(text).is_dir():
        return f"{text}: no songs in this folder"
    if Path(text).exists():
        return f"{text}: expected a sound file, found a pipe or a device"
    if glob.has_magic(text):
        matches = glob.glob(text, recursive=True)  # noqa: PTH207 (may be absolute)
        return f"{text}: {'no songs match' if matches else 'no file matches'} this pattern"
    return f"{text}: no such file"
