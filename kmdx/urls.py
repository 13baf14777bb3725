"""Files at URLs: list them, fetch one whole, store one whole.

``http://`` and ``https://`` use :mod:`kmdx.weights.download`, which limits size, time and redirects. Every
other protocol uses fsspec, which is imported only then, and whose backends find credentials in the
environment and repeat requests that fail. In both cases, a server that sends nothing is given up.

A URL is shown without user name, password and query, because they may be secret.
"""

from __future__ import annotations

import atexit
import base64
import functools
import hashlib
import os
import posixpath
import re
import socket
import tempfile
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from glob import escape, has_magic
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from kmdx import documents, file_names, files, host
from kmdx.errors import KmdxError, reason
from kmdx.weights import download

T = TypeVar("T")

UNKNOWN = -1  # the size of a file whose server does not state it
LARGEST = 2**34  # bytes of a song
BLOCK = 2**21  # bytes per request
STORED = 50_000  # bytes per second at which a file is stored, at least
LISTED = 600.0  # seconds that a listing of a million files may take
AT_ONCE = 500  # small files fetched at a time
SMALL = 2**20  # bytes of a small file
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "content_md5", "mtime", "LastModified",
             "last_modified", "created")  # fmt: skip
_PACKAGES = {"smbclient": "smbprotocol"}  # where the package's name is not the module's


class UrlError(KmdxError):
    """A file at a URL cannot be read or stored; the message names the URL and the reason."""


class Facts(NamedTuple):
    """Size of a file in bytes, and what changes with its content, such as an ETag; empty if unknown."""

    size: int = UNKNOWN
    version: str = ""


class Stat(NamedTuple):
    """The facts of a file in the form of ``os.stat``."""

    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int


@dataclass(frozen=True)
class Url:
    """A file or folder at a URL, and the facts that a listing stated."""

    text: str = field(repr=False)  # may contain secrets
    facts: Facts | None = field(default=None, compare=False)

    def __str__(self) -> str:
        start, mark, query = self.text.partition("?" if self.is_web else "\0")
        tag = f"?…{hashlib.sha256(query.encode()).hexdigest()[:8]}" if mark else ""
        return without_secrets(start) + tag

    @property
    def is_web(self) -> bool:
        """Whether it is at a web server, which has no listings and stores nothing."""
        return self.text.lower().startswith(("http://", "https://"))

    @property
    def location(self) -> PurePosixPath:
        """Its host or bucket and its path, as an absolute path."""
        _, _, rest = str(self).partition("://")
        return PurePosixPath("/", unquote(rest.partition("?")[0]) if self.is_web else rest)

    @property
    def suffix(self) -> str:
        """The extension of its name."""
        return self.location.suffix

    @property
    def parent(self) -> Url:
        """The folder that it is in."""
        path = self.text.partition("?")[0] if self.is_web else self.text
        return Url(path.rstrip("/").rpartition("/")[0])

    def __truediv__(self, relative: str) -> Url:
        """A file or folder below this one, or next to it with ``..``."""
        scheme, mark, rest = self.text.partition("://")
        below = quote(relative) if self.is_web else relative
        return Url(scheme + mark + posixpath.normpath(posixpath.join(rest, below)))

    def resolve(self) -> Url:
        """The URL itself: it has no links."""
        return self

    def absolute(self) -> Url:
        """The URL itself: it is never relative."""
        return self

    def stat(self) -> Stat:
        """What is known about the file without fetching it. A file of unknown version is always a new one."""
        facts = self.facts or (_web_facts(self.text) if self.is_web else _look(self))
        version = hashlib.sha256(facts.version.encode()).hexdigest()[:15]
        return Stat(facts.size, 0, int(version, 16) if facts.version else time.time_ns())

    def fault(self) -> str | None:
        """Why this machine cannot access it, with its name; None if it can."""
        try:
            if self.is_web:
                _web_facts(self.text, must_answer=True)
            else:
                _look(self)
        except UrlError as error:
            return str(error)
        return None


def parse(text: str) -> Path | Url:
    """The URL or the local path that a text means; a local file with the name of a URL is preferred."""
    if not _SCHEME.match(text) or os.path.exists(text):  # noqa: PTH110 (any text)
        return Path(text)
    if text.lower().startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    return Url(text)


