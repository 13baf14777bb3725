"""One URL to one file: resumed, shown, checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from kmdx.weights.checksum import file_sha256

Progress = Callable[[int, "int | None"], None]
"""Called with the bytes that are there and the bytes there will be, None where nobody says."""

TIMEOUT = (10, 60)  # seconds to connect, seconds between bytes
RETRIES = 3


class SourceError(Exception):
    """Why one source could not deliver, in one line."""


def download(
    url: str,
    path: Path,
    progress: Progress,
    *,
    bytes: int | None = None,
    sha256: str | None = None,
) -> str:
    """Download a URL to a file, going on where an earlier attempt was cut off.

    A file with the wrong checksum is deleted.

    Returns
    -------
    str
        The file's sha256.

    Raises
    ------
    SourceError
        If the disk is full or the checksum is wrong; the network's own errors pass through.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_space(path, bytes)
    _resume(url, path, progress)
    actual = file_sha256(path)
    if sha256 and actual != sha256:
        path.unlink()
        raise SourceError(f"wrong content: sha256 {actual[:8]}… instead of {sha256[:8]}…")
    return actual


def reason(error: Exception) -> str:
    """An error of any of the network libraries in one line."""
    cause: BaseException | None = error
    while cause:
        if short := _short_reason(cause):
            return short
        cause = cause.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:199]}…"


def _short_reason(error: BaseException) -> str | None:
    """What the usual errors come to, told by their form: each library has its own classes."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status:
        return f"HTTP {status}"
    if "Timeout" in type(error).__name__:
        return "no answer in time"
    if "Connect" in type(error).__name__:
        return "no connection"
    return None


def _resume(url: str, path: Path, progress: Progress) -> None:
    from gdown.exceptions import DownloadError, FileURLRetrievalError

    before = _partial_bytes(path)
    try:
        _get(url, path, progress)
    except FileURLRetrievalError:
        raise
    except DownloadError as error:
        if error.__cause__ or not before or _partial_bytes(path) != before:
            raise
        for partial in _partials(path):  # the server does not go on from here: start anew
            partial.unlink()
        _get(url, path, progress)


def _get(url: str, path: Path, progress: Progress) -> None:
    import gdown

    gdown.download(
        url=url,
        output=str(path),
        quiet=True,
        resume=True,
        use_cookies=False,
        progress=progress,
        timeout=TIMEOUT,
        retries=RETRIES,
    )


def _partials(path: Path) -> list[Path]:
    """What gdown has of a file so far: it adds eight characters and ``.part`` to the name."""
    return list(path.parent.glob(f"{path.name}{'?' * 8}.part"))


def _partial_bytes(path: Path) -> int:
    return sum(partial.stat().st_size for partial in _partials(path))


def _check_space(path: Path, bytes: int | None) -> None:
    free = shutil.disk_usage(path.parent).free
    needed = (bytes or 0) - _partial_bytes(path)
    if needed > free:
        raise SourceError(f"needs {needed / 1e6:.0f} MB, {path.parent} has {free / 1e6:.0f} MB free")
