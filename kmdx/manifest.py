"""Which stems are finished, and what each was made with.

Next to the stems of a song is a hidden folder, ``.kmdx``, with one JSON record for each stem file: its size
and checksum, the song it was made from, and every setting that changes its sound. A stem counts as finished
only if its size is that of its record.

Writing goes through these steps, so that a kill at any moment leaves the old finished stem, the new one, or
none that counts as finished:

1. each stem is written under a hidden name, ``.<file>.<random>.partial``;
2. its record is written as ``.kmdx/.<file>.json.new``;
3. the stem gets its own name, which replaces an older one in one step;
4. its record does, too.

Where a kill left a ``.json.new``, the stem's checksum shows which of the two records is its own. One process
at a time writes to a folder: it holds the lock ``.kmdx/lock``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

from kmdx import documents, files
from kmdx.errors import AudioError, DocumentError, KmdxWarning

FOLDER = ".kmdx"
_RECORD, _NEW = ".json", ".json.new"  # behind a dot and the file's name: `**/vocals.*` finds the stem alone
_PATIENCE = 120.0  # seconds that another process may hold a folder
_REPORTED = 1.0  # after which the wait is reported


@dataclass(frozen=True)
class SourceFile:
    """The file that a song was read from: where it was, its size, two times in ns, and its checksum.

    Programs may set ``modified``, also to the same in two songs; ``changed`` is the system's own.
    """

    path: str
    bytes: int
    modified: int
    sha256: str
    changed: int = 0

    def is_content_of(self, path: Path) -> bool:
        """Whether a file has this content: by its checksum, unless it is the very file, left as it was."""
        stat = path.stat()
        if stat.st_size != self.bytes:
            return False
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        untouched = self.is_at(path) and times == (self.modified, self.changed)
        return untouched or files.sha256(path) == self.sha256

    def is_at(self, path: Path) -> bool:
        """Whether this is where a file is, whatever its content."""
        return self.path == str(path.resolve())


@dataclass(frozen=True)
class StemSettings:
    """Everything besides the song that changes how a stem sounds, or the file that it is in.

    Attributes
    ----------
    ensemble : str
        The plan's name; for messages only.
    plan : str
        Checksum of the part of the plan that the stem needs.
    weights : mapping of str to (str or None)
        Checksum of each weight file that it needs; None where the file is missing, which equals anything.
    precision, engine, speed : str
        What the networks compute in, by which implementation, and how much they overlap.
    start : float
        Where the part of the song begins, in seconds.
    duration : float or None
        How long that part is; None for all that follows.
    downmix : bool
    format : str
        A name in :data:`kmdx.audio.FORMATS`.
    """

    ensemble: str
    plan: str
    weights: Mapping[str, str | None]
    precision: str
    engine: str
    speed: str
    start: float
    duration: float | None
    downmix: bool
    format: str

    def difference(self, other: StemSettings, ignored: Collection[str] = ()) -> str | None:
        """In what another's differ from these, such as ``speed fast, not balanced``; None if in nothing."""
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
    """What is known of one stem file.

    Attributes
    ----------
    file, stem : str
        The file's name, and the stem in it.
    bytes : int
    sha256 : str
        Of the file's content.
    song : SourceFile
    settings : StemSettings
    program : str
        Which version wrote it.
    """

    file: str
    stem: str
    bytes: int
    sha256: str
    song: SourceFile
    settings: StemSettings
    program: str

    def difference(
        self, song: Path, wanted: StemSettings | None, ignored: Collection[str] = ()
    ) -> str | None:
        """Why the file is not what would be made of a song now; None if it is."""
        if wanted is None:
            return f"ensemble {self.settings.ensemble}, which has a stem {self.stem}"
        if not self.song.is_content_of(song):
            return "another file, or an older version of this one"
        return wanted.difference(self.settings, ignored)


@dataclass(frozen=True)
class Wanted:
    """The stems of one song that are to be made.

    Attributes
    ----------
    song : Path
    folder : Path
        Where its stems go.
    files : mapping of str to str
        Name of the file of each stem that is wanted.
    settings : callable
        What a stem would be made with now, by its name; None for one that the plan has not.
    overwrite : bool
        Whether finished stems are made again, and those of other settings are replaced.
    """

    song: Path
    folder: Path
    files: Mapping[str, str]
    settings: Callable[[str], StemSettings | None]
    overwrite: bool = False

    def only(self, stems: Collection[str]) -> Wanted:
        """Some of these stems."""
        return replace(self, files={stem: self.files[stem] for stem in stems})

    @property
    def paths(self) -> dict[str, Path]:
        """Path of each stem's file."""
        return {stem: self.folder / name for stem, name in self.files.items()}