def without_secrets(text: str) -> str:
    """A text without the user names, passwords and queries of the URLs in it."""
    text = re.sub(r"(https?://)[^/\s]*@", r"\1", text)
    text = re.sub(r"(://)[^/\s:@]*:[^/\s]*@", r"\1", text)
    return re.sub(r"(https?://[^?]*)\?\S*", r"\1?…", text)


@functools.cache
def scratch() -> Path:
    """A new folder for copies, which is removed at exit; after a kill, the next process removes it."""
    start = f"kmdx-urls-{socket.gethostname()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{escape(start)}*"):
        pid = left.name.removeprefix(start).partition(".")[0]
        if pid.isdecimal() and not host.is_running(int(pid)):
            files.remove_tree(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{start}{os.getpid()}."))
    atexit.register(files.remove_tree, folder)
    return folder


@contextmanager
def local(source: Path | Url, largest: int = LARGEST) -> Iterator[Path]:
    """A local file with the content of a source; the copy of a URL is removed afterwards."""
    if isinstance(source, Path):
        yield source
        return
    with tempfile.TemporaryDirectory(dir=scratch()) as folder:
        path = Path(folder) / file_names.portable(f"file{source.suffix}")
        fetch(source, path, largest)
        yield path


def read_text(url: Url) -> str:
    """The text of a small file; raises :class:`UrlError`, or :class:`DocumentError` if it is not a text."""
    with local(url, documents.MAX_BYTES) as path:
        return documents.read_text(path)


def fetch(url: Url, path: Path, largest: int = LARGEST) -> None:
    """Copy a file of at most ``largest`` bytes to a local path; raises :class:`UrlError`."""
    if url.is_web:
        _web_facts(url.text)  # before the content, so that a later version is never taken for it
        address, headers = _address(url.text)
        with _explained(url):
            download.download(address, path, lambda done, total: None, largest=largest, headers=headers)
        return
    system, place = _system(url)

    def steps() -> Generator[None, None, None]:
        before = _facts(system.info(place))
        if before.size > largest:
            raise UrlError(f"{url}: has {before.size:,} bytes; at most {largest:,} are accepted")
        with (
            path.open("wb") as target,
            system.open(place, "rb", block_size=BLOCK, cache_type="none") as source,
        ):
            while block := source.read(BLOCK):
                target.write(block)
                yield
        size = path.stat().st_size
        if before.size not in (UNKNOWN, size):
            raise UrlError(f"{url}: incomplete, received {size:,} of {before.size:,} bytes")
        if _facts(system.info(place)) != before:
            raise UrlError(f"{url}: changed while it was being read; run the command again")

    for _ in _in_time(url, steps()):
        pass


def store(path: Path, url: Url) -> None:
    """Copy a local file to a URL, replacing what is there; object stores do that atomically.

    Raises :class:`UrlError`.
    """
    system, place = _system(url)

    def work() -> None:
        if not system.async_impl:  # not an object store: it has folders
            system.makedirs(system._parent(place), exist_ok=True)
        system.put_file(str(path), place)

    _do(url, work, path.stat().st_size / STORED)


def remove(urls: Collection[Url]) -> None:
    """Remove files, as far as they exist; raises :class:`UrlError`."""
    for url in urls:
        system, place = _system(url)

        def work(system: Any = system, place: str = place) -> None:
            if system.exists(place):
                system.rm_file(place)

        _do(url, work)


def below(folder: Url) -> dict[str, Url]:
    """Every file below a folder, by its path relative to it; none if there is no such folder.

    Raises :class:`UrlError`.
    """
    system, place = _system(folder)

    def work() -> dict[str, Any]:
        try:
            return dict(system.find(place, detail=True))
        except FileNotFoundError:
            return {}

    start = f"{place.rstrip('/')}/"
    root = folder.text.rstrip("/")
    return {
        name.removeprefix(start): Url(f"{root}/{name.removeprefix(start)}", _facts(info))
        for name, info in _do(folder, work, LISTED).items()
        if name.startswith(start) and not name.endswith("/")
    }


def read_small(urls: Collection[Url]) -> Iterator[tuple[Url, bytes]]:
    """The contents of small files of one place, as listed; one that is missing, empty or large is left out.

    Raises :class:`UrlError`.
    """
    chosen = [url for url in urls if url.facts is not None and 0 < url.facts.size <= SMALL]
    for start in range(0, len(chosen), AT_ONCE):
        some = chosen[start : start + AT_ONCE]
        system, _ = _system(some[0])
        places = [_system(url)[1] for url in some]

        def work(system: Any = system, places: list[str] = places) -> list[bytes | Exception]:
            return list(system.cat_ranges(places, 0, SMALL))  # cat() expands patterns, and asks for each size

        for url, content in zip(some, _do(some[0], work), strict=True):
            if isinstance(content, bytes):
                yield url, content
            elif not isinstance(content, FileNotFoundError):
                with _explained(url):
                    raise content


def matches(url: Url) -> list[tuple[Url, bool]]:
    """The files and folders that a URL or a pattern names, and whether each is a folder.

    Raises :class:`UrlError`; a web page that does not exist is found only when it is fetched.
    """
    if url.is_web:
        return [(url, False)]
    system, place = _system(url)

    def work() -> list[Any]:
        try:
            return [system.info(place)]
        except FileNotFoundError:
            if not has_magic(place):
                raise
            return [info for _, info in sorted(system.glob(place, detail=True).items())]

    start = url.text.rstrip("/").removesuffix(place.rstrip("/"))
    found = _do(url, work)
    if len(found) == 1 and not has_magic(place):
        return [(replace(url, facts=_facts(found[0])), found[0]["type"] == "directory")]
    return [(Url(start + info["name"], _facts(info)), info["type"] == "directory") for info in found]


def _system(url: Url) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path in it."""
    try:
        from fsspec.core import url_to_fs

        with _explained(url):
            system, place = url_to_fs(url.text, use_listings_cache=False)
            return system, system._strip_protocol(place)
    except ImportError as error:
        name = getattr(error if error.name else error.__cause__, "name", None)
        missing = (name or "its backend").partition(".")[0]
        package = "'kmdx-net[urls]'" if missing == "fsspec" else _PACKAGES.get(missing, missing)
        raise UrlError(f"{url}: {missing} is missing; install it with: pip install {package}") from error


def _facts(info: Mapping[str, Any]) -> Facts:
    """The facts in fsspec's description of a file."""
    size = info.get("size")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), "")
    return Facts(UNKNOWN if size is None else int(size), version)


