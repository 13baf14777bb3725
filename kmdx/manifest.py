"""Records of finished stems and of the settings that each was made with.

The stems of a song are accompanied by a hidden folder, ``.kmdx``, with one JSON record for each stem file:
its size and checksum, the song it was made from, and every setting that changes its sound. A stem counts as
finished only if its size matches its record.

Stems are written in these steps. A kill at any moment leaves the old finished stem, the new finished stem,
or a stem that does not count as finished:

1. Each stem is written under a hidden name, ``.<file>.<random>.partial``.
2. Its record is written as ``.kmdx/.<file>.json.new``.
3. The stem is renamed to its own name, which replaces an older one atomically.
4. Its record is renamed, too.

If a kill left a ``.json.new``, the stem's checksum shows which of the two records describes it. Only one
process at a time writes to a folder: the one that holds the lock ``.kmdx/lock``. A worker of a cluster also
holds the lock ``.kmdx/claim`` while it separates.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kmdx import documents, files, urls
from kmdx.errors import AudioError, DocumentError, KmdxWarning
from kmdx.urls import Url

FOLDER = ".kmdx"
# After a dot and the file name, so that `**/vocals.*` finds only stems.
_RECORD, _NEW = ".json", ".json.new"
_LOCK_TIMEOUT = 120.0  # seconds to wait for another process
_LOCK_QUIET = 1.0  # seconds before the wait is reported


@dataclass(frozen=True)
class SourceFile:
    """The file that a song was read from: its path, size in bytes, two times in ns, and SHA-256.

    Programs can set ``modified`` to any time, so two songs may share it; only the system sets ``changed``.
    Of a song at a URL, ``changed`` stands for the version that its server states.
    """

    path: str
    bytes: int
    modified: int
    sha256: str
    changed: int = 0

    def is_content_of(self, path: Path | Url) -> bool:
        """Whether a file has this content; the checksum is skipped for the same, untouched file."""
        stat = path.stat()
        if stat.st_size not in (self.bytes, urls.UNKNOWN):
            return False
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        if self.is_at(path) and times == (self.modified, self.changed):
            return True
        with urls.local(path) as file:
            return files.sha256(file) == self.sha256

    def is_at(self, path: Path | Url) -> bool:
        """Whether this record's path is that of a file, whatever its content."""
        return self.path == str(path.resolve())


@dataclass(frozen=True)
class StemSettings:
    """Everything except the song that affects a stem's sound or file."""

    ensemble: str  # the plan's name; for messages only
    plan: str  # checksum of the part of the plan that the stem needs
    weights: Mapping[str, str | None]
    """Checksum of each weight file that it needs; None for a missing file, which matches any checksum."""
    precision: str
    engine: str
    speed: str
    """``precision``, ``engine`` and ``speed``: the options of the same names."""
    start: float  # start of the separated part of the song, in seconds
    duration: float | None  # length of that part in seconds; None for the rest of the song
    downmix: bool
    format: str
    """A name in :data:`kmdx.audio.FORMATS`."""

    def difference(self, other: StemSettings, ignored: Collection[str] = ()) -> str | None:
        """How other settings differ from these, such as ``speed fast, not balanced``; None if they do not."""
        found = []
        for name in (field.name for field in fields(self)):
            own, its = getattr(self, name), getattr(other, name)
            if name == "weights":
                changed = {key for key in {*own, *its} if None not in (own.get(key, ""), its.get(key, ""))}
                changed = {key for key in changed if own.get(key) != its.get(key)}
                found += [f"other weights of {key}" for key in sorted(changed)]
            elif name == "plan" and own != its:
                names = (other.ensemble, self.ensemble)
                text = "ensemble {}, not {}".format(*names) if len({*names}) > 1 else "another version of {}"
                found.append(text.format(self.ensemble))
            elif name not in ("ensemble", *ignored) and own != its:
                found.append(f"{name} {its}, not {own}")
        return ", ".join(found) or None


@dataclass(frozen=True)
class StemRecord:
    """The record of one stem file."""

    file: str
    stem: str
    """``file`` and ``stem``: name of the file, and of the stem in it."""
    bytes: int  # size of the file
    sha256: str  # checksum of the file
    song: SourceFile
    settings: StemSettings
    program: str  # the version of kmdx-net that wrote it

    def difference(
        self, song: Path | Url, wanted: StemSettings | None, ignored: Collection[str] = ()
    ) -> str | None:
        """How the file differs from what would be made of a song now; None if it does not."""
        if wanted is None:
            return f"ensemble {self.settings.ensemble}; the current one has no stem {self.stem}"
        if not self.song.is_content_of(song):
            return "another song, or an older version of this one"
        return wanted.difference(self.settings, ignored)


