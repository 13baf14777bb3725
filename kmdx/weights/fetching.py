"""What each kind of source delivers: the Hugging Face hub, a plain URL, the author's Drive folder, npm."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Generator, Mapping
from pathlib import Path, PurePath
from typing import Any

from kmdx.weights import npm
from kmdx.weights.download import (
    Fetched,
    Progress,
    SourceError,
    WebPage,
    check_redirect,
    download,
    head,
    in_time,
    one_line,
)
from kmdx.weights.loading import load
from kmdx.weights.registry import DownloadSource, DriveSource, HttpSource, HubSource, NpmSource, Weight

DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="


def fetch(weight: Weight, source: DownloadSource, workspace: Path, progress: Progress) -> Fetched:
    """Get a weight's file from a source into the workspace, checked.

    Where nobody states a checksum, the file is read from end to end: that is the only check there is.

    Raises
    ------
    SourceError
        If the source cannot deliver.
    WeightsError
        If what it delivered is no weight file.
    """
    fetched = _FETCH[type(source)](weight, source, workspace, progress)
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
        source.url,
        path,
        progress,
        bytes=source.bytes,
        sha256=source.sha256,
        largest=weight.largest,
    )
    return Fetched(path, sha256, known=source.sha256 is not None)


def _from_hub(weight: Weight, source: HubSource, workspace: Path, progress: Progress) -> Fetched:
    """Check against the registry's checksum or else the hub's; ``HF_ENDPOINT`` and ``HF_TOKEN`` apply."""
    from huggingface_hub import constants, get_token, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        raise SourceError("HF_HUB_OFFLINE is set")
    url = hf_hub_url(source.repository, source.file, revision=source.revision)
    # Not the client's own function for headers: it may ask the hub for something first, without our limits.
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    size, sha256 = source.bytes, source.sha256
    if sha256 is None:
        stated = head(url, headers)
        tag = stated.get("X-Linked-ETag") or stated.get("ETag", "")
        length = stated.get("X-Linked-Size") or stated.get("Content-Length", "")
        if re.fullmatch(r'"?[0-9a-f]{64}"?', tag):  # a small file has another kind of tag
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


def _from_drive(weight: Weight, source: DriveSource, workspace: Path, progress: Progress) -> Fetched:
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.exceptions import FileURLRetrievalError

    path = workspace / Path(source.file).name
    url = DRIVE + _drive_id(source)
    try:
        sha256 = download(url, path, progress, largest=weight.largest)
    except WebPage as page:  # that asks whether to download what was not scanned, or says why it cannot be
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
    """The folder's files with their identifiers; asked for once in a process."""
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


_FETCH: Mapping[type[DownloadSource], Callable[..., Fetched]] = {
    HubSource: _from_hub,
    HttpSource: _from_http,
    DriveSource: _from_drive,
    NpmSource: npm.fetch,
}
