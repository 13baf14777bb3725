"""Stems at a URL: they are made in a local folder and uploaded whole, their records last.

The local folder mirrors what is known about the URL: it has the records, and an empty file of the right size
in place of every other file. So :mod:`kmdx.manifest` decides what is finished exactly as for local folders.

Object stores have no locks. An upload removes the old records, stores the stems, then the new records. A
kill leaves stems without records, which do not count as finished. Before and after the records are stored,
it looks at the folder again: if another process has stored stems or records there meanwhile, the records are
removed, and the song has failed.
"""

from __future__ import annotations

import errno
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kmdx import files, manifest, urls
from kmdx.errors import reason
from kmdx.manifest import FOLDER, Wanted
from kmdx.urls import Url, UrlError


class _Disturbed(Exception):
    """Another process stores stems in the same place."""


@dataclass(frozen=True)
class Mirror:
    """The local folder for an output URL."""

    url: Url
    folder: Path

    @classmethod
    def of(cls, url: Url) -> Mirror:
        """A new, empty mirror."""
        if url.is_web:
            raise UrlError(f"{url}: a web server does not store stems: expected a folder or an object store")
        return cls(url, Path(tempfile.mkdtemp(prefix="out-", dir=urls.scratch())))

    def named(self, text: str) -> str:
        """A message with URLs in place of paths of the mirror."""
        return text.replace(str(self.folder), str(self.url))

    def at(self, path: Path) -> Url:
        """The URL of a path of the mirror."""
        return self.url / path.relative_to(self.folder).as_posix()

    @contextmanager
    def marked(self, name: str) -> Iterator[Url]:
        """Keep an empty file at the URL meanwhile.

        Raises :class:`UrlError` if nothing can be stored there.
        """
        mark = self.url / name
        path = self.folder / name
        path.touch()
        try:
            urls.store(path, mark)
        except UrlError as error:
            raise UrlError(str(error).replace(str(mark), str(self.url))) from error
        try:
            yield mark
        finally:
            path.unlink(missing_ok=True)
            with suppress(UrlError):
                urls.remove([mark])

    def pull(self, place: str | None = None) -> None:
        """Mirror a song's folder, or everything; raises :class:`UrlError`."""
        folder = self.folder / (place or "")
        found = {
            name: url
            for name, url in urls.below(self.at(folder)).items()
            if _is_usable(name) and (place is None or _is_in_song_folder(name))
        }
        if place is not None:
            for path in (*folder.glob("*"), *(folder / FOLDER).glob(".*.json")):
                if path.is_file():
                    path.unlink()
        records = {url: name for name, url in found.items() if _is_record(name)}
        for name, url in found.items():
            if url not in records and FOLDER not in PurePosixPath(name).parts:
                self._put(folder / name, b"", max(0, url.facts.size if url.facts else 0))
        for url, content in urls.read_small([*records]):
            self._put(folder / records[url], content, len(content))

    @contextmanager
    def uploading(self, wanted: Wanted) -> Iterator[None]:
        """Upload the stems that the block writes into a song's folder, which has just been pulled.

        A file that is in their place without a record is kept as a backup, as in a local folder.

        Raises
        ------
        UrlError
            If they cannot be stored, or another process has stored others.
        """
        unknown = manifest.status(wanted, lambda _: True).unknown
        for path in wanted.paths.values():
            if path.name in unknown:
                urls.fetch(self.at(path), path)
            else:
                path.unlink(missing_ok=True)
        before = {path for path in wanted.folder.glob("*") if path.name not in unknown}
        yield
        stems = [path for path in wanted.paths.values() if path.is_file()]
        backups = {path for path in wanted.folder.glob("*") if path.is_file()}.difference(before, stems)
        records = [path.parent / FOLDER / manifest.record_name(path.name) for path in stems]
        try:
            urls.remove([self.at(path) for path in records])
            for path in backups:
                urls.store(path, self.at(path))
            stored = {}
            for path in stems:
                urls.store(path, self.at(path))
                stored[path.name] = self._facts(wanted.folder).get(path.name)
            names = {f"{FOLDER}/{path.name}" for path in records}
            _check_alone(self._facts(wanted.folder), stored, names)
            for path in records:
                urls.store(path, self.at(path))
            _check_alone(self._facts(wanted.folder), stored, set())
        except _Disturbed as error:
            urls.remove([self.at(path) for path in records])
            raise UrlError(
                f"{self.at(wanted.folder)}: meanwhile, another process stored other stems there; "
                "run the command again"
            ) from error
        finally:
            for path in (*backups, *stems):
                path.unlink(missing_ok=True)

    def _put(self, path: Path, content: bytes, size: int) -> None:
        """Write a file of this size, unless its name cannot be that of a stem or record of ours."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content)
                file.truncate(size)
        except OSError as error:
            if error.errno not in (
                errno.ENAMETOOLONG,
                errno.EEXIST,
                errno.ENOTDIR,
                errno.EISDIR,
                errno.EFBIG,
            ):
                raise UrlError(f"{self.at(path)}: cannot be mirrored at {path}: {reason(error)}") from error

    def _facts(self, folder: Path) -> Mapping[str, urls.Facts | None]:
        return {name: url.facts for name, url in urls.below(self.at(folder)).items()}


def _check_alone(
    found: Mapping[str, urls.Facts | None], stored: Mapping[str, urls.Facts | None], absent: Collection[str]
) -> None:
    """Raise _Disturbed unless files are as they were stored, and others do not exist."""
    if any(found.get(name) != facts for name, facts in stored.items()) or found.keys() & {*absent}:
        raise _Disturbed


def opened(output: str | Path) -> tuple[Path, Mirror | None]:
    """The local folder for an output, and its mirror if it is a URL that can be listed and written.

    Raises :class:`UrlError` if it cannot.
    """
    target = urls.parse(str(output))
    if isinstance(target, Path):
        return target, None
    mirror = Mirror.of(target)
    with mirror.marked(f".kmdx.{secrets.token_hex(4)}{files.PARTIAL}"):
        mirror.pull()
    return mirror.folder, mirror


def _is_usable(name: str) -> bool:
    """Whether a name in an object store, which may be any text, is a path below a folder."""
    parts = name.split("/")
    return not {"", ".", ".."} & {*parts} and not {"\0", "\\"} & {*name}


def _is_record(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parent.name == FOLDER and path.name.startswith(".") and path.suffix == ".json"


def _is_in_song_folder(name: str) -> bool:
    """Whether a file belongs to a song's folder itself, not to the folder of a song below it."""
    return len(PurePosixPath(name.removeprefix(f"{FOLDER}/")).parts) == 1
