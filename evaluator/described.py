"""Reads ``dataset.yaml``, a small file that describes the layout of any data set.

Format
------
The file is in the data set's folder, or anywhere else if it has ``root``. DATA is the folder or the file::

    stems:                                  # required: the files that sum to each stem
      drums: ["*Kick*", "*Snare*", "*OH*"]  # patterns of file names, one or a list
      bass: "*Bass*"
      vocals: ["*Vox*", "vocals/*"]         # with a folder: relative to the song's folder
      other: ["*Gtr*", "*Keys*"]
    mixture: "*mix*"                        # optional; if no file matches, the stems are summed
    ignore: ["*Click*", "*_ref*"]           # optional: sound files that are not reported as unused
    splits:                                 # optional: names or patterns of songs; else folders are splits
      test: ["One", "A*"]
      train: ["B*"]
    uneven: 0.5                             # optional: seconds that a song's files may differ in length
    root: ../recordings                     # optional: where the songs are, relative to this file

A song is a folder with a file that matches a stem. Patterns may contain ``*``, ``?`` and ``[...]``. They
ignore case, and match a file's name with or without its ending. Several files of a stem are summed, and mono
files are copied to both channels. A file that matches two stems is an error. Stems may have any name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

from evaluator import layouts
from evaluator.layouts import Scan, SongFiles, is_stem_name, stem_named
from evaluator.sources import SOUNDS, AudioSource
from kmdx import documents
from kmdx.challenge import MIXTURE
from kmdx.documents import YamlPart
from kmdx.errors import DocumentError, KmdxError, quoted, shown
from kmdx.file_names import key

FILE = "dataset.yaml"
MAX_UNEVEN = 60.0  # seconds


@dataclass(frozen=True)
class Description:
    """The content of a ``dataset.yaml``; :func:`~kmdx.file_names.key` normalizes patterns and names alike."""

    path: Path  # the file itself
    root: Path  # folder of the songs
    stems: dict[str, tuple[str, ...]]  # patterns of each stem's files
    mixture: tuple[str, ...]
    ignore: tuple[str, ...]
    """``mixture`` and ``ignore``: patterns of the mixture, and of files that are not reported as unused."""
    splits: dict[str, tuple[str, ...]]  # names or patterns of each split's songs
    uneven: float  # seconds that a song's files may differ in length


def file_of(data: Path) -> Path | None:
    """The description file that DATA contains or is; None if there is none."""
    if data.suffix.lower() in (".yaml", ".yml") and data.is_file():
        return data
    path = data / FILE
    return path if path.is_file() else None


def load(path: Path) -> Description:
    """Read a description.

    Raises
    ------
    KmdxError
        If it cannot be read, or a key is unknown, missing or invalid. The message names the line and the key.
    """
    try:
        return documents.parse(documents.read_text(path)).read(_description, path)
    except DocumentError as error:
        hint = "; put quotes around a pattern that begins with *" if "alias" in error.problem else ""
        raise KmdxError(f"{path}: {error}{hint}") from error


def scan(description: Description) -> Scan:
    """Find the songs of a described data set.

    Raises
    ------
    KmdxError
        If a file matches two stems, or a split names a song that does not exist.
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
    """The song in a folder according to a description; ``None`` if no file matches a stem.

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
                f"{description.path}: {path} matches both {stems[0]} and {stems[1]}; make the patterns "
                "narrower, or add the file to ignore"
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
        problems.append((True, f"two files match the mixture in {description.path.name}: {names}"))
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
    """Whether a file's path in its song's folder matches one of the patterns."""
    parts = [key(part) for part in relative.parts]
    name = key(relative.stem)
    for pattern in map(key, patterns):
        *folders, last = pattern.split("/")
        in_folder = len(folders) == len(parts) - 1 and all(map(fnmatchcase, parts, folders))
        if in_folder and (fnmatchcase(parts[-1], last) or fnmatchcase(name, last)):
            return True
    return False


def _without_copies(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split files into those in the preferred format, and copies of these in other formats."""
    chosen: dict[Path, Path] = {}
    for path in sorted(paths, key=lambda path: (SOUNDS.index(path.suffix.lower()), path)):
        chosen.setdefault(path.with_suffix(""), path)
    kept = sorted(chosen.values())
    return kept, [path for path in paths if path not in kept]


def _split(description: Description, songs: Sequence[SongFiles]) -> dict[str | None, list[SongFiles]]:
    """The songs of each split that a description names."""
    splits: dict[str | None, list[SongFiles]] = {}
    placed: dict[str, str] = {}
    for split, patterns in description.splits.items():
        for pattern in patterns:
            exact = [each for each in songs if key(each.name) == key(pattern)]
            chosen = exact or [each for each in songs if fnmatchcase(key(each.name), key(pattern))]
            if not chosen:
                raise KmdxError(f"{description.path}: splits.{split}: no song is named {quoted(pattern)}")
            for each in chosen:
                if placed.setdefault(each.name, split) != split:
                    raise KmdxError(
                        f"{description.path}: splits: {each.name} is in both {placed[each.name]} and "
                        f"{split}; a song may be in one split only"
                    )
                if each not in splits.setdefault(split, []):
                    splits[split].append(each)
    rest = [each for each in songs if each.name not in placed]
    return {**splits, **({None: rest} if rest else {})}


def _description(
    path: Path,
    stems: YamlPart,
    mixture: YamlPart | None = None,
    ignore: YamlPart | None = None,
    splits: YamlPart | None = None,
    uneven: YamlPart | None = None,
    root: str = "",
) -> Description:
    patterns: dict[str, tuple[str, ...]] = {}
    for given, part in stems.entries().items():
        name = stem_named(given) or given
        if not is_stem_name(name):
            raise stems.error(f"{quoted(given)} cannot be the name of a stem", given)
        if name in patterns:
            raise part.error(f"means {name}, which is listed already")
        patterns[name] = _patterns(part)
    if not patterns:
        raise stems.error("expected at least one stem")
    return Description(
        path,
        path.parent / Path(root).expanduser(),
        patterns,
        _patterns(mixture) if mixture else (),
        _patterns(ignore) if ignore else (),
        {name: _patterns(part) for name, part in splits.entries().items()} if splits else {},
        _seconds(uneven) if uneven else 0.0,
    )


def _patterns(part: YamlPart) -> tuple[str, ...]:
    """One pattern or a list of them."""
    found = part.plain()
    patterns = found if isinstance(found, list) else [found]
    if isinstance(found, dict) or not patterns:
        raise part.error("expected a pattern or a list of patterns")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            found_text = "nothing" if pattern is None else quoted(pattern)
            raise part.error(f"expected text, found {found_text}")
    return tuple(pattern.removeprefix("./") for pattern in patterns)


def _seconds(part: YamlPart) -> float:
    number = part.plain()
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MAX_UNEVEN:
        raise part.error(f"expected a number of seconds from 0 to {MAX_UNEVEN:g}, found {quoted(number)}")
    return float(number)
