"""``--output-template``: the paths of stem files in the output folder, such as ``{stem}/{track}.{ext}``.

The records of a song's stems are then in ``OUTPUT/.kmdx/<song>/.kmdx``, because several songs may share a
folder. ``<song>`` is the folder that :mod:`kmdx.inputs` chooses for the song, and so is ``{track}``: every
song of OUTPUT has its own.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kmdx import file_names, manifest
from kmdx.errors import KmdxError, quoted, shown, suggest
from kmdx.familiar import TEMPLATE as DEFAULT
from kmdx.inputs import InputSong

FIELDS = ("track", "trackext", "stem", "ext")


@dataclass(frozen=True)
class Template:
    """A checked template: its literal texts, each with the field that follows it or None."""

    text: str
    parts: tuple[tuple[str, str | None], ...]

    def path(self, song: InputSong, stem: str, extension: str) -> str:
        """The path of a stem file relative to OUTPUT, with ``/`` as separator and valid names.

        ``extension`` starts with a dot.
        """
        values = {
            "track": song.place,
            "trackext": file_names.portable(song.path.suffix.lstrip(".")),
            "stem": stem,
            "ext": "",
        }
        text = "".join(literal + values[field or "ext"] for literal, field in self.parts).removesuffix(".")
        *folders, name = text.split("/")
        longest = file_names.LONGEST - len(extension.encode())
        names = [*map(_portable, folders), f"{_portable(name, longest)}{extension}"]
        return "/".join(names)

    def files(self, song: InputSong, stems: Iterable[str], extension: str) -> dict[str, str]:
        """The path of each stem file, relative to the folder of the song's records."""
        up = "../" * (1 + len(PurePosixPath(song.place).parts))
        return {stem: f"{up}{self.path(song, stem, extension)}" for stem in stems}


def parse(text: str) -> Template | None:
    """Check a template; None for the default one.

    Raises :class:`KmdxError` if it is not a relative path with ``{track}`` that ends with ``.{ext}`` and has
    no other fields than :data:`FIELDS`.
    """
    if text == DEFAULT:
        return None
    what = f"--output-template {quoted(text)}"
    try:
        found = [*string.Formatter().parse(text)]
    except ValueError as error:
        raise KmdxError(f"{what}: {error}") from error
    parts = []
    for literal, field, form, conversion in found:
        if field is not None and field not in FIELDS:
            known = ", ".join(f"{{{name}}}" for name in FIELDS)
            raise KmdxError(
                f"{what}: unknown field {{{shown(field)}}}{suggest(field, FIELDS)}; available: {known}"
            )
        if form or conversion:
            raise KmdxError(f"{what}: {{{field}}} takes no format")
        parts.append((literal, field))
    if not text.endswith(".{ext}") or text.count("{ext}") != 1:
        raise KmdxError(f"{what} must end with .{{ext}}, as in {DEFAULT}")
    names = text.replace("\\", "/").split("/")
    if any(name.strip() in ("", ".", "..") for name in names) or ":" in names[0]:
        raise KmdxError(f"{what}: expected a path below the output folder, as in {DEFAULT}")
    if "track" not in {field for _, field in parts}:  # songs of other commands would replace each other
        raise KmdxError(f"{what} must contain {{track}}, as in {DEFAULT}")
    return Template(text, tuple(parts))


def check(template: Template, songs: Iterable[InputSong], stems: Iterable[str], extension: str) -> None:
    """Raise :class:`KmdxError` if two stems would be written to the same file, or one into another."""
    stems = tuple(stems)
    owners: dict[tuple[str, ...], tuple[InputSong, str]] = {}
    for song in songs:
        for stem in stems:
            parts = tuple(map(file_names.key, template.path(song, stem, extension).split("/")))
            if other := owners.get(parts):
                raise _shared(template, other, (song, stem))
            owners[parts] = song, stem
    for parts, owner in owners.items():
        for end in range(1, len(parts)):
            if other := owners.get(parts[:end]):
                raise _shared(template, other, owner)


def records_folder(output: Path) -> Path:
    """The parent of the folders with the songs' records."""
    return output / manifest.FOLDER


def folder_of(files: Mapping[str, Path]) -> Path:
    """The deepest folder that contains all stem files."""
    parents = [path.parent for path in files.values()]
    shared = parents[0]
    while not all(parent.is_relative_to(shared) for parent in parents):
        shared = shared.parent
    return shared


def _shared(template: Template, first: tuple[InputSong, str], second: tuple[InputSong, str]) -> KmdxError:
    """The error for two stems that share a path; names the field that would tell them apart."""
    (song, stem), (other, other_stem) = first, second
    field = "stem" if stem != other_stem else "track"
    return KmdxError(
        f"--output-template {quoted(template.text)}: {stem} of {song.path} and {other_stem} of {other.path} "
        f"would be written to the same path; use {{{field}}}, as in {DEFAULT}"
    )


def _portable(name: str, longest: int = file_names.LONGEST) -> str:
    """A name that is valid on every system, and neither hidden nor empty."""
    name = file_names.portable(name.strip(), longest)
    return f"_{name}"[:longest] if not name or name.startswith(".") else name