@dataclass(frozen=True)
class FolderStatus:
    """What is in a song's folder already.

    Attributes
    ----------
    missing : list of str
        Stems that are wanted and not finished with these settings; all of them to overwrite.
    conflicts : list of str
        Files that were made with other settings and prevent the work, with what differs.
    stale : list of str
        Files next to the wanted ones that were made with other settings, or have no record.
    unknown : list of str
        Files in the place of wanted ones that are not what a record describes.
    """

    missing: list[str]
    conflicts: list[str]
    stale: list[str]
    unknown: list[str]


def identify(song: Path) -> SourceFile:
    """Return what a song's file is now; raises :class:`OSError` if it cannot be read."""
    stat = song.stat()
    return SourceFile(
        str(song.resolve()), stat.st_size, stat.st_mtime_ns, files.sha256(song), stat.st_ctime_ns
    )


def owner(folder: Path) -> SourceFile | None:
    """Return the song whose stems are in a folder, by their records; None where there are none."""
    return next((record.song for record in _records(folder).values()), None)


def recorded(folder: Path) -> set[str]:
    """Names of the files in a folder that have a record: they are stems, not songs."""
    return {*_records(folder)}


def status(wanted: Wanted, is_sound: Callable[[str], bool]) -> FolderStatus:
    """Compare the files in a song's folder with what is wanted.

    Parameters
    ----------
    wanted : Wanted
    is_sound : callable
        Whether a file's ending is one that stems have.

    Raises
    ------
    OSError
        If the folder or the song cannot be read.
    """
    records = _records(wanted.folder)
    finished = {name for name, record in records.items() if _has_size(wanted.folder, record)}
    targets = set(wanted.files.values())
    differing = {}
    for name, record in records.items():
        ignored = () if name in targets else ("format",)
        difference = record.difference(wanted.song, wanted.settings(record.stem), ignored)
        if difference is not None:
            differing[name] = f"{name}: {difference}"
    missing = [
        stem
        for stem, name in wanted.files.items()
        if wanted.overwrite or name not in finished or name in differing
    ]
    conflicts = [] if wanted.overwrite or not missing else [*differing.values()]
    stale = [] if conflicts else [text for name, text in differing.items() if name not in targets]
    there = sorted(path.name for path in _entries(wanted.folder) if is_sound(path.name) and path.is_file())
    stale += [
        f"{name}: no record of how it was made"
        for name in there
        if not (name in records or name in targets) and wanted.settings(Path(name).stem) is not None
    ]
    unknown = [name for name in there if name in targets and name not in finished]
    return FolderStatus(missing, conflicts, stale, [] if conflicts else unknown)


def clean(folder: Path) -> None:
    """Remove what an interrupted run left in a folder, unless another process is writing there now."""
    if not any(_partials(folder)) and not any(_records_in(folder, _NEW)):
        return
    with suppress(OSError, filelock.Timeout), _lock(folder, 0):
        _recover(folder)


