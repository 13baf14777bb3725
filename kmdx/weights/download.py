"""Downloads of one URL to one checked file, resumable and limited in size, time and redirects.

A server is not trusted: it may send too much, too slowly, endlessly, or something other than the file.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

from kmdx import files
from kmdx.weights.registry import LARGEST

if TYPE_CHECKING:
    from requests import Response, Session

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes so far and the bytes in total, None if that is unknown."""

T = TypeVar("T")

_clock = time.monotonic
_BLOCK = 1 << 16  # bytes per read
_PAGE = 1 << 16  # bytes of a web page to examine
_HTML = re.compile(rb"\s*(<!doctype\s+html|<html|<head)", re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True)
class DownloadLimits:
    """Limits of a download; times are in seconds."""

    connect: float = 10  # until a server accepts the connection
    answer: float = 60  # until the response begins, including redirects
    silence: float = 30  # without a byte
    window: float = 60  # of waiting, over which the rate is averaged
    slowest: float = 1000  # minimum of bytes per second, on average over each window
    redirects: int = 10
    retries: int = 3  # new connections after a broken one
    pause: float = 1  # before the first retry, doubled before each further one


LIMITS = DownloadLimits()


class Fetched(NamedTuple):
    """A file that is ready to be moved into place, and whether its content is verified."""

    path: Path
    sha256: str
    known: bool


class SourceError(Exception):
    """Why one source could not deliver, in one line."""


class Unreachable(SourceError):
    """A server that cannot be connected to."""

    def __init__(self, host: str, why: str) -> None:
        super().__init__(f"no connection to {host} ({why})")
        self.host = host


class WebPage(SourceError):
    """A web page instead of the file; ``text`` is its beginning."""

    def __init__(self, host: str, page: bytes) -> None:
        self.text = page.decode("utf-8", "replace")
        title = _TITLE.search(self.text)
        named = f" ({one_line(title[1], 60)!r})" if title and title[1].strip() else ""
        super().__init__(
            f"{host} sent a web page{named} instead of the file: an error page, or the network's login page"
        )


class _Broken(SourceError):
    """A broken connection; another attempt may resume the download."""


class _Silent(_Broken):
    """A server that stopped sending; worth another attempt only if something has arrived."""


class _Request(NamedTuple):
    """A request and its limits."""

    url: str
    headers: Mapping[str, str]
    limits: DownloadLimits
    bytes: int | None = None
    largest: int = LARGEST

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or self.url