def _look(url: Url) -> Facts:
    system, place = _system(url)
    return _facts(_do(url, lambda: system.info(place)))


def _address(text: str) -> tuple[str, dict[str, str]]:
    """A web address without user name and password, and the header that states them."""
    with _explained(Url(text)):
        parts = urlsplit(text)
    login, mark, server = parts.netloc.rpartition("@")
    token = base64.b64encode(unquote(login).encode()).decode()
    return parts._replace(netloc=server).geturl(), {"Authorization": f"Basic {token}"} if mark else {}


@functools.lru_cache(maxsize=4096)
def _web_facts(text: str, must_answer: bool = False) -> Facts:
    """The facts that a web server states; many servers state none."""
    address, headers = _address(text)
    try:
        stated = download.head(address, {"Accept-Encoding": "identity", **headers})
    except download.SourceError as error:
        if must_answer and isinstance(error, download.Unreachable):
            raise UrlError(f"{Url(text)}: {error}") from error
        return Facts()
    length = stated.get("Content-Length", "")
    if "Location" in stated or not length.isdecimal():
        return Facts()
    return Facts(int(length), stated.get("ETag") or stated.get("Last-Modified", ""))


def _do(url: Url, work: Any, seconds: float = 0.0) -> Any:
    """The result of work at a URL. The work may take ``seconds`` longer than a server may take to answer."""
    return next(_in_time(url, (work() for _ in range(1)), seconds))


def _in_time(url: Url, steps: Generator[T, None, None], seconds: float = 0.0) -> Iterator[T]:
    """The steps of work at a URL, none of which may take long."""
    limits = replace(download.LIMITS, answer=download.LIMITS.answer + seconds)
    with _explained(url), closing(download.in_time(steps, "the server", limits)) as timed:
        yield from timed


@contextmanager
def _explained(url: Url) -> Iterator[None]:
    """Turn every error of a backend, each of which has its own, into one line that names the URL."""
    try:
        yield
    except (KmdxError, ImportError, GeneratorExit):
        raise
    except FileNotFoundError as error:
        raise UrlError(f"{url}: no such file, folder or bucket") from error
    except PermissionError as error:
        raise UrlError(f"{url}: access denied; check the credentials in the environment") from error
    except Exception as error:
        why = str(error) if isinstance(error, download.SourceError) else download.one_line(reason(error))
        if type(error).__module__.startswith("aiohttp."):
            why = f"the connection failed ({why})"
        raise UrlError(f"{url}: {without_secrets(why)}") from error