@contextmanager
def writing(wanted: Wanted, song: SourceFile) -> Iterator[Callable[[Mapping[Path, Path]], None]]:
    """Hold a song's folder while its stems are written.

    Yields what to call when all of them are complete under their hidden names, before they get their own:
    with the hidden name of each path. It writes their records.

    Raises
    ------
    AudioError
        If the folder cannot be made or locked, or has stems of other settings by now.
    """

    def prepare(partials: Mapping[Path, Path]) -> None:
        for stem, name in wanted.files.items():
            partial = partials[wanted.folder / name]
            settings = wanted.settings(stem)
            assert settings is not None, "what is written is what the plan has"
            record = StemRecord(
                file=name,
                stem=stem,
                bytes=partial.stat().st_size,
                sha256=files.sha256(partial),
                song=song,
                settings=settings,
                program=f"kmdx-net {version('kmdx-net')}",
            )
            _keep_unknown(wanted.folder / name, partial)
            _write_new(wanted.folder, record)

    try:
        with _lock(wanted.folder, _PATIENCE):
            _recover(wanted.folder)
            there = owner(wanted.folder)
            if there is not None and song.path != there.path and song.sha256 != there.sha256:
                raise AudioError(
                    f"{wanted.folder}: another process put the stems of {there.path} there meanwhile; "
                    "nothing was replaced; run the command again"
                )
            if found := status(wanted, lambda _: False).conflicts:
                raise AudioError(
                    f"{wanted.folder}: another process wrote stems with different settings meanwhile"
                    f" ({'; '.join(found)}); nothing was replaced"
                )
            try:
                yield prepare
            finally:
                _recover(wanted.folder)
    except filelock.Timeout as error:
        raise AudioError(
            f"{wanted.folder}: another process has been writing there for {_PATIENCE / 60:.0f} minutes; "
            "nothing was written"
        ) from error
    except OSError as error:
        raise AudioError(f"{wanted.folder}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _lock(folder: Path, patience: float) -> Iterator[None]:
    """Be the only process that writes to a folder; leaves nothing of its own where that fails."""
    place = folder / FOLDER
    with files.folder(place):
        lock = filelock.FileLock(place / "lock")
        try:
            lock.acquire(timeout=min(patience, _REPORTED))
        except filelock.Timeout:
            if not patience:
                raise
            warnings.warn(f"waiting for another process that writes to {folder}", KmdxWarning, stacklevel=4)
            lock.acquire(timeout=patience)
        try:
            yield
        except BaseException:
            if not any(_records_in(folder, _RECORD)):
                with suppress(OSError):  # Windows keeps a file that is open
                    (place / "lock").unlink()
            raise
        finally:
            lock.release()


def _recover(folder: Path) -> None:
    """Finish or undo what an interrupted run did in a folder; the folder is locked."""
    for partial in _partials(folder):
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
    """The record of each file in a folder that has one and exists; of two, the one that its content is of."""
    found: dict[str, StemRecord] = {}
    for place in _records_in(folder, _RECORD):
        record = _read(place)
        if record is not None and (folder / record.file).is_file():
            found[record.file] = record
    for place in _records_in(folder, _NEW):
        record = _read(place)
        if record is None or not (folder / record.file).is_file():
            continue
        if _has_content(folder, record):
            found[record.file] = record
        elif record.file in found and not _has_content(folder, found[record.file]):
            del found[record.file]
    return found


def _has_size(folder: Path, record: StemRecord) -> bool:
    """Whether the file of a record is there with its size."""
    path = folder / record.file
    return path.is_file() and path.stat().st_size == record.bytes


def _has_content(folder: Path, record: StemRecord) -> bool:
    """Whether the file of a record is there with the content that the record is of."""
    return _has_size(folder, record) and files.sha256(folder / record.file) == record.sha256


def _keep_unknown(path: Path, new: Path) -> None:
    """Give a file that is not what its record describes another name, unless a new one begins with it."""
    record = _records(path.parent).get(path.name)
    is_recorded = record is not None and _has_content(path.parent, record)
    if not path.exists() or is_recorded or _begins_with(new, path):
        return
    backup = path.with_name(f"{path.name}.bak")
    number = 1
    while backup.exists():
        number += 1
        backup = path.with_name(f"{path.name}.bak{number}")
    path.rename(backup)


def _begins_with(whole: Path, part: Path) -> bool:
    """Whether a file is the beginning of another one, or equal to it."""
    with whole.open("rb") as first, part.open("rb") as second:
        while block := second.read(2**20):
            if block != first.read(len(block)):
                return False
    return True


def _write_new(folder: Path, record: StemRecord) -> None:
    """Write a record that counts from when its file has its own name."""
    text = json.dumps(asdict(record), indent=1)
    files.write_text(folder / FOLDER / f".{record.file}{_NEW}", f"{text}\n")


def _read(path: Path) -> StemRecord | None:
    """Read a record; None if the file is none, or was cut off."""
    try:
        content = documents.read_json(path)
        song, settings = SourceFile(**content["song"]), StemSettings(**content["settings"])
        record = StemRecord(**{**content, "song": song, "settings": settings})
    except (DocumentError, TypeError, KeyError):  # no JSON, or other values than a record has
        return None
    is_usable = _is_of_types(record) and path.name.startswith(f".{record.file}{_RECORD}")
    return record if is_usable else None


def _is_of_types(record: StemRecord) -> bool:
    """Whether a record's values are what they are declared to be, as far as its readers need it."""
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
    place = folder / FOLDER
    return (path for path in _entries(place) if path.name.endswith(ending))


def _partials(folder: Path) -> Iterator[Path]:
    there = (path for place in (folder, folder / FOLDER) for path in _entries(place))
    return (path for path in there if path.name.startswith(".") and path.name.endswith(files.PARTIAL))


def _entries(folder: Path) -> Iterator[Path]:
    """What is in a folder; nothing where there is no such folder."""
    try:
        yield from sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