@dataclass(frozen=True)
class Wanted:
    """The stems to make of one song."""

    song: Path | Url
    folder: Path  # output folder of its stems
    files: Mapping[str, str]  # file name of each stem to make, or its path relative to ``folder``
    settings: Callable[[str], StemSettings | None]
    """Returns the settings that a stem would be made with now; None if the plan does not have the stem."""
    overwrite: bool = False
    """Whether to make finished stems again, and to replace those made with other settings."""

    def only(self, stems: Collection[str]) -> Wanted:
        """Some of these stems."""
        return replace(self, files={stem: self.files[stem] for stem in stems})

    @property
    def paths(self) -> dict[str, Path]:
        """The path of each stem file."""
        return {stem: file_path(self.folder, name) for stem, name in self.files.items()}


@dataclass(frozen=True)
class FolderStatus:
    """What a song's folder already contains."""

    missing: list[str]  # stems still to be made with these settings; with ``overwrite``, all stems
    conflicts: list[str]
    """Files made with other settings that prevent the work, and how their settings differ."""
    stale: list[str]  # other files that were made with other settings or have no record
    unknown: list[str]  # files that have the name of a stem to be made but do not match a record


def identify(song: Path | Url, copy: Path | None = None) -> SourceFile:
    """Return the current state of a song's file; raises :class:`OSError` if it cannot be read.

    Of a song at a URL, ``copy`` is what was fetched.
    """
    stat, file = song.stat(), copy or Path(str(song))
    return SourceFile(
        str(song.resolve()), file.stat().st_size, stat.st_mtime_ns, files.sha256(file), stat.st_ctime_ns
    )


def record_name(file: str) -> str:
    """The name of a stem file's record, in the folder :data:`FOLDER`."""
    return f".{_record_stem(file)}{_RECORD}"


def file_path(folder: Path, name: str) -> Path:
    """The path of a stem file, whose name may be a path relative to the folder of its records."""
    return Path(os.path.normpath(folder / name)) if "/" in name else folder / name


def _record_stem(file: str) -> str:
    """The name of a file, or the checksum of a path, which may be longer than a name may be."""
    return hashlib.sha256(file.encode(errors="surrogateescape")).hexdigest()[:32] if "/" in file else file


def owner(folder: Path) -> SourceFile | None:
    """Return the song whose stems are in a folder; None if the folder has no records."""
    record = any_record(folder)
    return None if record is None else record.song


def any_record(folder: Path) -> StemRecord | None:
    """Return the record of one of the stems in a folder; None if the folder has no records."""
    if not any(_records_in(folder, _NEW)):  # then the first record of an existing file is enough
        return next(iter(_old_records(folder)), None)
    return next(iter(_records(folder).values()), None)


def recorded(folder: Path) -> set[str]:
    """Names of the files in a folder that have a record, and are therefore stems, not songs."""
    return {*_records(folder)}


def finished(folder: Path) -> list[tuple[str, StemSettings]]:
    """The stems that are finished in a folder, and what each was made with."""
    records = _records(folder).values()
    return [(record.stem, record.settings) for record in records if _has_size(folder, record)]


def recorded_below(records: Path) -> set[Path]:
    """Real paths of all stems that have a record in a folder of songs' records, at any depth."""
    homes = [path.parent for path in records.rglob(FOLDER)]
    return {file_path(home, name).resolve() for home in homes for name in _records(home)}


