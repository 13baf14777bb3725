"""Data sets in any layout, described by a small YAML file.

Format
------
``dataset.yaml`` in the data set's folder, or anywhere else with ``root``; DATA is the folder or the file::

    stems:                                  # required: what each stem is the sum of
      drums: ["*Kick*", "*Snare*", "*OH*"]  # patterns of file names, one or a list
      bass: "*Bass*"
      vocals: ["*Vox*", "vocals/*"]         # with a folder: relative to the song's folder
      other: ["*Gtr*", "*Keys*"]
    mixture: "*mix*"                        # optional; without a match the mixture is the stems' sum
    ignore: ["*Click*", "*_ref*"]           # optional: sound files that are not to be listed as unknown
    splits:                                 # optional: names or patterns of songs; else folders are splits
      test: ["One", "A*"]
      train: ["B*"]
    uneven: 0.5                             # optional: seconds that a song's files may differ in length
    root: ../recordings                     # optional: where the songs are, relative to this file

A song is a folder with a file that matches a stem. Patterns have ``*``, ``?`` and ``[...]``, are compared
without case, and match a file's name with or without its ending. Several files of a stem are summed; those
with one channel count for both. A file that matches two stems is an error. Names of stems are free.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import yaml

from evaluator import layouts
from evaluator.layouts import Scan, SongFiles, is_stem_name, key, stem_named
from evaluator.sources import SOUNDS, AudioSource
from kmdx import documents
from kmdx.challenge import MIXTURE
from kmdx.errors import DocumentError, KmdxError, quoted, shown, suggest

FILE = "dataset.yaml"
KEYS = ("stems", "mixture", "ignore", "splits", "uneven", "root")
MAX_UNEVEN = 60.0  # seconds


@dataclass(frozen=True)
class Description:
    """The content of a ``dataset.yaml``; patterns are in the form of :func:`~evaluator.layouts.key`.

    Attributes
    ----------
    path : Path
        The file itself.
    root : Path
        Folder of the songs.
    stems : mapping of str to tuple of str
        Patterns of each stem's files.
    mixture, ignore : tuple of str
        Patterns of the mixture, and of files that are not to be listed.
    splits : mapping of str to tuple of str
        Names or patterns of each split's songs.
    uneven : float
        Seconds that a song's files may differ in length.
    """

    path: Path
    root: Path
    stems: dict[str, tuple[str, ...]]
    mixture: tuple[str, ...]
    ignore: tuple[str, ...]
    splits: dict[str, tuple[str, ...]]
    uneven: float


def file_of(data: Path) -> Path | None:
    """The description that belongs to DATA, if it has one or is one."""
    if data.suffix.lower() in (".yaml", ".yml") and data.is_file():
        return data
    path = data / FILE
    return path if path.is_file() else None


def load(path: Path) -> Description:
    """Read a description.

    Raises
    ------
    KmdxError
        If it cannot be read or a key is unknown, missing or of another kind; names the line and the key.
    """
    try:
        root = documents.compose(documents.read_text(path))
        if root is None:
            raise DocumentError("is empty, expected a mapping with the key stems")
        return _parsed(path, root)
    except DocumentError as error:
        hint = ": a pattern that begins with * needs quotes" if "alias" in error.problem else ""
        raise KmdxError(f"{path}: {error}{hint}") from error


def scan(description: Description) -> Scan:
    """Find the songs that a description means.

    Raises
    ------
    KmdxError
        If a file matches two stems, or a split names a song that there is not.
    OSError
        If a folder cannot be read.
    """
    if not description.root.is_dir():
        raise KmdxError(f"{description.path}: root: {description.root} is not a folder")
    found = layouts.scan(description.root, lambda path: song(description, path))
    if not description.splits or not found.splits:
        return found
    songs = [each for group in found.splits.values() for each in group]
    return replace(found, splits=_split(description, songs))


def song(description: Description, folder: Path) -> SongFiles | None:
    """The song that a folder is by a description; ``None`` if none of its files is of a stem.

    Raises
    ------
    KmdxError
        If a file matches two stems.
    """
    if not folder.is_dir():
        return None
    matched: dict[str, list[Path]] = defaultdict(list)
    extra = []
    for path in layouts.sounds_below(folder):
        relative = path.relative_to(folder)
        if _matches(relative, description.ignore):
            continue
        if _matches(relative, description.mixture):
            matched[MIXTURE].append(path)
            continue
        stems = [name for name, patterns in description.stems.items() if _matches(relative, patterns)]
        if len(stems) > 1:
            raise KmdxError(
                f"{description.path}: {path} matches {stems[0]} and {stems[1]}: make the patterns narrower, "
                "or add it to ignore"
            )
        if stems:
            matched[stems[0]].append(path)
        else:
            extra.append(path)
    if not matched.keys() & description.stems.keys():
        return None
    sources = {}
    for name in (MIXTURE, *description.stems):
        files, copies = _without_copies(matched.get(name, []))
        extra += copies
        if files:
            sources[name] = tuple(map(AudioSource, files))
    problems = []
    if len(sources.get(MIXTURE, ())) > 1:
        names = " and ".join(shown(source.path.name) for source in sources[MIXTURE][:2])
        problems.append((True, f"two files match mixture in {description.path.name}: {names}"))
    return SongFiles(
        layouts.folder_name(folder),
        folder,
        sources,
        tuple(sorted(extra)),
        tuple(problems),
        multitrack=True,
        uneven=description.uneven,
        declared=tuple(description.stems),
    )


def _matches(relative: PurePath, patterns: Sequence[str]) -> bool:
    """Whether a file's path in its song matches one of the patterns, folder by folder."""
    parts = [key(part) for part in relative.parts]
    name = key(relative.stem)
    for pattern in patterns:
        *folders, last = pattern.split("/")
        in_folder = len(folders) == len(parts) - 1 and all(map(fnmatchcase, parts, folders))
        if in_folder and (fnmatchcase(parts[-1], last) or fnmatchcase(name, last)):
            return True
    return False


