"""Which songs a command line means, and where the stems of each go."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kmdx import audio

EXTENSIONS = frozenset(
    [
        ".wav",
        ".flac",
        ".ogg",
        ".oga",
        ".opus",
        ".mp3",
        ".m4a",
        ".aac",
        ".mp4",
        ".mov",
        ".mkv",
        ".webm",
        ".avi",
        ".aif",
        ".aiff",
        ".aifc",
        ".caf",
        ".w64",
        ".wma",
        ".mka",
        ".m4v",
    ]
)
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


@dataclass(frozen=True)
class Batch:
    """What a command line's arguments came to: songs, and a line for each that is none."""

    songs: list[Song]
    problems: list[str]


def collect(inputs: Iterable[str], output: Path) -> Batch:
    """Find the songs that files, folders and patterns mean.

    A folder means every sound file in it and below, but only ``mixture.*`` of a folder that has one:
    what lies beside a mixture are its stems. Nothing under ``output`` counts. Two songs of one name
    would overwrite each other's stems, so the second is a problem.

    Parameters
    ----------
    inputs : iterable of str
        Paths and glob patterns.
    output : Path
        Folder that the stems' folders lie in.
    """
    found: dict[str, Song] = {}
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
            song = Song(path, _name(path))
            other = found.setdefault(song.name, song)
            if not other.path.samefile(path):
                problems.append(
                    f"{path}: {other.path} has the same name, and both would go to {song.folder(output)}; "
                    "separate them into different folders with --output"
                )
    return Batch(list(found.values()), problems)


def _paths(text: str, output: Path) -> Iterator[Path]:
    """Files that one argument means; none if there are none."""
    path = Path(text)
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
    name = path.absolute().parent.name if path.stem == "mixture" else path.stem
    return name.rstrip(". ") or path.name.replace(".", "_")


def _nothing(text: str) -> str:
    """Why an argument gave no song."""
    if Path(text).is_dir():
        return f"{text}: no sound files in this folder"
    if glob.has_magic(text):
        return f"{text}: nothing matches this pattern"
    return f"{text}: no such file"