def status(wanted: Wanted, is_sound: Callable[[str], bool]) -> FolderStatus:
    """Compare the files in a song's folder with the stems to make.

    Raises :class:`OSError` if the folder or the song cannot be read.

    Parameters
    ----------
    is_sound : callable
        Whether a file name has an extension of stems.
    """
    records = _records(wanted.folder)
    finished = {name for name, record in records.items() if _has_size(wanted.folder, record)}
    targets = set(wanted.files.values())
    differing = {}
    for name, record in records.items():
        ignored = () if name in targets else ("format",)
        difference = record.difference(wanted.song, wanted.settings(record.stem), ignored)
        if difference is not None:
            differing[name] = f"{name.replace('../', '')}: {difference}"
    missing = [
        stem
        for stem, name in wanted.files.items()
        if wanted.overwrite or name not in finished or name in differing
    ]
    conflicts = [] if wanted.overwrite or not missing else [*differing.values()]
    stale = [] if conflicts else [text for name, text in differing.items() if name not in targets]
    present = [path.name for path in _entries(wanted.folder, is_sound) if path.is_file()]
    stale += [
        f"{name}: no record of how it was made"
        for name in present
        if not (name in records or name in targets) and wanted.settings(Path(name).stem) is not None
    ]
    unknown = sorted(name for name in targets - finished if file_path(wanted.folder, name).is_file())
    return FolderStatus(missing, conflicts, stale, [] if conflicts else unknown)


