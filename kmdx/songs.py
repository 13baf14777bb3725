"""Which songs a command line means, and where the stems of each go."""

from __future__ import annotations

import glob
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmdx import audio
from kmdx.errors import AudioError

SOUND = {".wav", ".w64", ".flac", ".aif", ".aiff", ".aifc", ".caf", ".ogg", ".oga", ".opus"}
COMPRESSED = {".mp3", ".m4a", ".aac", ".wma", ".mka", ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"}
EXTENSIONS = SOUND | COMPRESSED
"""What counts as a song inside a folder; a file that is named itself may end in anything."""


@dataclass(frozen=True)
class Song:
    """A file to separate, and the name that its stems' folder gets."""

    path: Path
    name: str

    def folder(self, output: Path) -> Path:
        """Folder of its stems."""
        return output / self.name

    def files(self, output: Path, stems: Iterable[str], format: str) -> dict[str, Path]:
        """File of each stem."""
        extension = audio.FORMATS[format].extension
        return {stem: self.folder(output) / f"{stem}{extension}" for stem in stems}


MADE_BY = ".kmdx.json"
"""In each folder of stems: what they were made of, so that other stems are not taken for them."""

UNNOTED = {"speed": "leaderboard", "engine": "tuned"}
"""What it means if a note says nothing of it, as older ones do not; of the precision it means nothing."""


def made_by(path: Path, **settings: Any) -> dict[str, Any]:
    """What a song's stems are made of: its file and the settings that change them."""
    stat = path.stat()
    return {"song": path.name, "bytes": stat.st_size, "modified": stat.st_mtime_ns, **settings}


def difference(folder: Path, expected: Mapping[str, Any]) -> str | None:
    """In what the stems in a folder differ from those expected; ``None`` if in nothing that is known."""
    try:
        noted = json.loads((folder / MADE_BY).read_text("utf-8"))
        found = {**UNNOTED, "precision": expected.get("precision"), **noted}
    except (OSError, ValueError, TypeError):
        return None
    differing = [key for key, value in expected.items() if found.get(key) != value]
    if not differing:
        return None
    if "bytes" in differing or "modified" in differing or "song" in differing:
        return "another file, or an older version of this one"
    return ", ".join(f"{key} {found.get(key)}, not {expected[key]}" for key in differing)


def note(folder: Path, made: Mapping[str, Any]) -> None:
    """Note what the stems in a folder were made of; an :class:`AudioError` where that cannot be written."""
    partial = folder / f"{MADE_BY}.partial"
    try:
        partial.write_text(json.dumps(made) + "\n", "utf-8")
        partial.replace(folder / MADE_BY)
    except OSError as error:
        raise AudioError(f"{folder / MADE_BY}: cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class Batch:
    """What a command line's arguments came to: songs, and a line for each that is none."""

    songs: list[Song]
    problems: list[str]


def collect(inputs: Iterable[str], output: Path) -> Batch:
    """Find the songs that files, folders and patterns mean.

    A folder means every sound file in it and below, but only ``mixture.*`` of a folder that has one:
    what lies beside a mixture are its stems. Nothing under ``output`` counts. Where two songs would have
    one name, the names of their folders, or else their endings, tell them apart.

    Parameters
    ----------
    inputs : iterable of str
        Paths and glob patterns.
    output : Path
        Folder that the stems' folders lie in.
    """
    found: dict[Path, Path] = {}  # by where it really lies
    problems = []
    for text in inputs:
        try:
            paths = list(_paths(text, output))
        except OSError as error:  # a name too long, a folder that may not be read
            problems.append(f"{text}: {error.strerror}")
            continue
        if not paths:
            problems.append(_nothing(text))
        for path in paths:
            found.setdefault(path.resolve(), path)
    return Batch([Song(path, name) for path, name in _named(list(found.values()))], problems)


def _named(paths: list[Path]) -> Iterator[tuple[Path, str]]:
    """Give each song a name of its own."""
    names = Counter(map(_name, paths))
    longer = Counter(_longer_name(path) for path in paths)
    for path in paths:
        name = _name(path)
        if names[name] > 1:
            name = _longer_name(path)
            if longer[name] > 1 or name in names:
                name = f"{name} ({path.suffix.lstrip('.') or 'no ending'})"
        yield path, name


def _longer_name(path: Path) -> str:
    """A song's name behind its folder's."""
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 (links are left as they are)
    return f"{folder.name} - {_name(path)}"


def _paths(text: str, output: Path) -> Iterator[Path]:
    """Files that one argument means; none if there are none."""
    path = Path(text)
    if not text.strip():
        return
    if path.is_dir():
        yield from _in_folder(path, {output.resolve()})
    elif path.exists():
        yield path
    elif glob.has_magic(text):
        for match in sorted(glob.glob(text, recursive=True)):  # noqa: PTH207 (may be absolute)
            yield from _paths(match, output)


def _in_folder(folder: Path, passed: set[Path]) -> Iterator[Path]:
    """Songs in a folder and below it, in order of name; each folder once, whatever links lead to it."""
    if folder.resolve() in passed:
        return
    passed.add(folder.resolve())
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    sounds = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in EXTENSIONS]
    yield from [entry for entry in sounds if entry.stem == "mixture"] or sounds
    for entry in entries:
        if entry.is_dir():
            yield from _in_folder(entry, passed)


def _name(path: Path) -> str:
    """Name of a song's folder: the file's, or for ``mixture.*`` the folder's that it lies in.

    Dots and spaces at the end are left out, since not every file system keeps them.
    """
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 (links are left as they are)
    name = folder.name if path.stem == "mixture" else path.stem
    return name.rstrip(". ") or path.name.replace(".", "_")


def _nothing(text: str) -> str:
    """Why an argument gave no song."""
    if not text.strip():
        return "a song's name is empty: expected a file, a folder or a pattern"
    if Path(text).is_dir():
        return f"{text}: no sound files in this folder"
    if glob.has_magic(text):
        return f"{text}: nothing matches this pattern"
    return f"{text}: no such file"