def download(
    url: str,
    path: Path,
    progress: Progress,
    *,
    bytes: int | None = None,
    sha256: str | None = None,
    largest: int = LARGEST,
    headers: Mapping[str, str] | None = None,
    limits: DownloadLimits | None = None,
) -> str:
    """Download a URL to a file, resuming an earlier attempt that was interrupted.

    An incomplete download is kept as ``<name>.part`` next to ``path``, which appears only when complete.
    Raises :class:`SourceError` if the published file cannot be downloaded; the message is the reason, in one
    line.

    Parameters
    ----------
    bytes : int, optional
        The published size; no other size is accepted.
    sha256 : str, optional
        The published checksum.
    largest : int
        The maximum number of bytes if no size is published.
    headers : mapping, optional
        Sent with the request; ``Authorization`` is never sent to another host.
    limits : DownloadLimits, optional
        By default ``LIMITS``.

    Returns
    -------
    str
        The file's sha256.
    """
    request = _Request(url, headers or {}, limits or LIMITS, bytes, largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(path)
    resumed = part.resumable(bytes, sha256)
    _check_space(part, bytes)
    _download(request, part, progress)
    actual = files.sha256(part.file)
    if sha256 and actual != sha256 and resumed:  # perhaps only the part of an earlier attempt is wrong
        part.remove()
        _download(request, part, progress)
        actual = files.sha256(part.file)
    if sha256 and actual != sha256:
        part.remove()
        raise SourceError(f"wrong content: sha256 {actual[:8]}… instead of {sha256[:8]}…")
    part.finish(path)
    return actual


def head(url: str, headers: Mapping[str, str], limits: DownloadLimits | None = None) -> Mapping[str, str]:
    """Return the headers of a file without the file; redirects are followed only within the host.

    Raises :class:`SourceError` if the server does not respond, or responds with an error.
    """
    request = _Request(url, headers, limits or LIMITS)
    with contextlib.closing(in_time(_exchange(request, "HEAD"), request.host, request.limits)) as steps:
        response: Response = next(steps)
        if response.status_code >= 400:
            raise SourceError(_status(response))
        return response.headers


def in_time(
    steps: Generator[T, None, None], host: str, limits: DownloadLimits | None = None
) -> Generator[T, None, None]:
    """Yield the steps of a generator, which runs in its own thread so that no step can last forever.

    The first step may take ``limits.answer`` seconds, each other step ``limits.silence``. Socket timeouts
    alone do not ensure this: they start again with each byte, and name resolution has none. Raises
    :class:`SourceError` if a step takes longer, or the network fails; other errors pass through.
    """
    import threading
    from queue import Empty, SimpleQueue

    limits = limits or LIMITS
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def work() -> None:
        with contextlib.closing(steps):
            while wanted.get():
                try:
                    made.put((next(steps), None))
                except BaseException as error:  # raised in the thread that requested the step
                    made.put((None, error))

    threading.Thread(target=work, daemon=True, name=f"download from {host}").start()
    seconds = limits.answer
    try:
        while True:
            wanted.put(True)
            try:
                step, error = made.get(timeout=seconds)
            except Empty:
                raise _Silent(f"{host} sent nothing for {seconds:g} s") from None
            if isinstance(error, StopIteration):
                return
            if error:
                raise _network_error(error, host, limits) from error
            yield step
            seconds = limits.silence
    finally:
        wanted.put(False)


def _network_error(error: BaseException, host: str, limits: DownloadLimits) -> BaseException:
    """Convert errors of the network libraries to a :class:`SourceError`; return others unchanged."""
    from requests import exceptions as of_requests
    from urllib3 import exceptions as of_urllib3

    cause = getattr(error.args[0] if error.args else None, "reason", None)
    if isinstance(error, of_requests.ProxyError):
        return Unreachable(f"{host} through the proxy", _innermost(error))
    if isinstance(error, of_requests.SSLError):
        return SourceError(f"no secure connection to {host}: {_innermost(error)}")
    if isinstance(error, of_requests.ConnectTimeout):
        return Unreachable(host, f"no answer within {limits.connect:g} s")
    if isinstance(error, of_requests.ReadTimeout | of_urllib3.ReadTimeoutError):
        return _Silent(f"{host} sent nothing for {limits.silence:g} s")
    if isinstance(cause, of_urllib3.NameResolutionError):
        return Unreachable(host, "its name was not found")
    if isinstance(cause, of_urllib3.NewConnectionError):
        return Unreachable(host, _innermost(cause))
    if isinstance(
        error,
        of_requests.ConnectionError | of_urllib3.ProtocolError | of_urllib3.SSLError | ConnectionError,
    ):
        return _Broken(f"the connection to {host} broke ({_innermost(error)})")
    if isinstance(error, of_requests.RequestException | of_urllib3.HTTPError):
        return SourceError(one_line(f"{host}: {error}"))
    return error


def one_line(text: object, most: int = 200) -> str:
    """Return a text as one line of at most ``most`` printable characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def check_redirect(url: str, target: str) -> None:
    """Refuse redirects to other protocols than http and https, and from https to http.

    Raises
    ------
    SourceError
    """
    host, old, new = urlsplit(url).hostname, urlsplit(url).scheme, urlsplit(target).scheme
    if new not in ("http", "https"):
        raise SourceError(
            f"{host} redirects to a {one_line(new, 20) or 'malformed'} address, which is refused"
        )
    if (old, new) == ("https", "http"):
        raise SourceError(f"{host} redirects from https to http, which is refused")


class _Part:
    """The part of a file that has arrived, and the version that the server stated for it."""

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f"{path.name}.part")
        self._version = path.with_name(f"{path.name}.version")

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    @property
    def version(self) -> str | None:
        """The ETag or date to resume by."""
        try:
            return self._version.read_text("ascii") or None
        except (OSError, UnicodeDecodeError):
            return None

    def resumable(self, bytes: int | None, sha256: str | None) -> bool:
        """Whether to resume; without a checksum only if the server can confirm that it is the same file."""
        if self.size and self.size <= (bytes or self.size) and (sha256 or self.version):
            return True
        self.remove()
        return False

    def begin(self, response: Response) -> None:
        """Start at the first byte of the version in the response."""
        self.remove()
        tag = response.headers.get("ETag", "")
        version = response.headers.get("Last-Modified", "") if tag.startswith("W/") or not tag else tag
        if version.isascii() and version.isprintable():
            self._version.write_text(version, "ascii")

    def finish(self, path: Path) -> None:
        files.commit(self.file, path)
        self._version.unlink(missing_ok=True)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _download(request: _Request, part: _Part, progress: Progress) -> None:
    """Complete the part, reconnecting after a broken connection."""
    limits = request.limits
    for retry in range(limits.retries + 1):
        before = part.size
        try:
            while not _attempt(request, part, progress):
                part.remove()  # the server cannot resume: start at the first byte
            return
        except _Broken as error:
            if retry == limits.retries or (isinstance(error, _Silent) and part.size <= before):
                raise
            time.sleep(limits.pause * 2**retry)


def _attempt(request: _Request, part: _Part, progress: Progress) -> bool:
    """Make one request; returns False if the server does not resume at the end of the part."""
    start = part.size
    if start == request.bytes:
        return True
    headers = {"Accept-Encoding": "identity", **request.headers}
    if start:
        headers["Range"] = f"bytes={start}-"
        if part.version:
            headers["If-Range"] = part.version
    steps = in_time(_exchange(request._replace(headers=headers), "GET"), request.host, request.limits)
    response: Any = None
    try:
        response = next(steps)
        if start and response.status_code in (206, 416) and not _resumes(response, start, request.bytes):
            return False
        if response.status_code not in ((200, 203, 206) if start else (200, 203)):
            raise SourceError(_status(response))
        if response.status_code != 206:
            start = 0
        pieces = _paced(steps, request)
        first = _first_piece(response, pieces)
        total = _total(response, start, request)
        if not start:
            part.begin(response)
        _check_space(part, total)
        _write(part, itertools.chain([first], pieces), total, request, progress)
    finally:
        steps.close()
        if response is not None:  # wakes the thread if it waits for data
            with contextlib.suppress(Exception):
                response.raw.shutdown()
    return True


def _paced(steps: Iterator[Any], request: _Request) -> Iterator[bytes]:
    """The pieces of a body, as long as they arrive fast enough; only the time spent waiting counts."""
    limits = request.limits
    waited, came = 0.0, 0
    while True:
        before = _clock()
        piece = next(steps, b"")
        waited += _clock() - before
        if not piece:
            return
        came += len(piece)
        if waited >= limits.window:
            if came < limits.slowest * waited:
                raise SourceError(
                    f"too slow: {request.host} sent {came:,} bytes in {waited:.0f} s; "
                    f"the minimum is {limits.slowest:g} bytes per second"
                )
            waited, came = 0.0, 0
        yield piece


def _write(
    part: _Part, pieces: Iterable[bytes], total: int | None, request: _Request, progress: Progress
) -> None:
    """Append a body to the part, up to the allowed size of the file."""
    done, most = part.size, total or request.largest
    with part.file.open("ab") as file:
        try:
            for piece in pieces:
                done += len(piece)
                if done > most:
                    break
                file.write(piece)
                progress(done, total)
        except _Broken as error:
            raise type(error)(f"incomplete, received {_of(done, total)} bytes: {error}") from error
        file.flush()
        os.fsync(file.fileno())
    if done > most:
        part.remove()
        raise SourceError(f"{request.host} sends more than the expected {most:,} bytes: gave up")
    if not done:
        raise SourceError(f"{request.host} sent an empty file")
    if total and done < total:
        raise _Broken(f"incomplete, received {_of(done, total)} bytes: {request.host} closed the connection")


def _of(done: int, total: int | None) -> str:
    return f"{done:,} of {total:,}" if total else f"{done:,}"


def _exchange(request: _Request, method: str) -> Generator[Any, None, None]:
    """Yield the response, then its body piece by piece as it was sent, without decompression."""
    import requests

    with requests.Session() as session, contextlib.closing(_open(session, request, method)) as response:
        yield response
        while piece := response.raw.read1(_BLOCK, decode_content=False):
            yield piece


def _open(session: Session, request: _Request, method: str) -> Response:
    """The response to a request, after redirects."""
    url, headers = request.url, dict(request.headers)
    visited = [url]
    while True:
        try:
            response = session.request(
                method,
                url,
                headers=headers,
                stream=True,
                allow_redirects=False,
                timeout=(request.limits.connect, request.limits.silence),
                auth=lambda prepared: prepared,  # nothing from ~/.netrc
            )
            target = session.get_redirect_target(response)
            if target is None:
                return response
            target = urljoin(url, target)
            check_redirect(url, target)
            leaves = urlsplit(target).netloc != urlsplit(url).netloc
        except ValueError as error:  # in this address or in the target of its redirect
            raise SourceError(
                f"malformed address or response of {one_line(url, 80)}: {one_line(error, 100)}"
            ) from error
        if leaves and method == "HEAD":
            return response
        session.close()  # keeps cookies, but not a connection that the server may be closing
        if leaves:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        url = target
        visited.append(url)
        if len(visited) > request.limits.redirects + 1:
            raise SourceError(_astray(visited))


def _astray(visited: list[str]) -> str:
    """The problem with a long chain of redirects."""
    places = [url.partition("?")[0] for url in visited]
    host = urlsplit(visited[0]).hostname
    if len(set(places)) < len(places):
        return f"a redirect loop: {host} leads back to where it began ({len(visited) - 1} redirects followed)"
    return f"too many redirects: {host} leads from one address to the next ({len(visited) - 1} followed)"


def _resumes(response: Response, start: int, bytes: int | None) -> bool:
    """Whether a response contains everything from ``start`` on."""
    stated = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code != 206 or not stated or int(stated[1]) != start:
        return False
    total = int(stated[2]) + 1 if stated[3] == "*" else int(stated[3])
    return int(stated[2]) == total - 1 and (bytes is None or total == bytes)


def _first_piece(response: Response, pieces: Iterator[bytes]) -> bytes:
    """The first bytes of the body if it is neither compressed nor a web page."""
    host = urlsplit(response.url).hostname or response.url
    packed = response.headers.get("Content-Encoding", "").strip().lower()
    if packed not in ("", "identity"):
        raise SourceError(
            f"{host} sent compressed content ({one_line(packed, 20)}), not the plain bytes requested"
        )
    first = next(pieces, b"")
    kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml") or _HTML.match(first):
        page = first
        while len(page) < _PAGE and (piece := next(pieces, b"")):
            page += piece
        raise WebPage(host, page)
    return first


def _total(response: Response, start: int, request: _Request) -> int | None:
    """The published size of the whole file or else the announced one; None if neither is known."""
    host = urlsplit(response.url).hostname
    stated = response.headers.get("Content-Length", "")
    countable = stated.isdecimal() and len(stated) < 20 and "Transfer-Encoding" not in response.headers
    announced = start + int(stated) if countable else None
    if request.bytes and announced not in (None, request.bytes):
        raise SourceError(
            f"{host} has a file of {announced:,} bytes instead of the published {request.bytes:,}"
        )
    if announced and not request.bytes and announced > request.largest:
        raise SourceError(
            f"{host} has a file of {announced:,} bytes; at most {request.largest:,} are accepted"
        )
    return request.bytes or announced


def _check_space(part: _Part, total: int | None) -> None:
    free = shutil.disk_usage(part.file.parent).free
    needed = (total or 0) - part.size
    if needed > free:
        raise SourceError(
            f"needs {needed / 1e6:.0f} MB, but {part.file.parent} has only {free / 1e6:.0f} MB free"
        )


def _status(response: Response) -> str:
    return one_line(
        f"{urlsplit(response.url).hostname}: HTTP {response.status_code} {response.reason or ''}", 80
    )


def _innermost(error: BaseException) -> str:
    """The message of the innermost error, which is the most specific."""
    while True:
        below = [getattr(error, "reason", None), getattr(error, "original_error", None), *error.args]
        deeper = next((e for e in below if isinstance(e, BaseException)), error.__cause__)
        if deeper is None:
            return one_line(getattr(error, "strerror", None) or error, 100) or type(error).__name__
        error = deeper