def clean(folder: Path, names: Collection[str] = ()) -> None:
    """Remove the leftovers of an interrupted run from a folder, unless another process is writing to it.

    ``names`` are those of stems that may be in other folders.
    """
    if not any(_partials(folder, names)) and not any(_records_in(folder, _NEW)):
        return
    with suppress(OSError), _lock(folder, 0):
        _recover(folder, names)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other workers from separating the same song meanwhile.

    Raises :class:`kmdx.files.Locked` if another worker is separating it, and another :class:`OSError` if the
    folder cannot be made.
    """
    with _lock(folder, 0, "claim"):
        yield


@contextmanager
def writing(wanted: Wanted, song: SourceFile) -> Iterator[Callable[[Mapping[Path, Path]], None]]:
    """Lock a song's folder while its stems are written.

    Yields a function that writes the records. Call it with the hidden name of each path when all stems are
    complete, before they are renamed. Raises :class:`AudioError` if the folder cannot be made or locked, or
    now has stems made with other settings.
    """

    def prepare(partials: Mapping[Path, Path]) -> None:
        for stem, name in wanted.files.items():
            path = wanted.paths[stem]
            partial = partials[path]
            settings = wanted.settings(stem)
            assert settings is not None, "only stems of the plan are written"
            record = StemRecord(
                file=name,
                stem=stem,
                bytes=partial.stat().st_size,
                sha256=files.sha256(partial),
                song=song,
                settings=settings,
                program=f"kmdx-net {version('kmdx-net')}",
            )
            _keep_unknown(wanted.folder, name, partial)
            _write_new(wanted.folder, record)

    try:
        names = wanted.files.values()
        with _lock(wanted.folder, _LOCK_TIMEOUT):
            _recover(wanted.folder, names)
            other = owner(wanted.folder)
            if other is not None and song.path != other.path and song.sha256 != other.sha256:
                raise AudioError(
                    f"{wanted.folder}: meanwhile, another process wrote the stems of {other.path} to it; "
                    "nothing was replaced; run the command again"
                )
            if found := status(wanted, lambda _: False).conflicts:
                raise AudioError(
                    f"{wanted.folder}: meanwhile, another process wrote stems with different settings to it"
                    f" ({'; '.join(found)}); nothing was replaced"
                )
            try:
                yield prepare
            finally:
                _recover(wanted.folder, names)
    except files.Locked as error:
        raise AudioError(
            f"{wanted.folder}: another process has been writing to it for {_LOCK_TIMEOUT / 60:.0f} minutes; "
            "nothing was written; run the command again when it has finished"
        ) from error
    except OSError as error:
        raise AudioError(f"{wanted.folder}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _lock(folder: Path, timeout: float, name: str = "lock") -> Iterator[None]:
    """Be the only process that writes to a folder; a failure leaves no new files or folders behind."""
    place = folder / FOLDER

    def on_wait() -> None:
        text = f"waiting for another process that is writing to {folder}"
        warnings.warn(text, KmdxWarning, stacklevel=7)

    with files.folder(place), files.locked(place / name, timeout, on_wait, _LOCK_QUIET):
        try:
            yield
        except BaseException:
            if not any(_records_in(folder, _RECORD)):
                with suppress(OSError):  # Windows does not remove an open file
                    (place / name).unlink()
            raise


def _recover(folder: Path, names: Collection[str] = ()) -> None:
    """Finish or undo the work of an interrupted run in a folder, which must be locked."""
    for partial in _partials(folder, names):
        partial.unlink(missing_ok=True)
    for new in [*_records_in(folder, _NEW)]:
        record = _read(new)
        if record is not None and _has_content(folder, record):
            new.replace(new.with_suffix(""))
        else:
            new.unlink(missing_ok=True)
    files.sync_folder(folder)
    files.sync_folder(folder / FOLDER)


def _records(folder: Path) -> dict[str, StemRecord]:
    """The records of existing files in a folder; of two for one file, the one that matches its content."""
    found = {record.file: record for record in _old_records(folder)}
    for place in _records_in(folder, _NEW):
        record = _read(place)
        if record is None or not file_path(folder, record.file).is_file():
            continue
        if _has_content(folder, record):
            found[record.file] = record
        elif record.file in found and not _has_content(folder, found[record.file]):
            del found[record.file]
    return found


def _old_records(folder: Path) -> Iterator[StemRecord]:
    """The records of existing files in a folder, without those that are not in effect yet."""
    for place in _records_in(folder, _RECORD):
        record = _read(place)
        if record is not None and file_path(folder, record.file).is_file():
            yield record


def _has_size(folder: Path, record: StemRecord) -> bool:
    """Whether the file of a record exists and has the recorded size."""
    path = file_path(folder, record.file)
    return path.is_file() and path.stat().st_size == record.bytes


def _has_content(folder: Path, record: StemRecord) -> bool:
    """Whether the file of a record exists and has the recorded content."""
    return _has_size(folder, record) and files.sha256(file_path(folder, record.file)) == record.sha256


def _keep_unknown(folder: Path, name: str, new: Path) -> None:
    """Rename a file that does not match its record, unless the new file begins with the same bytes."""
    path = file_path(folder, name)
    record = _records(folder).get(name)
    is_recorded = record is not None and _has_content(folder, record)
    if not path.exists() or is_recorded or _begins_with(new, path):
        return
    backup = path.with_name(f"{path.name}.bak")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak{number}")
    path.rename(backup)


def _begins_with(whole: Path, part: Path) -> bool:
    """Whether the content of ``whole`` begins with that of ``part``."""
    with whole.open("rb") as first, part.open("rb") as second:
        while block := second.read(2**20):
            if block != first.read(len(block)):
                return False
    return True


def _write_new(folder: Path, record: StemRecord) -> None:
    """Write a record that takes effect when its stem file has been renamed."""
    text = json.dumps(asdict(record), indent=1)
    files.write_text(folder / FOLDER / f".{_record_stem(record.file)}{_NEW}", f"{text}\n")


def _read(path: Path) -> StemRecord | None:
    """Read a record; None if the file is not a record or is incomplete."""
    try:
        content = documents.read_json(path)
        song, settings = SourceFile(**content["song"]), StemSettings(**content["settings"])
        record = StemRecord(**{**content, "song": song, "settings": settings})
    except (DocumentError, TypeError, KeyError):  # not JSON, or not the fields of a record
        return None
    is_usable = _is_of_types(record) and path.name.startswith(record_name(record.file))
    return record if is_usable else None


def _is_of_types(record: StemRecord) -> bool:
    """Whether the values of a record that its readers use have their declared types."""
    song, settings = record.song, record.settings
    texts: list[Any] = [record.file, record.stem, record.sha256, song.path, song.sha256, settings.ensemble]
    weights = settings.weights
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in (record.bytes, song.bytes, song.modified, song.changed))
        and isinstance(weights, Mapping)
        and all(isinstance(value, str) or value is None for value in weights.values())
    )


def _records_in(folder: Path, ending: str) -> Iterator[Path]:
    return _entries(folder / FOLDER, lambda name: name.endswith(ending))


def _partials(folder: Path, names: Collection[str]) -> Iterator[Path]:
    def is_partial(name: str) -> bool:
        return name.startswith(".") and name.endswith(files.PARTIAL)

    for place in (folder, folder / FOLDER):
        yield from _entries(place, is_partial)
    for path in (file_path(folder, name) for name in names if "/" in name):  # among those of other songs
        others = _entries(path.parent, is_partial)
        yield from (other for other in others if files.is_partial_of(other, path))


def _entries(folder: Path, is_wanted: Callable[[str], bool]) -> Iterator[Path]:
    """The entries of a folder with such names, sorted; none if the folder does not exist."""
    try:
        names = [entry.name for entry in os.scandir(folder)]  # paths are slow to make and to compare
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from (folder / name for name in sorted(filter(is_wanted, names)))