def _without_copies(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Files of different names, the preferred format of each, and the others: copies in other formats."""
    chosen: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: (SOUNDS.index(path.suffix.lower()), path)):
        chosen.setdefault(path.with_suffix(""), path)
    kept = sorted(chosen.values())
    return kept, [path for path in paths if path not in kept]


def _split(description: Description, songs: Sequence[SongFiles]) -> dict[str | None, list[SongFiles]]:
    """Songs by the splits that a description names."""
    splits: dict[str | None, list[SongFiles]] = {}
    placed: dict[str, str] = {}
    for split, patterns in description.splits.items():
        for pattern in patterns:
            exact = [each for each in songs if key(each.name) == pattern]
            chosen = exact or [each for each in songs if fnmatchcase(key(each.name), pattern)]
            if not chosen:
                raise KmdxError(f"{description.path}: splits.{split}: no song is named {quoted(pattern)}")
            for each in chosen:
                if placed.setdefault(each.name, split) != split:
                    raise KmdxError(
                        f"{description.path}: splits: {each.name} is in {placed[each.name]} and in {split}"
                    )
                if each not in splits.setdefault(split, []):
                    splits[split].append(each)
    rest = [each for each in songs if each.name not in placed]
    return {**splits, **({None: rest} if rest else {})}


def _parsed(path: Path, root: yaml.Node) -> Description:
    known = _mapping(root, "the file")
    for name, node in known.items():
        if name not in KEYS:
            raise _wrong(node, f"unknown key {quoted(name)}: expected {', '.join(KEYS)}{suggest(name, KEYS)}")
    if "stems" not in known:
        raise DocumentError("no key stems: expected patterns of files for each stem")
    stems: dict[str, tuple[str, ...]] = {}
    for given, node in _mapping(known["stems"], "stems").items():
        name = stem_named(given) or given
        if not is_stem_name(name):
            raise _wrong(node, f"stems: {quoted(given)} cannot be the name of a stem")
        if name in stems:
            raise _wrong(node, f"stems: {given} is {name}, which is there already")
        stems[name] = _patterns(node, f"stems.{given}")
    if not stems:
        raise _wrong(known["stems"], "stems: expected at least one stem")
    splits = _mapping(known["splits"], "splits") if "splits" in known else {}
    return Description(
        path,
        path.parent / _text(known["root"], "root") if "root" in known else path.parent,
        stems,
        _patterns(known["mixture"], "mixture") if "mixture" in known else (),
        _patterns(known["ignore"], "ignore") if "ignore" in known else (),
        {name: _patterns(node, f"splits.{name}") for name, node in splits.items()},
        _seconds(known["uneven"], "uneven") if "uneven" in known else 0.0,
    )


def _wrong(node: yaml.Node, problem: str) -> DocumentError:
    return DocumentError(problem, node.start_mark.line + 1)


def _mapping(node: yaml.Node, what: str) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(node, f"{what}: expected a mapping, such as drums: ['*Kick*', '*Snare*']")
    return {name.value: child for name, child in node.value}


def _text(node: yaml.Node, what: str) -> str:
    text = documents.value(node)
    if not isinstance(text, str) or not text.strip():
        raise _wrong(node, f"{what}: expected a text, found {quoted(text)}")
    return text


def _patterns(node: yaml.Node, what: str) -> tuple[str, ...]:
    """One pattern or a list of them."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if isinstance(node, yaml.MappingNode) or not nodes:
        raise _wrong(node, f"{what}: expected a pattern or a list of patterns")
    return tuple(key(_text(each, what)).removeprefix("./") for each in nodes)


def _seconds(node: yaml.Node, what: str) -> float:
    number = documents.value(node)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MAX_UNEVEN:
        raise _wrong(node, f"{what}: expected seconds from 0 to {MAX_UNEVEN:g}, found {quoted(number)}")
    return float(number)
